"""Rotary position embedding, as GPT-J has it: interleaved pairs, at explicit positions.

Each pair of neighbouring dimensions (0, 1), (2, 3), … of a head is turned by an angle proportional to the token's
position. GPT-NeoX and LLaMA pair dimension i with i + R/2 instead; the two layouts must not be mixed.

Source: RoFormer (arXiv 2104.09864), equation 34; transformers, modeling_gptj.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj.products import leading

BASE = 10000.0


@keras.saving.register_keras_serializable(package="tfgptj")
class RotaryEmbedding(keras.layers.Layer):
    """Sine and cosine of every rotation angle, once for all layers.

    Args:
        rotary_dim: int, rotated dimensions of each head (R), even.

    Call arguments:
        positions: int [B, T] or [1, T].

    Returns:
        `(sin, cos)`, each float32 [B, T, 1, R] whatever the dtype policy: in half precision the angles of positions
        over a few hundred would be wrong. Both dimensions of a pair have its angle; the first one's sine is negated.

    >>> sin, cos = RotaryEmbedding(4)(np.array([[0, 1]]))
    >>> [[f"{angle:.3f}" for angle in position] for position in ops.convert_to_numpy(cos)[0, :, 0, :]]
    [['1.000', '1.000', '1.000', '1.000'], ['0.540', '0.540', '1.000', '1.000']]
    """

    def __init__(self, rotary_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rotary_dim = rotary_dim
        self._frequencies = (1.0 / BASE ** (np.arange(0, rotary_dim, 2) / rotary_dim)).astype("float32")  # [R / 2]

    def call(self, positions: Any) -> tuple[Any, Any]:
        frequencies = ops.convert_to_tensor(np.repeat(self._frequencies, 2))  # [R]
        signs = ops.convert_to_tensor(np.tile(np.array([-1.0, 1.0], "float32"), self.rotary_dim // 2))  # [R]
        angles = ops.cast(positions, "float32")[:, :, None, None] * frequencies  # [B, T, 1, R]
        return ops.sin(angles) * signs, ops.cos(angles)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rotary_dim": self.rotary_dim}


def apply_rotary(x: Any, sin: Any, cos: Any, training: bool | None = None) -> Any:
    """Turn the first R dimensions of every head; the others pass unchanged.

    (a, b) becomes (a cos - b sin, b cos + a sin), computed as (a, b) · (cos, cos) + (b, a) · (-sin, sin).

    Args:
        x: float [B, T, N, H], queries or keys.
        sin, cos: float32 [B, T, 1, R] from :class:`RotaryEmbedding`.
        training: whether gradients by x will be asked for. On TensorFlow none goes to the angles then, and x's is
            turned back by them, in about a third of the time that the gradients of slices and sums take.

    Returns:
        float [B, T, N, H], of x's dtype.
    """
    if not training or keras.backend.backend() != "tensorflow":
        return _turned(x, sin, cos)
    import tensorflow as tf

    @tf.custom_gradient
    def turned(x: Any) -> tuple[Any, Callable[[Any], Any]]:
        return _turned(x, sin, cos), lambda upstream: _turned(upstream, -sin, cos)

    return turned(x)


def _turned(x: Any, sin: Any, cos: Any) -> Any:
    width = sin.shape[-1]  # R
    sin, cos = ops.cast(sin, x.dtype), ops.cast(cos, x.dtype)
    turning = x[..., :width]  # [B, T, N, R]
    pairs = ops.reshape(turning, (*leading(x), width // 2, 2))
    crossed = ops.reshape(ops.flip(pairs, axis=-1), (*leading(x), width))  # (b, a) for each (a, b)
    turned = turning * cos + crossed * sin  # [B, T, N, R]
    return turned if width == x.shape[-1] else ops.concatenate([turned, x[..., width:]], axis=-1)
