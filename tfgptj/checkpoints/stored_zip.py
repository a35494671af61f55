"""ZIP archives as PyTorch writes them: members that are stored as they are, one after the other, nothing between them.

Python's `zipfile` reads whatever it can make sense of: archives behind other bytes, members that overlap, bytes that no
member owns. One file can then be two different archives to two programs, and what one of them has looked through is not
what the other loads. Here there is one way to read an archive. Its directory ends at the end of the file, the members
fill the file up to the directory, and whatever is written twice or three times is the same each time.

Source: the ZIP format's description, APPNOTE.TXT.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tfgptj import limits
from tfgptj.errors import CheckpointFormatError

Reader = Callable[[int, int], bytes]  # of so many bytes, from a place in the file on

_LOCAL = struct.Struct("<4s5H3I2H")  # before each member
_ENTRY = struct.Struct("<4s6H3I5H2I")  # in the directory
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")  # the same with larger numbers
_LOCATOR_64 = struct.Struct("<4sIQI")  # where that is

_MAX_16, _MAX_32 = 2**16 - 1, 2**32 - 1  # also stand for a number that is written elsewhere, in 64 bits

_SIZES_FOLLOW = 1 << 3  # a flag: sizes and checksum are written behind the member, in a descriptor
_UTF8 = 1 << 11


class Member(NamedTuple):
    """Where a member's bytes are, and their checksum; None if the archive was written without checksums."""

    start: int
    size: int
    crc: int | None


class _Entry(NamedTuple):
    """A member according to the directory."""

    name: bytes
    flags: int
    crc: int
    size: int
    offset: int  # of its local header


def read_members(path: Path, size: int, read: Reader) -> dict[str, Member]:
    """The members of an archive, by name.

    Args:
        path: the file, for messages.
        size: its size.
        read: reads from it.

    Raises:
        CheckpointFormatError: if the archive is damaged, or not as PyTorch writes them.
    """
    start, length, count = _find_directory(path, size, read)
    entries = sorted(_parse_directory(path, read(start, length)), key=lambda entry: entry.offset)
    names = [_name_of(path, entry) for entry in entries]
    if len(entries) != count or len(set(names)) != count:
        raise CheckpointFormatError(
            f"{path}: the ZIP directory should name {count:,} members; "
            f"it has {len(entries):,} entries with {len(set(names)):,} names"
        )
    stops = [*(entry.offset for entry in entries), start]
    if stops[0] != 0:
        raise CheckpointFormatError(f"{path}: {stops[0]:,} bytes stand before the first member of the ZIP archive")
    has_checksums = any(entry.crc for entry in entries)  # PyTorch can be told to leave them out: all are 0 then
    members = {}
    for name, entry, stop in zip(names, entries, stops[1:], strict=True):
        first = _start_of(path, entry, stop, read)
        _check_end(path, entry, first + entry.size, stop, read)
        members[name] = Member(first, entry.size, entry.crc if has_checksums else None)
    return members


def _find_directory(path: Path, size: int, read: Reader) -> tuple[int, int, int]:
    """Start, length and number of entries of the directory."""
    stop = size - _END.size
    signature, *numbers, comment = _END.unpack(read(stop, _END.size)) if stop >= 0 else (b"", 0)
    if signature != b"PK\x05\x06" or comment:
        raise CheckpointFormatError(f"{path}: does not end with a ZIP directory: cut short, or something was appended")
    end_64 = stop - _LOCATOR_64.size - _END_64.size
    if end_64 >= 0:
        locator = _LOCATOR_64.unpack(read(stop - _LOCATOR_64.size, _LOCATOR_64.size))
        if locator[0] == b"PK\x06\x07":
            signature, length, _, _, *large = _END_64.unpack(read(end_64, _END_64.size))
            small = [min(number, most) for number, most in zip(large, [_MAX_16] * 4 + [_MAX_32] * 2, strict=True)]
            if (signature, length, *locator[1:]) != (b"PK\x06\x06", 44, 0, end_64, 1) or small != numbers:
                raise CheckpointFormatError(f"{path}: the two ends of its ZIP directory do not agree")
            stop, numbers = end_64, large
    disk, first_disk, count_here, count, length, start = numbers
    if disk or first_disk or count_here != count or start + length != stop:
        raise CheckpointFormatError(
            f"{path}: its ZIP directory should end at byte {stop:,}; it has {length:,} bytes from {start:,} on"
        )
    if count > limits.MAX_ZIP_MEMBERS or length > limits.MAX_ZIP_DIRECTORY:
        raise CheckpointFormatError(
            f"{path}: a ZIP directory of {count:,} members and {length:,} bytes; "
            f"at most {limits.MAX_ZIP_MEMBERS:,} and {limits.MAX_ZIP_DIRECTORY:,} are read"
        )
    return start, length, count


