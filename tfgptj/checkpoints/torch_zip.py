"""PyTorch's weight files (`pytorch_model.bin`, `.pt`), read without PyTorch.

Since release 1.6 `torch.save` writes a ZIP archive: `data.pkl`, a pickle that says which tensors there are and of which
storage each is a view, and one member with the values of each storage. The archive is read by `stored_zip.py` and the
pickle by `restricted_pickle.py`, both strictly; no code in a file is ever run. What older releases wrote is refused.

The values' checksums are compared whenever all values of a storage are read, as they are for all tensors but views of a
part. Damaged disks and downloads do occur, and it takes only a quarter of a second per GB, on the thread that reads.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfgptj import limits
from tfgptj.checkpoints.raw_file import IMPOSTORS, RawFile, bytes_of
from tfgptj.checkpoints.restricted_pickle import StoredTensor, load_pickle
from tfgptj.checkpoints.stored_zip import Member, read_members
from tfgptj.checkpoints.tensors import TensorSpec, aligned_empty, block_buffers
from tfgptj.errors import CheckpointFormatError, UnsafeCheckpointError

_ZIP = b"PK\x03\x04"
_CONVERT = "never read, because it could run code; if you trust it, load it with PyTorch and save it again"

# Bytes that are read and then summed up at a time: few enough to be in the processor's cache still.
_CHUNK = 2**19


class _Place(NamedTuple):
    """Where the values of a tensor are."""

    member: Member
    offset: int  # of the first value, in bytes from the member's start
    nbytes: int  # up to the end of the last value
    strides: tuple[int, ...] | None  # in bytes; None if the values are in order, one after the other


class TorchZipFile(RawFile):
    """One of PyTorch's weight files, open for reading, by several threads if need be.

    It must hold a dict of tensors, or one under the key "state_dict" of another dict. Numbers and text among the
    tensors are left out.

    Args:
        path: the file.

    Raises:
        UnsafeCheckpointError: if the file could run code when loaded with PyTorch; naming the function or class.
        CheckpointFormatError: if the file is damaged or no such file, saying what is wrong with it.
        CheckpointError: if the file cannot be opened or read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "a PyTorch file")

    def read(self, name: str) -> np.ndarray:
        spec, place = self.spec(name), self._places[name]
        if place.strides is None:
            return super().read(name)
        values = np.empty(place.nbytes // spec.dtype.itemsize, spec.dtype)
        self._fill(name, 0, values)
        array = aligned_empty(spec.shape, spec.dtype)
        array[...] = np.lib.stride_tricks.as_strided(values, spec.shape, place.strides, writeable=False)
        return array

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """The values of a tensor, some rows at a time; all at once where they are not in order in the file.

        Raises:
            CheckpointError: as for :meth:`read`; after a wrong checksum the last rows have not been given.
        """
        spec, place = self.spec(name), self._places[name]
        if place.strides is not None:
            yield self.read(name)[start:stop]
            return
        checksum = 0
        for skip, block in block_buffers(spec, start, stop):
            checksum = self._read_part(name, skip, block, checksum)
            if start == 0 and skip + block.nbytes == place.nbytes:
                self._check_sum(name, checksum)
            yield block

    def _fill(self, name: str, skip: int, out: np.ndarray) -> None:
        self._check_sum(name, self._read_part(name, skip, out, 0))

    def _read_part(self, name: str, done: int, out: np.ndarray, checksum: int) -> int:
        """Read on after what was done already; the checksum of both."""
        place, memory = self._places[name], bytes_of(out)
        start = place.member.start + place.offset + done
        for first in range(0, len(memory), _CHUNK):
            chunk = memory[first : first + _CHUNK]
            self._read_bytes(start + first, chunk, f"tensor {name!r:.200}")
            checksum = zlib.crc32(chunk, checksum)
        if self._is_swapped:
            out.view(f"u{out.itemsize}").byteswap(inplace=True)
        return checksum

    def _check_sum(self, name: str, checksum: int) -> None:
        member, _, nbytes, _ = self._places[name]
        if member.crc not in (None, checksum) and nbytes == member.size:
            raise CheckpointFormatError(
                f"{self.path}: tensor {name!r:.200}: damaged: its checksum is {checksum:08x}, expected {member.crc:08x}"
            )

    # What is read when the file is opened

    def _read_header(self) -> None:
        self._check_magic()
        members = read_members(self.path, self._size(), self._bytes)
        root = next(iter(members), "").split("/")[0]
        pickles = [name for name in members if name.split("/")[-1] == "data.pkl"]
        if pickles != [f"{root}/data.pkl"] or not all(name.startswith(f"{root}/") for name in members):
            raise CheckpointFormatError(
                f"{self.path}: a ZIP archive, but none of PyTorch's: it must hold one directory, with one data.pkl"
            )
        self._is_swapped = self._read_byte_order(members.get(f"{root}/byteorder"))
        text = self._read_small(members[pickles[0]], "data.pkl", limits.MAX_PICKLE_BYTES)
        tensors = _find_tensors(self.path, load_pickle(text, f"{self.path}: data.pkl"))
        self._metadata = {"format": "pt"}  # names and layout are PyTorch's
        self._specs, self._places = {}, {}
        for name, tensor in tensors.items():
            where = f"{self.path}: tensor {name!r:.200}"
            self._places[name] = _place(where, tensor, members.get(f"{root}/data/{tensor.storage.key}"))
            self._specs[name] = TensorSpec(name, tensor.shape, tensor.storage.dtype)

    def _check_magic(self) -> None:
        start = self._bytes(0, min(self._size(), 512))
        if not start:
            raise CheckpointFormatError(f"{self.path}: the file is empty")
        if start.startswith(_ZIP):
            return
        if start.startswith(b"\x80"):
            raise UnsafeCheckpointError(f"{self.path}: a bare pickle, as PyTorch wrote before release 1.6: {_CONVERT}")
        if start[257:262] == b"ustar":
            raise UnsafeCheckpointError(f"{self.path}: a TAR archive, as PyTorch's first releases wrote: {_CONVERT}")
        if start[8:9] == b"{":
            raise CheckpointFormatError(f"{self.path}: a safetensors file under a wrong name")
        for magic, description in IMPOSTORS:
            if start.startswith(magic):
                raise CheckpointFormatError(f"{self.path}: {description}")
        raise CheckpointFormatError(f"{self.path}: not a PyTorch file: begins with {start[:8]!r}, not with {_ZIP!r}")

    def _read_byte_order(self, member: Member | None) -> bool:
        """Whether the values' bytes are in another order than this processor's."""
        order = b"little" if member is None else self._read_small(member, "byteorder", 16)
        if order not in (b"little", b"big"):
            raise CheckpointFormatError(f"{self.path}: byteorder must be little or big, got {order!r}")
        return order.decode() != sys.byteorder

    def _read_small(self, member: Member, name: str, most: int) -> bytes:
        if member.size > most:
            raise CheckpointFormatError(f"{self.path}: {name} has {member.size:,} bytes, at most {most:,} are read")
        content = self._bytes(member.start, member.size)
        if member.crc not in (None, zlib.crc32(content)):
            raise CheckpointFormatError(f"{self.path}: {name} is damaged: its checksum is not {member.crc:08x}")
        return content

    def _bytes(self, start: int, count: int) -> bytes:
        content = bytearray(count)
        self._read_bytes(start, memoryview(content), "the ZIP archive")
        return bytes(content)


def _find_tensors(path: Path, value: Any) -> dict[str, StoredTensor]:
    """The tensors of a state dict, by name."""
    if type(value) is dict and type(value.get("state_dict")) is dict:
        value = value["state_dict"]
    if type(value) is not dict:
        raise CheckpointFormatError(f"{path}: data.pkl holds {type(value).__name__}, expected a dict of tensors")
    tensors = {}
    for name, entry in value.items():
        if type(entry) is StoredTensor and type(name) is str:
            tensors[name] = entry
        elif type(entry) not in (bool, int, float, str, type(None)):
            raise CheckpointFormatError(
                f"{path}: entry {name!r:.200} is of type {type(entry).__name__}; "
                "expected tensors, each under its name, and perhaps numbers and text"
            )
    return tensors


def _place(where: str, tensor: StoredTensor, member: Member | None) -> _Place:
    """Where a tensor's values are, after a check that they lie within the storage and the storage in the file."""
    storage, itemsize = tensor.storage, tensor.storage.dtype.itemsize
    if member is None:
        raise CheckpointFormatError(f"{where}: the archive lacks its values, data/{storage.key:.200}")
    if member.size != storage.size * itemsize:
        raise CheckpointFormatError(
            f"{where}: {storage.size:,} values of {storage.dtype.name} take {storage.size * itemsize:,} bytes, "
            f"but data/{storage.key:.200} has {member.size:,}"
        )
    if math.prod(max(size, 1) for size in tensor.shape) * itemsize > limits.MAX_TENSOR_BYTES:
        raise CheckpointFormatError(f"{where}: the sizes {tensor.shape!r:.80} are too large for any array")
    span, in_order = _span(where, tensor)
    if tensor.offset + span > storage.size:
        raise CheckpointFormatError(
            f"{where}: its values reach from {tensor.offset:,} to {tensor.offset + span:,}, "
            f"but its storage has {storage.size:,}"
        )
    # Where a size is 1, there is no step to a next value, and the stride may be any number.
    steps = zip(tensor.strides, tensor.shape, strict=True)
    strides = None if in_order else tuple(stride * itemsize if size > 1 else 0 for stride, size in steps)
    return _Place(member, tensor.offset * itemsize, span * itemsize, strides)


def _span(where: str, tensor: StoredTensor) -> tuple[int, bool]:
    """How many values there are from a tensor's first to its last, and whether these are its values in their order."""
    if 0 in tensor.shape:
        return 0, True
    steps = [(stride, size) for stride, size in zip(tensor.strides, tensor.shape, strict=True) if size > 1]
    span = 1
    for stride, size in sorted(steps):
        if stride < span:  # it must lead beyond all that the shorter ones reach together
            raise CheckpointFormatError(f"{where}: the strides {tensor.strides!r:.80} make its values overlap")
        span += stride * (size - 1)
    return span, span == math.prod(tensor.shape) and steps == sorted(steps, reverse=True)
