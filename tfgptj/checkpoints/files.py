"""Files replaced in one step: a crash leaves the old content or the new, never half of one."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# Siblings that are still being written. Whatever bears such a name was left by a save that did not finish.
_TEMPORARY_PREFIX, _TEMPORARY_SUFFIX = ".tfgptj-", ".tmp"


@contextmanager
def replaced_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when all is written and on disk.

    The old file of that name, and whoever reads it, is not disturbed. After an exception it is still there, and
    nothing else is.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    sibling = path.with_name(f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}")
    try:
        with open(sibling, "x+b") as file:  # the HDF5 library reads, too, what it wrote
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(sibling, path)
        sync_directory(path.parent)
    finally:
        sibling.unlink(missing_ok=True)


def json_bytes(fields: dict[str, Any]) -> bytes:
    """A JSON file in Hugging Face's form: indented, sorted, with a newline at its end."""
    return (json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def write_json(path: str | os.PathLike[str], fields: dict[str, Any]) -> None:
    """Write a JSON file, replacing an old one in one step.

    Raises:
        OSError: if the file cannot be written.
    """
    with replaced_file(path) as file:
        file.write(json_bytes(fields))


def sync_directory(directory: Path) -> None:
    """Put on disk which files a directory holds, so that a rename survives a power cut."""
    if os.name == "nt":  # Windows opens no directories, and needs no such call
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(directory: Path) -> None:
    """Remove what unfinished saves left behind."""
    for path in directory.glob(f"{_TEMPORARY_PREFIX}*{_TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
