"""Matrices in few bits: what is stored, what it stands for, and what LiteRT's kernels make of it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tfgptj.litert.engine import Program
from tfgptj.litert.graph import Graph
from tfgptj.litert.quantization import input_factors, quantized

KINDS = [(8, None), (4, None), (4, 32), (4, 64)]


def random_matrix(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((48, 128)).astype("float32")


def nearest(matrix: np.ndarray, bits: int, block_size: int | None) -> np.ndarray:
    """Rounded the simple way: each block's largest number becomes the largest integer."""
    blocks = matrix.reshape(len(matrix), -1, block_size or matrix.shape[1])
    scales = np.abs(blocks).max(axis=2, keepdims=True) / (2 ** (bits - 1) - 1)
    return (np.rint(blocks / scales) * scales).reshape(matrix.shape)


@pytest.mark.parametrize(("bits", "block_size"), KINDS)
def test_the_error_is_less_than_of_plain_rounding(bits: int, block_size: int | None) -> None:
    matrix = random_matrix()
    ours, plain = (np.square(found - matrix).sum() for found in
                   (quantized(matrix, bits, block_size).floats(), nearest(matrix, bits, block_size)))  # fmt: skip
    assert ours < plain * (0.95 if bits == 4 else 1.0)
    assert np.abs(quantized(matrix, bits, block_size).floats() - matrix).max() < (0.05 if bits == 8 else 1.2)


def test_thirty_two_bits_change_nothing() -> None:
    matrix = random_matrix()
    np.testing.assert_array_equal(quantized(matrix, 32).floats(), matrix)


def test_what_is_representable_stays_as_it_is() -> None:
    integers = np.random.default_rng(1).integers(-7, 8, (16, 64)).astype("float32")
    integers[:, ::32] = 7
    scales = np.array([0.5, 0.25], "float32")[None, :, None]
    matrix = (integers.reshape(16, 2, 32) * scales).reshape(16, 64)
    found = quantized(matrix, 4, 32)
    np.testing.assert_array_equal(found.floats(), matrix)
    assert found.scales.tolist() == [[0.5, 0.25]] * 16


