"""Matrices in few bits: integers and a scale for each output, or for each block of an output's inputs.

A scale is searched that leaves the least squared error, which at 4 bits cuts off the largest numbers of a block rather
than round all others more coarsely; then it is fitted to the integers that it made. At run time nothing of that shows.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import ml_dtypes
import numpy as np

# The largest number of a block by the scale that is tried first; less of it is cut off with each next one.
_SHARES = {8: (1.0, 0.97), 4: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)}

# The kernels hold scales of blocks in bfloat16, the file in float16: what both have is what is rounded with.
_LEAST_SCALE = 2.0**-14

# Numbers that are worked on at once: few enough to stay in the processor's caches.
_CHUNK = 2**17
_THREADS = 2


class Matrix(NamedTuple):
    """A matrix [out, in]: its integers, of which each is to be multiplied with its scale, or its floats."""

    values: np.ndarray  # int8 [out, in], or with 32 bits float32
    scales: np.ndarray  # float32 [out, blocks]; one block without block_size, none with 32 bits
    bits: int
    block_size: int | None

    def packed(self) -> np.ndarray:
        """The values as they are stored: of 4 bits two in a byte, the first in its lower half."""
        if self.bits != 4:
            return self.values
        nibbles = self.values.view(np.uint8) & 15
        return nibbles[:, ::2] | nibbles[:, 1::2] << 4

    def floats(self) -> np.ndarray:
        """What the matrix stands for, float32 [out, in]."""
        if self.bits == 32:
            return self.values
        blocks = self.values.reshape(*self.scales.shape, -1) * self.scales[..., None]
        return np.asarray(blocks.reshape(self.values.shape), "float32")


def quantized(matrix: np.ndarray, bits: int, block_size: int | None = None) -> Matrix:
    """A matrix in few bits.

    Args:
        matrix: float [out, in].
        bits: 4 or 8; or 32, which changes nothing.
        block_size: inputs that share a scale, a divisor of them; None for all.

    >>> quantized(np.array([[0.5, -1.0], [2.0, 0.0]], "float32"), 8).values.tolist()
    [[64, -127], [127, 0]]
    """
    if bits == 32:
        return Matrix(np.asarray(matrix, "float32"), np.zeros((len(matrix), 0), "float32"), 32, None)
    outputs, inputs = matrix.shape
    width = block_size or inputs
    blocks = matrix.reshape(-1, width)
    values = np.empty(blocks.shape, np.int8)
    scales = np.empty(len(blocks), np.float32)
    step = max(_CHUNK // width, 1)

    def fill(start: int) -> None:
        part = slice(start, start + step)
        values[part], scales[part] = _rounded(blocks[part].astype("float32"), bits, block_size is not None)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(fill, range(0, len(blocks), step)))
    return Matrix(values.reshape(outputs, inputs), scales.reshape(outputs, -1), bits, block_size)


def _rounded(blocks: np.ndarray, bits: int, narrow: bool) -> tuple[np.ndarray, np.ndarray]:
    """Integers [K, W] and scales [K] of blocks [K, W], of the scales tried those with the least error."""
    top = 2 ** (bits - 1) - 1
    largest = np.abs(blocks).max(axis=1)
    best = np.full(len(blocks), np.inf, "float32")
    values, scales = np.zeros(blocks.shape, np.int8), np.ones(len(blocks), "float32")
    for share in _SHARES[bits]:
        tried = _storable(largest * (share / top), narrow)
        integers = _integers(blocks, tried, top)
        # The scale that suits these integers best leaves them as they are.
        norm = np.einsum("KW,KW->K", integers, integers)
        fitted = np.einsum("KW,KW->K", blocks, integers) / np.maximum(norm, 1.0)
        tried = np.where(norm > 0, _storable(fitted, narrow), tried)
        difference = blocks - integers * tried[:, None]
        error = np.einsum("KW,KW->K", difference, difference)
        better = error < best
        best[better], scales[better] = error[better], tried[better]
        values[better] = integers[better]
    return values, scales


def _integers(blocks: np.ndarray, scales: np.ndarray, top: int) -> np.ndarray:
    """The nearest integers, as float32. Of 8 bits -128 is not used, of 4 bits -8 is."""
    scaled = np.rint(blocks / scales[:, None])
    return np.clip(scaled, -8 if top == 7 else -top, top, out=scaled)


def _storable(scales: np.ndarray, narrow: bool) -> np.ndarray:
    """The nearest scales that there are."""
    if not narrow:
        return np.maximum(scales, np.finfo("float32").tiny).astype("float32")
    return np.clip(scales, _LEAST_SCALE, 65280.0).astype(ml_dtypes.bfloat16).astype("float32")
