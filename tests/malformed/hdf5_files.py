"""HDF5 files that must be refused, each made by a function of the path to write.

`REFUSED` maps what is wrong to how it is made, the error and a pattern of its text. Files that lead elsewhere lead to
`secret.h5` beside them, which `write_secret` makes: nothing may open it.
"""

from __future__ import annotations

import io
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from tfgptj.errors import CheckpointFormatError, UnsafeCheckpointError

SECRET = "secret.h5"
ONES = np.ones((4, 4), np.float32)
Build = Callable[[Path], None]


class Refused(NamedTuple):
    """How a file is made, and what is said of it."""

    build: Build
    text: str
    error: type[Exception] = CheckpointFormatError


def valid_bytes(path: Path, **options: Any) -> bytes:
    """A sound file of two tensors; with options for how the second is stored."""
    with h5py.File(path, "w") as h5:
        h5["lm_head/kernel:0"] = np.arange(12, dtype=np.float32).reshape(3, 4)
        h5.create_dataset("wte/weight:0", data=np.ones((70, 3), np.float16), **options)
    return path.read_bytes()


def content(values: bytes) -> Build:
    """A file of these bytes."""
    return lambda path: path.write_bytes(values) and None


def structure(fill: Callable[[h5py.File], Any]) -> Build:
    """A file that h5py writes."""

    def build(path: Path) -> None:
        with h5py.File(path, "w") as h5:
            fill(h5)

    return build


def changed(fill: Callable[[h5py.File], Any], change: Callable[[bytearray], Any]) -> Build:
    """A file that h5py writes, with some bytes changed."""

    def build(path: Path) -> None:
        structure(fill)(path)
        values = bytearray(path.read_bytes())
        change(values)
        path.write_bytes(values)

    return build


def dataset(data: Any = None, **options: Any) -> Build:
    """A file with one dataset `x`."""
    return structure(lambda h5: h5.create_dataset("x", data=data, **options))


def write_secret(directory: Path) -> None:
    """A file that other files lead to."""
    with h5py.File(directory / SECRET, "w") as h5:
        h5["x"] = ONES


# Disks


def open_objects() -> int:
    """How many files, groups and datasets the HDF5 library has open."""
    return h5py.h5f.get_obj_count(types=h5py.h5f.OBJ_FILE | h5py.h5f.OBJ_GROUP | h5py.h5f.OBJ_DATASET)


class FailingDisk(io.BytesIO):
    """A file that cannot be read or written after so many calls."""

    def __init__(self, content: bytes, calls: int) -> None:
        super().__init__(content)
        self.calls = calls

    def readinto(self, buffer: Any) -> int:
        self._count(5, "Input/output error")
        return super().readinto(buffer)

    def write(self, data: Any) -> int:
        self._count(28, "No space left on device")
        return super().write(data)

    def _count(self, code: int, text: str) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise OSError(code, text)


class InterruptingDisk(FailingDisk):
    """A file in one of whose calls somebody presses Ctrl-C."""

    def _count(self, code: int, text: str) -> None:
        self.calls -= 1
        if self.calls == -1:
            signal.raise_signal(signal.SIGINT)


# Links


def soft_below(h5: h5py.File) -> None:
    """A link in the middle of a path; the group that it leads to is sound."""
    h5["sound/x"] = ONES
    h5["transformer/wte"] = h5py.SoftLink("/sound")


def external_below(h5: h5py.File) -> None:
    h5["transformer/wte"] = h5py.ExternalLink(SECRET, "/")


def cycle(h5: h5py.File) -> None:
    h5["transformer/x"] = ONES
    h5["transformer/again"] = h5["/transformer"]


def cycle_to_root(h5: h5py.File) -> None:
    h5["transformer/root"] = h5["/"]


def one_dataset_twice(h5: h5py.File) -> None:
    h5["x"] = ONES
    h5["y"] = h5["x"]


def many_groups(h5: h5py.File, count: int = 3 * 2**13 + 1) -> None:
    for number in range(count):
        h5.create_group(str(number))


def deep_groups(h5: h5py.File) -> None:
    h5["/".join("a" * 18) + "/x"] = ONES


# Values elsewhere


def external_storage(h5: h5py.File) -> None:
    h5.create_dataset("x", (4, 4), np.float32, external=[(SECRET, 0, 64)])


def virtual(h5: h5py.File) -> None:
    layout = h5py.VirtualLayout((4, 4), np.float32)
    layout[:] = h5py.VirtualSource(SECRET, "x", (4, 4))
    h5.create_virtual_dataset("x", layout)


