"""The safetensors reader and writer: against the library, and against damaged and hostile files."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_checks import Tensors, assert_equal, read, specs_of, tensors_of

from tfgptj import limits
from tfgptj.checkpoints.safetensors import DTYPES, SafetensorsFile, write_safetensors
from tfgptj.checkpoints.tensors import TensorSpec, assemble
from tfgptj.errors import CheckpointError, CheckpointFormatError

NUMPY = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


def write(path: Path, tensors: Tensors, **options: Any) -> Path:
    write_safetensors(path, specs_of(tensors), tensors.items(), **options)
    return path


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), data: int = 4) -> bytes:
    """A file with the tensor `a`."""
    return file_bytes({"a": entry(dtype, shape, offsets)}, bytes(data))


@settings(max_examples=60, deadline=None)
@given(
    original=tensors_of("safetensors"), metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)
)
def test_what_is_written_is_read_by_the_library_and_by_us(
    tmp_path_factory: pytest.TempPathFactory, original: Tensors, metadata: dict[str, str]
) -> None:
    path = write(tmp_path_factory.mktemp("a") / "model.safetensors", original, metadata=metadata)
    assert_equal(read(SafetensorsFile, path), original)
    with SafetensorsFile(path) as file:
        assert file.metadata == metadata
    found = dict(safetensors.deserialize(path.read_bytes()))
    assert set(found) == set(original)
    for name, array in original.items():
        assert DTYPES[found[name]["dtype"]] == array.dtype
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()


@settings(max_examples=40, deadline=None)
@given(original=tensors_of("safetensors", NUMPY))
def test_the_librarys_files_are_read_and_ours_are_byte_for_byte_the_same(
    tmp_path_factory: pytest.TempPathFactory, original: Tensors
) -> None:
    content = safetensors.numpy.save(original, {"format": "pt"})
    path = tmp_path_factory.mktemp("b") / "model.safetensors"
    path.write_bytes(content)
    assert_equal(read(SafetensorsFile, path), original)
    with SafetensorsFile(path) as file:
        in_order = {name: original[name] for name in file.names}
    assert write(path, in_order).read_bytes() == content


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    original = {"x": np.array([1, np.nan, -np.inf, 3.14], ml_dtypes.bfloat16)}
    assert_equal(read(SafetensorsFile, write(tmp_path / "m.safetensors", original)), original)


def test_values_begin_at_a_multiple_of_eight(tmp_path: Path) -> None:
    for name in ("x", "xx", "xxx", "xxxxxxxxx"):
        content = write(tmp_path / "m.safetensors", {name: np.ones(3)}).read_bytes()
        assert int.from_bytes(content[:8], "little") % 8 == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(3, 5), (64, 1), (1, 64), (130, 70), (0, 4)])
def test_assembling_transposes_and_converts(shape: tuple[int, int], dtype: str) -> None:
    original = np.random.default_rng(0).standard_normal(shape, np.float32)
    blocks = [original[row : row + 7] for row in range(0, len(original), 7)]
    spec = TensorSpec("x", shape, original.dtype)
    for transpose in (False, True):
        result = assemble(blocks, spec, np.dtype(dtype), transpose=transpose)
        np.testing.assert_array_equal(result, (original.T if transpose else original).astype(dtype))
        assert result.flags.c_contiguous
        assert result.ctypes.data % 64 == 0 or result.size == 0


def test_values_too_large_for_a_dtype_are_refused() -> None:
    blocks, spec = [np.array([1, 1e5], np.float32)], TensorSpec("wte", (2,), np.dtype("float32"))
    with pytest.raises(CheckpointError, match="tensor wte: holds values too large for float16; use a wider one"):
        assemble(blocks, spec, np.dtype("float16"))
    blocks[0] = np.array([np.nan, -np.inf], np.float32)  # these are in float16 too
    np.testing.assert_array_equal(assemble(blocks, spec, np.dtype("float16")), blocks[0])


VALID = file_bytes({"a": entry(), "b": entry("U8", [2, 1], [4, 6])}, bytes(range(6)))
DEEP = b'{"a":' * 100_000
# Content, what the message must say, and whether the library takes it nevertheless.
DAMAGED: dict[str, tuple[bytes, str, bool]] = {
    "empty": (b"", "the file is empty", False),
    "short": (b"\x08\0\0", "not a safetensors file: its header's length is 8", False),
    "no header": (struct.pack("<Q", 0), "its header's length is 0, not between 2 and 4,194,304", False),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", "its header's length is 9,223,372,036,854,775,808", False),
    "all ones": (b"\xff" * 8 + b"{}", "its header's length is 18,446,744,073,709,551,615", False),
    "over the limit": (struct.pack("<Q", 2**22 + 1) + b"{}", "its header's length is 4,194,305, not between", False),
    "header over the end": (struct.pack("<Q", 50) + b"{}", "cut short: the header takes 58 bytes, the file", False),
    "values cut": (VALID[:-1], f"cut short: {len(VALID)} bytes expected, {len(VALID) - 1} found", False),
    "trailing bytes": (VALID + b"PK", f"has bytes after the last tensor: {len(VALID)} bytes expected", False),
    "no object": (file_bytes(b"[1] "), r"its header begins with b'\[1\] ', not with {", False),
    "leading space": (file_bytes(b"  {}"), "its header begins with b'  {}'", True),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{}"), "its header begins with", False),
    "not JSON": (file_bytes(b'{"a":}'), "the header is not valid JSON", False),
    "two objects": (file_bytes(b"{}{}"), "the header is not valid JSON", False),
    "not UTF-8": (file_bytes(b'{"\xff":1}'), "the header is not valid JSON", False),
    "deep": (file_bytes(DEEP), "the header is not valid JSON", False),
    "long number": (file_bytes(b'{"a":' + b"9" * 10_000 + b"}"), "the header is not valid JSON", False),
    "NaN": (file_bytes(b'{"a":NaN}'), "NaN is not a JSON number", False),
    "same name twice": (
        file_bytes(f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry())}}}'.encode(), bytes(4)),
        "the key 'a' comes twice", True,
    ),
    "metadata of numbers": (file_bytes({"__metadata__": {"format": 1}}), "__metadata__ must map text to text", False),
    "metadata list": (file_bytes({"__metadata__": []}), "__metadata__ must map text to text", False),
    "entry is a list": (file_bytes({"a": []}), "tensor 'a': expected dtype, shape and data_offsets, got", False),
    "entry lacks a field": (file_bytes({"a": {"dtype": "F32", "shape": []}}), "expected dtype, shape and data_", False),
    "unknown dtype": (one("F33"), "unknown dtype 'F33'; known are BOOL, U8", False),
    "dtype is a list": (one(["F32"]), r"unknown dtype \['F32'\]", False),
    "half bytes": (one("F4", [8]), "unknown dtype 'F4'", True),
    "negative size": (one(shape=[-1]), r"the shape must be a list of sizes, got \[-1", False),
    "size is true": (one(shape=[True]), "the shape must be a list of sizes", False),
    "size is a float": (one(shape=[1.0]), "the shape must be a list of sizes", False),
    "size is text": (one(shape="1"), "the shape must be a list of sizes", False),
    "65 dimensions": (one(shape=[1] * 65), "the shape must be a list of sizes", True),
    "sizes overflow": (one(shape=[2**32] * 3), "the sizes .4294967296, .* are too large", False),
    "sizes times zero": (one(shape=[2**62, 2**62, 0], offsets=[0, 0]), "are too large for any array", False),
    "shape disagrees": (one(shape=[2]), r"float32 \[2\] takes 8 bytes, but .* span 4", False),
    "reversed offsets": (one(offsets=[4, 0]), "must be a start and a stop", False),
    "negative offsets": (one(offsets=[-4, 0]), "must be a start and a stop", False),
    "three offsets": (one(offsets=[0, 4, 8], data=8), "must be a start and a stop", False),
    "overlap": (
        file_bytes({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)),
        "tensor 'b': overlaps the tensor before it: starts at 2, expected 4", False,
    ),
    "hole": (
        file_bytes({"a": entry(), "b": entry(offsets=[5, 9])}, bytes(9)),
        "tensor 'b': leaves a hole after the tensor before it: starts at 5, expected 4", False,
    ),
    "hole at the start": (one(offsets=[4, 8], data=8), "tensor 'a': leaves a hole", False),
    "git lfs": (b"version https://git-lfs/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull", False),
    "web page": (b"<!DOCTYPE html><html></html>", "a web page or XML, not weights", False),
    "zip": (b"PK\x03\x04" + bytes(40), "a ZIP archive, such as PyTorch's .bin", False),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file under a wrong name", False),
    "pickle": (b"\x80\x04\x95" + bytes(40), "a Python pickle, which is never read", False),
}  # fmt: skip


def library_accepts(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except Exception:  # of several kinds
        return False
    return True


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(tmp_path: Path, case: str) -> None:
    content, text, accepted_by_library = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert library_accepts(content) == accepted_by_library
    with pytest.raises(CheckpointFormatError, match=text) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_a_header_need_not_be_sorted_and_may_say_more(tmp_path: Path) -> None:
    header = {"b": entry("U8", [2], [4, 6]), "a": {**entry(), "later": 1}}
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(header, struct.pack("<fBB", 1.5, 6, 7)))
    assert library_accepts(path.read_bytes())
    assert_equal(read(SafetensorsFile, path), {"a": np.array([1.5], np.float32), "b": np.array([6, 7], np.uint8)})


def test_flipped_bits_give_an_error_or_a_file_that_the_library_takes_too(tmp_path: Path) -> None:
    path, chance = tmp_path / "model.safetensors", random.Random(0)
    for _ in range(500):
        content = bytearray(VALID)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            read(SafetensorsFile, path)
        except CheckpointFormatError:
            continue
        assert library_accepts(bytes(content))


def test_the_header_limit_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(VALID)
    monkeypatch.setattr(limits, "MAX_SAFETENSORS_HEADER", 20)
    with pytest.raises(CheckpointFormatError, match="not between 2 and 20"):
        SafetensorsFile(path)


def test_a_failing_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def seek(self, start: int) -> None:
            raise OSError(5, "Input/output error")

    with SafetensorsFile(write(tmp_path / "m.safetensors", {"x": np.ones(1)})) as file:
        monkeypatch.setattr(file, "_file", Broken())
        with pytest.raises(CheckpointError, match="tensor 'x' could not be read: Input/output error"):
            file.read("x")
        monkeypatch.undo()


ONE = np.ones(2, np.float32)


def test_the_name_of_the_metadata_is_taken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the name '__metadata__' is taken"):
        write(tmp_path / "m.safetensors", {"__metadata__": np.ones(1)})
