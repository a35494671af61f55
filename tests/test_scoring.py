"""score(): log-probabilities and perplexity against the logits themselves; and transition scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, elsewhere, numbers
from generation_goldens import arrays, cases, load

from tfgptj import GPTJTokenizer, TFGPTJForCausalLM
from tfgptj.errors import InputError

pytestmark = pytest.mark.core
SMALL = GPTJTokenizer.from_directory(FIXTURES / "small_vocab")
TEXTS = [[5, 9, 3, 8, 2], [7, 7], [1, 2, 3, 4, 5, 6, 7]]


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return load()


def expected_of(model: Any, ids: list[int]) -> np.ndarray:
    logits = numbers(model(np.array([ids])))[0].astype("float64")
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logs[np.arange(len(ids) - 1), ids[1:]]


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = np.zeros((3, 7), int), np.zeros((3, 7), int)
    for row, text in enumerate(TEXTS):
        where = slice(7 - len(text), 7) if side == "left" else slice(len(text))
        ids[row, where], mask[row, where] = text, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", elsewhere([1, 2, 8], 2))
def test_log_probabilities_are_those_of_each_text_alone(model: TFGPTJForCausalLM, side: str, batch_size: int) -> None:
    ids, mask = padded(side)
    scores = model.score(ids, mask, batch_size=batch_size)
    for row, text in enumerate(TEXTS):
        expected = expected_of(model, text)
        assert scores.token_ids[row].tolist() == text
        np.testing.assert_allclose(scores.log_probabilities[row], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(scores.total[row], expected.sum(), rtol=1e-4)
        np.testing.assert_allclose(scores.perplexity[row], np.exp(-expected.mean()), rtol=1e-3)


def test_long_texts_are_judged_in_parts(model: TFGPTJForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfgptj.generation.scoring.POSITIONS", 5)
    ids = np.random.default_rng(0).integers(0, 64, 33).tolist()
    [found] = model.score([ids]).log_probabilities
    np.testing.assert_allclose(found, expected_of(model, ids), rtol=1e-4, atol=1e-4)


def test_texts_need_a_tokenizer() -> None:
    model = TFGPTJForCausalLM.from_pretrained(FIXTURES / "pipeline_goldens" / "causal_lm", dtype="float32")
    texts = ["The king", "So it is"]
    scores = model.score(texts, tokenizer=SMALL)
    assert [ids.tolist() for ids in scores.token_ids] == [SMALL.encode(text) for text in texts]
    for text, found in zip(texts, scores.log_probabilities, strict=True):
        np.testing.assert_allclose(found, expected_of(model, SMALL.encode(text)), rtol=1e-4, atol=1e-4)
    assert model.score(texts[0], tokenizer=SMALL).total[0] == pytest.approx(scores.total[0], rel=1e-4)
    with pytest.raises(InputError, match="texts need the model's tokenizer: give tokenizer=, or token ids"):
        model.score(texts)
    with pytest.raises(InputError, match="text 1 is empty"):
        model.score(["a", ""], tokenizer=SMALL)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"texts": [[5]]}, "text 0 has 1 token: only tokens after others have a probability"),
        ({"texts": [[5, 6], [7, 0]], "attention_mask": [[1, 1], [1, 0]]}, "text 1 has 1 token"),
        ({"texts": [[5, 6]], "attention_mask": [[0, 0]]}, "row 0 of the texts has no token"),
        ({"texts": [[5, 6]], "batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"texts": [[5] * 65]}, "n_positions"),
    ],
)
def test_what_cannot_be_scored(model: TFGPTJForCausalLM, call: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.score(**call)


BEAMS = [case["name"] for case in cases("strategies") if case["name"].startswith("beams_full")]


@pytest.mark.parametrize("name", BEAMS)
def test_transition_scores_of_beams_are_hugging_face_s(model: TFGPTJForCausalLM, name: str) -> None:
    found = arrays("strategies")
    sequences, scores, indices = (found[f"{name}/{key}"] for key in ("sequences", "scores", "beam_indices"))
    for suffix, normalize in (("", False), ("_normalized", True)):
        result = model.compute_transition_scores(sequences, scores, indices, normalize_logits=normalize)
        np.testing.assert_allclose(result, found[f"{name}/transition_scores{suffix}"], rtol=1e-5, atol=1e-5)


def test_arrays_that_do_not_belong_together(model: TFGPTJForCausalLM) -> None:
    with pytest.raises(InputError, match="do not belong together"):
        model.compute_transition_scores([[1]], np.zeros((3, 1, 5)))
