"""The rotary embedding against complex numbers: turning a pair (a, b) is multiplying a + ib by exp(i · angle)."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
from conftest import numbers
from keras import ops

from tfgptj.rotary import RotaryEmbedding, apply_rotary

pytestmark = pytest.mark.core


def frequencies(width: int) -> np.ndarray:
    return np.array([10000.0 ** (-2 * pair / width) for pair in range(width // 2)])


def turned(x: np.ndarray, positions: np.ndarray, width: int) -> np.ndarray:
    """The first `width` features of x [B, T, N, H] turned, in float64."""
    x = x.astype("float64").copy()
    angles = positions[:, :, None, None] * frequencies(width)  # [B, T, 1, R / 2]
    pairs = (x[..., 0:width:2] + 1j * x[..., 1:width:2]) * np.exp(1j * angles)
    x[..., 0:width:2], x[..., 1:width:2] = pairs.real, pairs.imag
    return x


def rotate(x: np.ndarray, positions: np.ndarray, width: int) -> np.ndarray:
    return numbers(apply_rotary(ops.convert_to_tensor(x), *RotaryEmbedding(width)(positions)))


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("width", [2, 4, 8])
def test_a_rotation_is_a_complex_multiplication(width: int) -> None:
    x, positions = random(2, 5, 3, 8), np.array([[0, 1, 2, 3, 4], [7, 3, 30, 11, 0]])
    np.testing.assert_allclose(rotate(x, positions, width), turned(x, positions, width), rtol=0, atol=1e-5)


def test_far_positions_are_exact_to_float32_angles() -> None:
    x, positions = random(1, 4, 2, 64), np.array([[500, 1000, 2000, 2047]])
    # An angle of 2047 rounds by at most 2047 · 2^-24 = 1.2e-4.
    np.testing.assert_allclose(rotate(x, positions, 64), turned(x, positions, 64), rtol=0, atol=1e-3)
    sin, cos = RotaryEmbedding(64)(positions)
    angles = positions[:, :, None, None] * np.repeat(frequencies(64), 2)
    np.testing.assert_allclose(numbers(sin), np.sin(angles) * np.tile([-1, 1], 32), rtol=0, atol=2e-4)
    np.testing.assert_allclose(numbers(cos), np.cos(angles), rtol=0, atol=2e-4)


def test_neighbours_are_paired() -> None:
    x = np.zeros((1, 1, 1, 4), "float32")
    x[..., 0] = 1.0
    expected = [math.cos(3), math.sin(3), 0.0, 0.0]  # GPT-NeoX's layout would put the sine third
    np.testing.assert_allclose(rotate(x, np.array([[3]]), 4)[0, 0, 0], expected, rtol=0, atol=1e-6)


def test_position_zero_is_the_identity() -> None:
    x = random(2, 3, 2, 8)
    assert np.array_equal(rotate(x, np.zeros((2, 3), int), 8), x)


def test_features_beyond_the_rotary_width_pass_unchanged() -> None:
    x = random(1, 3, 2, 8)
    result = rotate(x, np.array([[5, 6, 7]]), 4)
    assert np.array_equal(result[..., 4:], x[..., 4:])
    assert not np.isclose(result[..., :4], x[..., :4]).any()


def test_only_the_features_are_compared_with_the_rotary_width() -> None:
    x, positions = random(2, 4, 4, 8), np.arange(8).reshape(2, 4)  # as many tokens and heads as are rotated
    np.testing.assert_allclose(rotate(x, positions, 4), turned(x, positions, 4), rtol=0, atol=1e-5)


def test_rotations_keep_lengths() -> None:
    x = random(1, 3, 2, 8)
    lengths = np.linalg.norm(rotate(x, np.array([[5, 60, 700]]), 8), axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(x, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("shift", [1, 10, 1000])
def test_scores_depend_on_differences_of_positions_only(shift: int) -> None:
    query, key = random(1, 4, 2, 8), random(2, 4, 2, 8)[1:]
    positions = np.arange(4)[None]

    def scores(offset: int) -> np.ndarray:
        turned_query, turned_key = (rotate(x, positions + offset, 8) for x in (query, key))
        return np.einsum("BTNH,BSNH->BNTS", turned_query, turned_key)

    np.testing.assert_allclose(scores(shift), scores(0), rtol=0, atol=2e-3 if shift == 1000 else 2e-5)


def test_one_row_of_positions_serves_all_rows() -> None:
    x, positions = random(3, 4, 2, 8), np.arange(4)[None]
    assert np.array_equal(rotate(x, positions, 4), rotate(x, np.repeat(positions, 3, axis=0), 4))


@pytest.mark.parametrize("policy", ["bfloat16", "float16", "mixed_bfloat16"])
def test_angles_are_float32_under_every_policy(policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    positions = np.array([[2000, 2001]])
    sin, cos = RotaryEmbedding(16)(positions)
    assert {keras.backend.standardize_dtype(x.dtype) for x in (sin, cos)} == {"float32"}
    angles = positions[:, :, None, None] * np.repeat(frequencies(16), 2)
    np.testing.assert_allclose(numbers(sin), np.sin(angles) * np.tile([-1, 1], 8), rtol=0, atol=2e-4)
    np.testing.assert_allclose(numbers(cos), np.cos(angles), rtol=0, atol=2e-4)


def test_half_precision_features_are_turned_to_their_own_accuracy() -> None:
    x, positions = random(1, 2, 2, 16), np.array([[1999, 2000]])
    half = ops.cast(ops.convert_to_tensor(x), "bfloat16")
    result = apply_rotary(half, *RotaryEmbedding(16)(positions))
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
    expected = turned(numbers(half), positions, 16)
    # bfloat16 rounds sine, cosine, two products and their sum by 2^-9 each.
    assert np.abs(numbers(result) - expected).max() <= 5 * 2**-9 * np.abs(x).max() * math.sqrt(2)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow's training has a gradient of its own"
)
@pytest.mark.parametrize("width", [4, 8])
def test_in_training_gradients_are_turned_back(width: int) -> None:
    import tensorflow as tf

    x, upstream = (tf.constant(random(2, 3, 2, 8)) for _ in range(2))
    angles = RotaryEmbedding(width)(np.array([[0, 7, 90]]))
    found = []
    for training in (True, False):  # the latter is TensorFlow's own differentiation
        with tf.GradientTape() as tape:
            tape.watch([x, *angles])
            result = apply_rotary(x, *angles, training)
        turned_back, *others = tape.gradient(result, [x, *angles], upstream)
        assert [gradient is None for gradient in others] == [training] * 2
        found.append((numbers(result), numbers(turned_back)))
    assert np.array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0, atol=1e-6)


def test_shapes() -> None:
    sin, cos = RotaryEmbedding(6)(np.zeros((2, 5), int))
    assert tuple(sin.shape) == tuple(cos.shape) == (2, 5, 1, 6)


def test_the_layer_goes_through_its_configuration() -> None:
    layer = RotaryEmbedding(6, name="rotary")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert (type(again), again.rotary_dim, again.name) == (RotaryEmbedding, 6, "rotary")
    assert again.get_config() == layer.get_config()
    assert layer.weights == []
