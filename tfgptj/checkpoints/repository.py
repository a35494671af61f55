"""A repository of the Hugging Face Hub: which of its files a load needs, and how they come into the local cache.

The requests, the cache and their care for broken connections are the `huggingface_hub` library's own.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tfgptj.checkpoints.directory import DOCUMENTS, FORMATS, heads_of
from tfgptj.config import read_json
from tfgptj.errors import CheckpointError, ConfigError, TFGPTJError

_LOG = logging.getLogger("tfgptj")

_LISTED_FILES = 20


@dataclasses.dataclass(frozen=True)
class Repository:
    """A model repository at some revision.

    Args:
        name: its id on the Hub, owner/name.
        revision: branch, tag or commit.
        subfolder: directory below it that holds the checkpoint.
        cache_dir: where downloads are kept; None is the library's own place.
        token: Hub token, True for the stored one, None for the stored one where it is needed, False for none.
        local_files_only: take downloaded files only.
    """

    name: str
    revision: str = "main"
    subfolder: str = ""
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = dataclasses.field(default=None, repr=False)
    local_files_only: bool = False

    def fetch(self, names: Sequence[str]) -> Path:
        """Download those of some files that the repository has; without a connection, take what is in the cache.

        Returns:
            The local directory that holds them.

        Raises:
            CheckpointError: if there are none of them, or they cannot be fetched.
        """
        with hub_errors(self.name, self.revision):
            directory = self._download(names) / self.subfolder
        if not any((directory / name).is_file() for name in names):
            files, failure = self._list()
            if files is None:
                raise self._uncached(names, failure) from failure
            raise self._without(names, files)
        return directory

    def fetch_weights(self, weights: str = "auto") -> Path:
        """Download the configurations and the weights of one format; without a connection, take what is in the cache.

        Args:
            weights: a key of :data:`FORMATS`, or "auto" for the first of them that the repository has.

        Returns:
            The local directory that holds them.

        Raises:
            CheckpointError: if `weights` names no format, or there are no such weights, or they cannot be fetched.
        """
        heads = heads_of(weights)
        files, failure = self._list()
        if files is None:
            return self._cached_weights(heads, failure)
        head = next((name for name in heads if self._path(name) in files), None)
        if head is None:
            raise self._without(heads, files)
        _LOG.info("%s: its weights are in %s", self.name, self._path(head))
        with hub_errors(self.name, self.revision):
            snapshot = self._download([*DOCUMENTS, head])
        directory = snapshot / self.subfolder
        self._check_downloaded(directory, [head])
        shards = _shards(directory / head)
        lacking = [name for name in shards if self._path(name) not in files]
        if lacking:
            raise CheckpointError(f"{self.name}: {head} names shards that the repository lacks: {_listed(lacking)}")
        if shards:
            with hub_errors(self.name, self.revision):
                self._download(shards, commit=snapshot.name)  # shards of another commit must not be mixed in
            self._check_downloaded(directory, shards)
        return directory

    def _cached_weights(self, heads: Sequence[str], failure: Exception | None) -> Path:
        with hub_errors(self.name, self.revision, failure):
            directory = dataclasses.replace(self, local_files_only=True)._download(DOCUMENTS) / self.subfolder
        head = next((name for name in heads if (directory / name).is_file()), None)
        if head is None:
            raise self._uncached(heads, failure) from failure
        missing = [name for name in _shards(directory / head) if not (directory / name).is_file()]
        if missing:
            raise self._uncached(missing, failure) from failure
        _LOG.info("%s: its weights are in %s, taken from the cache", self.name, self._path(head))
        return directory

    def _path(self, name: str) -> str:
        return (PurePosixPath(self.subfolder) / name).as_posix()

    def _download(self, names: Iterable[str], commit: str | None = None) -> Path:
        """The directory of the cache that stands for a commit; its name is the commit's."""
        import huggingface_hub  # slow to import, and needed for this alone

        directory = huggingface_hub.snapshot_download(
            self.name,
            allow_patterns=[glob.escape(self._path(name)) for name in names],
            revision=commit or self.revision,
            token=self.token,
            local_files_only=self.local_files_only,
            cache_dir=None if self.cache_dir is None else os.fspath(self.cache_dir),
        )
        return Path(directory)

    def _list(self) -> tuple[frozenset[str] | None, Exception | None]:
        """The names of all files; None, with the reason, where the library would take what is in the cache."""
        if self.local_files_only:
            return None, None
        from huggingface_hub import HfApi, constants, errors

        with hub_errors(self.name, self.revision):
            try:
                # Unlike list_repo_files this does not try again for half a minute where there is no connection.
                info = HfApi(token=self.token).model_info(
                    self.name, revision=self.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
                )
            except errors.RevisionNotFoundError:
                raise
            except (errors.HTTPError, errors.OfflineModeIsEnabled) as failure:
                return None, failure
        return frozenset(file.rfilename for file in info.siblings or ()), None

    def _check_downloaded(self, directory: Path, names: Iterable[str]) -> None:
        """Where the connection has gone since the listing, the library is content with a directory that lacks files."""
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.name}: {_listed(missing)} did not arrive: the connection was lost, or revision "
                f"{self.revision!r} has just changed; try again"
            )

    def _without(self, names: Iterable[str], files: Iterable[str]) -> CheckpointError:
        place = f" in {self.subfolder!r}" if self.subfolder else ""
        found = _listed(sorted(files)) or "nothing"
        return CheckpointError(
            f"{self.name}: has at revision {self.revision!r}{place} none of {', '.join(names)}; it has {found}"
        )

    def _uncached(self, names: Sequence[str], failure: Exception | None) -> CheckpointError:
        looked_for = names[0] if len(names) == 1 else f"any of {_listed(names)}"
        reason = _why_cache(failure, self.revision)
        return CheckpointError(f"{self.name}: is in the cache only in part, without {looked_for}; {reason}")


