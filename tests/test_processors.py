"""Logits processors against Hugging Face's warpers (fixtures/goldens/warpers.npz); draws against their distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from chains import context_of
from conftest import GOLDENS, numbers
from keras import ops

from tfgptj.generation import constraints, penalties, processors
from tfgptj.generation.processors import FORBIDDEN

pytestmark = pytest.mark.core
BACKEND = keras.backend.backend()
VALUES = np.load(GOLDENS / "warpers.npz")
LAST = 1 - 2**-24  # the largest float32 below 1
WARPERS = [name for name in VALUES if name != "logits"]


def golden_logits() -> np.ndarray:
    """Four rows [B, V]: plain, peaked, every value twice, and some already forbidden."""
    return np.where(np.isinf(VALUES["logits"]), np.float32(FORBIDDEN), VALUES["logits"])


def draw(logits: Any, uniforms: Any) -> np.ndarray:
    logits, uniforms = (ops.convert_to_tensor(np.asarray(x, "float32")) for x in (logits, uniforms))
    return numbers(processors.draw(logits, uniforms))


def distribution(logits: np.ndarray) -> np.ndarray:
    """Softmax in float64."""
    weights = np.exp(logits.astype("float64") - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def compiled() -> list[tuple[str, Callable[..., Any]]]:
    """`draw` in every way that a backend can run it."""
    ways: list[tuple[str, Callable[..., Any]]] = [("eager", processors.draw)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        ways += [("xla", tf.function(processors.draw, jit_compile=True, autograph=False))]
    elif BACKEND == "jax":
        import jax

        ways += [("xla", jax.jit(processors.draw))]
    return ways


# Against Hugging Face


def test_the_goldens_hold_all_three_warpers() -> None:
    assert {name.split("=")[0] for name in WARPERS} == {"temperature", "top_k", "top_p"}
    assert len(WARPERS) >= 10


@pytest.mark.parametrize("name", WARPERS)
def test_logits_are_hugging_face_s(name: str) -> None:
    kind, value = name.split("=")
    logits = ops.convert_to_tensor(golden_logits())
    result = numbers(getattr(processors, kind)(logits, None, int(value) if kind == "top_k" else float(value)))
    expected = VALUES[name]
    allowed = np.isfinite(expected)
    assert np.array_equal(result > FORBIDDEN / 10, allowed)
    if kind == "temperature":
        np.testing.assert_allclose(result[allowed], expected[allowed], rtol=1e-6)
    else:
        assert np.array_equal(result[allowed], expected[allowed])


def test_each_row_may_be_cut_in_its_own_way() -> None:
    names = [name for name in WARPERS if not name.startswith("temperature")]
    given, count = golden_logits(), len(golden_logits())
    rows = np.concatenate([given] * len(names))
    cuts = [name.split("=") for name in names for _ in range(count)]
    ks = [[int(value) if kind == "top_k" else 0] for kind, value in cuts]
    shares = [[float(value) if kind == "top_p" else 1.0] for kind, value in cuts]
    numbers_of_rows = ops.convert_to_tensor(np.array(ks, "int32")), ops.convert_to_tensor(np.array(shares, "float32"))
    result = numbers(processors.cutoffs(ops.convert_to_tensor(rows), None, *numbers_of_rows))
    expected = np.concatenate([VALUES[name] for name in names])
    assert np.array_equal(result > FORBIDDEN / 10, np.isfinite(expected))
    assert np.array_equal(result[np.isfinite(expected)], expected[np.isfinite(expected)])


def test_rows_without_cuts_are_left_as_they_are() -> None:
    logits = ops.convert_to_tensor(golden_logits())
    k, share = np.array([[0], [0], [3], [0]], "int32"), np.array([[1.0], [1.0], [1.0], [1.0]], "float32")
    some = numbers(processors.cutoffs(logits, None, ops.convert_to_tensor(k), ops.convert_to_tensor(share)))
    none = numbers(processors.cutoffs(logits, None, ops.convert_to_tensor(0 * k), ops.convert_to_tensor(share)))
    np.testing.assert_array_equal(none, golden_logits())
    np.testing.assert_array_equal(some[[0, 1, 3]], golden_logits()[[0, 1, 3]])
    assert (some[2] > FORBIDDEN / 10).sum() < (none[2] > FORBIDDEN / 10).sum()


def test_a_row_is_first_cut_to_k_and_then_to_a_share() -> None:
    logits, share = ops.convert_to_tensor(golden_logits()), np.float32(0.7)
    expected = numbers(processors.top_p(processors.top_k(logits, None, 5), None, share))
    k, shares = np.full((4, 1), 5, "int32"), np.full((4, 1), share)
    result = numbers(processors.cutoffs(logits, None, ops.convert_to_tensor(k), ops.convert_to_tensor(shares)))
    np.testing.assert_array_equal(result > FORBIDDEN / 10, expected > FORBIDDEN / 10)


def test_ties_with_the_kth_stay() -> None:
    result = numbers(processors.top_k(ops.convert_to_tensor(np.array([[1.0, 2.0, 2.0, 0.0]], "float32")), None, 1))
    assert (result > FORBIDDEN).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("k", [4, 5, 2**24])
def test_top_k_of_the_whole_vocabulary_changes_nothing(k: int) -> None:
    logits = ops.convert_to_tensor(np.array([[1.0, 2.0, 2.0, 0.0]], "float32"))
    assert processors.top_k(logits, None, k) is logits


def test_top_p_keeps_the_token_that_crosses_the_share() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], "float32"))
    for share, kept in ((1e-9, 1), (0.4, 1), (0.6, 2), (0.9, 3), (0.99, 4), (1.0, 4)):
        result = numbers(processors.top_p(ops.convert_to_tensor(logits), None, share))
        assert (result > FORBIDDEN).sum() == kept


def test_top_p_reads_each_row_by_itself() -> None:
    logits = np.log(np.array([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9], [0.34, 0.33, 0.33]], "float32"))
    result = numbers(processors.top_p(ops.convert_to_tensor(logits), None, 0.7)) > FORBIDDEN
    assert result.tolist() == [[True, False, False], [False, False, True], [True, True, True]]


def test_a_forbidden_token_stays_forbidden() -> None:
    logits = ops.convert_to_tensor(golden_logits()[3:])
    was = numbers(logits) == np.float32(FORBIDDEN)
    for result in (
        processors.top_k(logits, None, 40),
        processors.top_p(logits, None, 1.0),
        processors.temperature(logits, None, 2.0),
    ):
        assert (numbers(result)[was] < FORBIDDEN / 10).all()
        assert np.isfinite(numbers(ops.softmax(result))).all()
        assert (numbers(ops.softmax(result))[was] == 0).all()


# Where one number decides


def test_the_coldest_leaves_the_likeliest() -> None:
    logits = golden_logits()
    best = logits == logits.max(-1, keepdims=True)
    for value in (9e-4, 1e-6, 1e-30):
        result = numbers(processors.temperature(ops.convert_to_tensor(logits), None, np.float32(value)))
        np.testing.assert_array_equal(result[best], 0)
        assert (result[~best] < 0).all()
    warm = ops.convert_to_tensor(logits[:3])  # nothing needs to be added there
    np.testing.assert_allclose(numbers(processors.temperature(warm, None, np.float32(1e-3))), logits[:3] / 1e-3, 1e-6)


def test_rows_that_are_compared_get_nothing_added() -> None:
    logits = np.array([[3.0, -2.0, 1.5], [-0.5, FORBIDDEN, -4.0]], "float32")
    for value in (2.0, 1e-4, 1e-30):
        result = numbers(processors.temperature(ops.convert_to_tensor(logits), None, np.float32(value), True))
        expected = np.clip(logits.astype("float64") / value, -1e24, 1e24)
        np.testing.assert_allclose(result, np.where(logits == FORBIDDEN, FORBIDDEN, expected), rtol=1e-6)


def kept(result: Any) -> list[int]:
    return (numbers(result) > FORBIDDEN / 10).sum(-1).tolist()


# What cuts by probability, with a number that leaves nothing but what must stay: eta's goes into its square root.
STRICTEST = {"top_p": 0.0, "min_p": 2.0, "typical_p": 0.0, "epsilon_cutoff": 2.0, "eta_cutoff": 4.0}


@pytest.mark.parametrize("name", STRICTEST)
def test_so_many_stay_whatever_the_number(name: str) -> None:
    logits = ops.convert_to_tensor(np.array([[5.0, 1.0, 2.0, 4.0, 3.0], [0.0, 4.0, 8.0, 6.0, 2.0]], "float32"))
    function = getattr(processors, name)
    strictest = np.float32(STRICTEST[name])
    assert kept(function(logits, None, strictest)) == [1, 1]
    for keep in (1, 2, 3):
        result = function(logits, None, strictest, keep)
        assert kept(result) == [keep, keep]
        likeliest = np.sort(numbers(logits), axis=-1)[:, -keep:].sum(-1)
        if name != "typical_p":  # whose likeliest may be untypical
            np.testing.assert_array_equal(np.where(numbers(result) > FORBIDDEN, numbers(result), 0).sum(-1), likeliest)
    assert kept(function(logits, None, strictest, 9)) == [5, 5]


def steps_of(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities from the highest on, and the sum before each, float32 as the functions compute them."""
    descending = ops.flip(ops.sort(ops.convert_to_tensor(logits), axis=-1), axis=-1)
    probabilities = ops.softmax(descending, axis=-1)
    return numbers(probabilities), numbers(ops.cumsum(probabilities, axis=-1) - probabilities)


