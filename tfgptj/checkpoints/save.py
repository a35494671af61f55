"""save_pretrained: a model as a directory that Hugging Face's classes read too."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj.checkpoints.mapping import Entry, head_of, plan, variable_of
from tfgptj.checkpoints.tensors import BLOCK_ROWS, FLOAT_DTYPES, TensorSpec, assemble
from tfgptj.checkpoints.write import write_checkpoint
from tfgptj.errors import CheckpointError
from tfgptj.files import json_bytes


def save_pretrained(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
) -> None:
    """Write `config.json`, `generation_config.json` and the weights, with Hugging Face's names and layout.

    Args:
        model: one of the package's models.
        directory: where to; created if need be. An older checkpoint there is replaced in one step, whatever its format;
            other files are left alone.
        format: "safetensors", read by Hugging Face's PyTorch classes; "h5" by their TensorFlow classes; or "msgpack"
            by their Flax classes.
        max_shard_size: largest size of a weight file, in bytes or like "200MB"; beyond that there are several, with an
            index. A single tensor that is larger has a file to itself.
        dtype: "float32", "float16" or "bfloat16"; None stores every weight in the dtype that it has. HDF5 has no
            bfloat16.

    Raises:
        CheckpointError: if an argument is invalid, the format lacks a weight or the dtype, the directory cannot be
            written, or a weight does not fit `dtype`.
        ConfigError: if the configuration has a field that JSON cannot hold.
    """
    weights = ModelWeights(model)
    write_checkpoint(Path(directory), weights, format=format, max_shard_size=max_shard_size, dtype=dtype)


class ModelWeights:
    """A model's weights, each fetched from its variable when it is asked for."""

    def __init__(self, model: Any) -> None:
        self.config, (self.head, _) = model.config, head_of(type(model))
        parameters = getattr(model, "generation_config", None)
        self.documents = {} if parameters is None else {"generation_config.json": json_bytes(parameters.to_dict())}
        self._model = model
        for entry in plan(self.config, self.head):
            variable = variable_of(model, entry)
            stored = keras.backend.standardize_dtype(variable.dtype)
            if stored not in FLOAT_DTYPES or tuple(variable.shape) != entry.shape:
                raise CheckpointError(
                    f"{entry.variable}: is {variable.dtype} {list(variable.shape)}, expected floats "
                    f"{list(entry.shape)}: a quantized model has no such checkpoint; save it before it is quantized"
                )

    def dtype(self, entry: Entry) -> np.dtype[Any]:
        """The dtype that a weight has."""
        return FLOAT_DTYPES[keras.backend.standardize_dtype(variable_of(self._model, entry).dtype)]

    def values(self, wanted: Sequence[tuple[Entry, TensorSpec, bool]]) -> Iterator[np.ndarray]:
        """Weights in the dtypes of their specs, transposed where that is asked for."""
        for entry, spec, transpose in wanted:
            own = TensorSpec(spec.name, entry.shape, self.dtype(entry))
            # The cast changes nothing: it makes a tensor of a variable, which cannot be sliced on every backend.
            tensor = ops.cast(variable_of(self._model, entry), own.dtype.name)
            rows = range(0, entry.shape[0], BLOCK_ROWS)
            blocks = (ops.convert_to_numpy(tensor[row : row + BLOCK_ROWS]) for row in rows)
            yield assemble(blocks, own, spec.dtype, transpose=transpose)
