"""Every logits processor, alone and with others, against what Hugging Face's made of the same scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chains import EAGER, WAYS, context_of, in_every_way, run, tensors
from conftest import numbers
from generation_goldens import arrays, cases, parameters_of
from keras import ops

from tfgptj.generation.chain import CUSTOM, ON_THE_HOST, PREFIX, build_chain, cut_chain
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.processors import FORBIDDEN

CASES = {case["name"]: case for case in cases("processors")}
TEXTS = [name for name, case in CASES.items() if "prompt_length" not in case["parameters"]]
# Together they have nearly all processors.
MANY = ("many_greedy", "many_sampled", "many_beams", "encoder_no_repeat_ngram_2", "forced_bos_first", "forced_eos_two")

# Hugging Face keeps one of several equal tokens that come last, tfgptj all of them.
TIES = ("top_p_keeps_more_for_beams", "min_p_keeps_more_for_beams", "many_beams")


def on_the_host(name: str, functions: dict[str, Any], ids: np.ndarray, scores: np.ndarray, beams: int) -> np.ndarray:
    if name == CUSTOM:
        return functions[CUSTOM](ids, scores).astype("float32")
    result = np.full_like(scores, FORBIDDEN)
    for row, text in enumerate(ids):
        allowed = functions[PREFIX](row // beams, text)
        result[row, allowed] = scores[row, allowed]
    return result


def processed(case: dict[str, Any], compiled: bool = False, padding: int = 0) -> np.ndarray:
    parameters, values = parameters_of(case), arrays("processors")
    functions = {name: parameters.pop(name) for name in ON_THE_HOST if name in parameters}
    config, prompt_length = GenerationConfig(**parameters), case["prompt_length"]
    ids, scores = (values[f"{case['name']}/{name}"] for name in ("input_ids", "scores"))
    limit = 100 if config.max_length is None else config.max_length - prompt_length
    context = context_of(ids, prompt_length, limit, config.eos_token_ids, padding)
    scores = np.where(np.isneginf(scores), np.float32(FORBIDDEN), scores)
    for names, static in cut_chain(*build_chain(config, tuple(functions))):
        if names[0][0] in ON_THE_HOST:
            scores = on_the_host(names[0][0], functions, ids, scores, config.num_beams)
        else:
            scores = numbers(run(names, tensors(static), ops.convert_to_tensor(scores), context, compiled))
    return scores


def check(case: dict[str, Any], **options: Any) -> None:
    result = processed(case, **options)
    expected = arrays("processors")[f"{case['name']}/expected"]
    allowed = expected > -1e30
    if case["name"] in TIES:  # row 1 has whole numbers
        lowest = expected[1][allowed[1]].min()
        tied = np.isclose(result[1], lowest) & ~allowed[1]
        assert tied.any()
        result[1, tied] = FORBIDDEN
    np.testing.assert_array_equal(result > FORBIDDEN / 2, allowed)
    np.testing.assert_allclose(result[allowed], expected[allowed], rtol=2e-6, atol=2e-6)


def test_there_is_a_case_for_every_processor() -> None:
    assert len(CASES) == 72


@pytest.mark.core
@pytest.mark.parametrize(("name", "way"), in_every_way(CASES, *MANY))
def test_scores_are_hugging_face_s(name: str, way: str) -> None:
    check(CASES[name], compiled=way == "compiled")


@pytest.mark.parametrize("name", TEXTS if EAGER else MANY)
def test_padding_is_no_text(name: str) -> None:
    check(CASES[name], padding=3, compiled=WAYS == ("compiled",))
