"""Checkpoints in every format that is written: what the files hold, and how one replaces another."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from array_weights import ArrayWeights, is_same, open_state, random_weights, state_of
from conftest import GOLDENS

from tfgptj import files
from tfgptj.checkpoints import write
from tfgptj.checkpoints.directory import FORMATS, find_weights
from tfgptj.checkpoints.mapping import plan
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.checkpoints.write import WRITTEN, write_checkpoint
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError

FORMAT_GOLDENS = GOLDENS / "formats"
ANY_FORMAT = pytest.mark.parametrize("form", WRITTEN)
LIMITS = pytest.mark.parametrize("limit", ["1GB", "9KB"])
HEADS = ("none", "causal_lm", "classification", "question_answering")


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Every format into every other


SOURCES = {  # one of each format, dtype and head, as Hugging Face wrote them
    "base/causal_lm": "causal_lm",
    "base/classification": "classification",
    "base/question_answering": "question_answering",
    "tied/causal_lm": "causal_lm",
    "odd_sizes/causal_lm": "causal_lm",
    "loading/headless": "none",
    "loading/float16": "causal_lm",
    "loading/bfloat16": "causal_lm",
    "loading/sharded": "causal_lm",
    "formats/torch/float32": "causal_lm",
    "formats/torch/float16": "causal_lm",
    "formats/torch/bfloat16": "causal_lm",
    "formats/torch/sharded": "causal_lm",
    "formats/tensorflow/causal_lm": "causal_lm",
    "formats/tensorflow/headless": "none",
    "formats/tensorflow/classification": "classification",
    "formats/tensorflow/question_answering": "question_answering",
    "formats/tensorflow/sharded": "causal_lm",
    "formats/flax/causal_lm": "causal_lm",
    "formats/flax/headless": "none",
    "formats/flax/bfloat16": "causal_lm",
    "formats/flax/sharded": "causal_lm",
}


@pytest.mark.parametrize("source", SOURCES)
@ANY_FORMAT
@LIMITS
def test_a_checkpoint_of_any_format_is_bit_equal_in_any_other(
    tmp_path: Path, source: str, form: str, limit: str
) -> None:
    head = SOURCES[source]
    with open_state(GOLDENS / source, head) as (_, weights):
        if form == "h5" and "bfloat16" in source:
            with pytest.raises(CheckpointError, match="HDF5 has no bfloat16; save as float16 or float32"):
                write_checkpoint(tmp_path, weights, format=form)
            assert names_in(tmp_path) == []
            return
        if form == "msgpack" and head in ("classification", "question_answering"):
            with pytest.raises(CheckpointError, match="Flax classes have no such weight; save as safetensors"):
                write_checkpoint(tmp_path, weights, format=form)
            assert names_in(tmp_path) == []
            return
        write_checkpoint(tmp_path, weights, format=form, max_shard_size=limit)
    expected, (fields, found) = state_of(GOLDENS / source, head), state_of(tmp_path, head)
    assert is_same((fields, found), (fields, expected[1]))
    assert find_weights(tmp_path)[1] == form
    assert (find_weights(tmp_path)[0].suffix == ".json") == (limit == "9KB")


@ANY_FORMAT
@pytest.mark.parametrize("activation", ["prelu", "xielu"])
def test_activations_with_weights_are_pytorchs_alone(tmp_path: Path, form: str, activation: str) -> None:
    with open_state(GOLDENS / activation / "causal_lm") as (_, weights):
        if form != "safetensors":
            with pytest.raises(CheckpointError, match=r"mlp\.act\..*: .* classes have no such weight"):
                write_checkpoint(tmp_path, weights, format=form)
            assert names_in(tmp_path) == []
        else:
            write_checkpoint(tmp_path, weights, format=form)
            assert is_same(([], state_of(tmp_path)[1]), ([], state_of(GOLDENS / activation / "causal_lm")[1]))


@ANY_FORMAT
@pytest.mark.parametrize("head", HEADS[:2])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype(tmp_path: Path, form: str, head: str, dtype: str) -> None:
    wide = random_weights(1, head=head, dtype="float64")
    write_checkpoint(tmp_path, wide, format=form, dtype=dtype)
    for name, array in state_of(tmp_path, head)[1].items():
        np.testing.assert_array_equal(array, wide.arrays[name].astype(dtype))
        assert array.dtype == dtype
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


# What Hugging Face's own classes write


@pytest.mark.parametrize(
    ("name", "head"), [("causal_lm", "causal_lm"), ("headless", "none"), ("bfloat16", "causal_lm")]
)
def test_flax_files_are_those_of_hugging_face(tmp_path: Path, name: str, head: str) -> None:
    golden = FORMAT_GOLDENS / "flax" / name
    with open_state(golden, head) as (_, weights):
        write_checkpoint(tmp_path, weights, format="msgpack")
    assert (tmp_path / "flax_model.msgpack").read_bytes() == (golden / "flax_model.msgpack").read_bytes()


@pytest.mark.parametrize("head", HEADS)
def test_tensorflow_files_have_the_layout_of_hugging_faces(tmp_path: Path, head: str) -> None:
    """Their attributes are compared in the tests of the format."""
    golden = FORMAT_GOLDENS / "tensorflow" / ("headless" if head == "none" else head)
    with open_state(golden, head) as (_, weights):
        write_checkpoint(tmp_path, weights, format="h5")
    places: list[set[str]] = []
    for directory in (tmp_path, golden):
        places.append(set())
        with h5py.File(directory / "tf_model.h5") as h5:
            h5.visit(lambda place: places[-1].add(place.replace("tfgptj_model_1", "tfgptj_model")))
    assert places[0] == places[1]


@pytest.mark.parametrize("form", ["h5", "msgpack"])
def test_shards_are_named_as_hugging_face_does(tmp_path: Path, form: str) -> None:
    golden = FORMAT_GOLDENS / {"h5": "tensorflow", "msgpack": "flax"}[form] / "sharded"
    with open_state(golden) as (_, weights):
        write_checkpoint(tmp_path, weights, format=form, max_shard_size="12KB")
    index = FORMATS[form].index
    ours, theirs = (json.loads((directory / index).read_text()) for directory in (tmp_path, golden))
    # They number the models of a process, and we have one.
    assert set(ours["weight_map"]) == {name.replace("_causal_lm_1/", "_causal_lm/") for name in theirs["weight_map"]}
    assert ours["metadata"] == theirs["metadata"]
    assert all(FORMATS[form].is_shard(name) for name in set(ours["weight_map"].values()))


@LIMITS
def test_hugging_faces_tensorflow_class_has_a_kernel_of_its_own_when_tied(tmp_path: Path, limit: str) -> None:
    with open_state(GOLDENS / "tied" / "causal_lm") as (_, weights):
        write_checkpoint(tmp_path, weights, format="h5", max_shard_size=limit)
        with Checkpoint(tmp_path) as checkpoint:
            expected = weights.arrays["embedding.wte.embeddings"].T
            np.testing.assert_array_equal(checkpoint.read("lm_head/kernel:0"), expected)
            assert len(checkpoint.names) == len(plan(weights.config, "causal_lm")) + 1


# One checkpoint in place of another


def put_old(directory: Path, form: str, limit: str) -> None:
    """A checkpoint in any format: PyTorch's own is Hugging Face's."""
    if form == "bin":
        source = FORMAT_GOLDENS / "torch" / ("float32" if limit == "1GB" else "sharded")
        shutil.copytree(source, directory, dirs_exist_ok=True)
        (directory / "generation_config.json").write_text('{"top_k": 1}')
    else:
        write_checkpoint(directory, OLD, format=form, max_shard_size=limit)


OLD, NEW = random_weights(1, documents=True), random_weights(2, n_layer=2, layer_norm_epsilon=1e-3)
OTHERS = {"vocab.json": "{}", "notes.txt": "mine", "model.onnx": "no format of ours", "my-model.safetensors": "mine"}


@pytest.mark.parametrize("old", FORMATS)
@pytest.mark.parametrize("old_limit", ["1GB", "2KB"])
@ANY_FORMAT
@pytest.mark.parametrize("new_limit", ["1GB", "2KB"])
def test_any_format_replaces_any_other_and_nothing_else(
    tmp_path: Path, old: str, old_limit: str, form: str, new_limit: str
) -> None:
    put_old(tmp_path, old, old_limit)
    for name, text in OTHERS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / ".tfgptj-left-by-a-crash.tmp").touch()
    write_checkpoint(tmp_path, NEW, format=form, max_shard_size=new_limit)
    found = state_of(tmp_path)
    assert is_same(found, (found[0], dict(NEW.arrays)))
    assert found[0][1] is None  # the old generation_config.json is gone
    with Checkpoint(tmp_path, form) as checkpoint:
        head = FORMATS[form].whole if new_limit == "1GB" else FORMATS[form].index
        assert names_in(tmp_path) == sorted({*OTHERS, "config.json", head, *checkpoint.shards})
    assert all((tmp_path / name).read_text() == text for name, text in OTHERS.items())


@ANY_FORMAT
def test_a_checkpoint_is_written_over_the_files_that_it_is_read_from(tmp_path: Path, form: str) -> None:
    write_checkpoint(tmp_path, NEW, format=form)
    expected = state_of(tmp_path)
    for target in (*WRITTEN, form):
        with open_state(tmp_path) as (_, weights):
            write_checkpoint(tmp_path, weights, format=target, max_shard_size="1KB" if target == form else "1GB")
        assert is_same(state_of(tmp_path), expected)


class Killed(BaseException):
    """The process ends here: nothing that follows has any effect."""


def kill_at(step: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Let the process die before its nth change of the disk, and at every attempt to clean up after that."""
    changes: list[str] = []

    def dying(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def change_or_die(*args: Any, **kwargs: Any) -> Any:
            changes.append(name)
            if len(changes) > step:
                raise Killed
            return change(*args, **kwargs)

        return change_or_die

    patch.setattr(files, "open", dying("open", open), raising=False)
    for home, name in ((os, "replace"), (os, "fsync"), (os, "utime"), (Path, "unlink"), (shutil, "rmtree")):
        patch.setattr(home, name, dying(name, getattr(home, name)))
    return changes


def outcomes_of_kills(tmp_path: Path, old: Callable[[Path], object], new: Callable[[Path], object]) -> list[bool]:
    """Whether the new checkpoint is there after a kill before each change of the disk; else it is the old one."""
    old(tmp_path / "old")
    new(tmp_path / "new")
    states, outcomes = (state_of(tmp_path / "old"), state_of(tmp_path / "new")), []
    for step in range(200):
        directory = tmp_path / "killed"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / "old", directory)
        with pytest.MonkeyPatch.context() as patch:
            changes = kill_at(step, patch)
            with contextlib.suppress(Killed):
                new(directory)
        found = state_of(directory)
        assert is_same(found, states[0]) or is_same(found, states[1]), f"a third state after {changes[:step]}"
        outcomes.append(is_same(found, states[1]))
        if len(changes) <= step:
            return outcomes
        if step % 5 == 0:  # the next save clears up what was left
            new(directory)
            assert is_same(state_of(directory), states[1])
            assert len(names_in(directory)) == len(names_in(tmp_path / "new"))
    raise AssertionError("a save that never ends")


