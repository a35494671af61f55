"""Work done part by part on TensorFlow's CPU, so that what it needs in between is there for one part alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras


def pays() -> bool:
    """Whether parts are to be taken in turn: on TensorFlow's CPU. A GPU wants them side by side."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")


def in_turn(function: Callable[[Any], list[Any]], like: list[Any]) -> list[Any]:
    """What a function of a part's number gives, for all parts, one after the other.

    Args:
        function: of an int32 scalar.
        like: tensors [P, ...] of which each result has the dtype and the shape, without P for one part.
    """
    import tensorflow as tf

    size = tf.shape(like[0])[0]

    def body(i: Any, arrays: Any) -> Any:
        return i + 1, [array.write(i, x) for array, x in zip(arrays, function(i), strict=True)]

    arrays = [tf.TensorArray(x.dtype, size, element_shape=x.shape[1:]) for x in like]
    _, arrays = tf.while_loop(lambda i, _: i < size, body, (tf.constant(0), arrays), parallel_iterations=1)
    return [array.stack() for array in arrays]
