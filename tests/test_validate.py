"""What `validate` finds in sound checkpoints, and in those that are not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES, GOLDENS
from safetensors.numpy import load_file, save_file

from tfgptj.checkpoints.hub import PACKAGED
from tfgptj.checkpoints.validate import validate

Tensors = dict[str, np.ndarray]
FORMATS = GOLDENS / "formats"


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the base checkpoint, whose tensors or configuration are changed."""

    def change(tensors: Callable[[Tensors], object] = lambda tensors: None, **fields: object) -> Path:
        shutil.copytree(GOLDENS / "base" / "causal_lm", tmp_path, dirs_exist_ok=True)
        stored = load_file(tmp_path / "model.safetensors")
        tensors(stored)
        save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
        return tmp_path

    return change


@pytest.mark.parametrize(
    "path",
    [
        *(GOLDENS / "base" / head for head in ("causal_lm", "classification", "question_answering")),
        *(FORMATS / "torch" / name for name in ("float16", "sharded", "buffers")),
        *(FORMATS / "tensorflow" / name for name in ("sharded", "headless")),
        FORMATS / "flax" / "bfloat16",
        PACKAGED / "shakespeare",
    ],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_sound_checkpoints_have_no_faults(path: Path) -> None:
    assert validate(path).faults == []


def test_facts_and_notes() -> None:
    report = validate(FORMATS / "torch" / "buffers")
    facts = dict(report.facts)
    assert facts["weights"].startswith("pytorch_model.bin, 29 tensors, ")
    assert facts["stored as"] == "bool, float32"
    assert facts["head"] == "causal lm"
    content = (FORMATS / "torch" / "buffers" / "pytorch_model.bin").read_bytes()
    assert facts["sha256 pytorch_model.bin"] == hashlib.sha256(content).hexdigest()
    assert report.notes == [
        "4 tensors are constants or of another head, and not loaded",
        "there is no tokenizer beside the weights",
    ]
    assert dict(validate(PACKAGED / "shakespeare").facts)["tokenizer"].endswith("tokens, for a vocabulary of 1,024")


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    validate(GOLDENS / "base" / "causal_lm", progress=lambda *counts: told.append(counts))
    assert len(told) == 25
    assert (
        told[-1][0]
        == told[-1][1]
        == sum(array.nbytes for array in load_file(GOLDENS / "base" / "causal_lm" / "model.safetensors").values())
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(broken: Callable[..., Path], value: float) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["transformer.h.1.mlp.fc_in.bias"][-1] = value
        tensors["lm_head.weight"][0, 0] = value

    names = ("transformer.h.1.mlp.fc_in.bias", "lm_head.weight")
    assert validate(broken(spoil)).faults == [f"{name}: holds NaN or infinite values" for name in names]


def test_zeros(broken: Callable[..., Path]) -> None:
    def wipe(tensors: Tensors) -> None:
        for name in (
            "transformer.h.0.ln_1.weight",
            "transformer.h.0.ln_1.bias",
            "lm_head.bias",
            "transformer.wte.weight",
        ):
            tensors[name][...] = 0

    names = ("transformer.wte.weight", "transformer.h.0.ln_1.weight")
    assert validate(broken(wipe)).faults == [f"{name}: all values are zero" for name in names]


def test_tensors_that_differ_from_the_plan(broken: Callable[..., Path]) -> None:
    (fault,) = validate(broken(lambda tensors: tensors.pop("transformer.h.0.attn.q_proj.weight"))).faults
    assert "missing (1): h.0.attn.q_proj.weight" in fault


def test_damaged_files(broken: Callable[..., Path]) -> None:
    directory = broken()
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-1])
    (fault,) = validate(directory).faults
    assert "model.safetensors: cut short" in fault
    (fault,) = validate(directory, weights="bin").faults
    assert "holds no weights; looked for pytorch_model.bin" in fault


def test_damaged_values_are_found_where_the_format_can_tell(tmp_path: Path) -> None:
    shutil.copytree(FORMATS / "torch" / "float32", tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "pytorch_model.bin"
    values = load_file(GOLDENS / "base" / "causal_lm" / "model.safetensors")["transformer.wte.weight"].tobytes()
    weights.write_bytes(weights.read_bytes().replace(values, values[:-1] + bytes([values[-1] ^ 1])))
    (fault,) = validate(tmp_path).faults
    assert "tensor 'transformer.wte.weight': damaged: its checksum is" in fault


def test_configurations_that_do_not_fit(broken: Callable[..., Path]) -> None:
    (fault,) = validate(broken(n_head=3)).faults
    assert "n_embd must be divisible by n_head" in fault
    directory = broken()
    (directory / "generation_config.json").write_text('{"temperature": "hot"}')
    (fault,) = validate(directory).faults
    assert "generation_config.json: temperature" in fault


def test_tokenizers_that_do_not_fit(broken: Callable[..., Path]) -> None:
    directory = broken()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FIXTURES / "small_vocab" / name, directory)
    report = validate(directory)
    (fault,) = report.faults
    assert fault == "the tokenizer has 584 tokens, but the model's vocabulary only 48"
    assert "eos_token_id is 2 in the configuration, but 583 in the tokenizer" in report.notes
    (directory / "merges.txt").write_text("no merge at all")
    (fault,) = validate(directory).faults
    assert "merges.txt: line 1: expected two tokens" in fault
