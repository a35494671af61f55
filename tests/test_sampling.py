"""Sampled tokens against Hugging Face's exact distributions of the next token, and of the next two."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import foremost
from generation_goldens import arrays, cases, load

from tfgptj.heads import TFGPTJForCausalLM

pytestmark = pytest.mark.core
CASES = {case["name"]: case for case in cases("sampling")}
DRAWS = 1500
# These processors take padding for text in Hugging Face: only rows without padding can be compared.
COUNT_PADDING = ("many", "pairs_warm")


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return load()


def chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    """In standard deviations from its mean, over outcomes that are expected at least 5 times, the others together."""
    expected = shares * counts.sum()
    assert counts[expected == 0].sum() == 0, "what has no probability was drawn"
    often = expected >= 5
    counts, expected = (np.append(x[often], x[~often].sum()) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = max(len(expected) - 1, 1)
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def rows_of(name: str) -> list[int]:
    mask = arrays("sampling")[f"{name}/attention_mask"]
    return [row for row in range(len(mask)) if name not in COUNT_PADDING or mask[row].all()]


def test_there_are_all_cases() -> None:
    assert len(CASES) == 14
    assert all(rows_of(name) for name in CASES)


@pytest.mark.parametrize("name", CASES)
def test_probabilities_are_hugging_face_s(model: TFGPTJForCausalLM, name: str) -> None:
    found = arrays("sampling")
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "seed": 0}
    ids, mask = found[f"{name}/input_ids"], found[f"{name}/attention_mask"]
    scores = model.generate(ids, mask, **{**CASES[name]["parameters"], "max_new_tokens": 1}, **options).scores[0]
    weights = np.exp(scores.astype("float64") - scores.max(axis=-1, keepdims=True))
    shares, expected, rows = (
        weights / weights.sum(axis=-1, keepdims=True),
        found[f"{name}/probabilities"],
        rows_of(name),
    )
    np.testing.assert_array_equal(shares[rows] > 0, expected[rows] > 0)
    np.testing.assert_allclose(shares[rows], expected[rows], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", foremost(CASES, "plain", "top_p", "guidance", "many", "pairs_with_eos"))
def test_draws_follow_the_distribution(model: TFGPTJForCausalLM, name: str) -> None:
    found, parameters = arrays("sampling"), CASES[name]["parameters"]
    joint = f"{name}/joint" in found
    for row in rows_of(name):
        ids, mask = (found[f"{name}/{key}"][row : row + 1] for key in ("input_ids", "attention_mask"))
        options = {**parameters, "max_new_tokens": 2 if joint else 1, "num_return_sequences": DRAWS, "seed": 7 + row}
        drawn = model.generate(ids, mask, **options)[:, ids.shape[1] :]
        first = np.bincount(drawn[:, 0], minlength=64)
        assert chi_square(first, found[f"{name}/probabilities"][row].astype("float64")) < 4
        if joint:
            pairs = np.bincount(drawn[:, 0] * 64 + drawn[:, 1], minlength=64 * 64)
            assert chi_square(pairs, found[f"{name}/joint"][row].astype("float64").reshape(-1)) < 4


def test_streaming_neighbours_and_calls_do_not_change_a_draw(model: TFGPTJForCausalLM) -> None:
    options = {"do_sample": True, "seed": 3, "max_new_tokens": 12, "eos_token_id": None, "repetition_penalty": 1.2}
    ids, mask = np.array([[5, 6, 7], [9, 8, 0]]), np.array([[1, 1, 1], [1, 1, 0]])
    together = model.generate(ids, mask, **options)
    np.testing.assert_array_equal(together, model.generate(ids, mask, **options))
    np.testing.assert_array_equal(together[:1], model.generate(ids[:1], **options))

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[Any] = []

        def put(self, tokens: Any) -> None:
            self.tokens.append(tokens)

        def end(self) -> None:
            pass

    streamer = Streamer()
    np.testing.assert_array_equal(together, model.generate(ids, mask, streamer=streamer, **options))
    np.testing.assert_array_equal(np.stack(streamer.tokens[1:], axis=1), together[:, 3:])
