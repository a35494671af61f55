"""Each head's loss against plain NumPy: formulas written out here, or those of oracle.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import oracle
import pytest
from conftest import numbers
from keras import ops

from tfgptj.config import GPTJConfig
from tfgptj.errors import InputError, InputTypeError
from tfgptj.heads import GPTJHead, TFGPTJForCausalLM, TFGPTJForSequenceClassification
from tfgptj.losses import (
    IGNORE_INDEX,
    Smoothing,
    causal_lm_loss,
    classification_count,
    classification_loss,
    cross_entropy,
    infer_problem_type,
    question_answering_loss,
)

pytestmark = pytest.mark.core
TENSORFLOW = keras.backend.backend() == "tensorflow"
needs_tensorflow = pytest.mark.skipif(not TENSORFLOW, reason="gradients are taken with TensorFlow")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


LOGITS = random(2, 4, 7)  # [B, T, V]
LABELS = np.array([[0, 3, 6, 2], [1, 1, 5, 4]])
PARTLY = np.array([[0, 3, -100, 2], [-100, -100, 5, -100]])
CLASS_LOGITS = random(3, 4)  # [B, C]
START, END = random(3, 6, seed=1), random(3, 6, seed=2)  # [B, T]


def value(loss: Any) -> float:
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    return float(numbers(loss))


def terms(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Cross-entropy of each label [...], in float64; 0 where it is ignored."""
    shares = np.exp(logits.astype("float64"))
    shares /= shares.sum(-1, keepdims=True)
    chosen = np.take_along_axis(shares, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return np.where(labels == -100, 0.0, -np.log(chosen))


def gradients(function: Callable[[Any], Any], logits: np.ndarray) -> np.ndarray:
    import tensorflow as tf

    x = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = function(x)
    return tape.gradient(loss, x).numpy()


# Cross-entropy


@pytest.mark.parametrize("labels", [LABELS, PARTLY], ids=["all", "some"])
def test_cross_entropy_is_the_mean_over_what_counts(labels: np.ndarray) -> None:
    expected = terms(labels, LOGITS).sum() / (labels != -100).sum()
    assert value(cross_entropy(labels, LOGITS)) == pytest.approx(expected, rel=1e-6)
    assert value(cross_entropy(labels, LOGITS)) == pytest.approx(oracle.cross_entropy(LOGITS, labels), rel=1e-6)


def test_uniform_logits_give_the_logarithm_of_their_number() -> None:
    assert value(cross_entropy(LABELS, np.zeros((2, 4, 7), "float32"))) == pytest.approx(np.log(7), rel=1e-6)


def test_weights_weigh_the_terms_and_not_their_number() -> None:
    weights = np.array([[0.5], [2.0]], "float32")
    expected = (terms(PARTLY, LOGITS) * weights).sum() / 4
    assert value(cross_entropy(PARTLY, LOGITS, weights)) == pytest.approx(expected, rel=1e-6)


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([[1e30, -1e30, 0.0]], "float32")
    assert value(cross_entropy(np.array([0]), logits)) == 0.0
    assert np.isfinite(value(cross_entropy(np.array([1]), logits)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_are_summed_in_float32(dtype: str) -> None:
    logits = ops.cast(LOGITS, dtype)
    expected = oracle.cross_entropy(numbers(logits).astype("float64"), LABELS)
    assert value(cross_entropy(LABELS, logits)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32"])
def test_labels_may_have_any_number_dtype(dtype: str) -> None:
    assert value(cross_entropy(LABELS.astype(dtype), LOGITS)) == value(cross_entropy(LABELS, LOGITS))


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.1, 0.0), (0.0, 0.01), (0.1, 0.01)])
def test_smoothed_labels_and_the_denominator_add_to_it(label_smoothing: float, z_loss: float) -> None:
    exponents = np.exp(LOGITS.astype("float64"))
    total = exponents.sum(-1)
    wanted = (1 - label_smoothing) * np.eye(7)[np.maximum(PARTLY, 0)] + label_smoothing / 7
    losses = -(wanted * np.log(exponents / total[..., None])).sum(-1) + z_loss * np.log(total) ** 2
    expected = losses[PARTLY != -100].mean()
    loss = cross_entropy(PARTLY, LOGITS, smoothing=Smoothing(label_smoothing, z_loss))
    assert value(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("counted", [0.0, 1.0, 9.0])
def test_the_number_of_labels_may_be_a_whole_batch_s(counted: float) -> None:
    number = max(counted, 1.0)  # of nothing there is no mean
    expected = terms(PARTLY, LOGITS).sum() / number
    assert value(cross_entropy(PARTLY, LOGITS, counted=counted)) == pytest.approx(expected, rel=1e-6)
    rows = terms(np.array([3, 0, 1]), CLASS_LOGITS).sum() / number
    assert value(classification_loss(np.array([3, 0, 1]), CLASS_LOGITS, counted=counted)) == pytest.approx(rows)
    labels = random(3, 4, seed=5)
    squares = ((CLASS_LOGITS.astype("float64") - labels) ** 2).mean(-1).sum() / number
    loss = classification_loss(labels, CLASS_LOGITS, "regression", counted=counted)
    assert value(loss) == pytest.approx(squares, rel=1e-6)


def test_a_single_label_is_divided_by_one() -> None:
    labels = np.array([[-100, -100, -100, 2]])
    assert value(cross_entropy(labels, LOGITS[:1])) == pytest.approx(terms(labels, LOGITS[:1]).sum(), rel=1e-6)


# The causal language model


@pytest.mark.parametrize("labels", [LABELS, PARTLY], ids=["all", "some"])
def test_each_position_predicts_the_next_token(labels: np.ndarray) -> None:
    expected = terms(labels[:, 1:], LOGITS[:, :-1]).sum() / (labels[:, 1:] != -100).sum()
    assert value(causal_lm_loss(labels, LOGITS)) == pytest.approx(expected, rel=1e-6)
    assert value(causal_lm_loss(labels, LOGITS)) == pytest.approx(oracle.causal_lm_loss(LOGITS, labels), rel=1e-6)


def test_the_first_label_and_the_last_logits_do_not_count() -> None:
    labels, logits = LABELS.copy(), LOGITS.copy()
    labels[:, 0], logits[:, -1] = 5, 9.0
    assert value(causal_lm_loss(labels, logits)) == value(causal_lm_loss(LABELS, LOGITS))


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 4)], ids=["B", "B1", "BT"])
def test_sample_weights_per_row_and_per_token(shape: tuple[int, ...]) -> None:
    weights = np.linspace(0.5, 4.0, np.prod(shape)).reshape(shape)
    per_token = weights[:, 1:] if shape == (2, 4) else weights.reshape(2, 1)
    expected = (terms(PARTLY[:, 1:], LOGITS[:, :-1]) * per_token).sum() / 3
    assert value(causal_lm_loss(PARTLY, LOGITS, weights)) == pytest.approx(expected, rel=1e-6)


