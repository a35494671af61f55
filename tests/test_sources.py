"""A directory of weights as one collection of tensors: whole files, shards, and indexes that do not tell the truth."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDENS
from safetensors.numpy import load_file, save_file

from tfgptj.checkpoints.directory import FORMATS, companion, find_weights, fingerprint, pending_path
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.errors import CheckpointError, CheckpointFormatError

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A copy of a checkpoint in three shards."""
    return Path(shutil.copytree(GOLDENS / "loading" / "sharded", tmp_path / "sharded"))


def edit_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def test_shards_hold_what_the_whole_file_holds(sharded: Path) -> None:
    expected = load_file(GOLDENS / "base" / "causal_lm" / "model.safetensors")
    with Checkpoint(sharded) as checkpoint:
        assert set(checkpoint.names) == set(expected)
        assert checkpoint.layout == "torch"
        for name, array in expected.items():
            assert checkpoint.spec(name).shape == array.shape
            np.testing.assert_array_equal(checkpoint.read(name), array)
            np.testing.assert_array_equal(np.concatenate([block.copy() for block in checkpoint.blocks(name)]), array)


def test_a_whole_file_comes_before_shards(sharded: Path) -> None:
    save_file({"x": np.ones(1)}, sharded / "model.safetensors")
    with Checkpoint(sharded, "safetensors") as checkpoint:
        assert checkpoint.names == ("x",)
        assert checkpoint.shards == ["model.safetensors"]


def test_open_files_outlive_their_names(sharded: Path) -> None:
    with Checkpoint(sharded) as checkpoint:
        shutil.rmtree(sharded)
        assert all(checkpoint.read(name).size for name in checkpoint.names)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights; looked for model.safetensors or .*; found nothing"):
        Checkpoint(tmp_path)
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(CheckpointError, match="found model.ckpt"):
        find_weights(tmp_path)
    with pytest.raises(CheckpointError, match="weights must be one of auto, safetensors.*; got 'onnx'"):
        Checkpoint(tmp_path, "onnx")


def test_weights_are_found_while_a_save_changes_their_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "flax_model.msgpack", tmp_path / "model.safetensors"
    old.touch()
    lexists = os.path.lexists

    def save_meanwhile(path: Path) -> bool:
        found = lexists(path)
        if old.exists() and path == new:
            old.rename(new)
        return found

    monkeypatch.setattr(os.path, "lexists", save_meanwhile)
    assert find_weights(tmp_path) == (new, "safetensors")


def test_a_dangling_link_is_not_skipped(sharded: Path) -> None:
    (sharded / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: there is no such file"):
        Checkpoint(sharded)


def test_the_fingerprint_changes_with_weights_and_configurations(sharded: Path) -> None:
    (sharded / "generation_config.json").write_text("{}")
    before = fingerprint(sharded)
    assert fingerprint(sharded) == before
    for name in ("config.json", "generation_config.json", INDEX):
        (sharded / "new").write_bytes((sharded / name).read_bytes())
        (sharded / "new").replace(sharded / name)
        assert fingerprint(sharded) != before
        before = fingerprint(sharded)
    (sharded / "config.json").unlink()
    assert fingerprint(sharded) != before


def test_links_to_files_are_followed(sharded: Path) -> None:
    (sharded / FIRST).rename(sharded / "blob")
    (sharded / FIRST).symlink_to("blob")
    with Checkpoint(sharded) as checkpoint:
        assert len(checkpoint.names) == 25


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    with pytest.raises(CheckpointError, match=f"{FIRST}: this shard is named in {INDEX}, but there is no such file"):
        Checkpoint(sharded)


def test_a_damaged_shard(sharded: Path) -> None:
    (sharded / FIRST).write_bytes(b"")
    with pytest.raises(CheckpointFormatError, match=f"{FIRST}: the file is empty"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "a/x.safetensors", "/x.safetensors", "C:x.safetensors", "C:\\x.safetensors",
     "a\\x.safetensors", "//srv/x.safetensors", "x.bin", "x.safetensors\n", "x\0.safetensors", "", 3, None, ".."],
)  # fmt: skip
def test_a_shard_is_a_file_beside_the_index(sharded: Path, shard: object) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"lm_head.bias": shard}))
    with pytest.raises(
        CheckpointFormatError, match=r"lm_head\.bias' is said to be in .*must be a \*\.safetensors file"
    ):
        Checkpoint(sharded)


