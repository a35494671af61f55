"""The reader and writer of flax_model.msgpack: against Flax's files, and against damaged and hostile ones."""

from __future__ import annotations

import json
import os
import random
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import msgpack_files

from tfgptj.checkpoints import flax_msgpack
from tfgptj.checkpoints.flax_msgpack import FlaxFile, write_flax
from tfgptj.checkpoints.mapping import plan
from tfgptj.checkpoints.safetensors import SafetensorsFile
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorSpec
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, CheckpointFormatError

Tensors = dict[str, np.ndarray]
FORMATS = GOLDENS / "formats" / "flax"
WHOLE = {  # what Hugging Face's Flax class wrote, and the weights that it was given
    "causal_lm": "base/causal_lm",
    "headless": "loading/headless",
    "bfloat16": "loading/bfloat16",
}
ONE = np.ones(2, np.float32)


def specs_of(tensors: Tensors) -> list[TensorSpec]:
    return [TensorSpec(name, array.shape, array.dtype) for name, array in tensors.items()]


def write(path: Path, tensors: Tensors) -> Path:
    write_flax(path, specs_of(tensors), tensors.items())
    return path


def read(path: Path) -> Tensors:
    with FlaxFile(path) as file:
        return {name: file.read(name) for name in file.names}


def assert_equal(actual: Tensors, expected: Tensors) -> None:
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes()  # NaN, too


def weights(source: str) -> Tensors:
    """PyTorch's weights under the table's Flax names."""
    directory, found = GOLDENS / source, {}
    head = "none" if source.endswith("headless") else "causal_lm"
    with SafetensorsFile(directory / "model.safetensors") as file:
        for entry in plan(GPTJConfig.from_pretrained(directory), head):
            above = "" if entry.in_head or head == "none" else "transformer"
            stored = file.read(f"{above}.{entry.names['torch']}".lstrip("."))
            array = np.ascontiguousarray(stored.T if entry.transpose else stored)
            found[f"{above}/{entry.names['flax']}".lstrip("/")] = array
    return found


# Flax's files


@pytest.mark.parametrize("name", WHOLE)
def test_hugging_faces_files_hold_pytorchs_weights(name: str) -> None:
    path = FORMATS / name / "flax_model.msgpack"
    assert_equal(read(path), weights(WHOLE[name]))
    with FlaxFile(path) as file:
        assert file.metadata == {"format": "flax"}


def test_hugging_faces_shards_and_their_index() -> None:
    index = json.loads((FORMATS / "sharded" / "flax_model.msgpack.index.json").read_text())["weight_map"]
    found = {}
    for shard in sorted(set(index.values())):
        tensors = read(FORMATS / "sharded" / shard)
        assert set(tensors) == {name for name in index if index[name] == shard}
        found |= tensors
    assert_equal(found, weights("base/causal_lm"))


