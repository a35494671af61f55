"""Searches step by step: what ends a text, what the caller's functions get, and that nothing else changes."""

from __future__ import annotations

import functools
import itertools
import types
from typing import Any

import keras
import numpy as np
import pytest
from conftest import elsewhere, foremost
from generation_goldens import load

from tfgptj.errors import GenerationError
from tfgptj.generation import memory, stopping
from tfgptj.generation.results import GenerationOutput
from tfgptj.generation.stopping import StopText
from tfgptj.generation.strategies import new_run
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.pipelines import pipeline
from tfgptj.tokenizer import GPTJTokenizer

pytestmark = pytest.mark.usefixtures("eager_generation")
PROMPTS, MASK = np.array([[5, 9, 3], [8, 0, 0]]), np.array([[1, 1, 1], [1, 0, 0]])
PACKAGED = GPTJTokenizer.from_pretrained("shakespeare")
BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3}
GROUPS: dict[str, Any] = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7, "num_return_sequences": 4}
CONTRASTIVE: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 4}
END = 17
SEARCHES: dict[str, dict[str, Any]] = {
    "beams": {**BEAMS, "guidance_scale": 1.5},
    "drawn": {**BEAMS, "do_sample": True, "temperature": 1.5, "seed": 4},
    "groups": {**GROUPS, "guidance_scale": 1.5, "no_repeat_ngram_size": 2},
    "contrastive": {**CONTRASTIVE, "guidance_scale": 1.5},
}
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": END, "pad_token_id": 63}


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return load()


@pytest.mark.core
@pytest.mark.parametrize("search", elsewhere(foremost(SEARCHES, "drawn", "groups"), "drawn"))
@pytest.mark.compiled
def test_steps_make_what_the_compiled_loop_makes(model: TFGPTJForCausalLM, search: str) -> None:
    options = OPTIONS | SEARCHES[search]
    compiled = model.generate(PROMPTS, MASK, **options)
    stepped = model.generate(PROMPTS, MASK, logits_processor=lambda ids, scores: scores, **options)
    np.testing.assert_array_equal(stepped, compiled)


# What ends a text


@pytest.mark.parametrize("search", [BEAMS, GROUPS, {**BEAMS, "early_stopping": True}], ids=["beams", "groups", "early"])
def test_a_stop_string_and_a_criterion_end_texts_as_a_token_does(
    model: TFGPTJForCausalLM, search: dict[str, Any]
) -> None:
    expected = model.generate(PROMPTS, MASK, **OPTIONS, **search)
    new = expected[:, PROMPTS.shape[1] :]
    assert (new == END).any()
    options = {**OPTIONS, "eos_token_id": None, **search}
    stop = PACKAGED.convert_ids_to_tokens(END)
    found = model.generate(PROMPTS, MASK, stop_strings=[stop, "never this"], tokenizer=PACKAGED, **options)
    np.testing.assert_array_equal(found, expected)
    found = model.generate(PROMPTS, MASK, stopping_criteria=lambda ids, scores: ids[:, -1] == END, **options)
    np.testing.assert_array_equal(found, expected)


