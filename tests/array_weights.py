"""Checkpoints made of arrays, without a model and so without Keras: to be written, and compared with what is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tfgptj.checkpoints.directory import DOCUMENTS, companion
from tfgptj.checkpoints.mapping import Entry, canonical_name, plan
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorSpec
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError

Tensors = dict[str, np.ndarray]
Fields = dict[str, Any]
State = tuple[list[Fields | None], Tensors]  # config.json and generation_config.json, and weights by variable


class ArrayWeights:
    """What `write_checkpoint` wants of its source, from arrays by variable."""

    def __init__(
        self, config: GPTJConfig, head: str, arrays: Mapping[str, np.ndarray], documents: Mapping[str, bytes]
    ) -> None:
        self.config, self.head, self.arrays, self.documents = config, head, arrays, documents

    def dtype(self, entry: Entry) -> np.dtype[Any]:
        return self.arrays[entry.variable].dtype

    def values(self, wanted: Sequence[tuple[Entry, TensorSpec, bool]]) -> Iterator[np.ndarray]:
        for entry, spec, transpose in wanted:
            array = self.arrays[entry.variable]
            yield np.ascontiguousarray(array.T if transpose else array).astype(spec.dtype, copy=False)


def random_weights(
    seed: int, *, head: str = "causal_lm", dtype: str = "float32", documents: bool = False, **fields: Any
) -> ArrayWeights:
    """Weights of a small model, which differ in every number from those of another seed."""
    small = {"vocab_size": 12, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    config = GPTJConfig(**{**small, **fields})
    chance = np.random.default_rng(seed)
    entries = plan(config, head)
    arrays = {entry.variable: chance.standard_normal(entry.shape).astype(FLOAT_DTYPES[dtype]) for entry in entries}
    written = {"generation_config.json": b'{"top_k": %d}\n' % seed} if documents else {}
    return ArrayWeights(config, head, arrays, written)


@contextmanager
def open_state(directory: Path, head: str = "causal_lm") -> Iterator[tuple[list[Fields | None], ArrayWeights]]:
    """The configurations in a directory, and weights that are read from the open files when they are asked for."""
    with Checkpoint(directory) as checkpoint:
        paths = [companion(directory, name, checkpoint.format) for name in DOCUMENTS]
        fields = [json.loads(path.read_text()) if path.is_file() else None for path in paths]
        if fields[0] is None:
            raise CheckpointError(f"{paths[0]}: there is no such file")
        names = {canonical_name(name): name for name in checkpoint.names}

        class Lazy(dict[str, np.ndarray]):
            def __missing__(self, variable: str) -> np.ndarray:
                entry = entries[variable]
                wanted = entry.names[checkpoint.layout]
                if wanted not in names:
                    raise CheckpointError(f"{directory}: lacks {wanted}")
                array = checkpoint.read(names[wanted])
                assert array.shape == entry.stored_shape(checkpoint.layout)
                return array.T if entry.is_transposed(checkpoint.layout) else array

        config = GPTJConfig.from_dict(fields[0])
        entries = {entry.variable: entry for entry in plan(config, head)}
        yield fields, ArrayWeights(config, head, Lazy(), {})


def state_of(directory: Path, head: str = "causal_lm") -> State:
    """What a directory holds, from its configuration to its last weight."""
    with open_state(directory, head) as (fields, weights):
        arrays = {entry.variable: weights.arrays[entry.variable] for entry in plan(weights.config, head)}
    return fields, arrays


def is_same(one: State, other: State) -> bool:
    """Whether all is equal, weights to the last bit."""
    return one[0] == other[0] and one[1].keys() == other[1].keys() and all(
        (array.dtype, array.tobytes()) == (other[1][name].dtype, other[1][name].tobytes())
        for name, array in one[1].items()
    )  # fmt: skip