@pytest.mark.parametrize("path", sorted(FORMATS.rglob("*.msgpack")), ids=lambda path: path.relative_to(FORMATS))
def test_what_is_written_is_what_flax_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Byte for byte."""
    if path.name == "chunked.msgpack":
        monkeypatch.setattr(flax_msgpack, "_CHUNK_BYTES", 1000)
    assert write(tmp_path / "flax_model.msgpack", read(path)).read_bytes() == path.read_bytes()


def test_parted_arrays_are_put_together() -> None:
    with FlaxFile(FORMATS / "chunked.msgpack") as file:
        expected = weights("base/causal_lm")
        assert_equal({name: file.read(name) for name in file.names}, expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(np.concatenate([block.copy() for block in file.blocks(name)]), array)


def test_a_file_may_hold_nothing(tmp_path: Path) -> None:
    """Hugging Face writes such a shard where the first tensor is larger than a shard may be."""
    assert write(tmp_path / "flax_model.msgpack", {}).read_bytes() == b"\x80"
    assert read(tmp_path / "flax_model.msgpack") == {}


# Reading


@st.composite
def tensors(draw: st.DrawFn) -> Tensors:
    part = st.text("ab0é _", min_size=1, max_size=40)
    names = draw(st.lists(st.lists(part, min_size=2, max_size=2), max_size=20, unique_by=tuple))
    result = {}
    for name in sorted("/".join(parts) for parts in names):
        dtype = FLOAT_DTYPES[draw(st.sampled_from(sorted(FLOAT_DTYPES)))]
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        count = int(np.prod(shape)) * dtype.itemsize
        result[name] = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), dtype).reshape(shape)
    return result


@settings(max_examples=60, deadline=None, derandomize=True)
@given(original=tensors(), limit=st.sampled_from([1, 8, 30, 2**30]))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, original: Tensors, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flax_msgpack, "_CHUNK_BYTES", limit)
        path = write(tmp_path_factory.mktemp("a") / "flax_model.msgpack", original)
    assert_equal(read(path), original)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 31, 32, 127, 128, 255, 256, 65535, 65536])
def test_sizes_of_every_width(tmp_path: Path, size: int) -> None:
    """msgpack has several forms for each of them."""
    names = [f"layer/{number:05d}" for number in range(min(size, 300))]
    original = {"long" * min(size // 4, 60) + "er": np.ones((size, 1), np.float16)} | dict.fromkeys(names, ONE)
    assert_equal(read(write(tmp_path / "flax_model.msgpack", original)), original)


def test_scalars_and_short_extensions(tmp_path: Path) -> None:
    scalar = msgpack_files.extension(msgpack_files.inner(shape=()), 3)
    short = b"\xd8\x01\x93\x91\x01\xd9\x07float16\xc4\x02\x00\x3c"  # of 16 bytes, which has a first byte of its own
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(msgpack_files.mapping((msgpack_files.text("a"), scalar), (msgpack_files.text("b"), short)))
    assert_equal(read(path), {"a": np.zeros((), np.float32), "b": np.ones(1, np.float16)})


@pytest.mark.parametrize("limit", [100, 2**30])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (64,), (65, 3), (200, 2, 2)])
def test_blocks_are_the_rows_of_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], limit: int
) -> None:
    monkeypatch.setattr(flax_msgpack, "_CHUNK_BYTES", limit)
    original = np.random.default_rng(0).standard_normal(shape, np.float32)
    rows = original.reshape(shape or (1,))
    with FlaxFile(write(tmp_path / "flax_model.msgpack", {"x": original})) as file:
        done = 0
        for block in file.blocks("x"):
            assert 0 < len(block) <= 64
            np.testing.assert_array_equal(block, rows[done : done + len(block)])
            done += len(block)
    assert done == (len(rows) if rows.size else 0)


def test_threads_may_read_at_once() -> None:
    expected = weights("base/causal_lm")
    with FlaxFile(FORMATS / "chunked.msgpack") as file, ThreadPoolExecutor(8) as pool:
        names = list(expected) * 8
        assert_equal(dict(zip(names, pool.map(file.read, names), strict=True)), expected)


def test_opening_reads_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "flax_model.msgpack", {f"{number}": np.ones(10**6, np.float32) for number in range(5)})
    asked: list[int] = []
    read_bytes = FlaxFile._read_bytes

    def count(self: FlaxFile, start: int, out: memoryview, what: str) -> None:
        asked.append(len(out))
        read_bytes(self, start, out, what)

    monkeypatch.setattr(FlaxFile, "_read_bytes", count)
    FlaxFile(path).close()
    assert sum(asked) < 10_000


# Damaged and hostile files


@contextmanager
def little_memory(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", msgpack_files.REFUSED)
def test_damaged_and_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    content, text = msgpack_files.REFUSED[case]
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content)
    begin = time.perf_counter()
    with little_memory(2**20), pytest.raises(CheckpointFormatError, match=text) as caught:
        FlaxFile(path)
    assert time.perf_counter() - begin < 1
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_every_prefix_is_refused(tmp_path: Path) -> None:
    path, valid = tmp_path / "flax_model.msgpack", (FORMATS / "chunked.msgpack").read_bytes()
    for length in (*range(200), *np.linspace(200, len(valid) - 1, 64, dtype=int)):
        path.write_bytes(valid[:length])
        with pytest.raises(CheckpointFormatError, match="the file is empty|cut short") as caught:
            FlaxFile(path)
        assert str(path) in str(caught.value)


def test_flipped_bits_give_an_error_or_tensors_of_the_stored_sizes(tmp_path: Path) -> None:
    path, chance, refused = tmp_path / "flax_model.msgpack", random.Random(0), 0
    sizes = {(np.dtype(np.float32), 12), (np.dtype(ml_dtypes.bfloat16), 2), (np.dtype(np.float16), 2)}
    for _ in range(500):
        content = bytearray(msgpack_files.VALID)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            found = read(path)
        except CheckpointFormatError:
            refused += 1
        else:
            assert {(array.dtype, array.size) for array in found.values()} <= sizes
            assert len(found) == 2
    assert refused > 100


@settings(max_examples=300, deadline=None, derandomize=True)
@given(content=st.binary(max_size=60))
def test_any_bytes_give_an_error_or_tensors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.msgpack"
    path.write_bytes(b"\x82\xa1a" + content)
    try:
        read(path)
    except CheckpointFormatError as error:
        assert str(path) in str(error)


def test_things_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        FlaxFile(tmp_path / "flax_model.msgpack")
    with pytest.raises(CheckpointFormatError, match="is a directory, expected a Flax msgpack file"):
        FlaxFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointFormatError, match="is no regular file, expected a Flax msgpack file"):
        FlaxFile(tmp_path / "pipe")


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "flax_model.msgpack", {"x": np.ones(1000)})
    with FlaxFile(path) as file:
        with pytest.raises(CheckpointError, match="holds no tensor 'y'"):
            file.read("y")
        with pytest.raises(CheckpointError, match="holds no tensor 'y'"):
            next(file.blocks("y"))
        os.truncate(path, 1000)
        with pytest.raises(CheckpointFormatError, match="cut short while being read: tensor 'x' ends 7,"):
            file.read("x")
    with pytest.raises(CheckpointError, match="tensor 'x' was asked for after the file was closed"):
        file.read("x")


# Writing


@pytest.mark.parametrize(
    ("announced", "given", "text"),
    [
        ({"x": ONE}, {"y": ONE}, r"expected tensor 'x', float32 \[2\], got 'y', float32 \[2\]"),
        ({"x": ONE}, {"x": np.ones(2)}, r"got 'x', float64 \[2\]"),
        ({"x": ONE, "y": ONE}, {"x": ONE}, r"expected tensor 'y', float32 \[2\], got nothing"),
        ({"x": ONE}, {"x": ONE, "y": ONE}, "got more tensors than the 1 that were announced"),
        ({"x": np.ones(2, int)}, {}, "tensor 'x': is int64, expected float32, float16, bfloat16, float64"),
        ({"x": ONE, "x/y": ONE}, {}, "tensor 'x/y': a part of the name is empty or taken"),
        ({"x/y": ONE, "x": ONE}, {}, "tensor 'x': a part of the name is empty or taken"),
        ({"x//y": ONE}, {}, "tensor 'x//y': a part of the name is empty"),
        ({"x/y": ONE, "z": ONE, "x/w": ONE}, {}, "tensor 'x/w': .* do not follow each other: sort them by name"),
    ],
)
def test_tensors_must_be_those_announced(tmp_path: Path, announced: Tensors, given: Tensors, text: str) -> None:
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=text):
        write_flax(path, specs_of(announced), given.items())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_tensors_cannot_have_one_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor 'x': a part of the name is empty or taken"):
        write_flax(tmp_path / "m", specs_of({"x": ONE}) * 2, [])


def test_only_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    def values() -> Iterable[tuple[str, Any]]:
        for name in "abc":
            assert not (tmp_path / "m").exists()
            yield name, ONE

    write_flax(tmp_path / "m", specs_of(dict.fromkeys("abc", ONE)), values())
    assert_equal(read(tmp_path / "m"), dict.fromkeys("abc", ONE))
