"""Beams: texts, scores and indices of Hugging Face's searches, draws against their distribution, and independence."""

from __future__ import annotations

import collections
from typing import Any

import keras
import numpy as np
import pytest
from conftest import elsewhere, foremost
from generation_goldens import arrays, cases, check_full, inputs_of, load, parameters_of

from tfgptj.config import GPTJConfig
from tfgptj.errors import GenerationError, NonFiniteLogitsError
from tfgptj.generation.beam_run import BeamRun
from tfgptj.generation.beams import Result
from tfgptj.generation.functions import functions_of, listed
from tfgptj.generation.results import GenerationOutput, compute_transition_scores
from tfgptj.generation.run import CHUNK, Extras
from tfgptj.generation.strategies import new_run
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.pipelines import pipeline
from tfgptj.tokenizer import GPTJTokenizer

pytestmark = pytest.mark.usefixtures("eager_generation")
TENSORFLOW = keras.backend.backend() == "tensorflow"
# The functions of a case see the number of a row, or the width of all: its rows belong together.
OF_THE_BATCH = {"prefix_allowed_tokens_fn", "stopping_criteria"}

PARTS = {
    case["name"]: part
    for part in ("strategies", "beams", "retired")
    for case in cases(part)
    if case["name"].startswith(("beams", "groups"))
}
CASES = {case["name"]: case for part in ("strategies", "beams", "retired") for case in cases(part)}
REPRESENTATIVE = (
    *("beams_3", "beams_three_eos", "beams_penalty_0.5_stopping_False", "beams_penalty_2.0_stopping_never"),
    *("beams_many_processors", "beams_criteria", "beams_stop_strings", "beams_guidance", "groups", "groups_of_three"),
    *("groups_many_processors", "groups_functions"),
)


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return load()


def golden(name: str, array: str) -> np.ndarray:
    return arrays(PARTS[name])[f"{name}/{array}"]


def together(name: str) -> bool:
    """Whether all rows come out as they do alone; not where Hugging Face takes padding for text."""
    return CASES[name].get("rows_alone", True) or bool(OF_THE_BATCH & set(CASES[name]["parameters"]))


def rows_of(name: str) -> int:
    """How many rows of a case must be Hugging Face's: all, or the first, which has no padding."""
    mask = golden(name, "attention_mask")
    assert together(name) or mask[0].all()
    return len(mask) if together(name) else 1


def run_of(model: TFGPTJForCausalLM, name: str, jit: bool | None = None) -> BeamRun:
    inputs, parameters = inputs_of(PARTS[name], name, rows_of(name)), parameters_of(CASES[name])
    given = {key: parameters.pop(key, None) for key in ("logits_processor", "prefix_allowed_tokens_fn")}
    extras = Extras(
        functions=functions_of(**given),
        criteria=listed("stopping_criteria", parameters.pop("stopping_criteria", None)),
        negative=(inputs.get("negative_prompt_ids"), inputs.get("negative_prompt_attention_mask")),
        tokenizer=parameters.pop("tokenizer", None),
    )
    return new_run(model, inputs["input_ids"], inputs["attention_mask"], None, None, jit, parameters, extras)


def search(run: BeamRun) -> Result:
    for _ in run.chunks(CHUNK):
        pass
    return run.found()


