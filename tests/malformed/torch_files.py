"""PyTorch's weight files put together byte by byte, so that any part of them can be wrong.

Pickles are made of pieces, each of which leaves one value on the stack. Archives are made of members whose headers may
lie. What is wrong with them, and what the messages must say, stands in `torch_cases.py`.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Pickles

NONE, TRUE, FALSE, EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT = b"N", b"\x88", b"\x89", b")", b"]", b"}"


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def tuple_of(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def numbers(values: Iterable[int]) -> bytes:
    return tuple_of(*map(number, values))


def dict_of(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + tuple_of(*arguments) + b"R"


ORDERED_DICT = call("collections", "OrderedDict")


def storage(key: str = "0", kind: str = "FloatStorage", size: int = 6) -> bytes:
    return tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), number(size)) + b"Q"


def tensor(
    stored: bytes | None = None, offset: int = 0, shape: Sequence[int] = (2, 3), strides: Sequence[int] = (3, 1)
) -> bytes:
    stored = storage() if stored is None else stored
    parts = (stored, number(offset), numbers(shape), numbers(strides), FALSE, ORDERED_DICT)
    return call("torch._utils", "_rebuild_tensor_v2", *parts)


def program(value: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + value + b"."


# Archives


@dataclasses.dataclass
class Member:
    """A member and what its headers say; `local` and `entry` replace fields of the two, by name."""

    name: str | bytes
    content: bytes
    flags: int = 0x808  # as PyTorch's: a descriptor follows, and the name is UTF-8
    local: dict[str, Any] = dataclasses.field(default_factory=dict)
    entry: dict[str, Any] = dataclasses.field(default_factory=dict)
    descriptor: bytes | None = None  # None: a true one, if the flags announce it
    before: bytes = b""
    large: bool = False  # whether sizes and offset are written in 64 bits


LOCAL_FIELDS = ("signature", "version", "flags", "method", "time", "date", "crc", "packed", "size")
ENTRY_FIELDS = ("signature", "made_by", *LOCAL_FIELDS[1:])
END_FIELDS = ("disk", "first_disk", "count_here", "count", "length", "start")


def local_header(member: Member, encoded: bytes) -> bytes:
    deferred = bool(member.flags & 8)
    size, crc = (0, 0) if deferred else (len(member.content), zlib.crc32(member.content))
    fields = dict(zip(LOCAL_FIELDS, (b"PK\x03\x04", 0, member.flags, 0, 0, 0, crc, size, size), strict=True))
    fields |= {"name": encoded, "extra": b"FB\x02\x00ZZ"} | member.local
    lengths = (len(fields["name"]), len(fields["extra"]))
    fixed = struct.pack("<4s5H3I2H", *(fields[key] for key in LOCAL_FIELDS), *lengths)
    return fixed + fields["name"] + fields["extra"]


def directory_entry(member: Member, encoded: bytes, offset: int) -> bytes:
    size, crc = len(member.content), zlib.crc32(member.content)
    values = (b"PK\x01\x02", 0, 0, member.flags, 0, 0, 0, crc, size, size)
    fields: dict[str, Any] = dict(zip(ENTRY_FIELDS, values, strict=True))
    fields |= {"name": encoded, "extra": b"", "disk": 0, "offset": offset, "comment": b""}
    if member.large:
        fields |= {"packed": 2**32 - 1, "size": 2**32 - 1, "offset": 2**32 - 1}
        fields["extra"] = struct.pack("<2H3Q", 1, 24, size, size, offset)
    fields |= member.entry
    tail = tuple(len(fields[key]) for key in ("name", "extra", "comment")) + (fields["disk"], 0, 0, fields["offset"])
    fixed = struct.pack("<4s6H3I5H2I", *(fields[key] for key in ENTRY_FIELDS), *tail)
    return fixed + fields["name"] + fields["extra"] + fields["comment"]


def descriptor_of(member: Member, form: str = "<4s3I") -> bytes:
    size = len(member.content)
    return struct.pack(form, b"PK\x07\x08", zlib.crc32(member.content), size, size)


def archive(
    members: Iterable[Member],
    *,
    end: Mapping[str, int] | None = None,
    end_64: Mapping[str, Any] | None = None,
    comment: bytes = b"",
    between: bytes = b"",
) -> bytes:
    """A ZIP archive. `end` and `end_64` replace fields of the directory's ends, `between` stands before the first."""
    body, entries = bytearray(), []
    for member in members:
        encoded = member.name.encode() if isinstance(member.name, str) else member.name
        body += member.before
        entries.append(directory_entry(member, encoded, len(body)))
        body += local_header(member, encoded) + member.content
        if member.flags & 8:
            body += descriptor_of(member) if member.descriptor is None else member.descriptor
    directory = b"".join(entries)
    values = (0, 0, len(entries), len(entries), len(directory), len(body))
    true = dict(zip(END_FIELDS, values, strict=True))
    content = bytes(body) + directory + between
    if end_64 is not None:
        position = len(content)
        large = true | {"signature": b"PK\x06\x06", "size": 44, "at": position, "disks": 1} | dict(end_64)
        content += struct.pack(
            "<4sQ2H2I4Q", large["signature"], large["size"], 0, 0, *(large[key] for key in END_FIELDS)
        )
        content += struct.pack("<4sIQI", b"PK\x06\x07", 0, large["at"], large["disks"])
    small = true | dict(end or {})
    return content + struct.pack("<4s4H2IH", b"PK\x05\x06", *(small[key] for key in END_FIELDS), len(comment)) + comment


