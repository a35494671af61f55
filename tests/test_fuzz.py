"""Every format's reader against files with flipped bits, files cut short, and small files that ask for much.

`malformed/fuzz_readers.py` looks further, for as long as one lets it.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5py import h5d, h5s, h5t
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import hdf5_files, msgpack_files, torch_files
from malformed.child import Outcome, read_in_children
from reader_checks import FORMATS, ONE, SOUND, read

from tfgptj import limits
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.errors import CheckpointFormatError, UnsafeCheckpointError

FLIPS, POINTS, HEADER = 500, 64, 200
REFUSALS = ("CheckpointFormatError: ", "UnsafeCheckpointError: ")


def outcomes(sound: str, contents: list[bytes], directory: Path) -> list[Outcome]:
    """What the reader makes of the file itself, and then of these."""
    paths = [directory / "sound", *(directory / str(number) for number in range(len(contents)))]
    SOUND[sound].build(paths[0])
    for path, content in zip(paths[1:], contents, strict=True):
        path.write_bytes(content)
    return read_in_children(FORMATS[SOUND[sound].form].reader, paths, together=50)


def content_of(sound: str, directory: Path) -> bytes:
    SOUND[sound].build(directory / "content")
    return (directory / "content").read_bytes()


def bytes_in(tensors: dict[str, Any]) -> list[int]:
    widths = {"float16": 2, "bfloat16": 2}
    return [math.prod(shape) * widths.get(dtype, 4) for dtype, shape, _ in tensors.values()]


@pytest.mark.parametrize("sound", SOUND)
def test_every_prefix_is_refused(tmp_path: Path, sound: str) -> None:
    content = content_of(sound, tmp_path)
    lengths = {*range(min(HEADER, len(content))), *np.linspace(0, len(content) - 1, POINTS, dtype=int).tolist()}
    whole, *cut = outcomes(sound, [content[:length] for length in sorted(lengths)], tmp_path)
    assert isinstance(whole.result, dict)
    for found in cut:
        assert isinstance(found.result, str) and found.result.startswith("CheckpointFormatError: "), found
        assert str(found.path) in found.result
        assert "\n" not in found.result


@pytest.mark.parametrize("sound", SOUND)
def test_flipped_bits_give_an_error_or_tensors_of_the_stored_sizes(tmp_path: Path, sound: str) -> None:
    """Nothing confirms a name, or in some formats a value: the plan and the caller's own numbers do."""
    content, chance, changed = content_of(sound, tmp_path), random.Random(0), []
    for _ in range(FLIPS):
        values = bytearray(content)
        values[chance.randrange(len(values))] ^= 1 << chance.randrange(8)
        changed.append(bytes(values))
    whole, *flipped = outcomes(sound, changed, tmp_path)
    assert isinstance(whole.result, dict)
    refused = [found.result for found in flipped if isinstance(found.result, str)]
    assert all(text.startswith(REFUSALS) for text in refused)
    assert len(refused) > 50
    for found in flipped:
        assert found.memory < 2**25 and found.seconds < 5
        if isinstance(found.result, str):
            assert str(found.path) in found.result
        elif SOUND[sound].form == "bin":  # it has checksums of everything: what was hit is padding or a date
            assert found.result == whole.result
        elif SOUND[sound].exact:
            assert set(bytes_in(found.result)) <= set(bytes_in(whole.result))
        else:
            assert sum(bytes_in(found.result)) < 2 * sum(bytes_in(whole.result))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("sound", [name for name in SOUND if not name.startswith("h5")])
def test_any_bytes_in_the_middle_give_an_error_or_tensors(
    tmp_path_factory: pytest.TempPathFactory, sound: str, data: st.DataObject
) -> None:
    """HDF5's own library is not put to this in the process that runs the tests."""
    directory = tmp_path_factory.getbasetemp()
    content = content_of(sound, directory)
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, len(content)))
    path = directory / "any"
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=60)) + content[stop:])
    try:
        read(FORMATS[SOUND[sound].form].reader, path)
    except (CheckpointFormatError, UnsafeCheckpointError) as error:
        assert str(path) in str(error)


# Small files that ask for much, and the largest that are read

Build = Callable[[Path], object]


def content(values: bytes) -> Build:
    return lambda path: path.write_bytes(values)


def safetensors_header(text: str | bytes) -> Build:
    encoded = text.encode() if isinstance(text, str) else text
    return content(struct.pack("<Q", len(encoded)) + encoded)