def test_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"extra": FIRST}))
    with pytest.raises(
        CheckpointFormatError, match=f"{FIRST}: lacks tensor 'extra', but .* says that it is in {FIRST}"
    ):
        Checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    tensors = load_file(sharded / FIRST)
    save_file({**tensors, "lm_head.bias": np.ones(48, np.float32)}, sharded / FIRST)
    with pytest.raises(
        CheckpointFormatError, match="00001.*: holds tensor 'lm_head.bias', but .* it is in model-00003"
    ):
        Checkpoint(sharded)


def test_a_tensor_that_the_index_lacks(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].pop("lm_head.bias"))
    with pytest.raises(CheckpointFormatError, match="holds tensor 'lm_head.bias', but .* it is in none of the shards"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"weight_map": {}, "weight_map": {}}', "the key 'weight_map' comes twice"),
        ("{}", "weight_map must map tensors to shards, got None"),
        ('{"weight_map": {}}', r"weight_map must map tensors to shards, got \{\}"),
        ('{"weight_map": {"a": "b.safetensors"}, "metadata": 1}', "metadata must be an object, got 1"),
        ("[" + "1," * 2**18 + "1]", "not valid JSON: more than 262,144 values"),
        (" " * (2**23 + 1), "8,388,609 bytes; at most 8,388,608 are read of an index"),
    ],
    ids=lambda value: value[:20],
)
def test_an_index_that_is_none(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointFormatError, match=text) as caught:
        Checkpoint(tmp_path)
    assert INDEX in str(caught.value)


def test_an_index_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / INDEX
    for make in (os.mkfifo, os.mkdir):
        make(path)
        with pytest.raises(CheckpointFormatError, match=f"{INDEX}: is no regular file, expected the index"):
            Checkpoint(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()
    path.symlink_to(INDEX)
    with pytest.raises(CheckpointError, match=f"{INDEX}: cannot be read: Too many levels of symbolic links"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 7, -1, 1.5e9, "1 GB", None, ...])
def test_no_one_relies_on_the_total_size(sharded: Path, size: Any) -> None:
    """Old files count parameters there, or have floats, or nothing."""
    edit_index(sharded, lambda index: index["metadata"].update({"total_size": size}) if size is not ... else None)
    if size is ...:
        edit_index(sharded, lambda index: index.pop("metadata"))
    with Checkpoint(sharded) as checkpoint:
        assert len(checkpoint.names) == 25


@pytest.mark.parametrize(("label", "layout"), [("pt", "torch"), ("tf", "tensorflow"), ("flax", "flax")])
def test_the_metadata_tell_the_layout(tmp_path: Path, label: str, layout: str) -> None:
    save_file({"x": np.ones(1)}, tmp_path / "model.safetensors", {"format": label})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.layout == layout


def test_layouts_of_others(tmp_path: Path) -> None:
    save_file({"x": np.ones(1)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:  # written by hand: PyTorch's is the usual one
        assert checkpoint.layout == "torch"
    save_file({"x": np.ones(1)}, tmp_path / "model.safetensors", {"format": "paddle"})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointFormatError, match="name the format 'paddle'"):
        _ = checkpoint.layout


def test_a_waiting_configuration_counts_for_the_weights_that_it_belongs_to(tmp_path: Path) -> None:
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file({"x": np.ones(1)}, weights)
    assert companion(tmp_path, "config.json") == config
    pending = pending_path(tmp_path, "config.json", weights.stat())
    pending.write_text("{}")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.companion("config.json") == companion(tmp_path, "config.json") == pending
    pending.write_text("")  # these weights have none
    config.touch()
    assert not companion(tmp_path, "config.json").exists()
    assert companion(tmp_path, "generation_config.json") == tmp_path / "generation_config.json"
    assert companion(tmp_path, "config.json", "bin") == config
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert companion(tmp_path, "config.json") == config
    weights.unlink()
    weights.symlink_to("nowhere")
    assert companion(tmp_path, "config.json") == config


def test_names_of_shards() -> None:
    form = FORMATS["safetensors"]
    assert form.shard(2, 7) == "model-00002-of-00007.safetensors"
    assert form.is_shard(form.shard(2, 7))
    assert form.is_shard(form.shard(2, 7, "0123abcd"))
    assert not any(
        map(form.is_shard, ["model.safetensors", "my-model-00001-of-00002.safetensors", "model-1-of-2.safetensors"])
    )
