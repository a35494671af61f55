"""x Wᵀ: the product that nearly all of GPT-J's time goes into, in each backend's fastest form.

Matrices are kept as [out, in], as PyTorch keeps them: then each output reads one run of memory. On TensorFlow's CPU a
single token takes 12 % less time so than with [in, out] in float32, and 43 % less in bfloat16, whose kernels reorder
[in, out] at every call. Which operator is the fastest depends on dtype and number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import keras
from keras import ops

_MANY = 256  # rows from which the transpose of the result costs more than it brings

# How the program that is being traced calls `for_any_rows`, which takes long to trace, where it has a better way than
# to trace it for each matrix.
SHARED: ContextVar[Callable[[Any, Any], Any] | None] = ContextVar("SHARED", default=None)


def project(x: Any, matrix: Any, training: bool | None = None) -> Any:
    """Multiply the last dimension of x with a matrix.

    Args:
        x: float [..., K].
        matrix: float [N, K], of the same dtype.
        training: whether gradients will be asked for; the result is the same but for its rounding.

    Returns:
        float [..., N].
    """
    outputs, inputs = matrix.shape
    rows = ops.reshape(x, (-1, inputs))
    if keras.backend.backend() == "tensorflow":
        rows = _product_for_tensorflow(rows, matrix, training)
    else:
        rows = ops.matmul(rows, ops.transpose(matrix))  # a view, or a part of the product
    return ops.reshape(rows, (*leading(x), outputs))


def leading(x: Any) -> tuple[Any, ...]:
    """The dimensions of x but for the last, as a new shape takes them: at most one is -1, and none is computed if the
    graph knows all others."""
    known = tuple(x.shape)[:-1]
    if sum(size is None for size in known) <= 1:
        return tuple(-1 if size is None else size for size in known)
    return (-1, *ops.shape(x)[1:-1])


def _product_for_tensorflow(rows: Any, matrix: Any, training: bool | None) -> Any:
    import tensorflow as tf

    matrix = tf.convert_to_tensor(matrix)
    if training or matrix.dtype != tf.float32:
        return tf.matmul(rows, matrix, transpose_b=True)

    count = rows.shape[0]
    if count is None:
        return (SHARED.get() or for_any_rows)(rows, matrix)
    return _forms(rows, matrix)[0 if count == 1 else 1 if count < _MANY else 2]()


def for_any_rows(rows: Any, matrix: Any) -> Any:
    """The product in a graph of TensorFlow that learns the number of rows when it runs."""
    import tensorflow as tf

    of_one, of_some, of_many = _forms(rows, matrix)
    count = tf.shape(rows)[0]
    return tf.case([(count == 1, of_one), (count < _MANY, of_some)], default=of_many)


def _forms(rows: Any, matrix: Any) -> tuple[Callable[[], Any], ...]:
    """The product for one row, for some, and for many.

    In float32 `tf.matmul` is at the memory's limit for one row, and for more of them far from it: it then reorders the
    matrix at every call. `tf.einsum` does not; in training that brings nothing.
    """
    import tensorflow as tf

    return (
        lambda: tf.transpose(tf.matmul(matrix, tf.transpose(rows))),
        lambda: tf.transpose(tf.einsum("NK,BK->NB", matrix, rows)),
        lambda: tf.einsum("BK,NK->BN", rows, matrix),
    )
