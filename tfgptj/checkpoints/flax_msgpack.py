"""flax_model.msgpack, the file of Hugging Face's Flax classes: read strictly, and written one tensor at a time.

The file is a msgpack map of maps, whose keys joined by "/" are the names. An array is an extension of type 1 that holds
a msgpack list of its shape, its dtype's name and its bytes; a NumPy scalar is the same of type 3. An array of more than
1 GiB is a map of its shape and of flat chunks. All else that msgpack knows is refused.

When a file is opened, these headers are read and the values stepped over. A library for msgpack would need the file in
memory, and each value a second time.

Source: the msgpack specification, and the comments in flax/serialization.py.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from tfgptj import limits
from tfgptj.checkpoints.raw_file import IMPOSTORS, RawFile, bytes_of
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorSpec, announced
from tfgptj.errors import CheckpointError, CheckpointFormatError
from tfgptj.files import replaced_file

_Value = TypeVar("_Value")

_ARRAY, _SCALAR = 1, 3  # Flax's extension types
_TRUE = b"\xc3"
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK_BYTES = 2**30  # what an array may have before it is parted

_WINDOW = 512  # bytes read at a time; more than the headers between the values of two tensors


class _Header(NamedTuple):
    """How msgpack begins a value: with a byte that tells its size, or with one after which the size follows."""

    meaning: str
    sizes: dict[int, int]  # by first byte
    widths: dict[int, int]  # of the size that follows, in bytes, by first byte


_MAP = _Header("a map", {0x80 + size: size for size in range(16)}, {0xDE: 2, 0xDF: 4})
_LIST = _Header("a list", {0x90 + size: size for size in range(16)}, {0xDC: 2, 0xDD: 4})
_TEXT = _Header("text", {0xA0 + size: size for size in range(32)}, {0xD9: 1, 0xDA: 2, 0xDB: 4})
_BYTES = _Header("bytes", {}, {0xC4: 1, 0xC5: 2, 0xC6: 4})
_EXTENSION = _Header("an array", {0xD4 + power: 2**power for power in range(5)}, {0xC7: 1, 0xC8: 2, 0xC9: 4})
_SIZE = _Header("a size", {size: size for size in range(128)}, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8})  # the value itself


class _Stored(NamedTuple):
    """A tensor, and where its values lie: starts and lengths of what makes them up, one after the other."""

    spec: TensorSpec
    pieces: list[tuple[int, int]]


class FlaxFile(RawFile):
    """One flax_model.msgpack, or a shard of one, open for reading, by several threads if need be.

    Args:
        path: the file.

    Raises:
        CheckpointFormatError: if the file is damaged or no Flax file of weights, saying what is wrong with it.
        CheckpointError: if the file cannot be opened or read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "a Flax msgpack file")

    def _fill(self, name: str, skip: int, out: np.ndarray) -> None:
        memory = bytes_of(out)
        for start, nbytes in self._stored[name].pieces:
            part = memory[: max(0, nbytes - skip)]
            self._read_bytes(start + skip, part, f"tensor {name!r}")
            memory = memory[len(part) :]
            skip = max(0, skip - nbytes)

    def _read_header(self) -> None:
        size = self._size()
        if size == 0:
            raise CheckpointFormatError(f"{self.path}: the file is empty")
        head = bytearray(min(size, 32))
        self._read_bytes(0, memoryview(head), "the header")
        for magic, description in IMPOSTORS:
            # Flax writes the single byte of an empty map where a model's first tensor is larger than a shard.
            if head.startswith(magic) and size > 1:
                raise CheckpointFormatError(f"{self.path}: {description}")
        scan = _Scan(self.path, size, self._read_bytes)
        scan.read_map("")
        if scan.place != size:
            raise CheckpointFormatError(
                f"{self.path}: has bytes after the last tensor: {scan.place:,} bytes expected, {size:,} found"
            )
        self._stored = scan.found
        self._specs = {name: stored.spec for name, stored in scan.found.items()}
        self._metadata = {"format": "flax"}