def check(found: Result, name: str) -> None:
    """Compare with a golden; of groups it has no indices."""
    rows, new, parameters = len(found.tokens), found.tokens.shape[1], CASES[name]["parameters"]
    expected = golden(name, "sequences")[:rows, golden(name, "input_ids").shape[1] :]
    if name == "groups_criteria_length":  # Hugging Face puts an end after what a criterion ended
        assert expected.shape[1] == new + 1
        assert np.isin(expected[:, new], [parameters["eos_token_id"], parameters["pad_token_id"]]).all()
    else:
        assert expected.shape[1] == new or not together(name)
    if parameters["pad_token_id"] == 0:  # which Hugging Face takes for none at all
        expected = np.where(found.beam_indices < 0, 0, expected)
    np.testing.assert_array_equal(found.tokens, expected[:, :new])
    scores = golden(name, "sequences_scores")[:rows]
    same = np.ones(rows, bool)
    if "repetition_penalty" in parameters:  # Hugging Face takes padding for text: another score, the same texts
        full = golden(name, "attention_mask")[: rows_of(name)].all(axis=1)
        same = np.repeat(full, rows // len(full))
    assert same.any()
    np.testing.assert_allclose(found.scores[same], scores[same], rtol=2e-5, atol=2e-6)
    if f"{name}/beam_indices" in arrays(PARTS[name]):
        indices = golden(name, "beam_indices")[:rows]
        np.testing.assert_array_equal(found.beam_indices, indices[:, :new])
        assert (indices[:, new:] == -1).all()


def test_all_cases_are_there() -> None:
    found = collections.Counter(PARTS.values())
    assert found == {"strategies": 36, "beams": 12, "retired": 15}


@pytest.mark.parametrize("name", foremost(PARTS, *REPRESENTATIVE))
def test_texts_equal_hugging_face(model: TFGPTJForCausalLM, name: str) -> None:
    check(search(run_of(model, name)), name)


@pytest.mark.skipif(not TENSORFLOW, reason="XLA is a choice on TensorFlow only")
@pytest.mark.parametrize(
    "name",
    foremost(
        [
            *("beams_3", "beams_three_eos", "beams_many_processors", "groups", "groups_many_processors"),
            *("beams_criteria", "beams_guidance", "groups_functions"),
        ],
        *("beams_many_processors", "groups"),
    ),
)
def test_xla_finds_the_same(model: TFGPTJForCausalLM, name: str) -> None:
    check(search(run_of(model, name, jit=True)), name)


WHOLE = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.mark.core
@pytest.mark.parametrize("name", ["beams_full", "groups_full"])
def test_scores_and_states_of_each_step(model: TFGPTJForCausalLM, name: str) -> None:
    asked = {**WHOLE, "output_hidden_states": True, "output_attentions": True}
    result = model.generate(**inputs_of(PARTS[name], name), **CASES[name]["parameters"], **asked)
    assert isinstance(result, GenerationOutput)
    np.testing.assert_array_equal(result.sequences, golden(name, "sequences"))
    np.testing.assert_allclose(result.sequences_scores, golden(name, "sequences_scores"), rtol=2e-5)
    assert result.scores is not None
    np.testing.assert_allclose(np.stack(result.scores), golden(name, "scores"), atol=3e-5)
    check_full(result, PARTS[name], name)
    if name == "beams_full":
        assert result.beam_indices is not None
        np.testing.assert_array_equal(
            result.beam_indices, golden(name, "beam_indices")[:, : result.beam_indices.shape[1]]
        )
        found = compute_transition_scores(result.sequences, result.scores, result.beam_indices)
        np.testing.assert_allclose(found, golden(name, "transition_scores"), atol=3e-5)


def test_a_result_without_scores(model: TFGPTJForCausalLM) -> None:
    parameters = CASES["beams_full"]["parameters"]
    result = model.generate(**inputs_of("strategies", "beams_full"), **parameters, return_dict_in_generate=True)
    assert isinstance(result, GenerationOutput)
    assert (result.scores, result.logits, result.hidden_states) == (None, None, None)
    np.testing.assert_allclose(result.sequences_scores, golden("beams_full", "sequences_scores"), rtol=2e-5)


DRAWN = {"num_beams": 3, "do_sample": True, "seed": 5, "num_return_sequences": 2}
KINDS = [
    *({"num_beams": 3, "num_return_sequences": 2}, DRAWN),
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7, "num_return_sequences": 4},
]