def test_a_single_token_predicts_nothing() -> None:
    assert value(causal_lm_loss(LABELS[:, :1], LOGITS[:, :1])) == 0.0


@pytest.mark.parametrize("loss", [cross_entropy, causal_lm_loss])
def test_nothing_that_counts_gives_zero(loss: Callable[..., Any]) -> None:
    ignored = np.full((2, 4), IGNORE_INDEX)
    assert value(loss(ignored, LOGITS)) == 0.0
    assert value(loss(ignored, LOGITS, np.ones(2) if loss is causal_lm_loss else None)) == 0.0


@needs_tensorflow
@pytest.mark.parametrize("labels", [PARTLY, np.full((2, 4), -100)], ids=["some", "none"])
def test_gradients_are_those_of_the_formula(labels: np.ndarray) -> None:
    shares = np.exp(LOGITS.astype("float64"))
    shares /= shares.sum(-1, keepdims=True)
    kept = (labels != -100)[..., None]
    expected = kept * (shares - np.eye(7)[np.maximum(labels, 0)]) / max(kept.sum(), 1)
    actual = gradients(lambda logits: cross_entropy(labels, logits), LOGITS)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-7)


@needs_tensorflow
def test_a_step_without_labels_changes_nothing() -> None:
    model = TFGPTJForCausalLM(GPTJConfig(vocab_size=9, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    model.compile(keras.optimizers.SGD(1.0))
    before = model.get_weights()
    assert model.train_on_batch(np.array([[1, 2, 3]]), np.full((1, 3), -100)) == 0.0
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.array_equal(old, new)


# Classification


def test_regression_is_the_mean_square() -> None:
    labels, logits = np.array([0.5, -1.0, 2.0], "float32"), CLASS_LOGITS[:, :1]
    expected = ((logits[:, 0].astype("float64") - labels) ** 2).mean()
    for shaped in (labels, labels[:, None]):
        assert value(classification_loss(shaped, logits)) == pytest.approx(expected, rel=1e-6)
        assert value(classification_loss(shaped, logits, "regression")) == pytest.approx(expected, rel=1e-6)


def test_regression_of_several_outputs() -> None:
    labels = random(3, 4, seed=5)
    expected = ((CLASS_LOGITS.astype("float64") - labels) ** 2).mean()
    assert value(classification_loss(labels, CLASS_LOGITS, "regression")) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_single_label_classification(problem_type: str | None) -> None:
    labels = np.array([3, 0, 1])
    expected = terms(labels, CLASS_LOGITS).mean()
    for shaped in (labels, labels[:, None]):
        assert value(classification_loss(shaped, CLASS_LOGITS, problem_type)) == pytest.approx(expected, rel=1e-6)


def test_a_class_label_may_be_ignored() -> None:
    labels = np.array([3, -100, 1])
    assert value(classification_loss(labels, CLASS_LOGITS)) == pytest.approx(
        terms(labels, CLASS_LOGITS).sum() / 2, rel=1e-6
    )


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_multi_label_classification(problem_type: str | None) -> None:
    labels = np.array([[0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]], "float32")
    shares = 1 / (1 + np.exp(-CLASS_LOGITS.astype("float64")))
    expected = -(labels * np.log(shares) + (1 - labels) * np.log(1 - shares)).mean()
    assert value(classification_loss(labels, CLASS_LOGITS, problem_type)) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(oracle.classification_loss(CLASS_LOGITS, labels), rel=1e-6)


def test_multi_label_loss_is_exact_for_extreme_logits() -> None:
    logits = np.array([[-200.0, 200.0, 200.0, -200.0]], "float32")
    assert value(classification_loss(np.array([[0.0, 1, 1, 0]]), logits)) == 0.0
    assert value(classification_loss(np.array([[1.0, 0, 1, 0]]), logits)) == 100.0


@pytest.mark.parametrize(
    ("dtype", "num_labels", "expected"),
    [
        ("float32", 1, "regression"),
        ("int32", 1, "regression"),
        ("int64", 3, "single_label_classification"),
        ("uint8", 3, "single_label_classification"),
        ("float32", 3, "multi_label_classification"),
        ("bool", 3, "multi_label_classification"),
    ],
)
def test_the_problem_is_inferred_from_outputs_and_dtype(dtype: str, num_labels: int, expected: str) -> None:
    assert infer_problem_type(np.zeros(2, dtype), num_labels) == expected


@pytest.mark.parametrize(
    ("labels", "problem_type", "expected"),
    [
        (np.array([3, -100, 1]), None, 2),
        (np.array([3, -100, 1]), "single_label_classification", 2),
        (np.zeros((3, 4), "float32"), None, 3),
        (np.zeros((3, 4), "int32"), "multi_label_classification", 3),
        (np.zeros((3, 4), "float32"), "regression", 3),
    ],
)
def test_labels_of_one_class_are_counted_and_else_rows(
    labels: np.ndarray, problem_type: str | None, expected: int
) -> None:
    assert value(classification_count(labels, 4, problem_type)) == expected


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (np.array([0.5, -1.0, 2.0, 0.0, 1.0, 3.0], "float32").reshape(3, 2), "regression"),
        (np.array([1, 0, 1]), "single_label_classification"),
        (np.array([[0, 1], [1, 1], [0, 0]], "float32"), "multi_label_classification"),
    ],
)
def test_classification_weights_weigh_rows(labels: np.ndarray, problem_type: str) -> None:
    weights, logits = np.array([0.0, 1.0, 3.0], "float32"), CLASS_LOGITS[:, :2]
    rows = [value(classification_loss(labels[i : i + 1], logits[i : i + 1], problem_type)) for i in range(3)]
    expected = np.dot(weights, rows) / 3
    assert value(classification_loss(labels, logits, problem_type, weights)) == pytest.approx(expected, rel=1e-6)


