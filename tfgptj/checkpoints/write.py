"""Checkpoints written in any of three formats, each in the layout of the Hugging Face classes that read it.

A directory that holds a checkpoint already changes in one step. All new files are written and put on disk in a
directory of their own below it. Shards move out first, under names that nothing refers to; configurations next, under
names that only the new weights lead to (see `directory.py`). Then the file moves that decides what is loaded. Where an
old checkpoint in another format would still be preferred, its deciding file is removed, and it is that which counts. A
crash leaves the old checkpoint or the new one, and perhaps files that the next save removes.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tfgptj.checkpoints.directory import DOCUMENTS, FORMATS, HEADS, TOKENIZER_FILES, pending_path
from tfgptj.checkpoints.flax_msgpack import write_flax
from tfgptj.checkpoints.hdf5 import MODEL_NAMES, check_hdf5_dtypes, write_hdf5
from tfgptj.checkpoints.mapping import ARCHITECTURES, Entry, Layout, written_buffers, written_weights
from tfgptj.checkpoints.safetensors import write_safetensors
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorSpec
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, ConfigError, TFGPTJError
from tfgptj.files import json_bytes, remove_temporaries, replaced_file, staging_directory, sync_directory, write_json

# The formats that can be written, and whose names and layout they have. PyTorch's own is a pickle.
WRITTEN: dict[str, Layout] = {"safetensors": "torch", "h5": "tensorflow", "msgpack": "flax"}

_UNITS = {
    **{"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    **{"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40},
}

Progress = Callable[[int, int], object]  # is told how many bytes of how many are written


class WeightSource(Protocol):
    """Where weights come from: a model, or another checkpoint."""

    @property
    def config(self) -> GPTJConfig:
        """The configuration, from which the plan follows."""

    @property
    def head(self) -> str:
        """The head, as in :data:`~tfgptj.checkpoints.mapping.HEADS`."""

    @property
    def documents(self) -> Mapping[str, bytes]:
        """Files that belong to the weights, but for `config.json`."""

    def dtype(self, entry: Entry) -> np.dtype[Any]:
        """The dtype that a weight has."""

    def values(self, wanted: Sequence[tuple[Entry, TensorSpec, bool]]) -> Iterator[np.ndarray]:
        """Weights, or their transposes where that is asked for, in the dtypes of their specs, one after the other."""


class _Tensors:
    """The tensors of a checkpoint in some format's layout, each fetched from its source when it is asked for."""

    def __init__(self, source: WeightSource, form: str, dtype: str | None) -> None:
        self._source, layout = source, WRITTEN[form]
        self._weights: dict[str, tuple[Entry, bool]] = {}
        specs = []
        for name, entry, transpose in written_weights(source.config, source.head, layout):
            stored = FLOAT_DTYPES[dtype] if dtype else source.dtype(entry)
            self._weights[name] = entry, transpose
            specs.append(TensorSpec(name, entry.shape[::-1] if transpose else entry.shape, stored))
        self.dtype = max(specs, key=lambda spec: spec.size).dtype
        prefix = "transformer." if source.head != "none" else ""
        buffers = written_buffers(source.config) if layout == "torch" else []
        self._buffers = {f"{prefix}{name}": np.array(value, self.dtype) for name, value in buffers}
        specs += [TensorSpec(name, value.shape, value.dtype) for name, value in self._buffers.items()]
        # Wide dtypes first, then by name, as the safetensors library does: so all values lie aligned. In a msgpack
        # file the tensors of one map must follow each other.
        by_width = form == "safetensors"
        self.specs = sorted(specs, key=lambda spec: (-spec.dtype.itemsize if by_width else 0, spec.name))

    def read(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, np.ndarray]]:
        """Names and values of some tensors, one at a time."""
        names = [spec.name for spec in specs]
        wanted = [(*self._weights[spec.name], spec) for spec in specs if spec.name in self._weights]
        values = self._source.values([(entry, spec, transpose) for entry, transpose, spec in wanted])
        for name in names:
            yield name, self._buffers[name] if name in self._buffers else next(values)