@pytest.mark.parametrize("options", elsewhere(KINDS, DRAWN))
@pytest.mark.compiled
def test_a_row_does_not_depend_on_neighbours_or_padding(model: TFGPTJForCausalLM, options: dict[str, Any]) -> None:
    options = {**options, "max_new_tokens": 10, "eos_token_id": [10, 31], "pad_token_id": 0}
    returned = options["num_return_sequences"]
    alone = model.generate([[8, 20]], **options)[:, 2:]
    for row, mask in (([0, 0, 8, 20], [0, 0, 1, 1]), ([8, 20, 0, 0], [1, 1, 0, 0])):
        together = model.generate([row, [5, 9, 3, 7]], [mask, [1, 1, 1, 1]], **options)
        np.testing.assert_array_equal(together[:returned, :4], [row] * returned)
        new = together[:returned, 4:]
        width = alone.shape[1]
        np.testing.assert_array_equal(new[:, :width], alone[:, : new.shape[1]])
        assert (new[:, width:] == 0).all()


@pytest.mark.compiled
def test_long_searches_cross_chunks(model: TFGPTJForCausalLM) -> None:
    options = {"num_beams": 3, "max_new_tokens": 2 * CHUNK + 3, "eos_token_id": None}
    whole = model.generate([[8, 20]], **options)
    run = new_run(model, [[8, 20]], None, None, None, None, options)
    for _ in run.chunks(5):
        pass
    np.testing.assert_array_equal(run.new, whole[:, 2:])
    np.testing.assert_array_equal(run.tokens(0), whole[0, 2:])


# Drawn beams


def test_same_seed_same_texts(model: TFGPTJForCausalLM) -> None:
    options = {"do_sample": True, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8, "temperature": 2.0}
    first = model.generate([[8, 20]], seed=3, **options)
    np.testing.assert_array_equal(model.generate([[8, 20]], seed=3, **options), first)
    assert any((model.generate([[8, 20]], seed=seed, **options) != first).any() for seed in (4, 5))
    assert len({tuple(row) for row in first}) == 3


def test_zero_temperature_is_beam_search(model: TFGPTJForCausalLM) -> None:
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8}
    np.testing.assert_array_equal(
        model.generate([[8, 20]], do_sample=True, temperature=0, **options), model.generate([[8, 20]], **options)
    )


def test_drawn_beams_follow_their_distribution(model: TFGPTJForCausalLM) -> None:
    rows, kept, temperature = 6000, 5, 1.5
    logits = np.asarray(keras.ops.convert_to_numpy(model(np.array([[8, 20]]))))[0, -1].astype("float64")
    likeliest = np.argsort(-logits)[:kept]
    p = np.exp((logits - logits.max()) / temperature)[likeliest]
    p /= p.sum()
    # Of a first step the first two that are drawn, without putting back, are returned.
    options = {"do_sample": True, "num_beams": 2, "num_return_sequences": 2, "temperature": temperature, "top_k": kept}
    prompts = np.tile([[8, 20]], (rows, 1))
    ids = model.generate(prompts, seed=1, max_new_tokens=1, eos_token_id=None, **options)[:, 2].reshape(rows, 2)
    places = np.argmax(np.sort(ids, axis=1)[:, :, None] == np.sort(likeliest), axis=2)
    observed = np.zeros((kept, kept))
    np.add.at(observed, (places[:, 0], places[:, 1]), 1)
    p = p[np.argsort(likeliest)]
    expected = rows * np.triu(p[:, None] * p * (1 / (1 - p[:, None]) + 1 / (1 - p)), 1)
    assert observed[expected == 0].sum() == 0
    cells = expected > 0
    statistic = ((observed - expected)[cells] ** 2 / expected[cells]).sum()
    assert statistic < 27.9, statistic  # 9 degrees of freedom: exceeded once in 1000


