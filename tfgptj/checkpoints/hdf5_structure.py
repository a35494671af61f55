"""Where an HDF5 file holds its tensors: all that its library is asked, and what is checked of its answers.

The library sees the structure of a file, never a value. Each link is looked at before what it leads to, and each
dataset's properties before anything else of it: so nothing in a file can make the library load a filter, open another
file or fill memory.

Source: the HDF5 File Format Specification, version 3.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s, h5t, h5z

from tfgptj import limits
from tfgptj.checkpoints.raw_file import IMPOSTORS
from tfgptj.checkpoints.tensors import TensorSpec
from tfgptj.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError

DTYPES: dict[np.dtype[Any], h5t.TypeID] = {
    np.dtype(np.float32): h5t.IEEE_F32LE,
    np.dtype(np.float16): h5t.IEEE_F16LE,
    np.dtype(np.float64): h5t.IEEE_F64LE,
}
_OTHER_TYPES = {
    h5t.INTEGER: "integers",
    h5t.FLOAT: "floats of another form",
    h5t.STRING: "text",
    h5t.OPAQUE: "opaque bytes, as which h5py stores bfloat16",
    h5t.COMPOUND: "records",
    h5t.REFERENCE: "references",
    h5t.ENUM: "an enumeration",
    h5t.VLEN: "sequences",
    h5t.ARRAY: "arrays",
}

SUPERBLOCK_BYTES = 52  # of what is looked at
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Where the superblock, by its version, has the size of addresses, the address where the file begins, and where it ends.
_SUPERBLOCKS = {0: (13, 24, 40), 1: (13, 28, 44), 2: (9, 12, 28), 3: (9, 12, 28)}

_FILTERS = {h5z.FILTER_DEFLATE: "gzip", h5z.FILTER_SHUFFLE: "shuffle"}
_MAX_GZIP_RATIO = 1032  # zlib's own limit: 258 bytes of output for two bits


class Piece(NamedTuple):
    """Where a tensor's values lie: all of them, or one chunk."""

    start: int
    nbytes: int
    corner: tuple[int, ...]  # the chunk's first element
    skipped: int  # bit i: filter i was not applied to this chunk


class StoredTensor(NamedTuple):
    """A tensor as the file holds it."""

    spec: TensorSpec
    pieces: list[Piece]  # none, where there are no values
    chunk: tuple[int, ...] | None = None  # shape of a chunk; None: the values lie in one piece, as they are
    filters: tuple[int, ...] = ()  # in the order in which they were applied


