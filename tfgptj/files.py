"""Files replaced in one step, so that a crash leaves the old content or the new; and JSON, read strictly."""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import shutil
import sys
import uuid
from collections import Counter
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


@contextmanager
def staging_directory(directory: Path) -> Iterator[Path]:
    """A directory below another one, for files that are moved out of it when all are written. It is removed again."""
    path = directory / f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}"
    try:
        path.mkdir()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def exchange(first: Path, second: Path) -> None:
    """Let two directories swap their names in one step, so that neither name is ever without one.

    Raises:
        OSError: if they cannot; on systems other than Linux and macOS, and some file systems, none can.
    """
    paths = os.fsencode(first), os.fsencode(second)
    swap, here = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux, RENAME_SWAP of macOS
    library: Any = None if os.name == "nt" else ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        failed = library.renamex_np(*paths, swap)
    elif hasattr(library, "renameat2"):
        failed = library.renameat2(here, paths[0], here, paths[1], swap)
    else:
        ctypes.set_errno(errno.ENOTSUP)
        failed = -1
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))


def remove_temporaries(directory: Path) -> None:
    """Remove what unfinished saves left behind."""
    for path in directory.glob(f"{_TEMPORARY_PREFIX}*{_TEMPORARY_SUFFIX}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def parse_json(text: str | bytes, most_values: int | None = None) -> Any:
    """Parse JSON strictly: no key twice in one object, no NaN, no number beyond the range of floats.

    Args:
        text: the JSON; bytes are UTF-8, perhaps with a byte order mark.
        most_values: how many values it may have, which bounds the memory that they take: about 100 bytes each. Commas
            within texts count too.

    Raises:
        ValueError: saying what is wrong, in a few words.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        if most_values is not None and sum(map(text.count, ",:[{")) > most_values:
            raise ValueError(f"more than {most_values:,} values")
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:  # a number of 5,000 digits is one, too
        raise ValueError(str(error)[:200]) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {repeated!r:.80} comes twice in one object")
    return fields


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"{text[:40]} is too large")
    return float(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
