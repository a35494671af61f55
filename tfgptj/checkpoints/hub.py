"""Where a checkpoint is: a directory, a model that comes with the package, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tfgptj.errors import CheckpointError

PACKAGED = Path(__file__).parents[1] / "pretrained"

_HUB_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

# What to fetch from a repository for each purpose. Patterns are narrow on purpose: many repositories hold the same
# weights in several formats, 24 GB each.
_PATTERNS = {
    "config": ("config.json",),
    "generation": ("generation_config.json",),
    "tokenizer": (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "encoder.json", "merges.txt", "vocab.bpe"),
    ),
    "weights": (
        *("config.json", "generation_config.json"),
        *("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ),
}


def resolve_directory(
    name_or_path: str | os.PathLike[str],
    files: str,
    *,
    revision: str = "main",
    subfolder: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    weights: str = "auto",
) -> Path:
    """The local directory of a checkpoint; what is on the Hub is downloaded first.

    A directory that exists comes first, as in Hugging Face's libraries; then the packaged models, whose names have no
    slash; then the Hub, whose ids are of the form owner/name.

    Args:
        name_or_path: a directory, the name of a packaged model, or a Hub id.
        files: what is needed of it: "config", "generation", "tokenizer" or "weights" (these with the two JSON files).
        revision: branch, tag or commit on the Hub.
        subfolder: directory below `name_or_path`.
        cache_dir: where downloads are kept; None is the Hub library's own place.
        token: Hub token, True for the stored one, None for the stored one where it is needed, False for none.
        local_files_only: take downloaded files only.

    Returns:
        The directory, `subfolder` included.

    Raises:
        CheckpointError: if there is no such directory, packaged model or repository, or it cannot be fetched.
    """
    if files not in _PATTERNS:
        raise CheckpointError(f"files must be one of {', '.join(_PATTERNS)}; got {files!r}")
    name = os.fspath(name_or_path)
    _check_subfolder(subfolder)
    if os.path.isdir(name):
        directory = Path(name)
    elif name in packaged_models():
        directory = PACKAGED / name
    elif os.path.exists(name):
        raise CheckpointError(f"{name}: is a file; give the directory that holds it")
    elif isinstance(name_or_path, str) and _HUB_ID.fullmatch(name):
        patterns = [f"{subfolder.strip('/')}/{pattern}".lstrip("/") for pattern in _PATTERNS[files]]
        directory = _download(name, patterns, revision, cache_dir, token, local_files_only)
    else:
        raise CheckpointError(
            f"{name!r} is neither a directory, nor a Hub id of the form owner/name, nor a packaged model; "
            f"packaged are: {', '.join(packaged_models()) or 'none'}"
        )
    directory = directory / subfolder
    if not directory.is_dir():
        raise CheckpointError(f"{name}: has no subfolder {subfolder!r}")
    if files == "config" and not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: holds no config.json")
    return directory


def packaged_models() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(path.parent.name for path in PACKAGED.glob("*/config.json")))


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part keyword arguments into those of :func:`resolve_directory` and all others.

    >>> split_options({"revision": "float16", "n_layer": 2})
    ({'revision': 'float16'}, {'n_layer': 2})
    """
    hub = {name: value for name, value in options.items() if name in _HUB_OPTIONS}
    return hub, {name: value for name, value in options.items() if name not in hub}


def _check_subfolder(subfolder: str) -> None:
    path = Path(subfolder)
    if path.is_absolute() or path.drive or ".." in path.parts:
        raise CheckpointError(f"subfolder must be a path below the checkpoint's own directory, got {subfolder!r}")


def _download(
    repository: str,
    patterns: list[str],
    revision: str,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    import huggingface_hub  # slow to import, and needed for this alone
    from huggingface_hub import errors

    try:
        directory = huggingface_hub.snapshot_download(
            repository, allow_patterns=patterns, revision=revision, token=token, local_files_only=local_files_only,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        )  # fmt: skip
    except errors.GatedRepoError as error:
        reason = "the repository is gated: accept its terms on its page, and give a token"
        raise CheckpointError(f"{repository}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository}: has no branch, tag or commit {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "neither a local directory nor a repository of the Hub; if it is private, give a token"
        raise CheckpointError(f"{repository}: {reason}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "is not in the cache" + ("" if local_files_only else ", and the Hub cannot be reached")
        raise CheckpointError(f"{repository}: {reason}") from error
    except (OSError, ValueError) as error:  # the library's other errors descend from these
        raise CheckpointError(f"{repository}: cannot be downloaded: {error}") from error
    return Path(directory)