def write_checkpoint(
    directory: Path,
    source: WeightSource,
    *,
    format: str = "safetensors",
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write weights, `config.json` and the documents that belong to them; replace what was there.

    Args:
        directory: where to; created if need be. An older checkpoint there is replaced, whatever its format; files that
            belong to no checkpoint are left alone.
        source: the weights.
        format: "safetensors", "h5" or "msgpack".
        max_shard_size: largest size of a weight file, in bytes or like "200MB".
        dtype: what to store the weights in; None keeps every weight's own.
        progress: called after each tensor.

    Raises:
        CheckpointError: if an argument is invalid, the format lacks a weight or the dtype, the directory cannot be
            written, or a value does not fit the dtype.
        ConfigError: if the configuration cannot be written.
    """
    if format not in WRITTEN:
        raise CheckpointError(f"format must be one of {', '.join(WRITTEN)}; got {format!r}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype must be None or one of {', '.join(FLOAT_DTYPES)}; got {dtype!r}")
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file, expected a directory to save to")
    limit = parse_size(max_shard_size)
    tensors = _Tensors(source, format, dtype)
    if format == "h5":
        check_hdf5_dtypes(directory, tensors.specs)
    documents = {"config.json": _config_json(source, tensors.dtype.name), **source.documents}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with staging_directory(directory) as staging:
            shards = split_into_shards(tensors.specs, limit)
            names = _file_names(directory, format, len(shards))
            values = _reporting(tensors, progress or (lambda done, total: None))
            head = _write_weights(staging, format, source.head, dict(zip(names, shards, strict=True)), values)
            _put_in_place(directory, staging, head, [name for name in names if name != head], documents)
    except OSError as error:
        if isinstance(error, TFGPTJError):
            raise
        raise CheckpointError(f"{error.filename or directory}: could not be written: {error.strerror}") from error


def parse_size(size: int | str) -> int:
    """A size in bytes: 5GB, 1.5 GiB, 12KB, 4096.

    Raises:
        CheckpointError: if it is no size, or nothing fits in it.

    >>> parse_size("5GB"), parse_size("1.5 GiB"), parse_size(4096)
    (5000000000, 1610612736, 4096)
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]i?|)B?\s*", size, re.ASCII)
        count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    else:
        count = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if count < 1:
        raise CheckpointError(f"max_shard_size must be a number of bytes, or text like '5GB' or '200MiB'; got {size!r}")
    return count