# Question answering


@pytest.mark.parametrize("form", [dict, tuple, list])
def test_question_answering_averages_start_and_end(form: type) -> None:
    starts, ends = np.array([0, 2, 5]), np.array([1, 2, 3])
    expected = (terms(starts, START).mean() + terms(ends, END).mean()) / 2
    positions = {"start_positions": starts, "end_positions": ends} if form is dict else form((starts, ends))
    logits = {"start_logits": START, "end_logits": END}
    assert value(question_answering_loss(positions, logits)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("outside", [6, 7, 1000])
def test_answers_beyond_the_text_do_not_count(outside: int) -> None:
    starts, ends = np.array([0, outside, 5]), np.array([outside, outside, outside])
    expected = (terms(starts[[0, 2]], START[[0, 2]]).mean() + 0.0) / 2
    loss = question_answering_loss((starts, ends), {"start_logits": START, "end_logits": END})
    assert value(loss) == pytest.approx(expected, rel=1e-6)


def test_negative_positions_are_clamped_to_the_first_token() -> None:
    logits = {"start_logits": START, "end_logits": END}
    positions, clamped = np.array([-1, -100, 2]), np.array([0, 0, 2])
    loss = value(question_answering_loss((positions, positions), logits))
    assert loss == value(question_answering_loss((clamped, clamped), logits))
    assert loss == pytest.approx(oracle.question_answering_loss(START, END, positions, positions), rel=1e-6)


def test_positions_may_be_columns() -> None:
    starts, ends = np.array([[0], [2], [5]]), np.array([[1], [2], [3]])
    logits = {"start_logits": START, "end_logits": END}
    assert value(question_answering_loss((starts, ends), logits)) == value(
        question_answering_loss((starts[:, 0], ends[:, 0]), logits)
    )


def test_question_answering_weights_weigh_rows() -> None:
    starts, ends, weights = np.array([0, 2, 5]), np.array([1, 2, 3]), np.array([0.0, 1.0, 3.0])
    expected = ((terms(starts, START) * weights).mean() + (terms(ends, END) * weights).mean()) / 2
    logits = {"start_logits": START, "end_logits": END}
    assert value(question_answering_loss((starts, ends), logits, weights)) == pytest.approx(expected, rel=1e-6)


def test_first_and_last_tokens_have_numbers_of_their_own() -> None:
    starts, ends = np.array([0, 2, 5]), np.array([1, 2, 3])
    expected = (terms(starts, START).sum() / 2 + terms(ends, END).sum() / 5) / 2
    loss = question_answering_loss((starts, ends), {"start_logits": START, "end_logits": END}, counted=(2.0, 5.0))
    assert value(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("positions", "error", "text"),
    [
        ({"start_positions": [0]}, InputError, "needs start_positions and end_positions; end_positions is missing"),
        ({}, InputError, "needs start_positions and end_positions; start_positions is missing"),
        (np.array([[0, 1], [2, 3]]), InputTypeError, "needs labels as a dict or pair of start_positions and"),
        (([0],), InputTypeError, "needs labels as a dict or pair of start_positions and"),
        (None, InputTypeError, "needs labels as a dict or pair of start_positions and"),
    ],
)
def test_positions_must_be_a_pair(positions: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        question_answering_loss(positions, {"start_logits": START, "end_logits": END})


# Heads


def test_a_head_must_define_its_loss() -> None:
    class Headless(GPTJHead):
        """A head without a loss."""

    with pytest.raises(InputError, match="Headless has no loss of its own"):
        Headless.head_loss(Headless.__new__(Headless), LABELS, LOGITS)


def test_sample_weights_reach_the_head_s_loss() -> None:
    model = TFGPTJForCausalLM(GPTJConfig(vocab_size=7, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    model.compile("sgd")
    logits = numbers(model(LABELS))
    for weights in (np.array([0.5, 2.0]), np.arange(8.0).reshape(2, 4)):
        expected = value(causal_lm_loss(LABELS, logits, weights))
        assert model.evaluate(LABELS, LABELS, sample_weight=weights, verbose=0) == pytest.approx(expected, rel=1e-5)


def test_the_problem_type_of_the_configuration_wins() -> None:
    config = GPTJConfig(
        vocab_size=7, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, num_labels=3, problem_type="regression"
    )
    model, targets = TFGPTJForSequenceClassification(config), random(2, 3)
    model.compile("sgd")
    expected = ((numbers(model(LABELS)) - targets) ** 2).mean()
    assert model.evaluate(LABELS, targets, verbose=0) == pytest.approx(expected, rel=1e-5)