class _Scan:
    """One walk through a file's headers, from its first byte on."""

    def __init__(self, path: Path, size: int, read: Callable[[int, memoryview, str], None]) -> None:
        self._path, self._size, self._read = path, size, read
        self._window, self._window_start = b"", 0
        self._keys = 0
        self.place = 0
        self.found: dict[str, _Stored] = {}

    def read_map(self, name: str) -> None:
        """Find the tensors in the map that begins here, and in those within it."""
        count, keys = self._read_count(), set()
        for number in range(count):
            key = self._read_text()
            if key == _CHUNKED and number == 0 and name:
                self.found[name] = self._read_chunked(name, count)
                return
            if not key or "/" in key or key in keys:
                raise self._fault(f"{name!r:.200}: the key {key!r:.80} comes twice, is empty or has a slash")
            keys.add(key)
            child = f"{name}/{key}" if name else key
            if len(child) > limits.MAX_MSGPACK_NAME:
                raise self._fault(f"{child!r:.80}: names have {limits.MAX_MSGPACK_NAME} characters at most")
            first = self._peek()
            if first in _MAP.sizes or first in _MAP.widths:
                self.read_map(child)
            else:
                self.found[child] = self._read_array(child)

    def _read_array(self, name: str) -> _Stored:
        size = self._read_size(_EXTENSION, name)
        kind = self._take(1)[0]
        if kind not in (_ARRAY, _SCALAR):
            raise self._fault(f"tensor {name!r}: extension of type {kind}; known are {_ARRAY} and {_SCALAR}")
        stop = self.place + size
        if self._read_size(_LIST, name) != 3:
            raise self._fault(f"tensor {name!r}: expected shape, dtype and bytes")
        dimensions = self._read_size(_LIST, name)
        if dimensions > limits.MAX_DIMENSIONS:
            raise self._fault(f"tensor {name!r}: {dimensions:,} dimensions, more than {limits.MAX_DIMENSIONS}")
        shape = tuple(self._read_size(_SIZE, name) for _ in range(dimensions))
        dtype = self._read_text()
        if dtype not in FLOAT_DTYPES:
            raise self._fault(f"tensor {name!r}: unknown dtype {dtype!r:.80}; known are {', '.join(FLOAT_DTYPES)}")
        spec = self._checked(TensorSpec(name, shape, FLOAT_DTYPES[dtype]))
        nbytes = self._read_size(_BYTES, name)
        if nbytes != spec.nbytes or self.place + nbytes != stop:
            raise self._fault(
                f"tensor {name!r}: {dtype} {list(shape)} takes {spec.nbytes:,} bytes, "
                f"but there are {nbytes:,} in an extension with room for {stop - self.place:,}"
            )
        if stop > self._size:
            raise self._fault(f"cut short: tensor {name!r} ends at byte {stop:,}, the file has {self._size:,}")
        start, self.place = self.place, stop
        return _Stored(spec, [(start, nbytes)])

    def _read_chunked(self, name: str, count: int) -> _Stored:
        """An array in parts: a map that says so, with its shape and its chunks, both as maps with numbers as keys."""
        shape: list[int] = []
        chunks: list[_Stored] = []
        marked = self._take(1) == _TRUE
        for key in (self._read_text() for _ in range(count - 1)):
            if key == "shape" and not shape:
                shape = self._read_numbered(name, lambda: self._read_size(_SIZE, name))
            elif key == "chunks" and not chunks:
                chunks = self._read_numbered(name, lambda: self._read_array(name))
            else:
                marked = False
                break
        if not (marked and chunks):
            raise self._fault(f"tensor {name!r}: expected its shape and its chunks")
        spec = self._checked(TensorSpec(name, tuple(shape), chunks[0].spec.dtype))
        kinds = {(len(chunk.spec.shape), chunk.spec.dtype) for chunk in chunks}
        if kinds != {(1, spec.dtype)} or sum(chunk.spec.size for chunk in chunks) != spec.size:
            raise self._fault(f"tensor {name!r}: its chunks do not make up {spec.dtype.name} {shape}")
        return _Stored(spec, [piece for chunk in chunks for piece in chunk.pieces])

    def _read_numbered(self, name: str, read: Callable[[], _Value]) -> list[_Value]:
        values = []
        for number in range(self._read_count()):
            if self._read_text() != str(number):
                raise self._fault(f"tensor {name!r}: expected the key '{number}'")
            values.append(read())
        return values

    def _read_count(self) -> int:
        """The number of keys of a map, within what is allowed for the whole file."""
        count = self._read_size(_MAP, "the file")
        self._keys += count
        if self._keys > limits.MAX_MSGPACK_KEYS:
            raise self._fault(
                f"{count:,} keys make more than {limits.MAX_MSGPACK_KEYS:,}: these are not the weights of a GPT-J"
            )
        return count

    def _read_text(self) -> str:
        size = self._read_size(_TEXT, "a key or dtype")
        if size > 4 * limits.MAX_MSGPACK_NAME:
            raise self._fault(f"text of {size:,} bytes; names have {limits.MAX_MSGPACK_NAME} characters at most")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            raise self._fault("text that is not UTF-8") from None

    def _read_size(self, header: _Header, what: str) -> int:
        first = self._peek()
        if first not in header.sizes and first not in header.widths:
            raise self._fault(f"{what!r:.200}: expected {header.meaning}, got the byte 0x{first:02x}")
        self.place += 1
        return header.sizes[first] if first in header.sizes else int.from_bytes(self._take(header.widths[first]), "big")

    def _checked(self, spec: TensorSpec) -> TensorSpec:
        if math.prod(max(size, 1) for size in spec.shape) * spec.dtype.itemsize > limits.MAX_TENSOR_BYTES:
            raise self._fault(f"tensor {spec.name!r}: the sizes {list(spec.shape)} are too large for any array")
        return spec

    def _peek(self) -> int:
        first = self._take(1)[0]
        self.place -= 1
        return first

    def _take(self, count: int) -> bytes:
        """The next bytes, which come through a window on the file."""
        if count > self._size - self.place:
            raise self._fault(f"cut short: {count:,} bytes expected, the file has {self._size:,} in all")
        begin = self.place - self._window_start
        if not 0 <= begin <= begin + count <= len(self._window):
            window = bytearray(min(max(count, _WINDOW), self._size - self.place))
            self._read(self.place, memoryview(window), "the header")
            self._window, self._window_start, begin = bytes(window), self.place, 0
        self.place += count
        return self._window[begin : begin + count]

    def _fault(self, text: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{self._path}: at byte {self.place:,}: {text}")


def write_flax(
    path: str | os.PathLike[str], specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write a file that Flax reads, holding one tensor at a time; an old file of that name is replaced in one step.

    Args:
        path: the file.
        specs: name, shape and dtype of every tensor, in the order in which they come; tensors of one map follow each
            other, as they do when sorted by name. The names are those of the table's Flax column.
        tensors: names and values.

    Raises:
        CheckpointError: if the tensors are not those that `specs` announce, or are no floats.
        OSError: if the file cannot be written.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    keys = [_new_keys(path, spec, counts, above) for above, spec in zip([None, *specs], specs, strict=False)]
    with replaced_file(path) as file:
        file.write(_header(_MAP, counts[()]))
        for (_, array), new in zip(announced(path, specs, tensors), keys, strict=True):
            for position, parts in enumerate(new, 1):
                file.write(_text(parts[-1]))
                if position < len(new):
                    file.write(_header(_MAP, counts[parts]))
            _write_array(file, array)
            del array  # before the next one is made


def _new_keys(
    path: str | os.PathLike[str], spec: TensorSpec, counts: Counter[tuple[str, ...]], above: TensorSpec | None
) -> list[tuple[str, ...]]:
    """The keys, each with those above it, that come with a tensor; they are added to the counts of their maps."""
    if spec.dtype.name not in FLOAT_DTYPES:
        raise CheckpointError(f"{path}: tensor {spec.name!r}: is {spec.dtype.name}, expected {', '.join(FLOAT_DTYPES)}")
    parts = tuple(spec.name.split("/"))
    opened = tuple(above.name.split("/"))[:-1] if above else ()
    shared = len(os.path.commonprefix([opened, parts[:-1]]))
    new = [parts[: depth + 1] for depth in range(shared, len(parts))]
    if not all(parts) or any(key in counts for key in new):
        raise CheckpointError(
            f"{path}: tensor {spec.name!r}: a part of the name is empty or taken, or tensors of one map do not follow "
            "each other: sort them by name"
        )
    counts.update(key[:-1] for key in new)
    counts.update(dict.fromkeys(new, 0))
    return new


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    data, itemsize = bytes_of(np.ascontiguousarray(array)), array.dtype.itemsize
    if len(data) <= _CHUNK_BYTES:
        file.write(_array_header(array.shape, array.dtype.name, len(data)))
        file.write(data)
        return
    step = max(1, _CHUNK_BYTES // itemsize) * itemsize
    file.write(_header(_MAP, 3) + _text(_CHUNKED) + _TRUE + _text("shape") + _header(_MAP, array.ndim))
    for number, size in enumerate(array.shape):
        file.write(_text(str(number)) + _header(_SIZE, size))
    file.write(_text("chunks") + _header(_MAP, math.ceil(len(data) / step)))
    for number, start in enumerate(range(0, len(data), step)):
        chunk = data[start : start + step]
        file.write(_text(str(number)) + _array_header((len(chunk) // itemsize,), array.dtype.name, len(chunk)))
        file.write(chunk)


def _array_header(shape: tuple[int, ...], dtype: str, nbytes: int) -> bytes:
    sizes = b"".join(_header(_SIZE, size) for size in shape)
    inner = _header(_LIST, 3) + _header(_LIST, len(shape)) + sizes + _text(dtype) + _header(_BYTES, nbytes)
    return _header(_EXTENSION, len(inner) + nbytes) + bytes([_ARRAY]) + inner


def _text(text: str) -> bytes:
    return _header(_TEXT, len(text.encode())) + text.encode()


def _header(header: _Header, size: int) -> bytes:
    """The shortest form, as msgpack's own library takes."""
    for first, known in header.sizes.items():
        if known == size:
            return bytes([first])
    first, width = next((first, width) for first, width in header.widths.items() if size < 256**width)
    return bytes([first]) + size.to_bytes(width, "big")
