"""The reader of PyTorch's ZIP archives: those of other writers, large ones, and those that are not what they seem."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest
from conftest import GOLDENS
from malformed import torch_cases as cases
from malformed.torch_files import (
    GOOD,
    SOUND,
    VALUES,
    Member,
    archive,
    descriptor_of,
    dict_of,
    directory_entry,
    local_header,
    members,
    program,
    save,
    storage,
    tensor,
)

from tfgptj import limits
from tfgptj.checkpoints.torch_zip import TorchZipFile
from tfgptj.errors import CheckpointFormatError

MIXED = (GOLDENS / "formats" / "torch" / "variants" / "mixed.pt").read_bytes()  # PyTorch wrote it, with one tensor, x


def values_in(path: Path) -> dict[str, list[float]]:
    with TorchZipFile(path) as file:
        return {name: file.read(name).ravel().tolist() for name in file.names}


# Sound archives that PyTorch would have written otherwise


def test_members_whose_sizes_stand_before_them(tmp_path: Path) -> None:
    contents = {str(member.name): member.content for member in members(GOOD)}
    assert values_in(save(tmp_path, cases.zipfile_with(contents))) == {"x": list(range(6))}


def test_sizes_in_64_bits(tmp_path: Path) -> None:
    changed = cases.changed(3, large=True)
    changed[3].descriptor = descriptor_of(changed[3], "<4sI2Q")
    assert values_in(save(tmp_path, archive(changed, end_64={}))) == {"x": list(range(6))}


def write_large(path: Path, count: int) -> None:
    """A sparse file: a storage of so many zeros, with the last two values set, and a small one after it."""
    entries = {
        "end": tensor(storage("0", size=count), offset=count - 2, shape=(2,), strides=(1,)),
        "after": tensor(storage("1"), shape=(6,), strides=(1,)),
    }
    first = Member("a/data.pkl", program(dict_of(entries)))
    zeros = Member("a/data/0", b"", entry={"crc": 7})  # the checksum is compared only where all is read
    after = Member("a/data/1", VALUES, large=True)
    directory = b""
    with open(path, "wb") as file:
        directory += directory_entry(first, b"a/data.pkl", 0)
        file.write(local_header(first, b"a/data.pkl") + first.content + descriptor_of(first))
        zeros.entry["extra"] = struct.pack("<2H2Q", 1, 16, 4 * count, 4 * count)
        zeros.entry |= {"size": 2**32 - 1, "packed": 2**32 - 1}
        directory += directory_entry(zeros, b"a/data/0", file.tell())
        file.write(local_header(zeros, b"a/data/0"))
        file.seek(4 * count - 8, os.SEEK_CUR)
        file.write(VALUES[-8:] + struct.pack("<4sI2Q", b"PK\x07\x08", 7, 4 * count, 4 * count))
        directory += directory_entry(after, b"a/data/1", file.tell())
        file.write(local_header(after, b"a/data/1") + VALUES + descriptor_of(after, "<4sI2Q"))
        start = file.tell()
        end_64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, 3, 3, len(directory), start)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(directory), 1)
        end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 3, 3, len(directory), 2**32 - 1, 0)
        file.write(directory + end_64 + locator + end)


def test_a_file_of_more_than_4_gib(tmp_path: Path) -> None:
    write_large(tmp_path / "a.bin", 2**30 + 16)
    assert values_in(tmp_path / "a.bin") == {"end": [4, 5], "after": list(range(6))}


# Others


@pytest.mark.parametrize("case", cases.ZIP_FAULTS)
def test_archives_that_are_not_what_they_seem_are_refused(tmp_path: Path, case: str) -> None:
    content, said = cases.ZIP_FAULTS[case]
    path = save(tmp_path, content)
    with pytest.raises(CheckpointFormatError, match=said) as caught:
        TorchZipFile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert os.listdir(tmp_path) == [path.name]  # nothing was unpacked


def test_limits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, SOUND)
    monkeypatch.setattr(limits, "MAX_ZIP_MEMBERS", 3)
    with pytest.raises(CheckpointFormatError, match="a ZIP directory of 4 members and 246 bytes; at most 3 and"):
        TorchZipFile(path)
    monkeypatch.setattr(limits, "MAX_ZIP_MEMBERS", 4)
    monkeypatch.setattr(limits, "MAX_ZIP_DIRECTORY", 245)
    with pytest.raises(CheckpointFormatError, match="at most 4 and 245 are read"):
        TorchZipFile(path)
    monkeypatch.undo()
    size = len(GOOD)
    monkeypatch.setattr(limits, "MAX_PICKLE_BYTES", size - 1)
    with pytest.raises(CheckpointFormatError, match=f"data.pkl has {size} bytes, at most {size - 1} are read"):
        TorchZipFile(path)


def test_more_members_than_any_checkpoint_has(tmp_path: Path) -> None:
    content = archive([Member(f"archive/{i}", b"") for i in range(2**16 - 1)])
    start = time.perf_counter()
    with pytest.raises(CheckpointFormatError, match="a ZIP archive, but none of PyTorch's"):
        TorchZipFile(save(tmp_path, content))
    assert time.process_time() - start < 20  # it would be minutes
    large = {"count": 2**16 + 1, "count_here": 2**16 + 1}
    with pytest.raises(CheckpointFormatError, match="a ZIP directory of 65,537 members"):
        TorchZipFile(save(tmp_path, archive(members(GOOD), end={"count": 65535, "count_here": 65535}, end_64=large)))


def test_time_does_not_grow_with_the_square_of_the_directory(tmp_path: Path) -> None:
    entry = directory_entry(Member("archive/x", b""), b"archive/x", 0)
    count = limits.MAX_ZIP_DIRECTORY // len(entry)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, count * len(entry), 4, 0)
    start = time.process_time()
    with pytest.raises(CheckpointFormatError, match="should name 9 members; it has 305,040 entries with 1 names"):
        TorchZipFile(save(tmp_path, b"PK\x03\x04" + entry * count + end))
    assert time.process_time() - start < 20  # it would be minutes


def test_every_flipped_bit_of_the_pickle_is_found(tmp_path: Path) -> None:
    start = SOUND.index(GOOD)
    for bit in range(8 * len(GOOD)):
        flipped = bytearray(SOUND)
        flipped[start + bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointFormatError, match="data.pkl is damaged: its checksum is not"):
            TorchZipFile(save(tmp_path, bytes(flipped)))


def test_damaged_values_are_found_when_they_are_read(tmp_path: Path) -> None:
    said = "tensor 'x': damaged: its checksum is [0-9a-f]{8}, expected [0-9a-f]{8}"
    with TorchZipFile(save(tmp_path, SOUND.replace(VALUES, VALUES[:-1] + b"\x7f"))) as file:
        with pytest.raises(CheckpointFormatError, match=said):
            file.read("x")
        with pytest.raises(CheckpointFormatError, match=said):
            list(file.blocks("x"))
