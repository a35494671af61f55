"""Matrices in few bits: integers and a scale for each output, or for each block of an output's inputs.

A scale is searched that leaves the least squared error, which at 4 bits cuts off the largest numbers of a block rather
than round all others more coarsely; then it is fitted to the integers that it made. At run time nothing of that shows.

Where it is known what a matrix will be multiplied with, its columns are rounded one after the other, and what one of
them is off by is made up for by those behind it, as far as their inputs go together: what is small is then the error of
the products, not that of the weights.

Source: GPTQ (arXiv 2210.17323), in the form of LDLQ (arXiv 2307.13304).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import ml_dtypes
import numpy as np
from threadpoolctl import ThreadpoolController

# The largest number of a block by the scale that is tried first; less of it is cut off with each next one.
_SHARES = {8: (1.0, 0.97), 4: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)}

# The kernels hold scales of blocks in bfloat16, the file in float16: what both have is what is rounded with.
_LEAST_SCALE = 2.0**-14
_TINY = np.finfo("float32").tiny

# Numbers that are worked on at once: few enough to stay in the processor's caches.
_CHUNK = 2**17
_THREADS = 2

# Inputs that make up for each other. More are better by little, and take longer by as much as they are more.
_GROUP = 2048
# What is added to the squares of inputs, as a share of their mean: always, and times inputs by samples, since what few
# of these have in common is chance.
_DAMPING, _DAMPING_FOR_CHANCE = 0.01, 0.1
# Columns without a scale in common, which pass on their errors one by one; those behind them take all at once.
_STEP = 32
# Outputs that a thread rounds at once.
_OUTPUTS = 2048

Result = TypeVar("Result")


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


def input_factors(inputs: np.ndarray) -> list[np.ndarray]:
    """How the inputs of a matrix go together, for :func:`quantized`.

    Args:
        inputs: float32 [K, in], some that are typical.

    Returns:
        For each group of them an upper triangle R [G, G]: a column of errors e [G] makes the products err by |eᵀ R|² on
        average.
    """

    def factor(start: int) -> np.ndarray:
        part = inputs[:, start : start + _GROUP]
        squares = part.T @ part / np.float32(len(part))
        mean = float(squares.diagonal().mean()) or 1.0
        share = _DAMPING + _DAMPING_FOR_CHANCE * len(squares) / len(part)
        squares[np.diag_indices_from(squares)] += np.float32(share * mean)
        return np.ascontiguousarray(np.linalg.cholesky(squares[::-1, ::-1])[::-1, ::-1])

    return _in_threads(factor, range(0, inputs.shape[1], _GROUP))


def quantized(
    matrix: np.ndarray, bits: int, block_size: int | None = None, factors: Sequence[np.ndarray] | None = None
) -> Matrix:
    """A matrix in few bits.

    Args:
        matrix: float [out, in].
        bits: 4 or 8; or 32, which changes nothing.
        block_size: inputs that share a scale, a divisor of them; None for all.
        factors: how its inputs go together, see :func:`input_factors`; None if nothing is known of them.

    >>> quantized(np.array([[0.5, -1.0], [2.0, 0.0]], "float32"), 8).values.tolist()
    [[64, -127], [127, 0]]
    """
    if bits == 32:
        return Matrix(np.asarray(matrix, "float32"), np.zeros((len(matrix), 0), "float32"), 32, None)
    outputs, inputs = matrix.shape
    width = block_size or inputs
    if factors is None:
        rows, step = matrix.reshape(-1, width), max(_CHUNK // width, 1)
        found = partial(_rounded, bits=bits, narrow=block_size is not None)
    else:
        rows, step = matrix, _OUTPUTS
        known = [(factor.diagonal() ** 2, (factor / factor.diagonal()).T.copy()) for factor in factors]
        found = partial(_compensated, bits=bits, block_size=block_size, known=known)
    values = np.empty(rows.shape, np.int8)
    scales = np.empty((len(rows), outputs * inputs // (width * len(rows))), np.float32)

    def fill(start: int) -> None:
        part = slice(start, start + step)
        values[part], some = found(rows[part].astype("float32"))
        scales[part] = some.reshape(len(some), -1)

    _in_threads(fill, range(0, len(rows), step))
    return Matrix(values.reshape(outputs, inputs), scales.reshape(outputs, -1), bits, block_size)


def _in_threads(work: Callable[[int], Result], starts: range) -> list[Result]:
    """What is made of each part; NumPy's library gets no threads of its own, which would wait for these."""
    with ThreadpoolController().limit(limits=1, user_api="blas"), ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, starts))