# Old and new differ in format, but for three that stay; each format is there whole and in shards, as old and as new.
KILLS = [
    *(("safetensors", "1GB", "safetensors", "2KB"), ("safetensors", "2KB", "safetensors", "2KB")),
    *(("safetensors", "2KB", "h5", "1GB"), ("safetensors", "1GB", "msgpack", "2KB")),
    *(("bin", "1GB", "h5", "2KB"), ("bin", "2KB", "safetensors", "1GB"), ("bin", "1GB", "msgpack", "1GB")),
    *(("h5", "1GB", "safetensors", "2KB"), ("h5", "2KB", "msgpack", "1GB"), ("h5", "2KB", "h5", "1GB")),
    *(("msgpack", "1GB", "h5", "1GB"), ("msgpack", "2KB", "safetensors", "1GB"), ("msgpack", "1GB", "h5", "2KB")),
]


@pytest.mark.parametrize(("old", "old_limit", "form", "limit"), KILLS)
def test_whenever_it_is_killed_the_old_or_the_new_is_there(
    tmp_path: Path, old: str, old_limit: str, form: str, limit: str
) -> None:
    outcomes = outcomes_of_kills(
        tmp_path,
        lambda directory: put_old(directory, old, old_limit),
        lambda directory: write_checkpoint(directory, NEW, format=form, max_shard_size=limit),
    )
    assert outcomes == sorted(outcomes)  # once it is there, it stays
    assert not outcomes[0]
    assert outcomes[-1]


@ANY_FORMAT
def test_two_saves_in_one_tick_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Weights are told apart by size and time when a configuration is looked for that belongs to them."""
    fields = OLD.config.to_dict() | {"layer_norm_epsilon": 1e-3}
    new = ArrayWeights(GPTJConfig.from_dict(fields), "causal_lm", random_weights(3).arrays, {})
    write_weights = write._write_weights

    def write_at_noon(staging: Path, *arguments: Any) -> str:
        head = write_weights(staging, *arguments)
        os.utime(staging / head, ns=(10**18, 10**18))
        return head

    monkeypatch.setattr(write, "_write_weights", write_at_noon)
    outcomes = outcomes_of_kills(
        tmp_path,
        lambda directory: write_checkpoint(directory, OLD, format=form),
        lambda directory: write_checkpoint(directory, new, format=form),
    )
    assert outcomes == sorted(outcomes)
    assert outcomes[-1]
