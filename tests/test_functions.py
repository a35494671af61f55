"""The caller's own functions: what they get, what they may return, and where they stand among the processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from generation_goldens import load

from tfgptj.errors import GenerationError
from tfgptj.generation.chain import CUSTOM, PREFIX, build_chain, cut_chain
from tfgptj.generation.config import GenerationConfig
from tfgptj.heads import TFGPTJForCausalLM

pytestmark = pytest.mark.usefixtures("eager_generation")
PROMPTS, MASK = np.array([[5, 9, 3], [8, 0, 0]]), np.array([[1, 1, 1], [1, 0, 0]])
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return load()


@pytest.mark.core
def test_processors_get_the_tokens_of_a_row_without_padding(model: TFGPTJForCausalLM) -> None:
    seen: list[Any] = []

    def processor(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert ids.dtype == np.int32 and scores.dtype == np.float32
        assert scores.shape == (1, model.config.vocab_size)
        assert np.isneginf(scores[0, 50:]).all() and np.isfinite(scores[0, :50]).all()
        seen.append(ids[0].tolist())
        return scores

    free = model.generate(PROMPTS, MASK, suppress_tokens=list(range(50, 64)), **OPTIONS)
    result = model.generate(PROMPTS, MASK, suppress_tokens=list(range(50, 64)), logits_processor=processor, **OPTIONS)
    np.testing.assert_array_equal(result, free)
    expected = [[*prompt, *free[row, 3 : 3 + step]] for step in range(4) for row, prompt in enumerate(([5, 9, 3], [8]))]
    assert seen == expected


def test_several_processors_come_one_after_the_other(model: TFGPTJForCausalLM) -> None:
    def only(token: int) -> Any:
        return lambda ids, scores: np.where(np.arange(scores.shape[1]) == token, scores, -np.inf)

    def shift(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return np.roll(scores, 1, axis=1)

    for processors in (only(7), [only(6), shift], (only(6), shift)):
        ids = model.generate(PROMPTS, MASK, logits_processor=processors, **OPTIONS)
        assert (ids[:, 3:] == 7).all()


def test_rows_that_have_ended_are_not_asked(model: TFGPTJForCausalLM) -> None:
    rows = []

    def allowed(row: int, ids: np.ndarray) -> list[int]:
        rows.append(row)
        return [2] if row == 0 else [5, 6]

    ids = model.generate(
        PROMPTS, MASK, prefix_allowed_tokens_fn=allowed, eos_token_id=2, pad_token_id=63, max_new_tokens=3
    )
    assert ids[0, 3:].tolist() == [2, 63, 63]
    assert rows == [0, 1, 1, 1]


def test_sampling_comes_after_a_processor(model: TFGPTJForCausalLM) -> None:
    def favour(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return scores + 100 * (np.arange(scores.shape[1]) == 9)

    options = {**OPTIONS, "do_sample": True, "top_k": 1, "seed": 0}
    assert (model.generate(PROMPTS, MASK, logits_processor=favour, **options)[:, 3:] == 9).all()


def test_streaming_and_seeds_are_as_without(model: TFGPTJForCausalLM) -> None:
    options = {"do_sample": True, "seed": 5, "max_new_tokens": 10, "eos_token_id": None, "temperature": 1.5}
    plain = model.generate(PROMPTS, MASK, **options)
    stepped = model.generate(PROMPTS, MASK, logits_processor=lambda ids, scores: scores, **options)
    np.testing.assert_array_equal(plain, stepped)


def test_the_chain_is_cut_at_functions() -> None:
    config = GenerationConfig(min_new_tokens=2, eos_token_id=1, suppress_tokens=[3], do_sample=True, top_k=5, top_p=0.5)
    parts = cut_chain(*build_chain(config, (PREFIX, CUSTOM)))
    names = [[name for name, _ in part] for part, _ in parts]
    assert names == [["min_new_tokens"], [PREFIX], ["suppress"], [CUSTOM], ["top_k", "top_p"]]
    assert cut_chain(*build_chain(GenerationConfig(), (CUSTOM,)))[0][0] == ((CUSTOM, ()),)
    assert cut_chain(*build_chain(GenerationConfig())) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits_processor": 3}, "logits_processor must be a function or a list of functions, got 3"),
        ({"prefix_allowed_tokens_fn": [3]}, r"prefix_allowed_tokens_fn must be a function, got \[3\]"),
        ({"logits_processor": lambda ids, scores: None}, "must return scores of the shape"),
        ({"logits_processor": lambda ids, scores: scores[0]}, r"must return scores of the shape \(1, 64\)"),
        ({"logits_processor": lambda ids, scores: scores * np.nan}, "returned scores that are NaN or infinite"),
        ({"logits_processor": lambda ids, scores: scores + np.inf}, "returned scores that are NaN or infinite"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: []}, "prefix_allowed_tokens_fn allows no token for row 0: "),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [64]}, "prefix_allowed_tokens_fn must return token ids in 0…63"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [0.5]}, "prefix_allowed_tokens_fn must return token ids"),
    ],
)
def test_wrong_functions_and_results(model: TFGPTJForCausalLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.generate(PROMPTS, MASK, **arguments)