def _rounded(
    blocks: np.ndarray, bits: int, narrow: bool, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Integers [K, W] and scales [K] of blocks [K, W], of the scales tried those with the least error.

    The squared errors of a block are added up, each times its weight [W] if there are any.
    """
    top = 2 ** (bits - 1) - 1
    largest = np.abs(blocks).max(axis=1)
    best = np.full(len(blocks), np.inf, "float32")
    values, scales = np.zeros(blocks.shape, np.int8), np.ones(len(blocks), "float32")
    for share in _SHARES[bits]:
        tried = _storable(largest * (share / top), narrow)
        integers = _integers(blocks, tried[:, None], top)
        # The scale that suits these integers best leaves them as they are.
        norm = _summed(integers, integers, weights)
        fitted = _summed(blocks, integers, weights) / np.maximum(norm, _TINY)
        tried = np.where(norm > 0, _storable(fitted, narrow), tried)
        difference = blocks - integers * tried[:, None]
        error = _summed(difference, difference, weights)
        better = error < best
        best[better], scales[better] = error[better], tried[better]
        values[better] = integers[better]
    return values, scales


def _summed(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Of [K, W] the products of each with each, added up [K]."""
    return np.einsum("KW,KW->K", x, y) if weights is None else (x * y) @ weights


def _compensated(
    matrix: np.ndarray, bits: int, block_size: int | None, known: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Integers [C, in] and scales [C, blocks] of some outputs [C, in], column by column.

    Of each group of inputs their weights [G] are known, and a lower triangle [G, G]: what each takes over of the errors
    of those in front of it.
    """
    top, step, values, scales = 2 ** (bits - 1) - 1, block_size or _STEP, np.empty(matrix.T.shape, np.int8), []
    if block_size is None:
        scales.append(_rounded(matrix, bits, False, np.concatenate([weights for weights, _ in known]))[1])
    first = 0
    for weights, taken in known:
        columns = np.ascontiguousarray(matrix[:, first : first + len(taken)].T)  # [G, C]
        errors = np.empty_like(columns)
        for start in range(0, len(taken), step):
            part = slice(start, start + step)
            wanted = columns[part] + taken[part, :start] @ errors[:start]  # [W, C]
            if block_size is not None:
                scales.append(_rounded(np.ascontiguousarray(wanted.T), bits, True, weights[part])[1])
            for i, column in enumerate(wanted, start):
                integers = _integers(column + taken[i, start:i] @ errors[start:i], scales[-1], top)
                errors[i] = columns[i] - integers * scales[-1]
                values[first + i] = integers
        first += len(taken)
    return values.T, np.stack(scales, axis=1)


def _integers(blocks: np.ndarray, scales: np.ndarray, top: int) -> np.ndarray:
    """The nearest integers, as float32. Of 8 bits -128 is not used, of 4 bits -8 is."""
    scaled = np.rint(blocks / scales)
    return np.clip(scaled, -8 if top == 7 else -top, top, out=scaled)


def _storable(scales: np.ndarray, narrow: bool) -> np.ndarray:
    """The nearest scales that there are."""
    if not narrow:
        return np.maximum(scales, _TINY).astype("float32")
    return np.clip(scales, _LEAST_SCALE, 65280.0).astype(ml_dtypes.bfloat16).astype("float32")
