"""A checkpoint from one format to another, tensor by tensor: the model is never in memory as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tfgptj import limits
from tfgptj.checkpoints.checks import match_plan
from tfgptj.checkpoints.directory import TOKENIZER_FILES
from tfgptj.checkpoints.hub import resolve_directory
from tfgptj.checkpoints.mapping import Entry, plan
from tfgptj.checkpoints.opening import head_of_checkpoint, open_checkpoint, read_config
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.checkpoints.tensors import TensorSpec, assemble
from tfgptj.checkpoints.write import Progress, write_checkpoint
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    weights: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    **hub_options: Any,
) -> None:
    """Write a checkpoint anew, in another format or dtype; its configurations and its tokenizer go along.

    Neither Keras nor a backend is needed, and two tensors at most are in memory.

    Args:
        source: a directory, the name of a packaged model, or a Hub id.
        destination: the directory to write; another one, or the same with `overwrite`.
        format: "safetensors", "h5" or "msgpack", as for `save_pretrained`.
        dtype: "float32", "float16", "bfloat16" or "float64"; None keeps every weight's own.
        max_shard_size: largest size of a weight file, in bytes or like "200MB".
        weights: which files to read, where there are several formats: "auto", "safetensors", "bin", "h5", "msgpack".
        overwrite: replace the checkpoint in `destination`, in one step; without this the directory must be empty.
        progress: called with the bytes that are written and those that there will be, after each tensor.
        **hub_options: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        CheckpointError: if the source cannot be read or the destination not written, a value does not fit `dtype`, or
            the format lacks one of the weights.
        CheckpointFormatError: if a file is damaged.
        CheckpointMismatchError: if the tensors are not those that the configuration calls for.
        ConfigError: if the configuration is invalid.
    """
    destination = Path(destination)
    if not overwrite and destination.is_dir() and any(destination.iterdir()):
        raise CheckpointError(f"{destination}: is not empty; choose another directory, or overwrite what is there")
    with stored_weights(source, weights, **hub_options) as stored:
        write_checkpoint(
            destination, stored, format=format, max_shard_size=max_shard_size, dtype=dtype, progress=progress
        )


@contextmanager
def stored_weights(
    source: str | os.PathLike[str], weights: str = "auto", **hub_options: Any
) -> Iterator[StoredWeights]:
    """The weights of a checkpoint, open to be converted, with the files that go along.

    Args:
        source, weights, **hub_options: as for :func:`convert`.

    Raises:
        CheckpointError, CheckpointFormatError, CheckpointMismatchError, ConfigError: as there.
    """
    directory = resolve_directory(source, files="weights", weights=weights, **hub_options)
    tokenizer = resolve_directory(source, files="documents", **hub_options)
    checkpoint, (config, documents) = open_checkpoint(
        directory, lambda opened: (read_config(opened), _documents(opened, tokenizer)), weights
    )
    with checkpoint, ThreadPoolExecutor(1) as pool:
        yield StoredWeights(checkpoint, config, documents, pool)


class StoredWeights:
    """The weights of a checkpoint, each read when it is asked for, or while the one before it is being written.

    Args:
        checkpoint: the open files.
        config: their configuration.
        documents: the files that go along.
        pool: what reads ahead.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: GPTJConfig, documents: dict[str, bytes], pool: ThreadPoolExecutor
    ) -> None:
        self.config, self.head = config, head_of_checkpoint(checkpoint, config)
        match = match_plan(plan(config, self.head), checkpoint)
        self._names = {entry.variable: name for entry, name in match.stored}
        self._checkpoint, self._pool = checkpoint, pool
        self.documents = documents

    def dtype(self, entry: Entry) -> np.dtype[Any]:
        """The dtype that a weight has."""
        return self._checkpoint.spec(self._names[entry.variable]).dtype

    def values(self, wanted: Sequence[tuple[Entry, TensorSpec, bool]]) -> Iterator[np.ndarray]:
        """Weights in the dtypes of their specs, transposed where that is asked for."""
        ahead = [self._pool.submit(self._value, *each) for each in wanted[:1]]
        for following in [*wanted[1:], None]:
            value = ahead.pop().result()
            if following is not None:
                ahead.append(self._pool.submit(self._value, *following))
            yield value
            del value  # before the next but one is read

    def _value(self, entry: Entry, spec: TensorSpec, transpose: bool) -> np.ndarray:
        name = self._names[entry.variable]
        stored = self._checkpoint.spec(name)
        turn = transpose != entry.is_transposed(self._checkpoint.layout)
        if stored.dtype == spec.dtype and not turn:
            return self._checkpoint.read(name)
        return assemble(self._checkpoint.blocks(name), stored, spec.dtype, transpose=turn)


def _documents(checkpoint: Checkpoint, tokenizer: Path) -> dict[str, bytes]:
    """What lies beside the weights and belongs to the model, but for `config.json`, which is written anew."""
    paths = {"generation_config.json": checkpoint.companion("generation_config.json")}
    paths |= {name: tokenizer / name for name in TOKENIZER_FILES}
    return {name: _small_file(path) for name, path in paths.items() if path.is_file()}


def _small_file(path: Path) -> bytes:
    size = path.stat().st_size
    if size > limits.MAX_DOCUMENT_BYTES:
        raise CheckpointError(f"{path}: has {size:,} bytes; at most {limits.MAX_DOCUMENT_BYTES:,} are copied")
    return path.read_bytes()
