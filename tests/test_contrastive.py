"""Contrastive search: ids of Hugging Face's, on its own and beside neighbours, streamed or not."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from conftest import elsewhere, foremost
from generation_goldens import arrays, cases, check_full, inputs_of, load, parameters_of

from tfgptj.errors import GenerationError
from tfgptj.generation.results import GenerationOutput
from tfgptj.heads import TFGPTJForCausalLM

pytestmark = pytest.mark.usefixtures("eager_generation")
TENSORFLOW = keras.backend.backend() == "tensorflow"
CASES = {case["name"]: case for case in cases("retired") if case["name"].startswith("contrastive")}
REPRESENTATIVE = ("contrastive", "contrastive_guidance", "contrastive_many_processors")


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return load()


def test_all_cases_are_there() -> None:
    assert len(CASES) == 12


@pytest.mark.core
@pytest.mark.parametrize("name", elsewhere(foremost(CASES, *REPRESENTATIVE), "contrastive_guidance"))
def test_ids_equal_hugging_face(model: TFGPTJForCausalLM, name: str) -> None:
    case, expected = CASES[name], arrays("retired")[f"{name}/sequences"]
    # Where padding is taken for text, one without it; a function that sees the number of a row belongs to the batch.
    whole = case.get("rows_alone", True) or "prefix_allowed_tokens_fn" in case["parameters"]
    rows = len(expected) if whole else 1
    assert whole or arrays("retired")[f"{name}/attention_mask"][0].all()
    found = model.generate(**inputs_of("retired", name, rows), **parameters_of(case))
    np.testing.assert_array_equal(found, expected[:rows, : found.shape[1]])
    assert not whole or found.shape == expected.shape


@pytest.mark.parametrize("name", ["contrastive_full", "contrastive_guidance_full"])
def test_scores_and_states_of_each_step(model: TFGPTJForCausalLM, name: str) -> None:
    asked = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    options = dict.fromkeys(("return_dict_in_generate", *asked), True)
    result = model.generate(**inputs_of("retired", name), **parameters_of(CASES[name]), **options)
    assert isinstance(result, GenerationOutput)
    found = arrays("retired")
    np.testing.assert_array_equal(result.sequences, found[f"{name}/sequences"])
    assert result.scores is not None
    np.testing.assert_allclose(np.stack(result.scores), found[f"{name}/scores"], rtol=1e-4, atol=1e-4)
    scores = model.compute_transition_scores(result.sequences, result.scores)
    np.testing.assert_allclose(scores, found[f"{name}/transition_scores"], rtol=1e-4, atol=1e-4)
    check_full(result, "retired", name)


@pytest.mark.skipif(not TENSORFLOW, reason="XLA is a choice on TensorFlow only")
@pytest.mark.parametrize("name", foremost(["contrastive", "contrastive_guidance"], "contrastive_guidance"))
def test_xla_gives_the_same(model: TFGPTJForCausalLM, name: str) -> None:
    for jit in (False, True):
        ids = model.generate(**inputs_of("retired", name), jit_compile=jit, **parameters_of(CASES[name]))
        np.testing.assert_array_equal(ids, arrays("retired")[f"{name}/sequences"])


@pytest.mark.compiled
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
        ({"penalty_alpha": 1.5}, "penalty_alpha must be between 0 and 1, got 1.5"),
        ({"penalty_alpha": "much"}, "penalty_alpha must be a number, got 'much'"),
    ],
)
def test_what_does_not_go_together_is_refused(model: TFGPTJForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.generate([[1]], **{"penalty_alpha": 0.6, **options})
