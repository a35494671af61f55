"""One checkpoint in every format that Hugging Face's classes write: the same tensors, the same numbers."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import FIXTURES, Golden, assert_near, elsewhere, numbers

from tfgptj.backbone import TFGPTJModel
from tfgptj.checkpoints.directory import FORMATS
from tfgptj.errors import CheckpointError, CheckpointFormatError
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification

FORMAT_GOLDENS = FIXTURES / "goldens" / "formats"
CAUSAL_LM = [
    *("torch/float32", "torch/sharded", "torch/buffers"),
    *("tensorflow/causal_lm", "tensorflow/sharded", "flax/causal_lm", "flax/sharded"),
]
HALF = {"torch/float16": "loading/float16", "torch/bfloat16": "loading/bfloat16", "flax/bfloat16": "loading/bfloat16"}


def same_weights(model: keras.Model, other: keras.Model) -> None:
    for mine, theirs in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(numbers(mine.value), numbers(theirs.value))


@pytest.mark.core
@pytest.mark.parametrize("name", elsewhere(CAUSAL_LM, "torch/float32", "tensorflow/causal_lm", "flax/causal_lm"))
def test_bit_equal_weights_and_golden_logits(name: str, base: Golden) -> None:
    model = TFGPTJForCausalLM.from_pretrained(FORMAT_GOLDENS / name)
    same_weights(model, base.load(TFGPTJForCausalLM))
    assert_near(model(base.inputs("left")), base["left/causal_lm/logits"])


@pytest.mark.parametrize(("name", "safetensors"), HALF.items())
def test_half_precision_stays_as_it_is(name: str, safetensors: str) -> None:
    model = TFGPTJForCausalLM.from_pretrained(FORMAT_GOLDENS / name, dtype="auto")
    assert model.dtype_policy.name == name.split("/")[1]
    same_weights(model, TFGPTJForCausalLM.from_pretrained(FIXTURES / "goldens" / safetensors, dtype="auto"))


@pytest.mark.parametrize("name", ["tensorflow/headless", "flax/headless"])
def test_a_backbone_saved_by_itself(name: str, base: Golden) -> None:
    model = TFGPTJModel.from_pretrained(FORMAT_GOLDENS / name)
    assert_near(model(base.inputs("left")), base["left/causal_lm/hidden_states/2"])


def test_other_heads_in_hdf5(base: Golden) -> None:
    classifier = TFGPTJForSequenceClassification.from_pretrained(FORMAT_GOLDENS / "tensorflow" / "classification")
    assert_near(classifier(base.inputs("left")), base["left/classification/logits"])
    reader = TFGPTJForQuestionAnswering.from_pretrained(FORMAT_GOLDENS / "tensorflow" / "question_answering")
    assert_near(reader(base.inputs("left"))["end_logits"], base["left/question_answering/end_logits"])


def together(directory: Path) -> Path:
    """A directory with the weights in all four formats."""
    shutil.copytree(FIXTURES / "goldens" / "base" / "causal_lm", directory, dirs_exist_ok=True)
    for name in (
        "torch/float32/pytorch_model.bin",
        "tensorflow/causal_lm/tf_model.h5",
        "flax/causal_lm/flax_model.msgpack",
    ):
        shutil.copy(FORMAT_GOLDENS / name, directory)
    return directory


def test_the_order_is_fixed_and_said_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tfgptj")
    directory = together(tmp_path)
    for name, form in FORMATS.items():
        TFGPTJForCausalLM.from_pretrained(directory)
        assert f"reading weights from {directory / form.whole}" in caplog.text
        TFGPTJForCausalLM.from_pretrained(directory, weights=name)
        (directory / form.whole).unlink()
    with pytest.raises(CheckpointError, match="holds no weights; looked for model.safetensors"):
        TFGPTJForCausalLM.from_pretrained(directory)


def test_no_other_format_is_tried_after_an_error(tmp_path: Path) -> None:
    directory = together(tmp_path)
    for form in FORMATS.values():
        (directory / form.whole).write_bytes((directory / form.whole).read_bytes()[:100])
        with pytest.raises(CheckpointFormatError, match=form.whole):
            TFGPTJForCausalLM.from_pretrained(directory)
        (directory / form.whole).unlink()


@pytest.mark.parametrize("wrong", FORMATS)
@pytest.mark.parametrize("right", FORMATS)
def test_the_content_counts_and_not_the_name(right: str, wrong: str, tmp_path: Path) -> None:
    if right == wrong:
        return
    directory = together(tmp_path)
    shutil.copy(directory / FORMATS[right].whole, directory / "content")
    shutil.move(directory / "content", directory / FORMATS[wrong].whole)
    with pytest.raises(CheckpointFormatError, match=FORMATS[wrong].whole):
        TFGPTJForCausalLM.from_pretrained(directory, weights=wrong)
