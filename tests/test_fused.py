"""Cross-entropy without logits, against formulas in NumPy's float64 and against the plain path of the same model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from conftest import elsewhere, numbers
from keras import ops

from tfgptj.fused import Product, fused_cross_entropy
from tfgptj.losses import Smoothing

pytestmark = pytest.mark.core
RNG = np.random.default_rng(0)
N, D, V = 13, 5, 11
X, KERNEL, BIAS = (RNG.standard_normal(shape).astype("float32") for shape in ((N, D), (D, V), (V,)))
LABELS = np.where(RNG.random(N) < 0.3, -100, RNG.integers(0, V, N)).astype("int32")
WEIGHTS = RNG.random(N).astype("float32")
SMOOTHINGS = (Smoothing(), Smoothing(0.1), Smoothing(0.0, 0.03), Smoothing(0.2, 0.01))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def expected(logits: np.ndarray, smoothing: Smoothing) -> tuple[list[float], np.ndarray]:
    """The three sums, and the gradient by the logits, all float64."""
    smooth, z = smoothing
    kept, labels = LABELS != -100, np.maximum(LABELS, 0)
    log_total = np.log(np.exp(logits).sum(-1))
    nats = log_total - logits[np.arange(N), labels]
    losses = (1 - smooth) * nats + smooth * (log_total - logits.mean(-1)) + z * log_total**2
    target = (1 - smooth) * np.eye(V)[labels] + smooth / V
    slopes = softmax(logits) * (1 + 2 * z * log_total)[:, None] - target
    hits = (logits.argmax(-1) == labels)[kept].sum()
    weights = WEIGHTS.astype("float64") * kept
    return [(losses * weights).sum(), nats[kept].sum(), hits], slopes * weights[:, None]


def gradients(function: Any, tensors: list[np.ndarray]) -> tuple[Any, list[Any]]:
    """A function's value and its gradients, on any backend."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        variables = [tf.Variable(t) for t in tensors]
        with tf.GradientTape() as tape:
            value = tf.function(function)(*variables)
        return value, tape.gradient(value, variables)
    if backend == "jax":
        import jax

        return jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(tensors)))))(*tensors)
    leaves = [ops.convert_to_tensor(t).clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    value.backward()
    return value, [leaf.grad for leaf in leaves]


def near(actual: Any, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(numbers(actual), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("smoothing", elsewhere(SMOOTHINGS, SMOOTHINGS[3]), ids=str)
@pytest.mark.parametrize("chunk", [1, 4 * V, 1000], ids=["of one", "of four", "whole"])
def test_sums_and_gradients_are_those_of_the_formula(smoothing: Smoothing, chunk: int) -> None:
    def loss(x: Any, kernel: Any, bias: Any) -> Any:
        product = Product(x, kernel)
        return 3 * fused_cross_entropy([product], bias, LABELS, WEIGHTS, smoothing, with_hits=True, chunk=chunk)[0]

    sums, slopes = expected(X.astype("float64") @ KERNEL + BIAS, smoothing)
    for with_gradients in (True, False):
        options = {"with_hits": True, "chunk": chunk, "with_gradients": with_gradients}
        near(fused_cross_entropy([Product(X, KERNEL)], BIAS, LABELS, WEIGHTS, smoothing, **options), np.array(sums))
    value, (dx, dkernel, dbias) = gradients(loss, [X, KERNEL, BIAS])
    assert float(numbers(value)) == pytest.approx(3 * sums[0], rel=1e-5)
    near(dx, 3 * slopes @ KERNEL.T)
    near(dkernel, 3 * X.T @ slopes)
    near(dbias, 3 * slopes.sum(0))


@pytest.mark.parametrize("chunk", [3 * V, 1000])
def test_several_products_add_up_and_may_be_transposed(chunk: int) -> None:
    second, kernel = RNG.standard_normal((N, 2)).astype("float32"), RNG.standard_normal((V, 2)).astype("float32")

    def loss(x: Any, second: Any, kernel: Any) -> Any:
        products = [Product(x, KERNEL, trained=False), Product(second, kernel, transposed=True)]
        return fused_cross_entropy(products, BIAS, LABELS, WEIGHTS, trained_bias=False, chunk=chunk)[0]

    sums, slopes = expected(X.astype("float64") @ KERNEL + second @ kernel.T + BIAS, Smoothing())
    value, (dx, dsecond, dkernel) = gradients(loss, [X, second, kernel])
    assert float(numbers(value)) == pytest.approx(sums[0], rel=1e-5)
    near(dx, slopes @ KERNEL.T)
    near(dsecond, slopes @ kernel)
    near(dkernel, slopes.T @ second)


def test_nothing_that_counts_gives_zero() -> None:
    for chunk in (2 * V, 1000):
        sums = fused_cross_entropy([Product(X, KERNEL)], BIAS, np.full(N, -100, "int32"), WEIGHTS, chunk=chunk)
        assert numbers(sums).tolist() == [0.0, 0.0, 0.0]


def test_extreme_logits_stay_finite() -> None:
    kernel = np.array([[1e4, -1e4, 0.0]], "float32")
    sums = fused_cross_entropy(
        [Product(np.ones((2, 1), "float32"), kernel)],
        np.zeros(3, "float32"),
        np.array([0, 1], "int32"),
        np.ones(2, "float32"),
    )
    assert numbers(sums)[:2].tolist() == [2e4, 2e4]
