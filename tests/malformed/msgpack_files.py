"""Flax files that must be refused, as bytes.

`REFUSED` maps what is wrong to the content and a pattern of the error's text. They are put together here from msgpack's
first bytes, as no library writes such files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

Item = tuple[bytes, bytes]


def text(value: str | bytes) -> bytes:
    values = value.encode() if isinstance(value, str) else value
    return b"\xdb" + struct.pack(">I", len(values)) + values


def mapping(*items: Item, count: int | None = None) -> bytes:
    """A map of at most 15 keys, or of another number than there are."""
    header = bytes([0x80 + len(items)]) if count is None else b"\xdf" + struct.pack(">I", count)
    return header + b"".join(key + value for key, value in items)


def inner(shape: Iterable[Any] = (1,), dtype: bytes = text("float32"), values: bytes = bytes(4)) -> bytes:
    """What an array's extension holds; a size may be given as bytes."""
    sizes = [size if isinstance(size, bytes) else b"\xcf" + struct.pack(">Q", size) for size in shape]
    header = b"\xdd" + struct.pack(">I", len(sizes))
    return b"\x93" + header + b"".join(sizes) + dtype + b"\xc6" + struct.pack(">I", len(values)) + values


def extension(content: bytes, code: int = 1, size: int | None = None) -> bytes:
    return b"\xc9" + struct.pack(">IB", len(content) if size is None else size, code) + content


def array(shape: Iterable[Any] = (1,), dtype: bytes = text("float32"), values: bytes = bytes(4)) -> bytes:
    return extension(inner(shape, dtype, values))


def tensor(value: bytes) -> bytes:
    """A file with the one key `a`."""
    return mapping((text("a"), value))


def numbered(*values: bytes) -> bytes:
    return mapping(*((text(str(number)), value) for number, value in enumerate(values)))


MARK = (text("__msgpack_chunked_array__"), b"\xc3")
SHAPE, CHUNKS = (text("shape"), numbered(b"\x02")), (text("chunks"), numbered(array(), array()))


def chunked(*items: Item, **options: Any) -> bytes:
    """A file with a parted array, whose map has these keys."""
    return tensor(mapping(*items, **options))


