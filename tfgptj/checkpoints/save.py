"""save_pretrained: a model as a directory that Hugging Face's PyTorch classes read too.

A directory that holds a checkpoint already is changed in one step. New weights are written beside the old ones, under
names that nothing refers to, and take effect with a single rename (or, where shards follow a whole file, with the
removal of that file, which would otherwise be preferred). A configuration that differs from the old one waits beside
it until then, under a name with a mark that the new weights bear too, so that whoever loads between the two renames
finds the one that belongs to the weights: see `Checkpoint.companion`. A crash leaves the old checkpoint or the new one,
and perhaps files that the next save removes.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj.checkpoints.files import json_bytes, remove_temporaries, replaced_file, sync_directory, write_json
from tfgptj.checkpoints.mapping import Entry, head_of, plan, variable_of, written_buffers
from tfgptj.checkpoints.safetensors import write_safetensors
from tfgptj.checkpoints.sources import FORMATS, SAVE_MARK, Checkpoint, Format, find_weights, pending_path
from tfgptj.checkpoints.tensors import BLOCK_ROWS, FLOAT_DTYPES, TensorSpec, assemble
from tfgptj.errors import CheckpointError, ConfigError, TFGPTJError

# The others are read only.
WRITTEN = ("safetensors",)

_UNITS = {
    **{"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    **{"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40},
}


def save_pretrained(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
) -> None:
    """Write `config.json` and the weights, with Hugging Face's PyTorch names and layout.

    Args:
        model: one of the package's models.
        directory: where to; created if need be. An older checkpoint there is replaced, other files are left alone.
        format: "safetensors".
        max_shard_size: largest size of a weight file, in bytes or like "200MB"; beyond that there are several, with an
            index. A single tensor that is larger has a file to itself.
        dtype: "float32", "float16" or "bfloat16"; None stores every weight in the dtype that it has.

    Raises:
        CheckpointError: if an argument is invalid, the directory cannot be written, or a weight does not fit `dtype`.
    """
    directory = Path(directory)
    if format not in WRITTEN:
        raise CheckpointError(f"format must be one of {', '.join(WRITTEN)}; got {format!r}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype must be None or one of {', '.join(FLOAT_DTYPES)}; got {dtype!r}")
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file, expected a directory to save to")
    weights = _Weights(model, dtype)
    shards = split_into_shards(weights.specs, parse_size(max_shard_size))
    documents = _documents(model, weights.dtype)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace_checkpoint(directory, FORMATS[format], documents, weights, shards)
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


class _Weights:
    """A model's weights under PyTorch's names, each fetched from its variable when it is asked for."""

    def __init__(self, model: Any, dtype: str | None) -> None:
        head, _ = head_of(type(model))
        prefix = "" if head == "none" else "transformer."
        self._entries: dict[str, tuple[Entry, Any]] = {}
        specs = []
        for entry in plan(model.config, head):
            name = f"{'' if entry.in_head else prefix}{entry.names['torch']}"
            variable = variable_of(model, entry)
            stored = dtype or keras.backend.standardize_dtype(variable.dtype)
            if stored not in FLOAT_DTYPES or tuple(variable.shape) != entry.shape:
                raise CheckpointError(
                    f"{entry.variable}: is {variable.dtype} {list(variable.shape)}, expected floats "
                    f"{list(entry.shape)}: a quantized model has no such checkpoint; save it before it is quantized"
                )
            self._entries[name] = entry, variable
            specs.append(TensorSpec(name, entry.stored_shape("torch"), FLOAT_DTYPES[stored]))
        main = max(specs, key=lambda spec: spec.size).dtype
        self.dtype = main.name
        self._buffers = {f"{prefix}{name}": np.array(value, main) for name, value in written_buffers(model.config)}
        specs += [TensorSpec(name, value.shape, value.dtype) for name, value in self._buffers.items()]
        # Wide dtypes first, then by name, as the safetensors library does: so all values lie aligned.
        self.specs = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))

    def read(self, specs: Iterable[TensorSpec]) -> Iterator[tuple[str, np.ndarray]]:
        """Names and values of some tensors, one at a time."""
        for spec in specs:
            yield spec.name, self._buffers[spec.name] if spec.name in self._buffers else self._value(spec)

    def _value(self, spec: TensorSpec) -> np.ndarray:
        entry, variable = self._entries[spec.name]
        # The cast changes nothing: it makes a tensor of a variable, which cannot be sliced on every backend.
        dtype = keras.backend.standardize_dtype(variable.dtype)
        tensor = ops.cast(variable, dtype)
        rows = range(0, entry.shape[0], BLOCK_ROWS)
        blocks = (ops.convert_to_numpy(tensor[row : row + BLOCK_ROWS]) for row in rows)
        own = TensorSpec(spec.name, entry.shape, FLOAT_DTYPES[dtype])
        return assemble(blocks, own, spec.dtype, transpose=entry.is_transposed("torch"))


def _documents(model: Any, dtype: str) -> dict[str, bytes]:
    """The JSON files of a checkpoint."""
    _, architecture = head_of(type(model))
    # transformers reads the dtype as `torch_dtype` before 4.56, and as `dtype` since.
    fields = {**model.config.to_dict(), "architectures": [architecture], "dtype": dtype, "torch_dtype": dtype}
    documents = {"config.json": fields}
    if getattr(model, "generation_config", None) is not None:
        documents["generation_config.json"] = model.generation_config.to_dict()
    try:
        return {name: json_bytes(content) for name, content in documents.items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the configuration has a field that JSON cannot hold: {error}") from None


def _replace_checkpoint(
    directory: Path, form: Format, documents: Mapping[str, bytes], weights: _Weights, shards: list[list[TensorSpec]]
) -> None:
    mark = uuid.uuid4().hex[:8]
    names = [form.whole] if len(shards) == 1 else _free_names(directory, form, len(shards), mark)
    try:
        marks = {SAVE_MARK: mark} if _stage_documents(directory, documents, mark) else {}
        if len(shards) == 1:
            write_safetensors(directory / form.whole, shards[0], weights.read(shards[0]), {"format": "pt", **marks})
        else:
            _write_shards(directory, form, weights, dict(zip(names, shards, strict=True)), marks)
    finally:
        _settle(directory, documents, mark, set(names) - {form.whole})
    stale = {path.name for path in directory.iterdir() if form.is_shard(path.name)} - set(names)
    _remove(directory, stale | ({form.index} if len(shards) == 1 else set()))
    remove_temporaries(directory)
    sync_directory(directory)


def _settle(directory: Path, documents: Iterable[str], mark: str, new_shards: set[str]) -> None:
    """After a save, or a failure in it: finish what has taken effect, undo what has not."""
    current: set[str] = set()
    current_mark = ""
    if _has_weights(directory):
        try:
            with Checkpoint(directory) as checkpoint:
                current, current_mark = set(checkpoint.shards), checkpoint.mark
        except CheckpointError:  # it cannot be told what is needed, so everything stays
            return
    for name in documents:
        pending = pending_path(directory, name, mark)
        if pending.exists() and current_mark == mark:
            os.replace(pending, directory / name)
        else:
            pending.unlink(missing_ok=True)
    _remove(directory, new_shards - current)


def _stage_documents(directory: Path, documents: Mapping[str, bytes], mark: str) -> bool:
    """Write the JSON files that differ from those there; whether they wait for the weights under their mark."""
    changed = {
        name: content
        for name, content in documents.items()
        if not (directory / name).is_file() or (directory / name).read_bytes() != content
    }
    waiting = bool(changed) and _has_weights(directory)
    for name, content in changed.items():
        with replaced_file(pending_path(directory, name, mark) if waiting else directory / name) as file:
            file.write(content)
    return waiting


def _has_weights(directory: Path) -> bool:
    try:
        find_weights(directory)
    except CheckpointError:
        return False
    return True


def _free_names(directory: Path, form: Format, count: int, mark: str) -> list[str]:
    """Names of shards: Hugging Face's own, or with a mark where some of these are taken."""
    names = [form.shard(number, count) for number in range(1, count + 1)]
    if any((directory / name).exists() for name in names):
        names = [form.shard(number, count, mark) for number in range(1, count + 1)]
    return names


def _write_shards(
    directory: Path, form: Format, weights: _Weights, shards: dict[str, list[TensorSpec]], marks: dict[str, str]
) -> None:
    for name, specs in shards.items():
        write_safetensors(directory / name, specs, weights.read(specs))
    total = sum(spec.nbytes for specs in shards.values() for spec in specs)
    weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
    write_json(directory / form.index, {"metadata": {"total_size": total, **marks}, "weight_map": weight_map})
    (directory / form.whole).unlink(missing_ok=True)


def _remove(directory: Path, names: set[str]) -> None:
    for name in names:
        (directory / name).unlink(missing_ok=True)