def safetensors_bombs() -> dict[str, Build]:
    size, count = limits.MAX_SAFETENSORS_HEADER, limits.MAX_SAFETENSORS_VALUES
    text = '{"__metadata__":{"a":"%s"}}'
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    tensors = count // (sum(map(entry.count, ",:[{")) + 1) - 1
    return {
        "wide text": safetensors_header(text % ("\U0001f600" + "a" * (size - 50))),
        "text in parts": safetensors_header(text % ("\U0001f600a\\n" * ((size - 50) // 7))),
        "lists": safetensors_header('{"a":[' + "[]," * (count // 2 - 9) + "[]]}"),
        "dicts": safetensors_header('{"a":[' + '{"a":0},' * (count // 3 - 9) + "{}]}"),
        "keys": safetensors_header("{" + ",".join(f'"{number}":0' for number in range(count // 2 - 9)) + "}"),
        "metadata": safetensors_header(
            '{"__metadata__":{' + ",".join(f'"{number}":""' for number in range(count // 2 - 9)) + "}}"
        ),
        "tensors": safetensors_header("{" + ",".join(entry % number for number in range(tensors)) + "}"),
        "100 MB": safetensors_header(b" " * 100_000_000),
    }


def bin_bombs() -> dict[str, Build]:
    pickles = torch_files.bombs(limits.MAX_PICKLE_OPCODES, limits.MAX_PICKLE_BYTES)
    entry = torch_files.directory_entry(torch_files.Member("archive/x", b""), b"archive/x", 0)
    count = limits.MAX_ZIP_DIRECTORY // len(entry)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, count * len(entry), 4, 0)
    members = [torch_files.Member(f"archive/{number}", b"") for number in range(2**16 - 1)]
    return {
        **{name: content(torch_files.torch_file(value)) for name, value in pickles.items()},
        "one member again and again": content(b"PK\x03\x04" + entry * count + end),
        "members": content(torch_files.archive(members)),
    }


def chunks(count: int, **options: Any) -> Build:
    values = np.ones(count, np.float16)
    return hdf5_files.structure(lambda h5: h5.create_dataset("x", data=values, chunks=(1,), **options))


def many_tensors(h5: h5py.File) -> None:
    space = h5s.create_simple((1,))
    for number in range(limits.MAX_HDF5_OBJECTS - 1):
        h5d.create(h5.id, b"%d" % number, h5t.IEEE_F32LE, space).write(space, space, ONE[:1])


def hdf5_bombs() -> dict[str, Build]:
    return {
        "chunks": chunks(limits.MAX_HDF5_CHUNKS),
        "packed chunks": chunks(2**14, compression="gzip"),
        "groups": hdf5_files.structure(lambda h5: hdf5_files.many_groups(h5, limits.MAX_HDF5_OBJECTS)),
        "tensors": hdf5_files.structure(many_tensors),
    }


def msgpack_bombs() -> dict[str, Build]:
    most, text, empty = limits.MAX_MSGPACK_KEYS, msgpack_files.text, msgpack_files.array((0,), values=b"")
    shape = (text("shape"), msgpack_files.numbered(b"\0"))
    numbered = msgpack_files.mapping(count=most - 9) + b"".join(text(str(i)) + empty for i in range(most - 9))
    wide = (text(str(number).ljust(255) + "\U0001f600") + empty for number in range(most))
    return {
        "tensors": content(msgpack_files.mapping(count=most) + b"".join(wide)),
        "chunks": content(msgpack_files.chunked(msgpack_files.MARK, shape, (text("chunks"), numbered))),
        "depth": content(msgpack_files.deep(100_000)),
    }


def index(text: str) -> Build:
    def build(path: Path) -> None:
        path.mkdir()
        (path / "model.safetensors.index.json").write_text(text)

    return build


def index_bombs() -> dict[str, Build]:
    size, count = limits.MAX_INDEX_BYTES, limits.MAX_INDEX_VALUES
    shards = {str(number): f"{number}.safetensors" for number in range(count // 2 - 9)}
    return {
        "wide text": index('{"a":"%s"}' % ("\U0001f600" + "a" * (size - 50))),
        "lists": index('{"a":[' + "[]," * (count // 2 - 9) + "[]]}"),
        "shards": index(json.dumps({"weight_map": shards})),
        "too large": index(" " * (size + 1)),
    }


BOMBS = {
    "safetensors": safetensors_bombs, "bin": bin_bombs, "h5": hdf5_bombs, "msgpack": msgpack_bombs,
    "index": index_bombs,
}  # fmt: skip


@pytest.mark.parametrize("form", BOMBS)
def test_small_files_that_ask_for_much_take_little_memory_and_time(tmp_path: Path, form: str) -> None:
    bombs = BOMBS[form]()
    paths = [tmp_path / name for name in bombs]
    for path, build in zip(paths, bombs.values(), strict=True):
        build(path)
    for found in read_in_children(FORMATS[form].reader if form in FORMATS else Checkpoint, paths):
        size = sum(file.stat().st_size for file in [found.path, *found.path.glob("*")])
        assert found.memory < 2 * size + 2**26, found.path
        assert found.seconds < 20, found.path
