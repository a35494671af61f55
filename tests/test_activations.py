"""Every activation that a configuration may name, against PyTorch's values (fixtures/goldens/activations.npz)."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import oracle
import pytest
from conftest import GOLDENS, numbers

from tfgptj.activations import FUNCTIONS, activation_layer
from tfgptj.config import ACTIVATIONS
from tfgptj.errors import ConfigError

pytestmark = pytest.mark.core
VALUES = np.load(GOLDENS / "activations.npz")

# Hugging Face's xIELU starts from bfloat16 numbers; ours from the exact ones, so its goldens need these.
XIELU_START = {"alpha_p": 0.2041015625, "alpha_n": -1.046875}


def golden_layer(name: str) -> keras.layers.Layer:
    layer = activation_layer(name)
    layer.build((None, 49))
    if name == "xielu":
        for weight, value in XIELU_START.items():
            getattr(layer, weight).assign([value])
    return layer


def test_the_goldens_cover_every_name() -> None:
    names = {name for name in VALUES if not name.startswith("wide/")} - {"x", "wide_x", "xielu_bfloat16"}
    assert names == set(ACTIVATIONS)
    assert {*FUNCTIONS, "prelu", "xielu"} == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_are_pytorch_s(name: str) -> None:
    layer = golden_layer(name)
    np.testing.assert_allclose(numbers(layer(VALUES["x"])), VALUES[name], rtol=2e-6, atol=1e-6)
    # PyTorch's own error functions differ by up to 3e-7 from the exact value, times 24 here.
    np.testing.assert_allclose(numbers(layer(VALUES["wide_x"])), VALUES[f"wide/{name}"], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_are_the_formulas(name: str) -> None:
    x = np.linspace(-6, 6, 49)
    weights = XIELU_START if name == "xielu" else {}
    np.testing.assert_allclose(
        numbers(golden_layer(name)(x.astype("float32"))), oracle.ACTIVATIONS[name](x, **weights), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_huge_numbers_stay_finite(name: str) -> None:
    assert np.isfinite(numbers(golden_layer(name)(np.array([-1e6, -1e3, 0.0, 1e3, 1e6], "float32")))).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_dtype_is_the_policy_s(name: str) -> None:
    layer = activation_layer(name, dtype="mixed_bfloat16")
    result = layer(np.ones((1, 4), "float32"))
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
    assert all(weight.dtype == "float32" for weight in layer.weights)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="gradients are taken with TensorFlow")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_are_finite_everywhere(name: str) -> None:
    import tensorflow as tf

    x = tf.constant([-1e4, -50.0, -1.0, 0.0, 1.0, 50.0, 1e4])
    layer = golden_layer(name)
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(layer(x))
    for gradient in tape.gradient(total, [x, *(weight.value for weight in layer.weights)]):
        assert np.isfinite(gradient.numpy()).all()


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow's training has a gradient of its own"
)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-6), ("bfloat16", 2**-8)])
def test_the_gelu_of_training_has_the_slope_of_gelu(dtype: str, tolerance: float) -> None:
    import tensorflow as tf

    x = tf.cast(tf.linspace(tf.constant(-12.0, "float64"), 12.0, 2001), dtype)
    layer = activation_layer("gelu_new", dtype=dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    exact = tf.cast(x, "float64").numpy()
    tanh = np.tanh(math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3))
    inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * exact**2)
    slopes = 0.5 * (1 + tanh) + 0.5 * exact * (1 - tanh**2) * inner_slope
    found = tape.gradient(y, x)
    assert found.dtype == y.dtype == dtype
    np.testing.assert_allclose(tf.cast(found, "float64").numpy(), slopes, rtol=0, atol=tolerance)
    np.testing.assert_allclose(tf.cast(y, "float64").numpy(), 0.5 * exact * (1 + tanh), rtol=tolerance, atol=tolerance)


def test_prelu_learns_one_slope() -> None:
    layer = golden_layer("prelu")
    assert [(weight.name, weight.shape) for weight in layer.trainable_weights] == [("weight", (1,))]
    assert numbers(layer.slope).tolist() == [0.25]
    layer.slope.assign([0.1])
    x = np.array([[-2.0, 0.0, 3.0]], "float32")
    np.testing.assert_allclose(numbers(layer(x)), oracle.prelu(x, 0.1), rtol=1e-6)


def test_xielu_learns_two_strengths() -> None:
    layer = activation_layer("xielu")
    layer.build((None, 3))
    assert [(weight.name, weight.shape) for weight in layer.trainable_weights] == [("alpha_p", (1,)), ("alpha_n", (1,))]
    # Both strengths are 0.8 at the start, after the softplus and, for the negative side, beta = 0.5.
    np.testing.assert_allclose(numbers(layer(np.array([[2.0]], "float32"))), [[0.8 * 4 + 0.5 * 2]], rtol=1e-6)
    expected = 0.8 * (math.expm1(-2.0) + 2.0) - 0.5 * 2.0
    np.testing.assert_allclose(numbers(layer(np.array([[-2.0]], "float32"))), [[expected]], rtol=1e-6)


def test_xielu_follows_its_weights() -> None:
    layer = golden_layer("xielu")
    layer.alpha_p.assign([1.5])
    layer.alpha_n.assign([-0.5])
    x = np.array([[-3.0, -1e-8, 0.0, 1e-3, 2.0]], "float32")
    np.testing.assert_allclose(numbers(layer(x)), oracle.xielu(x.astype("float64"), 1.5, -0.5), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["geglu", "", None])
def test_an_unknown_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match=f"unknown activation_function {name!r}"):
        activation_layer(name)