def split_into_shards(specs: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Tensors in their order, parted so that no shard exceeds a number of bytes, unless a single tensor does."""
    shards: list[list[TensorSpec]] = [[]]
    room = limit
    for spec in specs:
        if shards[-1] and spec.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def _config_json(source: WeightSource, dtype: str) -> bytes:
    # transformers reads the dtype as `torch_dtype` before 4.56, and as `dtype` since.
    fields = {**source.config.to_dict(), "dtype": dtype, "torch_dtype": dtype}
    try:
        return json_bytes({**fields, "architectures": [ARCHITECTURES[source.head]]})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the configuration has a field that JSON cannot hold: {error}") from None


def _file_names(directory: Path, form: str, count: int) -> list[str]:
    """Names of the weight files: Hugging Face's own, or with a mark where some of those of shards are taken."""
    if count == 1:
        return [FORMATS[form].whole]
    names = [FORMATS[form].shard(number, count) for number in range(1, count + 1)]
    if any(os.path.lexists(directory / name) for name in names):
        mark = uuid.uuid4().hex[:8]
        names = [FORMATS[form].shard(number, count, mark) for number in range(1, count + 1)]
    return names


def _reporting(tensors: _Tensors, progress: Progress) -> Callable[[Sequence[TensorSpec]], Any]:
    """The tensors of a file, with a report after each that has been written."""
    total, done = sum(spec.nbytes for spec in tensors.specs), 0

    def read(specs: Sequence[TensorSpec]) -> Iterator[tuple[str, np.ndarray]]:
        nonlocal done
        values = tensors.read(specs)
        for spec in specs:
            yield next(values)
            done += spec.nbytes
            progress(done, total)

    return read


def _write_weights(
    staging: Path, form: str, head: str, files: Mapping[str, list[TensorSpec]], read: Callable[..., Any]
) -> str:
    """Write one file or several with their index; the name of the file that decides."""
    is_whole = list(files) == [FORMATS[form].whole]
    for name, specs in files.items():
        if form == "safetensors":
            write_safetensors(staging / name, specs, read(specs))
        elif form == "h5":
            write_hdf5(staging / name, specs, read(specs), MODEL_NAMES[head] if is_whole else None)
        else:
            write_flax(staging / name, specs, read(specs))
    if is_whole:
        return FORMATS[form].whole
    prefix = f"{MODEL_NAMES[head]}/" if form == "h5" else ""
    weight_map = {f"{prefix}{spec.name}": name for name, specs in files.items() for spec in specs}
    total = sum(spec.nbytes for specs in files.values() for spec in specs)
    write_json(staging / FORMATS[form].index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return FORMATS[form].index


def _put_in_place(
    directory: Path, staging: Path, head: str, shards: Sequence[str], documents: Mapping[str, bytes]
) -> None:
    status = _distinct_status(directory, staging / head)
    changed = {
        name: content
        for name, content in documents.items()
        if not (directory / name).is_file() or (directory / name).read_bytes() != content
    }
    changed |= {name: b"" for name in DOCUMENTS if name not in documents and os.path.lexists(directory / name)}
    try:
        for name in shards:
            os.replace(staging / name, directory / name)
        for name, content in changed.items():
            with replaced_file(pending_path(directory, name, status)) as file:
                file.write(content)
        sync_directory(directory)
        os.replace(staging / head, directory / head)
        sync_directory(directory)
        # The last of these to go is the one that counts so far.
        _remove(directory, reversed(HEADS[: HEADS.index(head)]))
    finally:
        counts = next((name for name in HEADS if os.path.lexists(directory / name)), None)
        is_done = counts == head and not (staging / head).exists()
        for name in changed:
            pending = pending_path(directory, name, status)
            if is_done and changed[name]:
                os.replace(pending, directory / name)
            elif is_done:
                (directory / name).unlink(missing_ok=True)
            pending.unlink(missing_ok=True)
        if not is_done:
            moved = [] if (staging / head).exists() else [head]
            _remove(directory, [*moved, *shards])
    _remove_superseded(directory, {head, *shards, *documents})
    sync_directory(directory)


def _distinct_status(directory: Path, path: Path) -> os.stat_result:
    """The status of new weights, after a change of their time if others there have the same size and time.

    Of two saves within one tick of the system's clock, the configuration of the later one would count for both.
    """
    paths = (directory / name for name in HEADS)
    taken = {(other.st_size, other.st_mtime_ns) for other in (path.stat() for path in paths if path.exists())}
    while ((status := path.stat()).st_size, status.st_mtime_ns) in taken:
        later = status.st_mtime_ns + 2 * 10**9  # which every file system can tell apart
        os.utime(path, ns=(later, later))
    return status


def _remove_superseded(directory: Path, current: set[str]) -> None:
    """Remove what the new checkpoint has not: other weights, configurations and, if it has one, tokenizer files."""
    shards = (path.name for path in directory.iterdir() if any(form.is_shard(path.name) for form in FORMATS.values()))
    tokenizer = TOKENIZER_FILES if current & set(TOKENIZER_FILES) else ()
    _remove(directory, [name for name in (*HEADS, *shards, *DOCUMENTS, *tokenizer) if name not in current])
    remove_temporaries(directory)


def _remove(directory: Path, names: Iterable[str]) -> None:
    for name in names:
        (directory / name).unlink(missing_ok=True)