def test_a_share_that_is_reached_exactly_is_reached() -> None:
    logits = np.array([[1.0, -0.5, 0.25, 2.0, -3.0]], "float32")
    _, before = steps_of(logits)
    given = ops.convert_to_tensor(logits)
    for count in (1, 2, 3, 4):
        share = np.array([[before[0, count]]], "float32")
        assert kept(processors.top_p(given, None, share[0, 0])) == [count]
        uncut = ops.convert_to_tensor(np.zeros((1, 1), "int32"))
        assert kept(processors.cutoffs(given, None, uncut, ops.convert_to_tensor(share))) == [count]


def test_a_token_with_just_the_probability_stays() -> None:
    logits = np.array([[1.0, -0.5, 0.25, 2.0, -3.0]], "float32")
    given = ops.convert_to_tensor(logits)
    probabilities = -np.sort(-numbers(ops.softmax(given, axis=-1)))[0]
    for count in (1, 2, 3):
        assert kept(processors.epsilon_cutoff(given, None, probabilities[count - 1])) == [count]
    assert kept(processors.min_p(given, None, np.float32(1.0))) == [1]
    rarest = numbers(ops.exp(ops.log_softmax(given, axis=-1))).min()  # less than sqrt(rarest) exp(-entropy)
    assert kept(processors.eta_cutoff(given, None, rarest)) == [5]
    assert kept(processors.eta_cutoff(given, None, np.nextafter(rarest, np.float32(1)))) == [4]


