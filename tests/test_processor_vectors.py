"""Hugging Face's own test vectors of processors, and what its classes make of them: fixtures/processor_vectors.py."""

from __future__ import annotations

import numpy as np
import pytest
from chains import EAGER, WAYS, context_of, in_every_way, run, tensors
from conftest import FIXTURES, numbers
from fixtures.processor_vectors import DIVERSITY, VECTORS, Vector
from keras import ops

from tfgptj.generation.chain import FUNCTIONS, PREFIX, build_chain
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.functions import Functions
from tfgptj.generation.processors import FORBIDDEN

pytestmark = pytest.mark.core
EXPECTED = np.load(FIXTURES / "processor_vectors.npz")
# No class to run without a model, or none at all: the table says what follows from the formula.
WITHOUT_A_CLASS = {"guidance", "frequency_and_presence_penalty", "vocabulary_limit"}
# TensorFlow's class forbids the end of the text where it is a bad word; PyTorch's and tfgptj do not.
OTHERWISE = {"tensorflow/bad_words", "tensorflow/bad_words/only_the_end"}

# What is compiled too: where there is no other way, one vector of each processor.
FIRST = {name.split("/")[0]: name for name in reversed(VECTORS)}
COMPILED = ("seven_at_once", "guidance", "no_repeat_ngram/2") if EAGER else tuple(FIRST.values())


def processed(vector: Vector, compiled: bool) -> np.ndarray:
    """The scores [B, V] after the chain that the parameters build, -inf for what is forbidden."""
    config, functions = config_of(vector), Functions(prefix_allowed_tokens=vector.parameters.get(PREFIX))
    names, values = build_chain(config, functions.names)
    ids, scores = np.array(vector.ids or [[0]] * len(vector.scores)), np.array(vector.scores, "float32")
    if not config.remove_invalid_values:
        scores = finite(scores)
    if functions.names:
        assert names == ((PREFIX, ()),)
        result = functions.apply(PREFIX, list(ids), scores, np.zeros(len(ids), bool))
    else:
        prompt = ids.shape[1] if vector.prompt is None else vector.prompt
        limit = 100 if config.max_length is None else config.max_length - prompt
        context = context_of(ids, prompt, limit, config.eos_token_ids)
        result = numbers(run(names, tensors(values), ops.convert_to_tensor(scores), context, compiled))
    return infinite(result)


def config_of(vector: Vector) -> GenerationConfig:
    return GenerationConfig(**{name: value for name, value in vector.parameters.items() if name != PREFIX})


def finite(scores: np.ndarray) -> np.ndarray:
    """Minus infinity as the loop has it."""
    return np.where(np.isneginf(scores), np.float32(FORBIDDEN), scores)


def infinite(scores: np.ndarray) -> np.ndarray:
    """Minus infinity for what is forbidden, which Hugging Face too has as other numbers at times."""
    return np.where(scores <= FORBIDDEN / 2, -np.inf, scores)


def test_every_processor_has_a_vector() -> None:
    built = {name for vector in VECTORS.values() for name, _ in build_chain(config_of(vector))[0]}
    assert built | {"diversity", "cutoffs"} == {*FUNCTIONS}  # which groups of beams have, and served models
    assert {name for name, vector in VECTORS.items() if f"torch/{name}" not in EXPECTED} == WITHOUT_A_CLASS
    assert sum(key.startswith("tensorflow/") for key in EXPECTED) == 27


@pytest.mark.parametrize(("name", "way"), in_every_way(VECTORS, *COMPILED))
def test_scores_are_those_of_hugging_face_s_tests_and_classes(name: str, way: str) -> None:
    vector = VECTORS[name]
    result = processed(vector, way == "compiled")
    if vector.forbidden is not None:
        assert [np.flatnonzero(np.isneginf(row)).tolist() for row in result] == vector.forbidden
    if vector.kept is not None:
        assert np.isfinite(result).sum(axis=1).tolist() == vector.kept
    for place, value in vector.values.items():
        assert result[place] == pytest.approx(value, rel=1e-6, abs=1e-7)
    if vector.probabilities is not None:
        np.testing.assert_allclose(np.exp(result), vector.probabilities, rtol=1e-3, atol=1e-3)
    for key in {f"{framework}/{name}" for framework in ("torch", "tensorflow")} - OTHERWISE:
        if key in EXPECTED:
            np.testing.assert_allclose(result, infinite(EXPECTED[key]), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_groups_shun_what_earlier_ones_chose(way: str) -> None:
    scores, taken, expected = DIVERSITY
    names, values = build_chain(GenerationConfig(num_beams=4, num_beam_groups=2, diversity_penalty=1.0))
    context = context_of(np.zeros((2, 1)), 1, 9, ())._replace(taken=ops.convert_to_tensor(np.array(taken, "int32")))
    given = ops.convert_to_tensor(np.array(scores, "float32"))
    result = numbers(run(names, tensors(values), given, context, way == "compiled"))
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    np.testing.assert_allclose(EXPECTED["torch/diversity"], expected, rtol=1e-6)