def test_the_end_of_each_text_is_the_first_stop_string(model: TFGPTJForCausalLM) -> None:
    options = {"max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 63, **BEAMS}
    stops = ["2ER", "KI", "(+", "?!", "N"]
    found = model.generate([[8, 20], [4, 4], [9, 5]], stop_strings=stops, tokenizer=PACKAGED, **options)[:, 2:]
    ended = 0
    for row in found:
        text = StopText(PACKAGED, stops)
        shown = "".join(text.put([token]) for token in row)
        ended += text.found
        assert not text.found or not any(stop in shown for stop in stops)
        length = next((i for i in range(1, len(row) + 1) if (row[i:] == 63).all()), len(row))
        whole = PACKAGED.decode(row[:length])
        assert sum(whole.count(stop) for stop in stops) == text.found  # nothing comes after one
    assert ended >= 3


def test_a_stop_string_is_no_part_of_a_pipeline_s_text(model: TFGPTJForCausalLM) -> None:
    write, options = pipeline("text-generation", model, PACKAGED), {"max_new_tokens": 12, "eos_token_id": None}
    free = write(")5", return_full_text=False, **BEAMS, **options)[0]["generated_text"]
    stop = free[3:5]
    for result in write(")5", return_full_text=False, stop_strings=stop, **BEAMS, **options):
        assert stop not in result["generated_text"]
    ids = model.generate(
        [PACKAGED.encode(")5")], stop_strings=stop, tokenizer=PACKAGED, num_beams=3, early_stopping=True, **options
    )
    assert stop in PACKAGED.decode(ids[0])


@pytest.mark.parametrize("search", [BEAMS, GROUPS], ids=["beams", "groups"])
def test_time_ends_a_search_with_the_best_so_far(
    model: TFGPTJForCausalLM, monkeypatch: pytest.MonkeyPatch, search: dict[str, Any]
) -> None:
    looks = search.get("num_beam_groups", 1)
    for steps in (1, 3):
        monkeypatch.setattr(
            stopping, "time", types.SimpleNamespace(monotonic=functools.partial(next, itertools.count()))
        )
        found = model.generate(PROMPTS, MASK, max_time=steps * looks - looks + 0.5, **OPTIONS, **search)
        monkeypatch.undo()
        expected = model.generate(PROMPTS, MASK, **{**OPTIONS, "max_new_tokens": steps}, **search)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("search", [BEAMS, GROUPS], ids=["beams", "groups"])
def test_criteria_get_each_candidate_and_the_scores(model: TFGPTJForCausalLM, search: dict[str, Any]) -> None:
    beams, groups = search["num_beams"], search.get("num_beam_groups", 1)
    seen: list[tuple[np.ndarray, Any]] = []

    def watch(ids: np.ndarray, scores: Any) -> bool:
        seen.append((ids, scores))
        return False

    asked = {"return_dict_in_generate": True, "output_scores": True, "stopping_criteria": watch}
    result = model.generate(PROMPTS, MASK, **{**OPTIONS, "max_new_tokens": 3}, **search, **asked)
    assert isinstance(result, GenerationOutput) and result.scores is not None
    candidates = 2 * beams // groups
    for call, (ids, scores) in enumerate(seen):
        step = call // groups
        assert ids.shape == (2 * candidates, 3 + step + 1)
        np.testing.assert_array_equal(ids[:, :3], np.repeat(PROMPTS, candidates, axis=0))
        assert len({tuple(row) for row in ids[:candidates]}) == candidates
        # Those of a step are known when the last group is asked.
        assert len(scores) == step + (call % groups == groups - 1)
        for given, kept in zip(scores, result.scores, strict=False):
            np.testing.assert_array_equal(given, kept)
    assert len(seen) == 3 * groups
    with pytest.raises(GenerationError, match=f"or one for each of {2 * candidates} rows; got the shape"):
        model.generate(PROMPTS, MASK, stopping_criteria=lambda ids, scores: [True, False], **OPTIONS, **search)


def test_when_all_candidates_end_so_does_the_search(model: TFGPTJForCausalLM) -> None:
    for search in (BEAMS, GROUPS):
        found = model.generate(PROMPTS, MASK, stopping_criteria=lambda ids, scores: True, **OPTIONS, **search)
        expected = model.generate(PROMPTS, MASK, **{**OPTIONS, "max_new_tokens": 1}, **search)
        np.testing.assert_array_equal(found, expected)


# The caller's functions


@pytest.mark.core
@pytest.mark.parametrize("search", [BEAMS, GROUPS, CONTRASTIVE], ids=["beams", "groups", "contrastive"])
def test_functions_get_the_text_of_each_beam(model: TFGPTJForCausalLM, search: dict[str, Any]) -> None:
    starts, rows, lengths = ([5, 9, 3], [8]), [], set()

    def allowed(row: int, ids: np.ndarray) -> list[int]:
        assert ids[: len(starts[row])].tolist() == starts[row]
        rows.append(row)
        return [1, 4, 7, 12, 30 + row]

    def processor(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert scores.shape == (1, 64) and np.isfinite(scores).sum() == 5
        lengths.add(ids.shape[1])
        return scores

    options = {**OPTIONS, "max_new_tokens": 3, "prefix_allowed_tokens_fn": allowed, "logits_processor": processor}
    found = model.generate(PROMPTS, MASK, **options, **search)[:, 3:].reshape(2, -1)
    for row in range(2):
        assert set(found[row]) <= {1, 4, 7, 12, 30 + row}
    beams = search.get("num_beams", 1)
    assert sorted(rows) == [0] * 3 * beams + [1] * 3 * beams
    assert lengths == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("search", [BEAMS, GROUPS, CONTRASTIVE], ids=["beams", "groups", "contrastive"])
def test_wrong_results_of_functions(model: TFGPTJForCausalLM, search: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match="allows no token for row 1: "):
        model.generate(PROMPTS, MASK, prefix_allowed_tokens_fn=lambda row, ids: [] if row else [1, 4], **search)
    with pytest.raises(GenerationError, match="must return scores of the shape"):
        model.generate(PROMPTS, MASK, logits_processor=lambda ids, scores: None, **search)


# Memory


@pytest.mark.parametrize(
    "search", [{**BEAMS, "guidance_scale": 1.5}, {**BEAMS, "eos_token_id": [1, 10]}, GROUPS, CONTRASTIVE]
)
def test_the_memory_of_what_a_search_keeps_is_counted(
    model: TFGPTJForCausalLM, monkeypatch: pytest.MonkeyPatch, search: dict[str, Any]
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory, "check_memory", lambda needed, *others: asked.append(needed))
    run = new_run(model, PROMPTS, MASK, None, None, None, {**OPTIONS, "max_new_tokens": 50, **search})
    next(run.chunks(2))
    assert run.state is not None
    caches = 2 * sum(size(key) + size(value) for key, value in run.state.caches)
    rest = 2 * sum(size(each) for each in keras.tree.flatten(run.state._replace(caches=())))
    if "num_beams" not in search:
        assert 2 * size(run.state.search.directions) > 0.5 * (asked[0] - caches)
    assert caches + rest < asked[0] < 1.2 * caches + 3 * rest


def size(tensor: Any) -> int:
    """Bytes of a tensor."""
    return int(np.asarray(keras.ops.convert_to_numpy(tensor)).nbytes)