@contextmanager
def hub_errors(repository: str, revision: str | None, failure: Exception | None = None) -> Iterator[None]:
    """Turn what the Hub library raises into a CheckpointError that says how to mend it.

    Args:
        repository: id of the repository.
        revision: what was asked for.
        failure: why only the cache is asked, if that is not the user's wish; it counts if the cache has nothing.

    Raises:
        CheckpointError: in place of the library's errors.
    """
    from huggingface_hub import errors

    try:
        yield
    except TFGPTJError:
        raise
    except errors.LocalEntryNotFoundError as error:
        cause = failure or error.__cause__
        part = (
            "is not in the cache" if type(error) is errors.LocalEntryNotFoundError else "is in the cache only in part"
        )
        reason = _why_cache(cause, revision) if _is_refusal(cause) else f"{part}; {_why_cache(cause, revision)}"
        raise CheckpointError(f"{repository}: {reason}") from error
    except (OSError, ValueError, RuntimeError, errors.HTTPError, errors.XetDownloadError) as error:
        raise CheckpointError(f"{repository}: {_reason(error, revision)}") from error


def _reason(error: BaseException, revision: str | None) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated: accept its terms on its page, and give a token"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no branch, tag or commit {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "neither a local directory nor a repository of the Hub; if it is private, give a token"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the Hub refuses this; give a token that is valid and has the permission: {_brief(error)}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"a file cannot be written or read: {error}; is there space, and permission?"
    if isinstance(error, errors.HTTPError) and not isinstance(error, OSError):
        return f"the connection to the Hub failed: {_brief(error)}; try again"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{_brief(error)} {_reason(error.__cause__, revision)}"
    # From a server that ignores ranges, or after that, release 1.0 gets too much and goes on with it for ever.
    is_stuck = "Consistency check" in str(error) or getattr(getattr(error, "response", None), "status_code", 0) == 416
    hint = "; if it fails again, remove the *.incomplete files from the cache" if is_stuck else ""
    return f"the Hub library failed: {_brief(error)}{hint}"


def _is_refusal(failure: BaseException | None) -> bool:
    """Whether the Hub has answered, and the answer was no."""
    from huggingface_hub import errors

    return isinstance(failure, errors.HfHubHTTPError) and failure.response.status_code < 500


def _why_cache(failure: BaseException | None, revision: str | None) -> str:
    if failure is None:
        return "local_files_only forbids a download"
    return _reason(failure, revision) if _is_refusal(failure) else f"the Hub cannot be reached: {_brief(failure)}"


def _shards(head: Path) -> list[str]:
    """The weight files that an index names; none for any other file. What is wrong in an index is found on loading."""
    form = next((form for form in FORMATS.values() if form.index == head.name), None)
    if form is None:
        return []
    try:
        weight_map = read_json(head).get("weight_map")
    except ConfigError:
        return []
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    return sorted(name for name in names if name.endswith(form.suffix))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name:.200}" for name in names[:_LISTED_FILES])
    return shown + (f" and {len(names) - _LISTED_FILES:,} more" if len(names) > _LISTED_FILES else "")


def _brief(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