def virtual_of_any_number(h5: h5py.File) -> None:
    """One of those whose sources the library would open to learn the shape."""
    properties = h5p.create(h5p.DATASET_CREATE)
    here, there = h5s.create_simple((4, 4), (h5s.UNLIMITED, 4)), h5s.create_simple((4, 4), (h5s.UNLIMITED, 4))
    for space in (here, there):
        space.select_hyperslab((0, 0), (h5s.UNLIMITED, 1), block=(1, 4))
    properties.set_virtual(here, SECRET.encode(), b"/x", there)
    h5d.create(h5.id, b"x", h5t.IEEE_F32LE, here, properties)


def filtered(number: int) -> Callable[[h5py.File], None]:
    """A dataset with a filter that the library may or may not know."""

    def fill(h5: h5py.File) -> None:
        properties = h5p.create(h5p.DATASET_CREATE)
        properties.set_chunk((4, 4))
        properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (0,))
        h5d.create(h5.id, b"x", h5t.IEEE_F32LE, h5s.create_simple((4, 4)), properties)

    return fill


def gzip_twice(h5: h5py.File) -> None:
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_chunk((4, 4))
    properties.set_deflate(9)
    properties.set_deflate(9)
    h5d.create(h5.id, b"x", h5t.IEEE_F32LE, h5s.create_simple((4, 4)), properties)


# Values that are no floats


def dtype(stored: Any) -> Build:
    return structure(lambda h5: h5.create_dataset("x", (4, 4), stored))


def quadruple(h5: h5py.File) -> None:
    h5d.create(h5.id, b"x", h5t.NATIVE_LDOUBLE, h5s.create_simple((4, 4)))


def no_shape(h5: h5py.File) -> None:
    h5["x"] = h5py.Empty("f4")


def named_type(h5: h5py.File) -> None:
    h5["x"] = np.dtype(np.float32)


def no_floats(h5: h5py.File) -> None:
    h5d.create(h5.id, b"x", h5t.UNIX_D32LE, h5s.create_simple((4, 4)))


# Sizes


def compact(h5: h5py.File) -> None:
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.COMPACT)
    h5d.create(h5.id, b"x", h5t.IEEE_F32LE, h5s.create_simple((4, 4)), properties)


def eight_pebibytes(h5: h5py.File, **options: Any) -> None:
    """Shape (2^25, 2^26) of float32; nothing is stored."""
    h5.create_dataset("x", (2**25, 2**26), np.float32, **options)


def some_chunks(h5: h5py.File) -> None:
    h5.create_dataset("x", (100, 100), np.float32, chunks=(10, 10), compression="gzip")[:20] = 1


def wide_chunks(h5: h5py.File) -> None:
    h5.create_dataset("x", (4, 4), np.float32, chunks=(2**13, 2**13), maxshape=(None, None), compression="gzip")


def packed_chunk(stored: bytes, **options: Any) -> Callable[[h5py.File], None]:
    """A dataset of one chunk, of 4 MiB, of which these bytes are stored."""

    def fill(h5: h5py.File) -> None:
        x = h5.create_dataset("x", (1024, 1024), np.float32, chunks=(1024, 1024), compression="gzip", **options)
        x.id.write_direct_chunk((0, 0), stored)

    return fill


