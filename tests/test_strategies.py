"""`generate` against what Hugging Face's PyTorch `generate` made of the same prompts: ids, scores, hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import elsewhere, foremost
from generation_goldens import arrays, cases, check_full, inputs_of, load, parameters_of

from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.results import GenerationOutput
from tfgptj.heads import TFGPTJForCausalLM

MODES = ("greedy", "sample")  # beams and contrastive search have tests of their own
REPRESENTATIVE = (
    *("greedy", "greedy_three_eos", "greedy_max_length", "greedy_forced_bos", "greedy_guidance_negative"),
    *("greedy_prefix_allowed_tokens_fn", "greedy_custom_processor", "greedy_suppress_tokens"),
)
ARGUMENTS = ("prefix_allowed_tokens_fn", "logits_processor")


def mode(case: dict[str, Any]) -> str:
    names = {name: value for name, value in case["parameters"].items() if name not in ARGUMENTS}
    return "assisted" if "assistant" in case else GenerationConfig(**names).mode


CASES = {case["name"]: case for case in cases("strategies") if mode(case) in ("greedy", "sample")}
# What Hugging Face does here depends on the padding, which it takes for text.
COUNTS_PADDING = ("greedy_repetition_penalty", "greedy_encoder_repetition_penalty")
# The limit counts the width of the prompts, and the function sees the number of the row: both are the batch's.
OF_THE_BATCH = ("greedy_max_length", "greedy_prefix_allowed_tokens_fn")


# The tokens are the same all the same, but not all scores; nor are those of rows that have ended, for the last.
COUNTS_PADDING_IN_SCORES = (
    *("greedy_guidance_many", "greedy_no_repeat_ngram", "greedy_encoder_no_repeat_ngram", "greedy_min_length"),
    "greedy_custom_processor",
)


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return load()


def comparable(name: str, steps: int) -> np.ndarray:
    """Which scores of a case must be Hugging Face's, bool [B, steps]."""
    mask, sequences = (
        inputs_of("strategies", name)["attention_mask"].astype(bool),
        arrays("strategies")[f"{name}/sequences"],
    )
    if name not in COUNTS_PADDING_IN_SCORES:
        return np.ones((len(mask), steps), bool)
    ended = np.cumsum(sequences[:, mask.shape[1] :] == CASES[name]["parameters"]["eos_token_id"], axis=1) > 0
    own = ~np.pad(ended, ((0, 0), (1, 0)))[:, :steps] & mask.all(axis=1, keepdims=True)
    assert own.sum() >= 5
    return own


def test_there_are_cases() -> None:
    assert len(CASES) == 27
    depends = {name for name, case in CASES.items() if case.get("rows_alone") is False}
    assert depends == {*COUNTS_PADDING, *OF_THE_BATCH} | depends & {"greedy_many_processors"}


def without_padding_as_text(name: str) -> bool:
    return name in OF_THE_BATCH or CASES[name].get("rows_alone", True)


@pytest.mark.core
@pytest.mark.parametrize(
    "name",
    elsewhere(
        foremost(filter(without_padding_as_text, CASES), *REPRESENTATIVE), "greedy_three_eos", "greedy_custom_processor"
    ),
)
def test_ids_are_hugging_face_s(model: TFGPTJForCausalLM, name: str) -> None:
    sequences = model.generate(**inputs_of("strategies", name), **parameters_of(CASES[name]))
    np.testing.assert_array_equal(sequences, arrays("strategies")[f"{name}/sequences"])


@pytest.mark.parametrize("name", [name for name in CASES if not without_padding_as_text(name)])
def test_rows_without_padding_come_out_the_same_whatever_stands_beside_them(
    model: TFGPTJForCausalLM, name: str
) -> None:
    inputs, expected = inputs_of("strategies", name), arrays("strategies")[f"{name}/sequences"]
    whole = inputs["attention_mask"].all(axis=1)
    sequences = model.generate(**inputs, **parameters_of(CASES[name]))
    width = min(sequences.shape[1], expected.shape[1])
    assert whole.any() and not whole.all()
    np.testing.assert_array_equal(sequences[whole, :width], expected[whole, :width])


@pytest.mark.parametrize(
    "name", elsewhere([name for name in CASES if CASES[name].get("rows_alone", True)], "greedy_full", "greedy_guidance")
)
def test_transition_scores_are_hugging_face_s(model: TFGPTJForCausalLM, name: str) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    output = model.generate(**inputs_of("strategies", name), **parameters_of(CASES[name]), **wanted)
    assert isinstance(output, GenerationOutput)
    found = arrays("strategies")
    np.testing.assert_array_equal(output.sequences, found[f"{name}/sequences"])
    assert len(output.scores) == output.sequences.shape[1] - inputs_of("strategies", name)["input_ids"].shape[1]
    for suffix, normalize in (("", False), ("_normalized", True)):
        scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=normalize)
        own = comparable(name, scores.shape[1])
        expected = found[f"{name}/transition_scores{suffix}"]
        np.testing.assert_allclose(scores[own], expected[own], rtol=1e-4, atol=1e-4)


@pytest.mark.core
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].get("full")])
def test_everything_else_is_hugging_face_s(model: TFGPTJForCausalLM, name: str) -> None:
    wanted = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    options = dict.fromkeys(("return_dict_in_generate", *wanted), True)
    output = model.generate(**inputs_of("strategies", name), **parameters_of(CASES[name]), **options)
    found = arrays("strategies")
    own = comparable(name, len(output.scores)).T
    np.testing.assert_allclose(np.stack(output.scores)[own], found[f"{name}/scores"][own], rtol=1e-4, atol=1e-4)
    check_full(output, "strategies", name)
