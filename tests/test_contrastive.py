"""Contrastive search: ids of Hugging Face's, on its own and beside neighbours, streamed or not."""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
import pytest
from conftest import FIXTURES, elsewhere

from tfgptj.errors import GenerationError
from tfgptj.heads import TFGPTJForCausalLM

pytestmark = pytest.mark.core
GOLDENS = FIXTURES / "goldens_generation"
TENSORFLOW = keras.backend.backend() == "tensorflow"
ARRAYS = np.load(GOLDENS / "retired.npz")


def cases() -> dict[str, dict[str, Any]]:
    """By name."""
    given = json.loads((GOLDENS / "retired.json").read_text())
    return {case["name"]: case for case in given if case["name"].startswith("contrastive")}


CASES = cases()


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return TFGPTJForCausalLM.from_pretrained(GOLDENS / "model")


def test_all_cases_are_there() -> None:
    assert len(CASES) == 9


@pytest.mark.parametrize(
    "name", elsewhere(CASES, "contrastive", "contrastive_three_eos", "contrastive_many_processors")
)
def test_ids_equal_hugging_face(model: TFGPTJForCausalLM, name: str) -> None:
    ids, mask = ARRAYS[f"{name}/input_ids"], ARRAYS[f"{name}/attention_mask"]
    rows = len(ids) if CASES[name].get("rows_alone", True) else 1  # where padding is taken for text, one without it
    assert rows == len(ids) or mask[0].all()
    found = model.generate(ids[:rows], mask[:rows], **CASES[name]["parameters"])
    np.testing.assert_array_equal(found, ARRAYS[f"{name}/sequences"][:rows, : found.shape[1]])
    assert rows < len(ids) or found.shape == ARRAYS[f"{name}/sequences"].shape


@pytest.mark.skipif(not TENSORFLOW, reason="XLA is a choice on TensorFlow only")
def test_xla_gives_the_same(model: TFGPTJForCausalLM) -> None:
    for jit in (False, True):
        ids = model.generate(
            ARRAYS["contrastive/input_ids"],
            ARRAYS["contrastive/attention_mask"],
            jit_compile=jit,
            **CASES["contrastive"]["parameters"],
        )
        np.testing.assert_array_equal(ids, ARRAYS["contrastive/sequences"])


def test_a_row_does_not_depend_on_neighbours_or_padding(model: TFGPTJForCausalLM) -> None:
    options = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 12, "eos_token_id": None}
    alone = model.generate([[8, 20]], **options)[:, 2:]
    for row, mask in (([0, 0, 8, 20], [0, 0, 1, 1]), ([8, 20, 0, 0], [1, 1, 0, 0])):
        together = model.generate([[5, 9, 3, 7], row], [[1, 1, 1, 1], mask], **options)
        np.testing.assert_array_equal(together[1:, 4:], alone)


def test_no_weight_is_greedy_and_more_candidates_than_tokens_are_all(model: TFGPTJForCausalLM) -> None:
    greedy = model.generate([[8, 20]], max_new_tokens=8)
    np.testing.assert_array_equal(model.generate([[8, 20]], max_new_tokens=8, penalty_alpha=0), greedy)
    np.testing.assert_array_equal(model.generate([[8, 20]], max_new_tokens=8, penalty_alpha=1e-6, top_k=500), greedy)


def test_a_streamer_gets_the_same_tokens(model: TFGPTJForCausalLM) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.given: list[np.ndarray] = []

        def put(self, ids: np.ndarray) -> None:
            self.given.append(ids)

        def end(self) -> None:
            self.given.append(np.array([-1]))

    recorder, options = Recorder(), {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 20}
    ids = model.generate([[8, 20]], streamer=recorder, **options)
    np.testing.assert_array_equal(np.concatenate([recorder.given[0][0], *recorder.given[1:-1]]), ids[0])
    np.testing.assert_array_equal(ids, model.generate([[8, 20]], **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 2}, "num_return_sequences > 1 needs do_sample=True or num_beams > 1"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores cannot be combined with contrastive"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits cannot be combined with contrastive"),
        ({"penalty_alpha": 1.5}, "penalty_alpha must be between 0 and 1, got 1.5"),
        ({"penalty_alpha": "much"}, "penalty_alpha must be a number, got 'much'"),
    ],
)
def test_what_does_not_go_together_is_refused(model: TFGPTJForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.generate([[1]], **{"penalty_alpha": 0.6, **options})
