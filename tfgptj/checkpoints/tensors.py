"""What all weight files have in common: named tensors, each known by shape and dtype before its values are read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from tfgptj.errors import CheckpointError

# The dtypes that weights may be stored in; anything else in a checkpoint is not a weight of a GPT-J.
FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}

# Rows of a matrix that are read, converted and transposed at a time: few enough to stay in the processor's caches
# between these steps, and enough to fill whole cache lines of the transpose. 32 or 128 rows take a third longer.
BLOCK_ROWS = 64

# Bytes whose health is looked at in one go, twice: few enough to come from the processor's caches the second time.
_HEALTH_BYTES = 2**19

# Where TensorFlow wants tensors to begin; others it copies.
_ALIGNMENT = 64


class TensorSpec(NamedTuple):
    """Name, shape and dtype of a stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Number of elements; Python's integers do not overflow."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the values take."""
        return self.size * self.dtype.itemsize

    @property
    def description(self) -> str:
        """Dtype and shape, for messages."""
        return f"{self.dtype.name} {list(self.shape)}"


class TensorFile(Protocol):
    """A weight file, or several that together hold one checkpoint. Tensors are read when asked for, not before."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Free text that the writer left in the file."""

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor, without reading its values."""

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, in an array of their own."""

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """The values of a tensor or of some of its rows, a block at a time; each is overwritten by the next."""

    def sha256(self) -> str:
        """SHA-256 of the whole file, in hexadecimal digits."""

    def close(self) -> None:
        """Close the file."""


class Health(NamedTuple):
    """What a tensor's values tell of it; no format checks them."""

    finite: bool  # no NaN, no infinity
    zero: bool  # nothing but zeros


class HealthCheck:
    """Looks at blocks of floats on their way to where they are used, while they are in the processor's caches still."""

    def __init__(self) -> None:
        self._largest = 0
        self._infinity = 1

    @property
    def health(self) -> Health:
        """The verdict on all blocks so far."""
        return Health(finite=self._largest < self._infinity, zero=self._largest == 0)

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The blocks as they are, each looked at before it is passed on."""
        for block in blocks:
            self.look(block)
            yield block

    def look(self, block: np.ndarray) -> None:
        """Take a block of any shape and float dtype into account.

        The bits of a float without its sign are ordered as the values are, with infinity and the NaNs at the top. Read
        as integers, the largest of the negative floats is the largest of all without a sign, and the largest of the
        others is the largest with one. NumPy's `isfinite` takes many times as long at 16 bits, and tells of no zeros.
        """
        size = block.dtype.itemsize
        flat, sign = block.reshape(-1), 1 << (8 * size - 1)
        self._infinity = int(np.array(np.inf, block.dtype).view(f"u{size}"))
        for start in range(0, flat.size, _HEALTH_BYTES // size):
            part = flat[start : start + _HEALTH_BYTES // size]
            unsigned, signed = int(part.view(f"u{size}").max()), int(part.view(f"i{size}").max())
            self._largest = max(self._largest, unsigned & (sign - 1) if unsigned >= sign else 0, signed)


def health(blocks: Iterable[np.ndarray]) -> Health:
    """Whether a tensor's values are finite, and whether they are all zero.

    Args:
        blocks: its values, of a float dtype, some rows at a time.

    >>> health([np.zeros((2, 3), np.float32)]), health([np.ones(2, np.float16), np.array([np.nan, 1], np.float16)])
    (Health(finite=True, zero=True), Health(finite=False, zero=False))
    """
    check = HealthCheck()
    for block in blocks:
        check.look(block)
    return check.health


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised array that a TensorFlow tensor can take over as it is, without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def block_buffers(spec: TensorSpec, start: int, stop: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Memory for the rows of a tensor, a block at a time, and where in the tensor's bytes it begins.

    All blocks are the same memory. Of an empty tensor, which may have 2^60 rows, there are none.
    """
    count, row_shape = (spec.shape[0], spec.shape[1:]) if spec.shape else (1, ())
    stop = count if stop is None else stop
    if spec.size == 0:
        return
    buffer = np.empty((min(BLOCK_ROWS, stop - start), *row_shape), spec.dtype)
    for row in range(start, stop, BLOCK_ROWS):
        yield row * (spec.nbytes // count), buffer[: stop - row]


def assemble(
    blocks: Iterable[np.ndarray], spec: TensorSpec, dtype: np.dtype[Any], *, transpose: bool = False
) -> np.ndarray:
    """Put the rows of a tensor together, in another dtype and transposed if need be.

    Args:
        blocks: the values, some rows at a time.
        spec: name, shape and dtype of the tensor.
        dtype: the dtype wanted.
        transpose: whether the tensor's two dimensions are to be swapped.

    Raises:
        CheckpointError: if a value is too large for `dtype`.
    """
    result = aligned_empty(spec.shape[::-1] if transpose else spec.shape, dtype)
    rows, done = (result.T if transpose else result), 0
    try:
        with np.errstate(over="raise", invalid="ignore"):
            for block in blocks:
                rows[done : done + len(block)] = block.astype(dtype, copy=False)
                done += len(block)
    except FloatingPointError:
        raise CheckpointError(f"tensor {spec.name}: holds values too large for {dtype.name}; use a wider one") from None
    return result


def announced(
    path: str | os.PathLike[str], specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values, each checked to be what the specs say."""
    arrays = iter(tensors)
    for spec in specs:
        name, array = next(arrays, (None, None))
        if name is None or array is None or (name, array.shape, array.dtype) != spec:
            found = "nothing" if array is None else f"{name!r}, {array.dtype.name} {list(array.shape)}"
            raise CheckpointError(f"{path}: expected tensor {spec.name!r}, {spec.description}, got {found}")
        yield name, array
        del array  # before the next one is made
    if next(arrays, None) is not None:
        raise CheckpointError(f"{path}: got more tensors than the {len(specs):,} that were announced")
