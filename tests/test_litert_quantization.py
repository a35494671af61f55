"""Matrices in few bits: what is stored, what it stands for, and what LiteRT's kernels make of it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tfgptj.litert.engine import Program
from tfgptj.litert.graph import Graph
from tfgptj.litert.quantization import quantized

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