VALUES = struct.pack("<6f", *range(6))


def members(
    pickled: bytes, storages: Mapping[str, bytes] | None = None, byteorder: bytes | None = b"little"
) -> list[Member]:
    """The members that PyTorch writes."""
    found = [Member("archive/data.pkl", pickled), Member("archive/version", b"3\n")]
    if byteorder is not None:
        found.append(Member("archive/byteorder", byteorder))
    stored = {"0": VALUES} if storages is None else storages
    return found + [Member(f"archive/data/{key}", values) for key, values in stored.items()]


def torch_file(value: bytes, storages: Mapping[str, bytes] | None = None, byteorder: bytes | None = b"little") -> bytes:
    """A sound archive with a pickle of this value."""
    return archive(members(program(value), storages, byteorder))


_KINDS = {
    "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "float64": "Double", "int64": "Long",
    "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool",
}  # fmt: skip


def file_of(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A sound archive with these tensors, each with a storage of its own."""
    entries, storages = {}, {}
    for key, (given, array) in enumerate(arrays.items()):
        stored = storage(str(key), f"{_KINDS[array.dtype.name]}Storage", array.size)
        entries[given] = tensor(stored, 0, array.shape, [step // array.itemsize for step in array.strides])
        storages[str(key)] = array.tobytes()
    return torch_file(dict_of(entries), storages)


GOOD = program(dict_of({"x": tensor()}))
SOUND = archive(members(GOOD))


def save(directory: Path, content: bytes) -> Path:
    """Writes a file of that content, where tests look for it."""
    path = directory / "pytorch_model.bin"
    path.write_bytes(content)
    return path


# Pickles that are small and grow


def bombs(opcodes: int, size: int) -> dict[str, bytes]:
    """Programs of so many opcodes, or of so many bytes, that make as much as they can."""
    half = b"}q\x00" + b"\x94" * 3
    storages = tuple_of(text("storage"), name("torch", "IntStorage"), text("0"), text("cpu"), number(1)) + b"q\x00"
    return {
        "lists": b"]" * (opcodes - 1),
        "dicts": b"}" * (opcodes - 1),
        "memo": b"N" + b"\x94" * (opcodes - 2),
        "marks": b"(" * (opcodes - 1),
        "both": half + b"}\x94" * (opcodes // 2 - 9),
        "nested": EMPTY_TUPLE + b"\x85" * (opcodes - 3),
        "lists in a list": b"]" + b"](Ne" * (opcodes // 4 - 2),
        "storages": storages + b"h\x00Q" * (opcodes // 2 - 9),
        "doubled": NONE + b"q\x00" + b"h\x00\x86q\x00" * (opcodes // 3 - 9),
        "wide text": text("\U0001f600" + "a" * (size - 30)),
        "many texts": b"\x8c\x02\xc4\x80" * (opcodes - 1),
        "long tuple": b"(" + NONE * (opcodes // 2) + b"tq\x00" + (name("torch", "Size") + b"h\x00\x85R") * 50_000,
        "items": b"}" + b"".join(b"J" + struct.pack("<i", i) + b"Ns" for i in range(opcodes // 3 - 9)),
    }