def test_typical_tokens_are_counted_up_to_the_mass() -> None:
    quarters = ops.convert_to_tensor(np.log(np.array([[0.25, 0.5, 0.125, 0.125]], "float32")))
    # Entropy 1.75 bits; distances 0.25, 0.75 and twice 1.25.
    for mass, count in ((0.2, 1), (0.5, 2), (0.8, 4), (1.5, 4)):
        assert kept(processors.typical_p(quarters, None, np.float32(mass))) == [count]
    even = ops.convert_to_tensor(np.array([[0.0, 0.0, 0.0, 0.0, FORBIDDEN]], "float32"))
    assert kept(processors.typical_p(even, None, np.float32(0.25))) == [4]
    # All five up to a mass that none reaches.
    given = ops.convert_to_tensor(np.array([[1.0, -0.5, 0.25, 2.0, -3.0]], "float32"))
    assert kept(processors.typical_p(given, None, np.float32(1.5))) == [5]


@pytest.mark.parametrize("name", ["typical_p", "eta_cutoff"])
def test_what_has_no_probability_has_no_entropy(name: str) -> None:
    alone = np.array([[1.0, -0.5, 0.25, 2.0, -3.0]], "float32")
    function, number = getattr(processors, name), np.float32(0.3)
    expected = numbers(function(ops.convert_to_tensor(alone), None, number))
    assert 0 < (expected > FORBIDDEN).sum() < 5
    for nothing in (FORBIDDEN, -np.inf):
        beside = ops.convert_to_tensor(np.pad(alone, ((0, 0), (2, 1)), constant_values=nothing))
        result = numbers(function(beside, None, number))
        np.testing.assert_array_equal(result[:, 2:-1], expected)
        assert (result[:, [0, 1, -1]] <= FORBIDDEN).all()


