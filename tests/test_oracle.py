"""The NumPy oracle against what Hugging Face's PyTorch GPT-J gave (see ``fixtures/make_goldens.py``)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest

GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/outputs.npz"))
CASES = ("none", "left", "right")
Outputs = dict[str, np.ndarray]


def assert_close(actual: Any, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    """The reference computes in float32, so what counts is the error relative to the largest value."""
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def load(name: str, head: str) -> tuple[oracle.Weights, oracle.Config, Outputs]:
    directory = GOLDENS / name / head
    config = json.loads((directory / "config.json").read_text())
    with np.load(GOLDENS / name / "outputs.npz") as outputs:
        return oracle.load_weights(directory), config, dict(outputs)


def inputs_of(outputs: Outputs, case: str) -> Outputs:
    names = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds")
    return {name: outputs[f"{case}/{name}"] for name in names if f"{case}/{name}" in outputs}


def test_goldens_are_present() -> None:
    assert len(NAMES) >= 9


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_causal_lm(name: str, case: str) -> None:
    weights, config, outputs = load(name, "causal_lm")
    inputs = inputs_of(outputs, case)
    states, attentions = oracle.hidden_states(weights, config, **inputs)
    for layer, state in enumerate(states):
        assert_close(state, outputs[f"{case}/causal_lm/hidden_states/{layer}"])
    for layer, attention in enumerate(attentions):
        assert_close(attention, outputs[f"{case}/causal_lm/attentions/{layer}"])
    logits = oracle.causal_lm_logits(weights, config, **inputs)
    assert_close(logits, outputs[f"{case}/causal_lm/logits"])
    loss = oracle.causal_lm_loss(logits, outputs[f"{case}/causal_lm/labels"])
    assert_close(loss, outputs[f"{case}/causal_lm/loss"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_classification(name: str, case: str) -> None:
    weights, config, outputs = load(name, "classification")
    inputs = inputs_of(outputs, case)
    if config.get("pad_token_id") is not None:
        logits = oracle.classification_logits(weights, config, **inputs)
    else:
        masks = inputs.get("attention_mask", np.ones_like(inputs["input_ids"])).astype(bool)
        rows = [ids[mask][None] for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
        logits = np.concatenate([oracle.classification_logits(weights, config, row) for row in rows])
    assert_close(logits, outputs[f"{case}/classification/logits"])
    labels = outputs[f"{case}/classification/labels"]
    loss = oracle.classification_loss(logits, labels, config.get("problem_type"))
    assert_close(loss, outputs[f"{case}/classification/loss"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_question_answering(name: str, case: str) -> None:
    weights, config, outputs = load(name, "question_answering")
    prefix = f"{case}/question_answering"
    start_logits, end_logits = oracle.question_answering_logits(weights, config, **inputs_of(outputs, case))
    assert_close(start_logits, outputs[f"{prefix}/start_logits"])
    assert_close(end_logits, outputs[f"{prefix}/end_logits"])
    positions = outputs[f"{prefix}/start_positions"], outputs[f"{prefix}/end_positions"]
    loss = oracle.question_answering_loss(start_logits, end_logits, *positions)
    assert_close(loss, outputs[f"{prefix}/loss"])


@pytest.mark.parametrize("case", ["position_ids", "token_type_ids", "inputs_embeds"])
@pytest.mark.parametrize("name", NAMES)
def test_other_inputs(name: str, case: str) -> None:
    weights, config, outputs = load(name, "causal_lm")
    logits = oracle.causal_lm_logits(weights, config, **inputs_of(outputs, case))
    assert_close(logits, outputs[f"{case}/causal_lm/logits"])


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name: str) -> None:
    weights, config, outputs = load(name, "causal_lm")
    prompt, mask, sequences = (outputs[f"greedy/{key}"] for key in ("input_ids", "attention_mask", "sequences"))
    steps = sequences.shape[1] - prompt.shape[1]
    np.testing.assert_array_equal(oracle.greedy(weights, config, prompt, mask, steps), sequences[:, -steps:])


@pytest.mark.parametrize(("name", "activation"), oracle.ACTIVATIONS.items())
def test_activation(name: str, activation: Callable[..., np.ndarray]) -> None:
    with np.load(GOLDENS / "activations.npz") as values:
        assert_close(activation(values["x"].astype(np.float64)), values[name])
        assert_close(activation(values["wide_x"].astype(np.float64)), values[f"wide/{name}"])


@pytest.mark.parametrize(("form", "tolerance"), [("sharded", 0), ("headless", 0), ("float16", 2**-11)])
def test_other_forms_hold_the_same_weights(form: str, tolerance: float) -> None:
    expected = oracle.load_weights(GOLDENS / "base" / "causal_lm")
    weights = oracle.load_weights(GOLDENS / "loading" / form)
    heads = {"lm_head.weight", "lm_head.bias"} if form == "headless" else set()
    assert set(weights) == set(expected) - heads
    for name, array in weights.items():
        assert_close(array, expected[name], tolerance)