def test_scales_of_blocks_are_in_both_small_formats() -> None:
    scales = quantized(random_matrix() * 1e-3, 4, 32).scales
    for narrow in (np.float16, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(scales.astype(narrow).astype("float32"), scales)


@pytest.mark.parametrize(("bits", "block_size"), KINDS)
def test_zeros_and_tiny_numbers(bits: int, block_size: int | None) -> None:
    matrix = np.zeros((4, 64), "float32")
    matrix[1] = 1e-9
    found = quantized(matrix, bits, block_size)
    assert np.isfinite(found.scales).all() and (found.scales > 0).all()
    np.testing.assert_allclose(found.floats(), matrix, atol=1e-8)


def test_two_numbers_of_four_bits_are_in_a_byte() -> None:
    found = quantized(np.array([[-7.0, 7.0, 1.0, 2.0]], "float32"), 4)
    assert found.values.tolist() == [[-7, 7, 1, 2]]
    assert found.packed().tolist() == [[0x79, 0x21]]


@pytest.mark.parametrize(("bits", "block_size"), [*KINDS, (32, None)])
def test_the_kernels_multiply_with_what_the_matrix_stands_for(
    bits: int, block_size: int | None, tmp_path: Path
) -> None:
    matrix = quantized(random_matrix(2), bits, block_size)
    bias = np.arange(48, dtype="float32")
    graph = Graph()
    graph.write(tmp_path / "product.tflite", [graph.product("w", graph.input("x", -1, 128), matrix, bias)])
    program = Program(tmp_path / "product.tflite", 1, ((-1, 128),), ((-1, 48),))
    # A row whose numbers fill the 256 steps that kernels round each row to: nothing is lost.
    x = np.random.default_rng(3).integers(-128, 128, (5, 128)).astype("float32")
    x[:, :2] = -128, 127
    [found] = program(x)
    np.testing.assert_allclose(found, x @ matrix.floats().T + bias, rtol=1e-5, atol=2e-2)
    [one] = program(x[:1])
    np.testing.assert_allclose(one, found[:1], rtol=1e-5, atol=1e-3)


# For inputs that are known


def inputs_that_go_together(width: int, rank: int = 24) -> np.ndarray:
    """Of a few sources, as what goes through a model is; and of unequal sizes."""
    rng = np.random.default_rng(4)
    mixed = rng.standard_normal((512, rank)) @ rng.standard_normal((rank, width))
    return ((mixed + 0.3 * rng.standard_normal(mixed.shape)) * rng.uniform(0.2, 3, width)).astype("float32")


@pytest.mark.parametrize("group", [128, 64])
def test_factors_are_those_of_the_squares(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfgptj.litert.quantization._GROUP", group)
    inputs = inputs_that_go_together(128)
    for i, factor in enumerate(input_factors(inputs)):
        part = inputs[:, i * group : (i + 1) * group].astype("float64")
        squares = part.T @ part / 512
        squares += (0.01 + 0.1 * group / 512) * np.trace(squares) / group * np.eye(group)
        np.testing.assert_allclose(factor @ factor.T, squares, rtol=1e-3, atol=1e-4 * squares.max())
        assert not np.tril(factor, -1).any()


def as_published(matrix: np.ndarray, squares: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """GPTQ's integers for scales [out, in]: after each column the others are moved by the inverse of the squares."""
    upper = np.linalg.cholesky(np.linalg.inv(squares)).T
    left, integers = matrix.astype("float64"), np.empty(matrix.shape)
    top = 2 ** (bits - 1) - 1
    for i in range(len(squares)):
        integers[:, i] = np.clip(np.rint(left[:, i] / scales[:, i]), -8 if bits == 4 else -top, top)
        error = (left[:, i] - integers[:, i] * scales[:, i]) / upper[i, i]
        left[:, i:] -= np.outer(error, upper[i, i:])
    return integers


@pytest.mark.parametrize(("bits", "block_size"), KINDS)
def test_integers_are_those_of_the_published_algorithm(bits: int, block_size: int | None) -> None:
    matrix, [factor] = random_matrix(), input_factors(inputs_that_go_together(128))
    found = quantized(matrix, bits, block_size, [factor])
    squares = factor.astype("float64") @ factor.T
    expected = as_published(matrix, squares, np.repeat(found.scales, block_size or 128, axis=1), bits)
    assert np.mean(found.values == expected) > 0.995  # in float64 a few fall to the other side of a half


@pytest.mark.parametrize(("bits", "block_size"), KINDS)
def test_products_with_such_inputs_err_less(bits: int, block_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, inputs = random_matrix(), inputs_that_go_together(128)

    def error(factors: list[np.ndarray] | None) -> float:
        return float(np.square(inputs @ (quantized(matrix, bits, block_size, factors).floats() - matrix).T).mean())

    plain, whole = error(None), error(input_factors(inputs))
    monkeypatch.setattr("tfgptj.litert.quantization._GROUP", 64)
    assert whole < 0.5 * plain and whole < error(input_factors(inputs)) < 0.8 * plain


def test_the_scale_is_nearly_the_best_that_there_is_for_inputs_of_unequal_sizes() -> None:
    """Inputs that never come together make up for nothing: the scale alone counts, and all of them can be tried."""
    sizes = np.where(np.arange(32) % 8 == 0, 0.05, 1.0)
    matrix = np.where(sizes < 1, 3.0, 0.7) * np.random.default_rng(5).uniform(-1, 1, (64, 32))
    inputs = np.diag(sizes).astype("float32")
    weights = sizes**2 / 32 + (0.01 + 0.1) * np.mean(sizes**2 / 32)

    def errors(values: np.ndarray) -> np.ndarray:
        return np.square(values - matrix) @ weights

    scales = np.geomspace(0.02, 0.6, 500).astype(ml_dtypes.bfloat16).astype("float64")[:, None, None]
    best = errors(np.clip(np.rint(matrix / scales), -8, 7) * scales).min(axis=0)
    found = errors(quantized(matrix, 4, 32, input_factors(inputs)).floats())
    assert (found >= best * 0.999).all() and found.mean() < 1.1 * best.mean()
    assert errors(quantized(matrix, 4, 32).floats()).mean() > 1.25 * best.mean()


@pytest.mark.parametrize(("bits", "block_size"), [*KINDS, (32, None)])
def test_inputs_of_zeros_tell_nothing(bits: int, block_size: int | None) -> None:
    matrix, factors = random_matrix(), input_factors(np.zeros((8, 128), "float32"))
    found, plain = (quantized(matrix, bits, block_size, known) for known in (factors, None))
    np.testing.assert_allclose(found.scales, plain.scales, rtol=1e-6)
    assert np.square(found.floats() - matrix).sum() <= np.square(plain.floats() - matrix).sum()
