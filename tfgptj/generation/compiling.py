"""One way to compile a generation function for each Keras backend.

TensorFlow: `tf.function`. Without XLA its shapes stay open, so that one trace serves every batch and length; with XLA
they are fixed, and callers round them up to a few sizes. JAX: `jax.jit`, shapes fixed, with the weights as arguments,
so that they are not baked into the program. PyTorch: eager. So is, on every backend, whatever runs a model that has an
engine of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj.attention import WRITER
from tfgptj.products import SHARED, for_any_rows

# Dimensions that callers may change from call to call: in caches [B, N, S, H] the rows and the slots, in all else
# [B, S or P, …] the first two. The rest of a shape belongs to the model.
OPEN_IN_CACHES, OPEN = (0, 2), (0, 1)


def runs_itself(model: Any) -> bool:
    """Whether a model has an engine of its own, which no program can call: see :mod:`tfgptj.litert`."""
    return bool(getattr(model, "runs_itself", False))


def library_of(array: Any) -> Any:
    """The functions for an array: NumPy's for its own arrays, which stay on the host, or `keras.ops`."""
    return np if isinstance(array, np.ndarray) else ops


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor's values on the host."""
    return np.asarray(tensor if isinstance(tensor, np.ndarray | np.generic) else ops.convert_to_numpy(tensor))


class Compiled:
    """A function of a model and tensors, compiled on first use for each of its static arguments.

    Args:
        model: the model whose variables the function reads.
        function: called as `function(model, static, *tensors)`; built from `keras.ops` alone.
        jit_compile: compile with XLA on TensorFlow; JAX always does.
    """

    def __init__(self, model: keras.Model, function: Callable[..., Any], jit_compile: bool) -> None:
        self.model, self.function, self.jit_compile = model, function, jit_compile
        self.programs: dict[Any, Callable[..., Any]] = {}
        self.traces = 0  # how often the function was traced: what compilations are counted by

    def __call__(self, static: Any, *tensors: Any) -> Any:
        if runs_itself(self.model):
            return self.function(self.model, static, *tensors)
        if static not in self.programs:
            self.programs[static] = getattr(self, f"_for_{keras.backend.backend()}")(static, tensors)
        return self.programs[static](*tensors)

    def _traced(self, static: Any, tensors: Any) -> Any:
        self.traces += 1
        return self.function(self.model, static, *tensors)

    def _for_tensorflow(self, static: Any, tensors: Any) -> Callable[..., Any]:
        import tensorflow as tf

        def open_shape(tensor: Any) -> Any:
            dimensions = OPEN_IN_CACHES if len(tensor.shape) == 4 else OPEN
            shape = [None if i in dimensions else size for i, size in enumerate(tensor.shape)]
            return tf.TensorSpec(shape, tensor.dtype)

        def traced(*tensors: Any) -> Any:
            with nullcontext() if self.jit_compile else plain_graph(), shared_products():
                return self._traced(static, tensors)

        signature = None if self.jit_compile else tf.nest.map_structure(open_shape, list(tensors))
        # TensorFlow counts traces by code, and would warn that all these programs were one that is traced too often; a
        # partial has none.
        return tf.function(partial(traced), input_signature=signature, jit_compile=self.jit_compile, autograph=False)

    def _for_jax(self, static: Any, tensors: Any) -> Callable[..., Any]:
        import jax

        variables = self.model.variables

        def stateless(values: Any, *tensors: Any) -> Any:
            with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
                return self._traced(static, tensors)

        program = jax.jit(stateless)
        return lambda *tensors: program([variable.value for variable in variables], *tensors)

    def _for_torch(self, static: Any, tensors: Any) -> Callable[..., Any]:
        import torch

        def eager(*tensors: Any) -> Any:
            with torch.no_grad():
                return self._traced(static, tensors)

        return eager


@contextmanager
def plain_graph() -> Iterator[None]:
    """What is traced within is for a TensorFlow graph without XLA: it needs TensorFlow's own operators alone."""
    before = WRITER.set(_write_in_place)
    try:
        yield
    finally:
        WRITER.reset(before)


@contextmanager
def shared_products() -> Iterator[None]:
    """In what is traced within, layers with matrices of one shape share a graph of their product: half the time."""
    import tensorflow as tf

    before = SHARED.set(tf.function(partial(for_any_rows), autograph=False))  # partial: see Compiled
    try:
        yield
    finally:
        SHARED.reset(before)


def _write_in_place(cache: Any, slot: Any, new: Any) -> Any:
    """:func:`tfgptj.attention.write_slots` for plain TensorFlow graphs.

    `ops.slice_update` is in place within XLA's programs. In a plain graph it copies the cache, which for long texts
    costs more than all else in a step; this writes into it where nothing else needs it.
    """
    import tensorflow as tf

    whole = 0b1011  # bits of the dimensions that are written from end to end
    return tf.raw_ops.TensorStridedSliceUpdate(
        input=cache,
        begin=[0, 0, slot, 0],
        end=[0, 0, slot + tf.shape(new)[2], 0],
        strides=[1, 1, 1, 1],
        value=new,
        begin_mask=whole,
        end_mask=whole,
    )