def test_rows_may_be_cut_to_one() -> None:
    k, share = np.array([[1], [0]], "int32"), np.ones((2, 1), "float32")
    logits = ops.convert_to_tensor(golden_logits()[:2])
    result = processors.cutoffs(logits, None, ops.convert_to_tensor(k), ops.convert_to_tensor(share))
    assert kept(result) == [1, golden_logits().shape[1]]


def test_a_row_without_any_token_is_found() -> None:
    logits = np.array([[FORBIDDEN, 1.0], [FORBIDDEN, 2 * FORBIDDEN]], "float32")
    for given in (logits, ops.convert_to_tensor(logits)):
        assert numbers(processors.any_left(given)).tolist() == [True, False]


# What is asked of the text


def test_a_text_may_be_just_the_beginning_of_a_sequence() -> None:
    context = context_of(np.array([[1], [2]]), 1, 9, (), padding=3)  # of token 3
    sequences = np.array([[-1, -1, 1, 0], [-1, 3, 1, 4], [3, 3, 3, 5]], "int32")
    given = [ops.convert_to_tensor(x) for x in (sequences, np.array([2, 3, 4], "int32"), np.ones(3, "float32"))]
    result = numbers(penalties.sequence_bias(ops.zeros((2, 6)), context, *given))
    np.testing.assert_array_equal(result, [[1, 0, 0, 0, 0, 0], [0] * 6])


def test_each_row_has_a_last_token_of_its_own() -> None:
    context = context_of(np.array([[1, 2, 3], [1, 2, 3]]), 1, 0, ())
    context = context._replace(limit=ops.convert_to_tensor(np.array([3, 4], "int32")))
    logits, ends = ops.zeros((2, 6)), ops.convert_to_tensor(np.array([4, -1], "int32"))
    assert kept(constraints.forced_eos(logits, context, ends)) == [1, 6]


# Greedy


def test_greedy_takes_the_likeliest_and_of_ties_the_first() -> None:
    logits = np.array([[0.0, 3.0, 1.0], [2.0, 1.0, 2.0], [-1.0, -1.0, -1.0]], "float32")
    for given in (logits, ops.convert_to_tensor(logits)):
        tokens = processors.greedy(given)
        assert keras.backend.standardize_dtype(tokens.dtype) == "int32"
        assert numbers(tokens).tolist() == [1, 0, 0]


# Draws


def test_each_share_of_the_unit_interval_gives_its_token() -> None:
    logits = np.random.default_rng(0).standard_normal((1, 12)).astype("float32")
    ends = distribution(logits)[0].cumsum()
    starts = np.concatenate([[0.0], ends[:-1]])
    for point in (0.01, 0.5, 0.99):
        uniforms = starts + point * (ends - starts)
        assert draw(np.repeat(logits, 12, axis=0), uniforms).tolist() == list(range(12))


def test_a_share_begins_with_its_lower_end() -> None:
    assert draw(np.zeros((4, 4)), [0.0, 0.25, 0.5, 0.75]).tolist() == [0, 1, 2, 3]