def bomb(size: int) -> bytes:
    """Zeros, packed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(size >> 20)) + packer.flush()


def two_tensors(h5: h5py.File) -> None:
    h5["x"], h5["y"] = ONES, 2 * ONES


def put_y_where_x_is(values: bytearray) -> None:
    """Change the address in the header of `y`; both are recognised by their values."""
    x, y = (values.index(struct.pack("<16f", *[value] * 16)) for value in (1, 2))
    replace_once(values, struct.pack("<QQ", y, 64), struct.pack("<QQ", x, 64))


def put_y_at_the_end(values: bytearray) -> None:
    y = values.index(struct.pack("<16f", *[2] * 16))
    replace_once(values, struct.pack("<QQ", y, 64), struct.pack("<QQ", len(values) - 60, 64))


def chunked_pair(h5: h5py.File) -> None:
    """Chunks whose addresses stand in a tree: 4 of 16 bytes."""
    h5.create_dataset("x", data=np.arange(16, dtype=np.float32), chunks=(4,))


def move_second_chunk(values: bytearray) -> None:
    """Let the second chunk be that of the first element once more."""
    key = struct.pack("<IIQQ", 16, 0, 4, 0)  # its size, filters, and first element
    replace_once(values, key, struct.pack("<IIQQ", 16, 0, 0, 0))


def last_chunk_at_the_end(values: bytearray) -> None:
    place = values.index(struct.pack("<4f", 12, 13, 14, 15))
    replace_once(values, struct.pack("<Q", place), struct.pack("<Q", len(values) - 8))


def replace_once(values: bytearray, old: bytes, new: bytes) -> None:
    assert values.count(old) == 1 and len(old) == len(new)  # or this file is not what it was made to be
    values[:] = values.replace(old, new)


def one_tensor_twice(h5: h5py.File) -> None:
    for model in ("tfgptj_model", "tfgptj_model_1"):
        h5[f"transformer/{model}/transformer/wte/weight:0"] = ONES


# Superblocks


def superblock(place: int, value: int) -> Build:
    return changed(two_tensors, lambda values: values.__setitem__(place, value))


def with_user_block(path: Path) -> None:
    with h5py.File(path, "w", userblock_size=512) as h5:
        two_tensors(h5)
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes()[10:])


def cut_by_one(path: Path) -> None:
    path.write_bytes(valid_bytes(path)[:-1])


def with_archive(path: Path) -> None:
    path.write_bytes(valid_bytes(path) + b"PK\x05\x06" + bytes(18))


def hollow(path: Path) -> None:
    """Zeros, but for a superblock that tells the right length."""
    values = valid_bytes(path)
    path.write_bytes(values[:96] + bytes(len(values) - 96))


_ELSEWHERE = "has its values in other files, which are never opened"
_LINK = "is a link by name, which could lead anywhere"
_LITTLE = "expected little-endian float16, float32 or float64"
_DAMAGED = "the HDF5 library finds it damaged"

REFUSED: dict[str, Refused] = {
    "soft link": Refused(structure(lambda h5: h5.__setitem__("x", h5py.SoftLink("/y"))), f"'x' {_LINK}",
                         UnsafeCheckpointError),
    "soft link in a path": Refused(structure(soft_below), f"'transformer/wte' {_LINK}", UnsafeCheckpointError),
    "external link": Refused(structure(lambda h5: h5.__setitem__("x", h5py.ExternalLink(SECRET, "/x"))),
                             f"'x' {_LINK}", UnsafeCheckpointError),
    "external link in a path": Refused(structure(external_below), f"'transformer/wte' {_LINK}", UnsafeCheckpointError),
    "cycle": Refused(structure(cycle), "'transformer/again' is a second link to the same", UnsafeCheckpointError),
    "cycle to the root": Refused(structure(cycle_to_root), "'transformer/root' is a second", UnsafeCheckpointError),
    "hard link": Refused(structure(one_dataset_twice), "'y' is a second link to the same", UnsafeCheckpointError),
    "many groups": Refused(structure(many_groups), "more than 24,576 groups and datasets"),
    "deep groups": Refused(structure(deep_groups), "groups more than 16 deep: these are not the weights"),
    "external storage": Refused(structure(external_storage), f"'x' {_ELSEWHERE}", UnsafeCheckpointError),
    "virtual": Refused(structure(virtual), f"'x' {_ELSEWHERE}", UnsafeCheckpointError),
    "virtual, unlimited": Refused(structure(virtual_of_any_number), f"'x' {_ELSEWHERE}", UnsafeCheckpointError),
    "unknown filter": Refused(structure(filtered(32015)), r"has the filters \[32015\]; only 1 \(gzip\) and 2 \(shuffle",
                              UnsafeCheckpointError),
    "lzf": Refused(dataset(ONES, chunks=(4, 4), compression="lzf"), r"filters \[32000\]", UnsafeCheckpointError),
    "checksums": Refused(dataset(ONES, chunks=(4, 4), fletcher32=True), r"filters \[3\]", UnsafeCheckpointError),
    "scale and offset": Refused(dataset(ONES, chunks=(4, 4), scaleoffset=2), r"filters \[6\]", UnsafeCheckpointError),
    "gzip twice": Refused(structure(gzip_twice), r"filters \[1, 1\]; .* once each", UnsafeCheckpointError),
    "integers": Refused(dtype(np.int64), f"'x' holds integers; {_LITTLE}"),
    "booleans": Refused(dtype(np.bool_), "'x' holds an enumeration"),
    "big-endian": Refused(dtype(">f4"), f"'x' holds floats of another form; {_LITTLE}"),
    "long double": Refused(structure(quadruple), "'x' holds floats of another form"),
    "bfloat16": Refused(dtype("V2"), "'x' holds opaque bytes, as which h5py stores bfloat16"),
    "text": Refused(dtype("S4"), "'x' holds text"),
    "text of any length": Refused(dtype(h5py.string_dtype()), "'x' holds text"),
    "sequences": Refused(dtype(h5py.vlen_dtype(np.float32)), "'x' holds sequences"),
    "records": Refused(dtype([("a", "f4")]), "'x' holds records"),
    "arrays": Refused(dtype(("f4", (2,))), "'x' holds arrays"),
    "references": Refused(dtype(h5py.ref_dtype), "'x' holds references"),
    "region references": Refused(dtype(h5py.regionref_dtype), "'x' holds references"),
    "times": Refused(structure(no_floats), "'x' holds no numbers"),
    "named type": Refused(structure(named_type), "'x' is neither a group nor a dataset"),
    "no shape": Refused(structure(no_shape), "'x' has no shape"),
    "huge shape with a zero": Refused(dataset(dtype="f4", shape=(2**62, 2**40, 0)), "too large for any array"),
    "compact": Refused(structure(compact), "'x' has its values in its header"),
    "nothing stored": Refused(structure(eight_pebibytes), "takes 9,007,199,254,740,992 bytes, but 0 are stored"),
    "nothing stored, gzip": Refused(
        structure(lambda h5: eight_pebibytes(h5, chunks=(2**10, 2**10), compression="gzip", fillvalue=1)),
        "'x' has 2,147,483,648 chunks, but 0 are stored"),
    "some chunks stored": Refused(structure(some_chunks), "'x' has 100 chunks, but 20 are stored"),
    "chunks too wide": Refused(structure(wide_chunks), r"'x' has chunks of \[8192, 8192\], larger than its shape \[4"),
    "chunk too short": Refused(structure(packed_chunk(b"short")), r"the chunk at \[0, 0\], 5 bytes, is damaged"),
    "chunk too long": Refused(structure(packed_chunk(bytes(2**22 + 2**13))), r"chunk at \[0, 0\], 4,202,496 bytes, is"),
    "chunk twice": Refused(changed(chunked_pair, move_second_chunk), r"the chunk at \[0\], 16 bytes, is damaged"),
    "chunk after the end": Refused(changed(chunked_pair, last_chunk_at_the_end), "values of 'x' go on after the end"),
    "overlap": Refused(changed(two_tensors, put_y_where_x_is), "the values of 'y' overlap those of 'x'"),
    "after the end": Refused(changed(two_tensors, put_y_at_the_end), _DAMAGED),
    "one tensor twice": Refused(structure(one_tensor_twice), "two datasets stand for tensor 'transformer/wte/weight:0"),
    "hollow": Refused(hollow, _DAMAGED),
    "unknown superblock": Refused(superblock(8, 9), "an HDF5 superblock of version 9; known are 0 to 3"),
    "short addresses": Refused(superblock(13, 4), "the HDF5 superblock is damaged, or has addresses of an unknown"),
    "begins later": Refused(superblock(24, 1), "the HDF5 superblock is damaged"),
    "cut": Refused(cut_by_one, "cut short: .* bytes expected, .* found"),
    "polyglot at the end": Refused(with_archive, "has bytes after its end: .* bytes expected, .* found"),
    "polyglot at the start": Refused(with_user_block, r"not an HDF5 file: it begins with b'#!/bin/s'"),
    "empty": Refused(content(b""), "the file is empty"),
    "signature alone": Refused(content(b"\x89HDF\r\n\x1a\n"), "cut short: 8 bytes are no HDF5 file"),
    "as text": Refused(content(b"\x89HDF\n\x1a\n" + bytes(100)), r"not an HDF5 file: it begins with b'\\x89HDF\\n"),
    "git lfs": Refused(content(b"version https://git-lfs/spec/v1\noid sha256:0\n"), "Git LFS pointer.*git lfs pull"),
    "web page": Refused(content(b"<!DOCTYPE html><html></html>"), "a web page or XML, not weights"),
    "zip": Refused(content(b"PK\x03\x04" + bytes(99)), "a ZIP archive, such as PyTorch's .bin"),
    "pickle": Refused(content(b"\x80\x04\x95" + bytes(99)), "a Python pickle, which is never read"),
}  # fmt: skip
