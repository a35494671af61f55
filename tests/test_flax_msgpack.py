"""The reader and writer of flax_model.msgpack: against Flax's files, and against damaged and hostile ones."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import msgpack_files
from reader_checks import ONE, Tensors, assert_equal, read, specs_of, tensors_of

from tfgptj.checkpoints import flax_msgpack
from tfgptj.checkpoints.flax_msgpack import FlaxFile, write_flax
from tfgptj.checkpoints.mapping import plan
from tfgptj.checkpoints.safetensors import SafetensorsFile
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, CheckpointFormatError

FORMATS = GOLDENS / "formats" / "flax"
WHOLE = {  # what Hugging Face's Flax class wrote, and the weights that it was given
    "causal_lm": "base/causal_lm",
    "headless": "loading/headless",
    "bfloat16": "loading/bfloat16",
}


def write(path: Path, tensors: Tensors) -> Path:
    write_flax(path, specs_of(tensors), tensors.items())
    return path


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
    assert_equal(read(FlaxFile, path), weights(WHOLE[name]))
    with FlaxFile(path) as file:
        assert file.metadata == {"format": "flax"}


def test_hugging_faces_shards_and_their_index() -> None:
    index = json.loads((FORMATS / "sharded" / "flax_model.msgpack.index.json").read_text())["weight_map"]
    found = {}
    for shard in sorted(set(index.values())):
        tensors = read(FlaxFile, FORMATS / "sharded" / shard)
        assert set(tensors) == {name for name in index if index[name] == shard}
        found |= tensors
    assert_equal(found, weights("base/causal_lm"))


@pytest.mark.parametrize("path", sorted(FORMATS.rglob("*.msgpack")), ids=lambda path: path.relative_to(FORMATS))
def test_what_is_written_is_what_flax_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Byte for byte."""
    if path.name == "chunked.msgpack":
        monkeypatch.setattr(flax_msgpack, "_CHUNK_BYTES", 1000)
    assert write(tmp_path / "flax_model.msgpack", read(FlaxFile, path)).read_bytes() == path.read_bytes()


def test_parted_arrays_are_put_together() -> None:
    with FlaxFile(FORMATS / "chunked.msgpack") as file:
        expected = weights("base/causal_lm")
        assert_equal({name: file.read(name) for name in file.names}, expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(np.concatenate([block.copy() for block in file.blocks(name)]), array)


def test_a_file_may_hold_nothing(tmp_path: Path) -> None:
    """Hugging Face writes such a shard where the first tensor is larger than a shard may be."""
    assert write(tmp_path / "flax_model.msgpack", {}).read_bytes() == b"\x80"
    assert read(FlaxFile, tmp_path / "flax_model.msgpack") == {}


# Reading


@settings(max_examples=60, deadline=None, derandomize=True)
@given(original=tensors_of("msgpack"), limit=st.sampled_from([1, 8, 30, 2**30]))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, original: Tensors, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flax_msgpack, "_CHUNK_BYTES", limit)
        path = write(tmp_path_factory.mktemp("a") / "flax_model.msgpack", original)
    assert_equal(read(FlaxFile, path), original)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 31, 32, 127, 128, 255, 256, 65535, 65536])
def test_sizes_of_every_width(tmp_path: Path, size: int) -> None:
    """msgpack has several forms for each of them."""
    names = [f"layer/{number:05d}" for number in range(min(size, 300))]
    original = {"long" * min(size // 4, 60) + "er": np.ones((size, 1), np.float16)} | dict.fromkeys(names, ONE)
    assert_equal(read(FlaxFile, write(tmp_path / "flax_model.msgpack", original)), original)


def test_scalars_and_short_extensions(tmp_path: Path) -> None:
    scalar = msgpack_files.extension(msgpack_files.inner(shape=()), 3)
    short = b"\xd8\x01\x93\x91\x01\xd9\x07float16\xc4\x02\x00\x3c"  # of 16 bytes, which has a first byte of its own
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(msgpack_files.mapping((msgpack_files.text("a"), scalar), (msgpack_files.text("b"), short)))
    assert_equal(read(FlaxFile, path), {"a": np.zeros((), np.float32), "b": np.ones(1, np.float16)})


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


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"x": np.ones(2, int)}, "tensor 'x': is int64, expected float32, float16, bfloat16, float64"),
        ({"x": ONE, "x/y": ONE}, "tensor 'x/y': a part of the name is empty or taken"),
        ({"x/y": ONE, "x": ONE}, "tensor 'x': a part of the name is empty or taken"),
        ({"x//y": ONE}, "tensor 'x//y': a part of the name is empty"),
        ({"x/y": ONE, "z": ONE, "x/w": ONE}, "tensor 'x/w': .* do not follow each other: sort them by name"),
    ],
)
def test_tensors_that_flax_cannot_hold(tmp_path: Path, tensors: Tensors, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        write(tmp_path / "flax_model.msgpack", tensors)
    assert list(tmp_path.iterdir()) == []