def test_sums_that_end_below_one_leave_no_gap() -> None:
    logits = np.random.default_rng(0).standard_normal((300, 9)).astype("float32")
    logits[:, [0, 5]] = FORBIDDEN
    sums = numbers(ops.cumsum(ops.softmax(ops.convert_to_tensor(logits), axis=-1), axis=-1))[:, -1]
    assert (sums < LAST).any()  # which would leave the largest number without a token
    assert (draw(logits, np.full(300, LAST)) == 8).all()


def test_draws_follow_the_distribution() -> None:
    logits = np.array([[2.0, -1.0, 0.5, FORBIDDEN, 1.0, 0.0, -3.0]], "float32")
    uniforms = np.random.default_rng(0).random(20_000, dtype="float32")
    counts = np.bincount(draw(np.repeat(logits, len(uniforms), axis=0), uniforms), minlength=7)
    expected = distribution(logits)[0] * len(uniforms)
    assert counts[3] == 0
    kept = expected > 0
    # Chi-square with 5 degrees of freedom: 20.5 is exceeded once in a thousand seeds.
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 20.5


def test_draws_after_all_processors_follow_the_exact_distribution() -> None:
    logits = np.random.default_rng(1).standard_normal((1, 40)).astype("float32") * 2
    warped = processors.temperature(ops.convert_to_tensor(logits), None, 0.8)
    warped = numbers(processors.top_p(processors.top_k(warped, None, 12), None, 0.95))
    exact = np.sort(logits.astype("float64")[0] / 0.8)[::-1][:12]
    shares = distribution(exact)
    kept = int((shares.cumsum() - shares < 0.95).sum())
    expected = np.zeros(40)
    expected[np.argsort(-logits[0])[:kept]] = shares[:kept] / shares[:kept].sum()
    uniforms = np.random.default_rng(2).random(20_000, dtype="float32")
    counts = np.bincount(draw(np.repeat(warped, len(uniforms), axis=0), uniforms), minlength=40)
    assert 5 < kept < 12
    assert counts[expected == 0].sum() == 0
    expected = expected[expected > 0] * len(uniforms)
    # Chi-square with at most 10 degrees of freedom: 29.6 is exceeded once in a thousand seeds.
    assert ((counts[counts > 0] - expected) ** 2 / expected).sum() < 29.6


@pytest.mark.parametrize("uniform", [0.0, LAST])
def test_the_ends_of_the_interval_give_the_first_and_last_allowed_token(uniform: float) -> None:
    assert np.float32(LAST) < 1
    logits = np.full((4, 9), FORBIDDEN, "float32")
    for row, allowed in enumerate(([4], [0, 8], [1, 7], [3, 4, 5])):
        logits[row, allowed] = 1.0
    expected = [4, 0, 1, 3] if uniform == 0 else [4, 8, 7, 5]
    assert draw(logits, np.full(4, uniform)).tolist() == expected


@pytest.mark.parametrize("way", compiled(), ids=lambda way: way[0])
def test_no_forbidden_token_is_ever_drawn(way: tuple[str, Callable[..., Any]]) -> None:
    # Parallel sums are not monotone: a cumulative probability may step where its token has none. So draw right there.
    logits = np.random.default_rng(0).standard_normal((1, 8192)).astype("float32") * 3
    logits = numbers(processors.top_k(ops.convert_to_tensor(logits), None, 500))
    steps = np.unique(numbers(ops.cumsum(ops.softmax(ops.convert_to_tensor(logits)), axis=-1)))
    beside = [np.nextafter(steps, np.float32(end)) for end in (0, 2)]
    uniforms = np.unique(np.concatenate([[0.0, LAST], steps, *beside]).astype("float32"))
    uniforms = uniforms[uniforms < 1][:: max(1, len(uniforms) // 600)]
    rows = ops.convert_to_tensor(np.repeat(logits, len(uniforms), axis=0))
    tokens = numbers(way[1](rows, ops.convert_to_tensor(uniforms)))
    assert (logits[0, tokens] > FORBIDDEN / 10).all()
