"""The model's numbers against Hugging Face's, for every golden configuration, head and padding."""

from __future__ import annotations

import keras
import numpy as np
import oracle
import pytest
from conftest import Golden, assert_near, numbers

from tfgptj.config import GPTJConfig
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification

pytestmark = pytest.mark.core
PADDINGS = ("none", "left", "right")


def everything(golden: Golden, cls: type, head: str, **options: object) -> keras.Model:
    return golden.load(cls, head, output_hidden_states=True, output_attentions=True, **options)


def test_causal_lm(golden: Golden) -> None:
    model = everything(golden, TFGPTJForCausalLM, "causal_lm")
    for padding in PADDINGS:
        key = f"{padding}/causal_lm"
        outputs = model(golden.inputs(padding))
        assert_near(outputs["logits"], golden[f"{key}/logits"])
        for i, hidden in enumerate(outputs["hidden_states"]):
            assert_near(hidden, golden[f"{key}/hidden_states/{i}"])
        for i, weights in enumerate(outputs["attentions"]):
            assert_near(weights, golden[f"{key}/attentions/{i}"])
        assert len(outputs["hidden_states"]) == model.config.n_layer + 1
        assert len(outputs["attentions"]) == model.config.n_layer
        assert_near(model.head_loss(golden[f"{key}/labels"], outputs), golden[f"{key}/loss"])


def test_other_inputs(golden: Golden) -> None:
    model = golden.load(TFGPTJForCausalLM)
    for case in ("position_ids", "token_type_ids", "inputs_embeds"):
        assert_near(model(golden.inputs(case)), golden[f"{case}/causal_lm/logits"])


def test_classification(golden: Golden) -> None:
    model = golden.load(TFGPTJForSequenceClassification, "classification")
    for padding in PADDINGS:
        key, inputs = f"{padding}/classification", golden.inputs(padding)
        by_mask = model(inputs)
        assert_near(by_mask, golden[f"{key}/logits"])
        assert_near(model.head_loss(golden[f"{key}/labels"], by_mask), golden[f"{key}/loss"])


def test_classification_finds_padding_by_its_token(golden: Golden) -> None:
    model = golden.load(TFGPTJForSequenceClassification, "classification")
    if model.config.pad_token_id is None:
        assert_near(model(golden["none/input_ids"]), golden["none/classification/logits"])
        return
    for padding in ("none", "right"):  # with left padding and no mask, PyTorch's rows see the padding: other numbers
        masked = numbers(model(golden.inputs(padding)))
        assert_near(model(golden[f"{padding}/input_ids"]), masked)


def test_question_answering(golden: Golden) -> None:
    model = golden.load(TFGPTJForQuestionAnswering, "question_answering")
    for padding in PADDINGS:
        key = f"{padding}/question_answering"
        outputs = model(golden.inputs(padding))
        positions = {name: golden[f"{key}/{name}"] for name in ("start_positions", "end_positions")}
        assert_near(outputs["start_logits"], golden[f"{key}/start_logits"])
        assert_near(outputs["end_logits"], golden[f"{key}/end_logits"])
        assert_near(model.head_loss(positions, outputs), golden[f"{key}/loss"])


@pytest.mark.parametrize(("policy", "tolerance"), [("mixed_bfloat16", 2**-5), ("bfloat16", 2**-5), ("float16", 2**-8)])
def test_half_precision_stays_near_the_oracle(base: Golden, policy: str, tolerance: float) -> None:
    model = base.load(TFGPTJForCausalLM, dtype=policy)
    inputs = base.inputs("left")
    weights = oracle.load_weights(base.directory / "causal_lm")
    config = GPTJConfig.from_json_file(base.directory / "causal_lm" / "config.json").to_dict()
    expected = oracle.causal_lm_logits(weights, config, inputs["input_ids"], inputs["attention_mask"])
    logits = model(inputs)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    real = inputs["attention_mask"].astype(bool)  # padding's own rows are read by nobody
    assert np.abs(numbers(logits)[real] - expected[real]).max() <= tolerance * np.abs(expected).max()