def deep(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + array()


VALID = mapping(
    (text("lm_head"), mapping((text("kernel"), array((3, 4), values=bytes(range(48)))))),
    (text("wte"), array((2, 1), text("bfloat16"), b"\x80\x3f\x00\x40")),
)

_PARTS = "tensor 'a': expected its shape and its chunks"
_SUM = r"tensor 'a': its chunks do not make up float32 \["

REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "number": (b"\x01", "'the file': expected a map, got the byte 0x01"),
    "array alone": (array(), "'the file': expected a map, got the byte 0xc9"),
    "list": (b"\x91" + array(), "'the file': expected a map, got the byte 0x91"),
    "trailing bytes": (VALID + b"PK", f"bytes after the last tensor: {len(VALID)} bytes expected, {len(VALID) + 2}"),
    "two maps": (VALID + VALID, "has bytes after the last tensor"),
    "values cut": (VALID[:-1], f"cut short: tensor 'wte' ends at byte {len(VALID)}, the file has {len(VALID) - 1}"),
    "key cut": (VALID[:8], "cut short: 7 bytes expected, the file has 8 in all"),
    "4 billion keys": (b"\xdf\xff\xff\xff\xff", "4,294,967,295 keys make more than 32,768: these are not the weights"),
    "32,768 keys and one": (mapping((text("a"), mapping(count=2**15)), count=1), "32,768 keys make more than 32,768"),
    "keys that are not there": (mapping(count=9), "cut short: 1 bytes expected, the file has 5 in all"),
    "deep": (deep(100_000), "'a/a/a/[a/]*: names have 256 characters at most"),
    "numbers as keys": (mapping((b"\x01", array())), "'a key or dtype': expected text, got the byte 0x01"),
    "bytes as keys": (mapping((b"\xc4\x01a", array())), "expected text, got the byte 0xc4"),
    "nothing as key": (mapping((b"\xc0", array())), "expected text, got the byte 0xc0"),
    "same key twice": (mapping((text("a"), array()), (text("a"), array())), "the key 'a' comes twice"),
    "same map twice": (mapping((text("a"), mapping()), (text("a"), mapping())), "the key 'a' comes twice, is empty or"),
    "empty key": (mapping((text(""), array())), "the key '' comes twice, is empty or has a slash"),
    "slash in a key": (mapping((text("a/b"), array())), "the key 'a/b' comes twice, is empty or has a slash"),
    "key not UTF-8": (mapping((text(b"\xff"), array())), "text that is not UTF-8"),
    "long key": (mapping((text("a" * 300), array())), "'aaa[a]*: names have 256 characters at most"),
    "very long key": (mapping((text("a" * 1025), array())), "text of 1,025 bytes; names have 256 characters"),
    "key of 4 GB": (b"\x81\xdb\xff\xff\xff\xff", "text of 4,294,967,295 bytes; names have"),
    "nil": (tensor(b"\xc0"), "'a': expected an array, got the byte 0xc0"),
    "true": (tensor(b"\xc3"), "'a': expected an array, got the byte 0xc3"),
    "float": (tensor(b"\xcb" + bytes(8)), "'a': expected an array, got the byte 0xcb"),
    "text as value": (tensor(text("weights")), "'a': expected an array, got the byte 0xdb"),
    "list as value": (tensor(b"\x91" + array()), "'a': expected an array, got the byte 0x91"),
    "reserved byte": (tensor(b"\xc1"), "'a': expected an array, got the byte 0xc1"),
    "complex number": (tensor(extension(bytes(19), 2)), "tensor 'a': extension of type 2; known are 1 and 3"),
    "time": (tensor(b"\xd6\xff" + bytes(4)), "tensor 'a': extension of type 255; known are 1 and 3"),
    "unknown extension": (tensor(extension(inner(), 127)), "extension of type 127"),
    "extension over the end": (tensor(extension(inner(), size=99)), "but there are 4 in an extension with room for 67"),
    "extension too short": (tensor(extension(inner(), size=9)), "in an extension with room for -"),
    "no parts": (tensor(extension(b"\xc0")), "'a': expected a list, got the byte 0xc0"),
    "two parts": (tensor(extension(b"\x92" + inner()[1:])), "tensor 'a': expected shape, dtype and bytes"),
    "shape is a number": (tensor(extension(b"\x93\x01" + inner()[1:])), "'a': expected a list, got the byte 0x01"),
    "65 dimensions": (tensor(array([1] * 65)), "tensor 'a': 65 dimensions, more than 64"),
    "4 billion dimensions": (tensor(extension(b"\x93\xdd\xff\xff\xff\xff")), "4,294,967,295 dimensions, more than 64"),
    "negative size": (tensor(array([b"\xff"])), "'a': expected a size, got the byte 0xff"),
    "size is a float": (tensor(array([b"\xcb" + bytes(8)])), "'a': expected a size, got the byte 0xcb"),
    "size is true": (tensor(array([b"\xc3"])), "'a': expected a size, got the byte 0xc3"),
    "sizes overflow": (tensor(array([2**62, 2**62])), "the sizes .4611686018427387904, .* are too large for any array"),
    "sizes times zero": (tensor(array([2**62, 2**62, 0], values=b"")), "are too large for any array"),
    "shape disagrees": (tensor(array([2])), r"tensor 'a': float32 \[2\] takes 8 bytes, but there are 4 in an"),
    "huge shape": (tensor(array([2**40])), "takes 4,398,046,511,104 bytes, but there are 4"),
    "objects": (tensor(array(dtype=text("object"))), "tensor 'a': unknown dtype 'object'; known are float32, float16"),
    "O": (tensor(array(dtype=text("O"))), "unknown dtype 'O'"),
    "void": (tensor(array(dtype=text("V4"))), "unknown dtype 'V4'"),
    "records": (tensor(array(dtype=text("f4,f4"))), "unknown dtype 'f4,f4'"),
    "integers": (tensor(array(dtype=text("int32"))), "unknown dtype 'int32'"),
    "dtype is a number": (tensor(array(dtype=b"\x01")), "'a key or dtype': expected text, got the byte 0x01"),
    "values as text": (tensor(extension(inner()[:-9] + text(bytes(4)))), "'a': expected bytes, got the byte 0xdb"),
    "chunks of nothing": (chunked(MARK, SHAPE, (text("chunks"), mapping())), _PARTS),
    "no chunks": (chunked(MARK, SHAPE), _PARTS),
    "no shape": (chunked(MARK, CHUNKS), _SUM),
    "a mark alone": (chunked(MARK), _PARTS),
    "mark is false": (chunked((MARK[0], b"\xc2"), SHAPE, CHUNKS), _PARTS),
    "mark at the end": (chunked(SHAPE, CHUNKS, MARK), "'a/shape/0': expected an array, got the byte 0x02"),
    "two shapes": (chunked(MARK, SHAPE, SHAPE), _PARTS),
    "two chunks": (chunked(MARK, CHUNKS, CHUNKS), _PARTS),
    "four keys": (chunked(MARK, SHAPE, CHUNKS, (text("x"), array())), _PARTS),
    "chunks not counted": (
        chunked(MARK, SHAPE, (text("chunks"), mapping((text("1"), array())))), "tensor 'a': expected the key '0'"),
    "chunked shape is a list": (chunked(MARK, (text("shape"), b"\x91\x02"), CHUNKS), "expected a map, got the byte"),
    "chunked shape lies": (chunked(MARK, (text("shape"), numbered(b"\x03")), CHUNKS), _SUM),
    "chunked shape is huge": (
        chunked(MARK, (text("shape"), numbered(*[b"\xcf" + b"\x7f" * 8] * 2)), CHUNKS), "too large for any array"),
    "chunks of two dtypes": (
        chunked(MARK, SHAPE, (text("chunks"), numbered(array(), array([2], text("float16"))))),
        "its chunks do not make up float32"),
    "chunks with two sizes": (chunked(MARK, SHAPE, (text("chunks"), numbered(array([2, 1], values=bytes(8))))), _SUM),
    "chunk is a map": (chunked(MARK, SHAPE, (text("chunks"), numbered(mapping()))), "expected an array, got the byte"),
    "4 billion chunks": (chunked(MARK, (text("chunks"), b"\xdf\xff\xff\xff\xff"), count=3), "make more than 32,768"),
    "whole file is parted": (mapping(MARK, SHAPE, CHUNKS), "expected an array, got the byte 0xc3"),
    "git lfs": (b"version https://git-lfs/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "a web page or XML, not weights"),
    "zip": (b"PK\x03\x04" + bytes(40), "a ZIP archive, such as PyTorch's .bin"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file under a wrong name"),
    "pickle": (b"\x80\x04\x95" + bytes(40), "a Python pickle, which is never read"),
}  # fmt: skip
