"""What tests of logits processors share: texts as a run keeps them, and chains compiled as a run compiles them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from tfgptj.generation.chain import Context, Names, process

BACKEND = keras.backend.backend()
# How a backend runs a chain: JAX always compiles it, PyTorch never.
WAYS = {"tensorflow": ("eager", "compiled"), "jax": ("compiled",), "torch": ("eager",)}[BACKEND]
EAGER = "eager" in WAYS


def in_every_way(names: Iterable[str], *kept: str) -> list[Any]:
    """Names and ways: all as they are, and compiled those to keep, or all if slow tests are asked for."""
    pairs = [(name, way) for name in names for way in WAYS]
    slow = pytest.mark.slow
    return [(n, way) if way == "eager" or n in kept else pytest.param(n, way, marks=slow) for n, way in pairs]


def tensors(values: Any) -> Any:
    """A chain's numbers as tensors."""
    return tuple(tuple(ops.convert_to_tensor(value) for value in some) for some in values)


def context_of(ids: np.ndarray, prompt_length: int, limit: int, eos: tuple[int, ...], padding: int = 0) -> Context:
    """Texts with so many slots of padding before them, and four slots of room after."""
    rows, length = ids.shape
    ids = np.pad(ids.astype("int32"), ((0, 0), (padding, 4)), constant_values=3)
    real = np.zeros(ids.shape, bool)
    real[:, padding : padding + length] = True
    scalars = {"slot": padding + length, "step": length - prompt_length, "limit": limit}
    return Context(
        ids=ops.convert_to_tensor(ids),
        real=ops.convert_to_tensor(real),
        length=ops.convert_to_tensor(np.full(rows, length, "int32")),
        eos=ops.convert_to_tensor(np.asarray(eos, "int32")),
        **{name: ops.convert_to_tensor(value, dtype="int32") for name, value in scalars.items()},
    )


def run(names: Names, numbers: Any, scores: Any, context: Context, compiled: bool) -> Any:
    """Scores after a chain; compiled with XLA, or as the backend runs it by itself."""
    return (program_of(names) if compiled else functools.partial(process, names))(numbers, scores, context)


@functools.cache
def program_of(names: Names) -> Callable[..., Any]:
    """A chain compiled with XLA, one program for all numbers; on PyTorch the chain itself."""
    function = functools.partial(process, names)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True, autograph=False)
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    return function