def _parse_directory(path: Path, directory: bytes) -> list[_Entry]:
    entries: list[_Entry] = []
    position = 0
    while position < len(directory):
        fixed = directory[position : position + _ENTRY.size].ljust(_ENTRY.size, b"\0")
        (signature, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, _, offset) = _ENTRY.unpack(fixed)
        end_of_name = position + _ENTRY.size + lengths[0]
        name = directory[position + _ENTRY.size : end_of_name]
        extra = directory[end_of_name : end_of_name + lengths[1]]
        position += _ENTRY.size + sum(lengths)
        if signature != b"PK\x01\x02" or position > len(directory):
            raise CheckpointFormatError(f"{path}: its ZIP directory is damaged after {len(entries):,} members")
        size, packed, offset = _large_numbers(path, name, extra, [size, packed, offset])
        if flags & ~(_SIZES_FOLLOW | _UTF8) or method or packed != size or disk:
            raise CheckpointFormatError(
                f"{path}: member {name!r:.200} is encrypted, compressed or otherwise not as PyTorch stores it: "
                f"flags 0x{flags:x}, method {method}, {packed:,} bytes for {size:,}"
            )
        entries.append(_Entry(name, flags, crc, size, offset))
    return entries


def _large_numbers(path: Path, name: bytes, extra: bytes, numbers: list[int]) -> list[int]:
    """The numbers of an entry; those that need more than 32 bits stand at the start of its extra field."""
    count = numbers.count(_MAX_32)
    if count and extra[:4] == struct.pack("<2H", 1, 8 * count) and len(extra) >= 4 + 8 * count:
        values = iter(struct.unpack_from(f"<{count}Q", extra, 4))
        return [next(values) if number == _MAX_32 else number for number in numbers]
    if count:
        raise CheckpointFormatError(f"{path}: member {name!r:.200} lacks its sizes in 64 bits")
    return numbers


def _name_of(path: Path, entry: _Entry) -> str:
    try:
        name = entry.name.decode()
    except UnicodeDecodeError:
        name = ""
    # Names never become paths, but an archive with others than these was not written by PyTorch.
    if not name or "\\" in name or min(name) < " " or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise CheckpointFormatError(f"{path}: a member of the ZIP archive has the name {entry.name!r:.200}")
    return name


def _start_of(path: Path, entry: _Entry, stop: int, read: Reader) -> int:
    """Where a member's bytes begin, after a check of the header before them."""
    expected = (b"PK\x03\x04", entry.flags, 0, entry.name)
    end_of_name = entry.offset + _LOCAL.size + len(entry.name)
    if end_of_name <= stop:
        header = read(entry.offset, _LOCAL.size + len(entry.name))
        signature, _, flags, method, _, _, *sizes, name_length, extra_length = _LOCAL.unpack_from(header)
        size = min(entry.size, _MAX_32)
        are_equal = sizes == [entry.crc, size, size] or (flags & _SIZES_FOLLOW and sizes == [0, 0, 0])
        name = header[_LOCAL.size :]
        if (signature, flags, method, name) == expected and name_length == len(name) and are_equal:
            return int(end_of_name + extra_length)
    raise CheckpointFormatError(f"{path}: member {entry.name!r:.200} is not what the ZIP directory says")


def _check_end(path: Path, entry: _Entry, end: int, stop: int, read: Reader) -> None:
    """Check that nothing but a descriptor, if one is announced, stands between a member's end and the next one."""
    descriptors = [b""]
    if entry.flags & _SIZES_FOLLOW:
        descriptors = [struct.pack("<4sI2Q", b"PK\x07\x08", entry.crc, entry.size, entry.size)]
        if entry.size <= _MAX_32:
            descriptors.append(struct.pack("<4s3I", b"PK\x07\x08", entry.crc, entry.size, entry.size))
    if stop - end not in map(len, descriptors) or read(end, stop - end) not in descriptors:
        raise CheckpointFormatError(
            f"{path}: member {entry.name!r:.200} should end where the next begins: it ends at {end:,}, that at {stop:,}"
        )