class LibraryFile:
    """A file as the HDF5 library is given it: one that never fails.

    After an exception in one of these methods the library could not even be closed. So that of a failing file is kept
    here, for whoever has closed it; and :func:`signals_deferred` lets no signal's handler raise one.

    Args:
        file: the file.
        size: its length, where it is read; to go to an address far behind it would be another error.
    """

    def __init__(self, file: Any, size: int | None = None) -> None:
        self._file = file
        self._size = size
        self.error: OSError | None = None

    def read(self, size: int) -> bytes:
        """Bytes from here on; h5py knows a file by this method, and calls the next."""
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def readinto(self, buffer: Any) -> int:
        """Fill memory with bytes from here on, with zeros where there are none."""
        memory = memoryview(buffer)
        count = self._attempt(self._file.readinto, memory)
        memory[count:] = bytes(len(memory) - count)
        return len(memory)

    def write(self, data: Any) -> int:
        """Write bytes here."""
        self._attempt(self._file.write, data)
        return len(data)

    def seek(self, place: int, whence: int = 0) -> int:
        """Go to a place, or to the end of the file if that comes first."""
        return self._attempt(self._file.seek, place if self._size is None else min(place, self._size), whence)

    def tell(self) -> int:
        """The place."""
        return self._attempt(self._file.tell)

    def truncate(self, size: int) -> int:
        """Set the file's length."""
        return self._attempt(self._file.truncate, size)

    def flush(self) -> None:
        """Hand over what is buffered."""
        self._attempt(self._file.flush)

    def _attempt(self, act: Any, *arguments: Any) -> int:
        try:
            return 0 if self.error else act(*arguments) or 0
        except OSError as error:
            self.error = error.with_traceback(None)  # its frames would keep this object alive beyond the library
            return 0


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Let what Python does at a signal, such as raise KeyboardInterrupt, wait until this is left.

    Python runs a signal's handler in the main thread, at the next of its instructions: while the library is at work,
    that is the first one of a method that the library calls.
    """
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in signal.valid_signals()}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}
    waiting: list[int] = []
    try:
        for number in handlers:
            signal.signal(number, lambda caught, frame: waiting.append(caught))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)


def check_superblock(path: Path, head: bytes, size: int) -> None:
    """Check that a file begins as HDF5 does, and ends where it says.

    Args:
        path: the file, for messages.
        head: its first :data:`SUPERBLOCK_BYTES`, or all that there are.
        size: its length.

    Raises:
        CheckpointFormatError: if it does not.
    """
    if size == 0:
        raise CheckpointFormatError(f"{path}: the file is empty")
    if not head.startswith(_SIGNATURE):
        for magic, description in IMPOSTORS:
            if head.startswith(magic) and not _SIGNATURE.startswith(magic):
                raise CheckpointFormatError(f"{path}: {description}")
        raise CheckpointFormatError(f"{path}: not an HDF5 file: it begins with {head[:8]!r}, not with {_SIGNATURE!r}")
    if len(head) < SUPERBLOCK_BYTES:
        raise CheckpointFormatError(f"{path}: cut short: {size:,} bytes are no HDF5 file")
    version = head[len(_SIGNATURE)]
    if version not in _SUPERBLOCKS:
        raise CheckpointFormatError(f"{path}: an HDF5 superblock of version {version}; known are 0 to 3")
    address_size, *places = _SUPERBLOCKS[version]
    begin, end = (int.from_bytes(head[place : place + 8], "little") for place in places)
    if head[address_size] != 8 or begin != 0:
        raise CheckpointFormatError(f"{path}: the HDF5 superblock is damaged, or has addresses of an unknown form")
    if end != size:
        fault = "cut short" if end > size else "has bytes after its end"
        raise CheckpointFormatError(f"{path}: {fault}: {end:,} bytes expected, {size:,} found")


def find_tensors(path: Path, file: LibraryFile, size: int) -> dict[str, StoredTensor]:
    """All tensors of a file by name; nothing of their values is read.

    Args:
        path: the file, for messages.
        file: the file itself, whose superblock has been checked.
        size: its length.

    Raises:
        CheckpointFormatError: if it is damaged, or its values are no tensors of floats.
        UnsafeCheckpointError: if it leads to other files, or wants filters from a plugin.
        CheckpointError: if it cannot be read.
    """
    found: dict[str, StoredTensor] = {}
    room = limits.MAX_HDF5_CHUNKS
    try:
        with signals_deferred(), h5py.File(file, "r") as h5:
            for place, dataset in _datasets(path, h5g.open(h5.id, b"/")):
                name = _tensor_name(place)
                if name in found:
                    raise CheckpointFormatError(f"{path}: two datasets stand for tensor {name!r:.200}")
                found[name] = _locate(f"{path}: {place!r:.200}", name, dataset, room)
                room -= len(found[name].pieces) if found[name].chunk else 0
    except CheckpointError:
        raise
    except Exception as error:  # h5py raises errors of many kinds
        raise CheckpointFormatError(f"{path}: the HDF5 library finds it damaged: {error}") from error
    finally:
        if file.error:  # whatever the library made of it
            raise CheckpointError(f"{path}: the header could not be read: {file.error.strerror}") from file.error
    _check_disjoint(path, found, size)
    return found


def _tensor_name(place: str) -> str:
    """The tensor that a path in a file stands for, whether that is a whole file or a shard."""
    parts = place.split("/")
    return "/".join(parts[2:] if len(parts) > 2 and parts[0] == parts[2] else parts)


def _datasets(path: Path, root: h5g.GroupID) -> Iterator[tuple[str, h5d.DatasetID]]:
    """All datasets with their paths. Nothing is opened before the link to it is known to be harmless."""
    seen, count = {h5o.get_info(root).addr}, 0
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        above = waiting.pop()
        group = h5g.open(root, "/".join(above).encode() or b".")  # looked at already, all the way
        count += group.get_num_objs()
        if count > limits.MAX_HDF5_OBJECTS or len(above) > limits.MAX_HDF5_DEPTH:
            raise CheckpointFormatError(
                f"{path}: more than {limits.MAX_HDF5_OBJECTS:,} groups and datasets, or groups more than "
                f"{limits.MAX_HDF5_DEPTH} deep: these are not the weights of a GPT-J"
            )
        for link in list(group):
            parts = (*above, link.decode())
            place = "/".join(parts)
            if group.links.get_info(link).type != h5l.TYPE_HARD:
                raise UnsafeCheckpointError(f"{path}: {place!r:.200} is a link by name, which could lead anywhere")
            address = h5o.get_info(group, link).addr
            if address in seen:
                raise UnsafeCheckpointError(f"{path}: {place!r:.200} is a second link to the same object")
            seen.add(address)
            child = h5o.open(group, link)
            if isinstance(child, h5g.GroupID):
                waiting.append(parts)
            elif isinstance(child, h5d.DatasetID):
                yield place, child
            else:
                raise CheckpointFormatError(f"{path}: {place!r:.200} is neither a group nor a dataset")


def _locate(where: str, name: str, dataset: h5d.DatasetID, room: int) -> StoredTensor:
    """Where the values of a dataset lie, after a check that all are there, in this file, and not too well packed.

    They may be in as many chunks as there is room for.
    """
    properties = dataset.get_create_plist()
    layout = properties.get_layout()
    if layout == h5d.VIRTUAL or properties.get_external_count():
        raise UnsafeCheckpointError(f"{where} has its values in other files, which are never opened")
    filters = tuple(properties.get_filter(number)[0] for number in range(properties.get_nfilters()))
    if not set(filters) <= set(_FILTERS) or len(set(filters)) != len(filters):
        known = " and ".join(f"{number} ({text})" for number, text in _FILTERS.items())
        raise UnsafeCheckpointError(f"{where} has the filters {list(filters)}; only {known} are taken, once each")
    spec = TensorSpec(name, _shape(where, dataset), _dtype(where, dataset))
    if layout == h5d.CHUNKED:
        return _locate_chunks(where, spec, properties.get_chunk(), filters, dataset, room)
    if layout != h5d.CONTIGUOUS:
        raise CheckpointFormatError(f"{where} has its values in its header; rewrite the file with contiguous datasets")
    if spec.nbytes == 0:
        return StoredTensor(spec, [])
    start = dataset.get_offset()
    stored = 0 if start is None else dataset.get_storage_size()
    if stored != spec.nbytes:
        raise CheckpointFormatError(f"{where} takes {spec.nbytes:,} bytes, but {stored:,} are stored")
    return StoredTensor(spec, [Piece(start, stored, (), 0)])


def _shape(where: str, dataset: h5d.DatasetID) -> tuple[int, ...]:
    space = dataset.get_space()
    if space.get_simple_extent_type() not in (h5s.SIMPLE, h5s.SCALAR):
        raise CheckpointFormatError(f"{where} has no shape")
    shape: tuple[int, ...] = space.get_simple_extent_dims()
    if math.prod(max(size, 1) for size in shape) * 8 > limits.MAX_TENSOR_BYTES:  # of the widest dtype
        raise CheckpointFormatError(f"{where}: the sizes {list(shape)} are too large for any array")
    return shape


def _dtype(where: str, dataset: h5d.DatasetID) -> np.dtype[Any]:
    stored = dataset.get_type()
    for dtype, known in DTYPES.items():
        if stored.equal(known):
            return dtype
    kind = _OTHER_TYPES.get(stored.get_class(), "no numbers")
    raise CheckpointFormatError(f"{where} holds {kind}; expected little-endian float16, float32 or float64")


def _locate_chunks(
    where: str, spec: TensorSpec, chunk: tuple[int, ...], filters: tuple[int, ...], dataset: h5d.DatasetID, room: int
) -> StoredTensor:
    if spec.nbytes == 0:
        return StoredTensor(spec, [], chunk, filters)
    axes = list(zip(spec.shape, chunk, strict=True))
    if any(step > size for size, step in axes):
        raise CheckpointFormatError(f"{where} has chunks of {list(chunk)}, larger than its shape {list(spec.shape)}")
    expected, stored = math.prod(math.ceil(size / step) for size, step in axes), dataset.get_num_chunks()
    if stored != expected:
        raise CheckpointFormatError(f"{where} has {expected:,} chunks, but {stored:,} are stored")
    if stored > room:
        raise CheckpointFormatError(
            f"{where} has {stored:,} chunks; at most {limits.MAX_HDF5_CHUNKS:,} are read from a file; rewrite it with "
            "larger chunks, or with contiguous datasets"
        )
    nbytes = math.prod(chunk) * spec.dtype.itemsize
    # What cannot be compressed grows by less than a thousandth and a few bytes.
    longest = nbytes + nbytes // 1000 + 64 if h5z.FILTER_DEFLATE in filters else nbytes
    shortest = nbytes // _MAX_GZIP_RATIO if h5z.FILTER_DEFLATE in filters else nbytes
    pieces: dict[tuple[int, ...], Piece] = {}

    def add(info: Any) -> None:
        corner = info.chunk_offset
        inside = all(start < size and start % step == 0 for start, (size, step) in zip(corner, axes, strict=True))
        if not inside or corner in pieces or info.byte_offset is None or not shortest <= info.size <= longest:
            raise CheckpointFormatError(f"{where}: the chunk at {list(corner)}, {info.size:,} bytes, is damaged")
        pieces[corner] = Piece(info.byte_offset, info.size, corner, info.filter_mask)

    dataset.chunk_iter(add)
    return StoredTensor(spec, list(pieces.values()), chunk, filters)


def _check_disjoint(path: Path, tensors: dict[str, StoredTensor], size: int) -> None:
    """No value is taken for two tensors, or from beyond the end: so a file holds no more than it is long."""
    end, last = 0, ""
    for piece, name in sorted((piece, name) for name, stored in tensors.items() for piece in stored.pieces):
        if piece.start < end:
            raise CheckpointFormatError(f"{path}: the values of {name!r:.200} overlap those of {last!r:.200}")
        end, last = piece.start + piece.nbytes, name
    if end > size:
        raise CheckpointFormatError(f"{path}: the values of {last!r:.200} go on after the end of the file")
