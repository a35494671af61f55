"""Attention head by head: values and gradients are TensorFlow's own of the plain formula, whatever the mask."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from conftest import numbers

from tfgptj.attention import MASKED
from tfgptj.in_turn import pays
from tfgptj.lean_attention import mixed_by_heads

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow takes heads in turn")
B, N, T, H = 2, 3, 5, 4
RNG = np.random.default_rng(0)
CAUSAL = np.tril(np.ones((T, T), bool))[None, None]
LEFT_PADDED = CAUSAL & (np.arange(T) >= np.array([[2], [0]]))[:, None, None]  # the first rows' tokens see nothing


def taken(function: Any, tensors: list[Any], upstream: Any) -> list[np.ndarray]:
    """A function's value and its gradients."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = tf.function(function)(*tensors)
    return [numbers(x) for x in (value, *tape.gradient(value, tensors, upstream))]


@pytest.mark.parametrize("mask", [CAUSAL, LEFT_PADDED], ids=["one mask", "a mask for each row"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_it_is_the_formula(mask: np.ndarray, dtype: str, tolerance: float) -> None:
    import tensorflow as tf

    *tensors, upstream = (tf.cast(RNG.standard_normal((B, N, T, H)), dtype) for _ in range(4))

    def plain(query: Any, key: Any, value: Any) -> Any:
        scores = 0.5 * tf.matmul(tf.cast(query, "float32"), tf.cast(key, "float32"), transpose_b=True)
        return tf.matmul(tf.cast(tf.nn.softmax(tf.where(mask, scores, MASKED)), dtype), value)

    found = taken(lambda *heads: mixed_by_heads(*heads, tf.constant(mask), 0.5, MASKED), tensors, upstream)
    for actual, expected in zip(found, taken(plain, tensors, upstream), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_it_is_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    assert pays()
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    assert not pays()
