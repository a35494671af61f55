"""Checkpoints converted without Keras: every format to every other one, bit for bit, and what comes along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import FIXTURES, GOLDENS, Golden, assert_near

from tfgptj.checkpoints.checks import match_plan
from tfgptj.checkpoints.convert import StoredWeights, convert
from tfgptj.checkpoints.directory import FORMATS, TOKENIZER_FILES
from tfgptj.checkpoints.mapping import plan
from tfgptj.checkpoints.opening import open_checkpoint, read_config
from tfgptj.checkpoints.write import WRITTEN
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError
from tfgptj.heads import TFGPTJForCausalLM

SOURCES = {
    "safetensors": GOLDENS / "base" / "causal_lm",
    "safetensors, sharded": GOLDENS / "loading" / "sharded",
    "bin": GOLDENS / "formats" / "torch" / "float32",
    "bin, with buffers": GOLDENS / "formats" / "torch" / "buffers",
    "h5": GOLDENS / "formats" / "tensorflow" / "causal_lm",
    "msgpack, sharded": GOLDENS / "formats" / "flax" / "sharded",
}


def variables(directory: Path, head: str = "causal_lm") -> dict[str, np.ndarray]:
    """The stored values under our own names, all turned as the variables are."""
    checkpoint, config = open_checkpoint(directory, read_config)
    with checkpoint:
        stored = match_plan(plan(config, head), checkpoint).stored
        return {
            entry.variable: array.T if entry.is_transposed(checkpoint.layout) else array
            for entry, array in ((entry, checkpoint.read(name)) for entry, name in stored)
        }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], dtype: Any = None) -> None:
    assert set(one) == set(other)
    for name, array in one.items():
        expected = array if dtype is None else array.astype(dtype)
        assert other[name].dtype == expected.dtype
        assert other[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("limit", ["5GB", "9KB"])
@pytest.mark.parametrize("target", WRITTEN)
@pytest.mark.parametrize("source", SOURCES)
def test_every_format_to_every_format(tmp_path: Path, source: str, target: str, limit: str) -> None:
    convert(SOURCES[source], tmp_path / "there", format=target, max_shard_size=limit)
    convert(tmp_path / "there", tmp_path / "back", max_shard_size="5GB")
    expected = variables(SOURCES["safetensors"])
    assert_same(expected, variables(tmp_path / "there"))
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        SOURCES["safetensors"] / "model.safetensors"
    ).read_bytes()
    assert GPTJConfig.from_pretrained(tmp_path / "back").n_embd == 16


@pytest.mark.parametrize("target", ["safetensors", "msgpack"])
def test_bfloat16_stays_as_it_is(tmp_path: Path, target: str) -> None:
    source = GOLDENS / "formats" / "torch" / "bfloat16"
    convert(source, tmp_path, format=target)
    assert_same(variables(source), variables(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("float16", "float16"), ("bfloat16", ml_dtypes.bfloat16)])
def test_another_dtype(tmp_path: Path, dtype: str, numpy_dtype: Any) -> None:
    convert(SOURCES["h5"], tmp_path, dtype=dtype)
    assert_same(variables(SOURCES["h5"]), variables(tmp_path), np.dtype(numpy_dtype))
    assert (tmp_path / "model.safetensors").read_bytes() == (
        GOLDENS / "loading" / dtype / "model.safetensors"
    ).read_bytes()


def test_what_was_converted_says_the_same(tmp_path: Path, base: Golden) -> None:
    convert(SOURCES["bin"], tmp_path, format="h5", max_shard_size="9KB")
    assert_near(TFGPTJForCausalLM.from_pretrained(tmp_path)(base.inputs("left")), base["left/causal_lm/logits"])


@pytest.mark.parametrize("head", ["classification", "question_answering", "none"])
@pytest.mark.parametrize("target", ["safetensors", "h5"])
def test_other_heads(tmp_path: Path, head: str, target: str) -> None:
    source = GOLDENS / "loading" / "headless" if head == "none" else GOLDENS / "base" / head
    convert(source, tmp_path, format=target)
    assert_same(variables(source, head), variables(tmp_path, head))
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == json.loads((source / "config.json").read_text())["architectures"]


@pytest.mark.parametrize("target", WRITTEN)
def test_a_tied_head(tmp_path: Path, target: str) -> None:
    source = GOLDENS / "tied" / "causal_lm"
    convert(source, tmp_path, format=target)
    assert_same(variables(source), variables(tmp_path))


def test_configurations_and_tokenizer_go_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCES["safetensors"], source)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FIXTURES / "small_vocab" / name, source)
    (source / "README.md").write_text("not a part of it")
    (source / "generation_config.json").write_text('{"top_k": 3}')
    convert(source, tmp_path / "new", format="h5")
    names = {"config.json", "generation_config.json", "vocab.json", "merges.txt", "tf_model.h5"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    for name in names - {"config.json", "tf_model.h5"}:
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()


def test_in_place(tmp_path: Path) -> None:
    shutil.copytree(SOURCES["bin"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").touch()
    expected = variables(tmp_path)
    with pytest.raises(CheckpointError, match="is not empty; choose another directory, or overwrite what is there"):
        convert(tmp_path, tmp_path)
    convert(tmp_path, tmp_path, dtype="float32", overwrite=True)
    assert_same(expected, variables(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "notes.txt",
    ]  # fmt: skip


def test_one_of_several_formats(tmp_path: Path) -> None:
    shutil.copytree(SOURCES["safetensors"], tmp_path / "both")
    shutil.copy(GOLDENS / "formats" / "torch" / "float16" / "pytorch_model.bin", tmp_path / "both")
    convert(tmp_path / "both", tmp_path / "new", weights="bin")
    assert {array.dtype.name for array in variables(tmp_path / "new").values()} == {"float16"}


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    convert(SOURCES["safetensors"], tmp_path, max_shard_size="9KB", progress=lambda *counts: told.append(counts))
    total = sum(array.nbytes for array in variables(tmp_path).values())
    assert len(told) == len(variables(tmp_path))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {whole for _, whole in told} == {told[-1][0]} == {total}


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="HDF5 has no bfloat16; save as float16 or float32"):
        convert(SOURCES["bin"], tmp_path, format="h5", dtype="bfloat16")
    with pytest.raises(CheckpointError, match="score.kernel: Hugging Face's Flax classes have no such weight"):
        convert(GOLDENS / "base" / "classification", tmp_path, format="msgpack")
    with pytest.raises(CheckpointError, match="act.slope: Hugging Face's TensorFlow classes have no such weight"):
        convert(GOLDENS / "prelu" / "causal_lm", tmp_path, format="h5")
    assert not list(tmp_path.iterdir())


def test_a_damaged_source_leaves_the_destination_alone(tmp_path: Path) -> None:
    shutil.copytree(SOURCES["bin"], tmp_path / "source")
    content = bytearray((tmp_path / "source" / "pytorch_model.bin").read_bytes())
    content[content.index(variables(SOURCES["bin"])["embedding.wte.embeddings"].tobytes())] ^= 1
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(content)
    shutil.copytree(SOURCES["h5"], tmp_path / "new")
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    with pytest.raises(CheckpointFormatError, match="damaged: its checksum is"):
        convert(tmp_path / "source", tmp_path / "new", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before


def test_a_source_that_does_not_fit_its_configuration(tmp_path: Path) -> None:
    shutil.copytree(SOURCES["bin"], tmp_path / "source")
    fields = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**fields, "n_layer": 3}))
    with pytest.raises(CheckpointMismatchError, match="missing \\(10\\): h.2.ln_1.weight"):
        convert(tmp_path / "source", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_huge_companion_is_not_copied(tmp_path: Path) -> None:
    shutil.copytree(SOURCES["bin"], tmp_path / "source")
    with open(tmp_path / "source" / TOKENIZER_FILES[0], "wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(CheckpointError, match="tokenizer.json: has 68,157,440 bytes; at most 67,108,864 are copied"):
        convert(tmp_path / "source", tmp_path / "new")


def test_two_tensors_at_most_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    most = 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            alive.pop()

    read = StoredWeights._value

    def counted(*args: Any) -> Any:
        nonlocal most
        alive.append(1)
        most = max(most, len(alive))
        return read(*args).view(Counted)

    monkeypatch.setattr(StoredWeights, "_value", counted)
    for target in WRITTEN:
        convert(SOURCES["safetensors"], tmp_path / target, format=target)
        assert not alive
    assert most == 2


def test_formats_that_the_command_line_offers() -> None:
    from tfgptj.cli import checkpoints

    assert (*WRITTEN, "litert", "tflite") == checkpoints.FORMATS
    assert ("auto", *FORMATS) == checkpoints.WEIGHTS
