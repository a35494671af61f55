"""Checks before loading: digests of files, and the architecture of a model that exists."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDENS

from tfgptj.checkpoints.checks import check_same_architecture, check_sha256
from tfgptj.checkpoints.safetensors import SafetensorsFile
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError
from tfgptj.heads import TFGPTJForCausalLM

BASE, SHARDED = GOLDENS / "base" / "causal_lm", GOLDENS / "loading" / "sharded"
SHA = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
TINY = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}


def digests(directory: Path) -> dict[str, str]:
    names = [path.name for path in directory.glob("*") if ".safetensors" in path.name]
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.core
@pytest.mark.parametrize("expected", [SHA, SHA.upper(), {"model.safetensors": SHA}])
def test_the_right_digest(expected: Any) -> None:
    model = TFGPTJForCausalLM.from_pretrained(BASE, expected_sha256=expected)
    model.load_pretrained(BASE, expected_sha256=expected)


def test_shards_and_their_index_have_digests() -> None:
    with Checkpoint(SHARDED) as checkpoint:
        assert checkpoint.sha256() == digests(SHARDED)
        assert len(digests(SHARDED)) == 4
    TFGPTJForCausalLM.from_pretrained(SHARDED, expected_sha256=digests(SHARDED))


@pytest.mark.parametrize("directory", ["float32", "sharded"])
def test_pytorchs_files_have_digests(directory: str) -> None:
    path = GOLDENS / "formats" / "torch" / directory
    with Checkpoint(path, "bin") as checkpoint:
        assert checkpoint.sha256() == {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("pytorch_model*")
        }


@pytest.mark.parametrize("name", sorted(digests(SHARDED)))
def test_every_file_counts(name: str) -> None:
    wrong = digests(SHARDED) | {name: "0" * 64}
    found = digests(SHARDED)[name]
    with pytest.raises(
        CheckpointFormatError,
        match=f"not the weights that were expected, by their SHA-256: {name} has {found}, expected 0{{64}}$",
    ):
        TFGPTJForCausalLM.from_pretrained(SHARDED, expected_sha256=wrong)


def test_a_wrong_digest_is_found_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("read too early")

    monkeypatch.setattr(SafetensorsFile, "_fill", fail)
    monkeypatch.setattr(TFGPTJForCausalLM, "__init__", fail)
    with pytest.raises(CheckpointFormatError, match=r"model\.safetensors has .*, expected 0{64}"):
        TFGPTJForCausalLM.from_pretrained(BASE, expected_sha256="0" * 64)


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("abc", r"expected_sha256 of model\.safetensors must be 64 hexadecimal digits, got 'abc'"),
        (SHA + "\n", "must be 64 hexadecimal digits, got"),
        ({"model.safetensors": b"0" * 64}, "must be 64 hexadecimal digits, got b'000"),
        (3, r"expected_sha256 must be 64 hexadecimal digits \(model\.safetensors\), got int"),
        ({}, r"must have exactly the files model\.safetensors; it lacks model\.safetensors$"),
        ({"model.safetensors": SHA, "x": SHA, 3: SHA}, "exactly the files .*; it names what is none of them: 3, x$"),
        ({"x": SHA}, "it lacks model.safetensors; it names what is none of them: x$"),
    ],
)
def test_what_is_no_digest_of_these_files(expected: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        TFGPTJForCausalLM.from_pretrained(BASE, expected_sha256=expected)
    assert not isinstance(caught.value, CheckpointFormatError)


def test_one_digest_is_not_enough_for_shards() -> None:
    text = (
        r"must be a dict of 64 hexadecimal digits for each file \(model\.safetensors\.index\.json, .*00003.*\), got str"
    )
    with pytest.raises(CheckpointError, match=text):
        TFGPTJForCausalLM.from_pretrained(SHARDED, expected_sha256=SHA)


def test_the_digest_is_that_of_the_open_files(tmp_path: Path) -> None:
    shutil.copytree(SHARDED, tmp_path, dirs_exist_ok=True)
    with Checkpoint(tmp_path) as checkpoint:
        for path in tmp_path.iterdir():  # another save
            path.unlink()
            path.write_text("{}")
        check_sha256(checkpoint, digests(SHARDED))


def test_a_closed_or_unreadable_file_has_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Any, algorithm: str) -> None:
        raise OSError(5, "Input/output error")

    checkpoint = Checkpoint(BASE)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", fail)
        with pytest.raises(CheckpointError, match=r"safetensors: its digest could not be taken: Input/output error"):
            checkpoint.sha256()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="its digest was asked for after the file was closed"):
        checkpoint.sha256()


# The architecture


def test_all_that_results_depend_on_is_compared() -> None:
    other = {
        **{"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": None, "n_inner": 8},
        **{"activation_function": "relu", "layer_norm_epsilon": 1e-6, "tie_word_embeddings": True},
    }
    with pytest.raises(CheckpointMismatchError) as caught:
        check_same_architecture(Path("x"), GPTJConfig(**{**TINY, **other}), GPTJConfig(**TINY), "causal_lm")
    lines = str(caught.value).splitlines()
    assert lines[0] == "x: these weights are for a model of another architecture:"
    assert "  rotary_dim: None, the model has 4" in lines
    assert {line.split(":")[0].strip() for line in lines[1:-1]} == set(other)
    assert lines[-1] == "Load them into a model of their own, with from_pretrained"


@pytest.mark.core
@pytest.mark.parametrize(
    "fields",
    [{"n_inner": 64}, {"attn_pdrop": 0.5, "n_positions": 7, "use_cache": False, "num_labels": 3}, {"pad_token_id": 1}],
)
def test_what_results_do_not_depend_on(fields: dict[str, Any]) -> None:
    check_same_architecture(Path("x"), GPTJConfig(**{**TINY, **fields}), GPTJConfig(**TINY), "causal_lm")


def test_differences_that_do_not_count_everywhere() -> None:
    config, tied = GPTJConfig(**TINY), GPTJConfig(**TINY, tie_word_embeddings=True)
    check_same_architecture(Path("x"), tied, config, "classification")
    longer = GPTJConfig(**{**TINY, "vocab_size": 50})
    check_same_architecture(Path("x"), longer, config, "causal_lm", ignore_mismatched_sizes=True)


# Vocabularies that were cut: 50,257 tokens of 50,400, here 48 of 50


def scaled(tmp_path: Path, name: str, **fields: Any) -> Path:
    """The checkpoint with 48 rows, and a configuration that says something else."""
    shutil.copytree(GOLDENS / name / "causal_lm", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("name", ["base", "tied"])
def test_a_vocabulary_of_another_size(tmp_path: Path, name: str) -> None:
    directory = scaled(tmp_path, name, vocab_size=50)
    with pytest.raises(CheckpointMismatchError) as caught:
        TFGPTJForCausalLM.from_pretrained(directory)
    assert str(caught.value).splitlines()[-1] == (
        "The weights are for a vocabulary of 48, the configuration says vocab_size 50: "
        "if the weights are right, load with vocab_size=48"
    )
    model = TFGPTJForCausalLM.from_pretrained(directory, vocab_size=48)
    assert model([[1, 2]]).shape == (1, 2, 48)
    model.save_pretrained(tmp_path / "again")
    assert TFGPTJForCausalLM.from_pretrained(tmp_path / "again").config.vocab_size == 48
    assert TFGPTJForCausalLM.from_pretrained(scaled(tmp_path, name)).config.vocab_size == 48


def test_the_advice_is_not_given_for_another_width(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"Does the config\.json belong to these weights"):
        TFGPTJForCausalLM.from_pretrained(scaled(tmp_path, "base", vocab_size=50, n_embd=32))
