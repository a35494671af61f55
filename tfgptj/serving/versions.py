"""Directories of a model's versions, as TensorFlow Serving watches them: a version is there whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tfgptj.errors import CheckpointError, InputError
from tfgptj.files import remove_temporaries, staging_directory, sync_directory
from tfgptj.limits import MAX_ID


@contextmanager
def new_version(directory: Path, version: int | None) -> Iterator[tuple[Path, Path]]:
    """A directory to write a version in, which takes its number when all of it is on disk.

    Servers pass over its name until then. What earlier exports left unfinished is removed, so that only one may write
    to a directory at a time.

    Args:
        directory: that of all versions; it is made if need be.
        version: the number; None for one more than the highest that there is.

    Returns:
        Where to write, and where it will be.

    Raises:
        InputError: for a number that is none.
        CheckpointError: if that version is there already, or nothing can be written.
    """
    if version is not None and (
        isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= MAX_ID
    ):
        raise InputError(f"version must be an integer from 1 to {MAX_ID:,}, got {version!r:.80}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_temporaries(directory)
        target = directory / str(next_version(directory) if version is None else version)
        if target.exists():
            raise CheckpointError(f"{target} exists already: give another version, or none for the next")
        with staging_directory(directory) as staging:
            yield staging, target
            _sync(staging)
            os.rename(staging, target)
            sync_directory(directory)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{directory}: could not be written: {error.strerror or error}") from error


def next_version(directory: Path) -> int:
    """One more than the highest that there is."""
    return max(versions_in(directory), default=0) + 1


def versions_in(directory: Path) -> list[int]:
    """The versions that a server would find, none where there is no directory."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def _sync(directory: Path) -> None:
    """Put all files below a directory on disk."""
    for home, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(os.path.join(home, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(home))