@pytest.mark.parametrize("temperature", [3.0, 5e-4])
def test_drawn_beams_compare_scores_over_the_temperature(model: TFGPTJForCausalLM, temperature: float) -> None:
    options = {"do_sample": True, "num_beams": 3, "top_k": 0, "max_new_tokens": 6, "eos_token_id": None, "seed": 2}
    result = model.generate([[8, 20]], temperature=temperature, **options, **WHOLE)
    assert isinstance(result, GenerationOutput)
    scores = np.stack(result.scores or ())
    log_probs = np.asarray(keras.ops.convert_to_numpy(keras.ops.log_softmax(np.stack(result.logits or ()))))
    np.testing.assert_allclose(scores, log_probs / temperature, rtol=1e-5, atol=1e-5)
    total = compute_transition_scores(result.sequences, result.scores, result.beam_indices).sum()
    np.testing.assert_allclose(result.sequences_scores, [total / 6], rtol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams=2"),
        ({"num_return_sequences": 3}, "needs do_sample=True or num_beams > 1"),
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beams=4 cannot be split into num_beam_groups=3"),
        ({"num_beam_groups": 2}, "num_beams=1 cannot be split into num_beam_groups=2"),
        ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups > 1 needs a diversity_penalty above 0"),
        ({"num_beams": 4, "diversity_penalty": 0.5}, "diversity_penalty acts between groups of beams"),
        ({"num_beams": 4, "num_beam_groups": 2, "do_sample": True}, "cannot be combined with do_sample=True"),
        ({"num_beams": 0}, "num_beams must be between 1 and"),
        ({"num_beams": 1025}, "num_beams must be between 1 and 1,024"),
        ({"num_beams": 2, "length_penalty": 6}, "length_penalty must be between -5 and 5, got 6"),
        ({"num_beams": 2.0}, "num_beams must be an integer"),
        ({"num_beams": 2, "early_stopping": "always"}, "early_stopping must be one of"),
        ({"num_beams": 2, "streamer": object()}, "num_beams=2 cannot be streamed"),
    ],
)
def test_what_does_not_go_together_is_refused(model: TFGPTJForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.generate([[1]], **options)


@pytest.mark.compiled
def test_strongly_shortened_texts_are_found(model: TFGPTJForCausalLM) -> None:
    # Their scores are below -1e9, at which Hugging Face takes texts for missing.
    options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 60, "length_penalty": -5}
    found = search(new_run(model, [[8, 20]], None, None, None, None, {**options, "eos_token_id": None}))
    assert found.tokens.shape == (2, 60)
    assert (found.scores < -1e9).all()


def test_more_ends_than_tokens(model: TFGPTJForCausalLM) -> None:
    found = search(new_run(model, [[8, 20]], None, None, None, None, {"num_beams": 2, "eos_token_id": list(range(64))}))
    assert found.tokens.shape == (1, 1)


def test_numbers_that_are_not_finite_are_an_error(model: TFGPTJForCausalLM) -> None:
    broken = TFGPTJForCausalLM(model.config)
    broken.set_weights([np.full(w.shape, np.nan, "float32") for w in broken.get_weights()])
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite logits"):
        broken.generate([[8, 20]], num_beams=2, max_new_tokens=3)


@pytest.mark.skipif(not TENSORFLOW, reason="traces are counted on TensorFlow, whose graphs leave the shapes open")
@pytest.mark.compiled
def test_one_trace_serves_every_length_and_batch(model: TFGPTJForCausalLM) -> None:
    fresh = TFGPTJForCausalLM(model.config)
    for length in range(1, 6):
        fresh.generate(np.ones((1 + length % 3, length), int), num_beams=2, max_new_tokens=2 + length)
        fresh.generate(np.ones((1, length), int), num_beams=2, max_new_tokens=2, length_penalty=length)
    assert {program.traces for program in fresh._generation_programs.values()} == {1}


def test_a_pipeline_returns_the_beams_of_each_prompt() -> None:
    tokenizer = GPTJTokenizer.train(["to be or not to be"], vocab_size=260)
    config = GPTJConfig(vocab_size=260, n_positions=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    model = TFGPTJForCausalLM(config)
    write = pipeline("text-generation", model, tokenizer)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "return_tensors": True}
    prompts = ["to be", "or", "not to be"]
    results = write(prompts, batch_size=2, **options)
    assert [len(each) for each in results] == [2, 2, 2]
    for prompt, found in zip(prompts, results, strict=True):
        ids = model.generate([tokenizer.encode(prompt)], num_beams=3, num_return_sequences=2, max_new_tokens=5)
        assert [each["generated_token_ids"] for each in found] == ids.tolist()
    with pytest.raises(GenerationError, match="cannot be streamed"):
        write.stream("to be", num_beams=2)
