"""A head's training step: every gradient against Hugging Face's PyTorch, in parts, with logits and without."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import FIXTURES, GOLDENS, assert_near, elsewhere, foremost, numbers
from keras import ops
from safetensors.numpy import load_file

from tfgptj.config import GPTJConfig
from tfgptj.errors import InputError, InputTypeError
from tfgptj.head import GPTJHead
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification
from tfgptj.losses import Smoothing
from tfgptj.training.metrics import BitsPerByte, Perplexity, TokenAccuracy

OPTIMIZED = True  # graphs run as they do for users: see conftest.py

TENSORFLOW = keras.backend.backend() == "tensorflow"
STEPS = np.load(FIXTURES / "step_goldens.npz")
CASES = sorted({"/".join(key.split("/")[:2]) for key in STEPS})
HEADS: dict[str, type] = {
    "causal_lm": TFGPTJForCausalLM,
    "classification": TFGPTJForSequenceClassification,
    "question_answering": TFGPTJForQuestionAnswering,
}
SHAPE: dict[str, Any] = {"vocab_size": 31, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
IDS = np.random.default_rng(0).integers(0, 31, (5, 6)).astype("int32")
LABELS = np.where(np.random.default_rng(1).random((5, 6)) < 0.3, -100, IDS).astype("int32")
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 3.0], "float32")


class Taken(keras.optimizers.Optimizer):
    """Puts the gradients in the place of the weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__(learning_rate=1.0, **options)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign(variable, ops.convert_to_tensor(gradient))


class Plain(TFGPTJForCausalLM):
    """A language model whose loss is computed of logits."""

    def head_loss(self, labels: Any, outputs: Any, sample_weight: Any = None, counted: Any = None) -> Any:
        return super().head_loss(labels, outputs, sample_weight, counted)


def config(**changes: Any) -> GPTJConfig:
    return GPTJConfig(**{**SHAPE, "initializer_range": 0.2, **changes})


def pair(**options: Any) -> tuple[Any, Any]:
    """Two models with the same weights, of which the second computes logits."""
    dtype = options.pop("dtype", None)
    first, second = TFGPTJForCausalLM(config(**options), dtype=dtype), Plain(config(**options), dtype=dtype)
    second.set_weights(first.get_weights())
    return first, second


def step(model: Any, x: Any = IDS, y: Any = LABELS, weights: Any = None, **options: Any) -> tuple[float, list[Any]]:
    """A step's loss and the gradients of what is trained."""
    model.compile(Taken(), run_eagerly=TENSORFLOW, **options)
    loss = model.train_on_batch(x, y, sample_weight=weights)
    return float(loss if np.ndim(loss) == 0 else loss[0]), [numbers(v) for v in model.trainable_variables]


def same_step(first: Any, second: Any, tolerance: float = 1e-5) -> None:
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    assert len(first[1]) == len(second[1])
    largest = max(np.abs(gradient).max() for gradient in second[1])
    for one, other in zip(first[1], second[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * largest)


# Hugging Face


@pytest.mark.core
@pytest.mark.parametrize(
    ("case", "micro_batches"),
    elsewhere(
        foremost(
            itertools.product(CASES, (1, 2, 3)),
            *((case, 1) for case in CASES if TENSORFLOW),
            *((case, n) for case in CASES if case.endswith("right") for n in (1, 3)),
        ),
        *(("causal_lm/right", 3), ("question_answering/right", 1)),
    ),
)
def test_loss_and_every_gradient_are_hugging_face_s(case: str, micro_batches: int, tmp_path: Path) -> None:
    head, kind = case.split("/")
    golden = {key.removeprefix(case + "/"): STEPS[key] for key in STEPS if key.startswith(case + "/")}
    options = {"problem_type": kind} if head == "classification" else {}
    model = HEADS[head].from_pretrained(GOLDENS / "base" / head, **options)  # type: ignore[attr-defined]
    targets = {name: golden[name] for name in ("labels", "start_positions", "end_positions") if name in golden}
    smoothing = {"label_smoothing": 0.1, "z_loss": 0.01} if kind == "smoothed" else {}
    model.compile(Taken(), micro_batches=micro_batches, **smoothing)
    loss = model.train_on_batch({name: golden[name] for name in ("input_ids", "attention_mask")} | targets)
    assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-5)
    model.save_pretrained(tmp_path)
    taken = load_file(tmp_path / "model.safetensors")
    wanted = {name.removeprefix("gradients/"): g for name, g in golden.items() if name.startswith("gradients/")}
    assert len(wanted) == len(model.trainable_variables)
    for name, gradient in wanted.items():
        # Some are zero but for rounding: a bias that moves all positions alike changes no softmax over them.
        scale = max(np.abs(gradient).max(), 0.1 * max(np.abs(g).max() for g in wanted.values()))
        np.testing.assert_allclose(taken[name], gradient, rtol=0, atol=1e-5 * scale, err_msg=name)


# Without logits, and with


WITH: list[tuple[dict[str, Any], float]] = [
    ({}, 1e-5),
    ({"tie_word_embeddings": True}, 1e-5),
    ({"output_hidden_states": True, "output_attentions": True}, 1e-5),
    ({"dtype": "mixed_bfloat16"}, 3e-2),
    ({"dtype": "mixed_float16"}, 1e-2),
    ({"dtype": "bfloat16"}, 3e-2),
]


@pytest.mark.core
@pytest.mark.parametrize(("options", "tolerance"), elsewhere(WITH, WITH[3]), ids=str)
def test_a_step_without_logits_is_the_step_with_them(options: dict[str, Any], tolerance: float) -> None:
    first, second = pair(**options)
    ours, theirs = step(first, weights=WEIGHTS), step(second, weights=WEIGHTS)
    assert first.needs_no_logits and not second.needs_no_logits
    same_step(ours, theirs, tolerance)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair()
    monkeypatch.setattr("tfgptj.fused.CHUNK", 31 * 7)
    same_step(step(first, weights=WEIGHTS, label_smoothing=0.1, z_loss=0.01),
              step(second, weights=WEIGHTS, label_smoothing=0.1, z_loss=0.01))  # fmt: skip


def test_adapters_of_the_head_are_trained_and_its_kernel_is_not() -> None:
    first, second = pair()
    for model in (first, second):
        model.add_lora(rank=2, targets=["lm_head", "q_proj"])
        for variable, values in zip(model.trainable_variables, adapters(model), strict=True):
            variable.assign(values)
    kernel = numbers(first.lm_head.dense.base_kernel)
    same_step(step(first), step(second))
    assert first.needs_no_logits and np.array_equal(numbers(first.lm_head.dense.base_kernel), kernel)


def adapters(model: Any) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.standard_normal(v.shape).astype("float32") for v in model.trainable_variables]


def test_a_frozen_head_stays_what_it_is() -> None:
    first, second = pair()
    first.lm_head.trainable = second.lm_head.trainable = False
    before = numbers(first.lm_head.dense.base_kernel)
    same_step(step(first), step(second))
    assert np.array_equal(numbers(first.lm_head.dense.base_kernel), before)


def test_segments_and_labels_of_the_inputs() -> None:
    first, second = pair()
    x = {"input_ids": IDS, "segment_ids": np.array([[0, 0, 1, 1, 1, 2]] * 5, "int32"), "attention_mask": IDS != 3}
    same_step(step(first, x, None), step(second, x, None))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_head_computes_its_logits(mode: str) -> None:
    model = TFGPTJForCausalLM(config())
    model.quantize(mode)
    model.add_lora(rank=2)
    model.compile("sgd", micro_batches=2)
    assert not model.needs_no_logits
    expected = float(numbers(model.head_loss(LABELS, model(IDS))))
    assert model.evaluate(IDS, LABELS, verbose=0) == pytest.approx(expected, rel=1e-5)
    assert model.train_on_batch(IDS, LABELS) == pytest.approx(expected, rel=1e-5)


def test_logits_are_made_where_they_are_asked_for() -> None:
    model = TFGPTJForCausalLM(config())
    for options, without in (
        ({}, True),
        ({"metrics": [Perplexity()]}, True),
        ({"metrics": [Perplexity(), "accuracy"]}, False),
        ({"weighted_metrics": [Perplexity()]}, False),
        ({"loss": "sparse_categorical_crossentropy"}, False),
        ({}, True),
    ):
        model.compile("sgd", **options)
        assert model.needs_no_logits is without
    model.train_on_batch(IDS, LABELS)
    assert model.predict_on_batch(IDS).shape == model(IDS).shape == (5, 6, 31)
    wide = TFGPTJForCausalLM(config(output_hidden_states=True))
    wide.compile("sgd", metrics={"logits": [Perplexity()]})
    assert not wide.needs_no_logits


# In parts


@pytest.mark.parametrize("micro_batches", foremost([2, 5, 7], 2))
def test_parts_add_up_to_the_whole(micro_batches: int) -> None:
    first, second = pair(resid_pdrop=0.0)
    same_step(step(first, weights=WEIGHTS, micro_batches=micro_batches), step(second, weights=WEIGHTS))


@pytest.mark.core
def test_parts_with_loss_scaling_and_adapters() -> None:
    first, second = pair(dtype="mixed_float16")
    for model in (first, second):
        model.add_lora(rank=2)
        for variable, values in zip(model.trainable_variables, adapters(model), strict=True):
            variable.assign(values)
    same_step(step(first, micro_batches=2), step(second), 1e-2)


def test_metrics_of_logits_see_the_whole_batch_in_parts() -> None:
    model = TFGPTJForSequenceClassification(config(num_labels=3))
    y = np.array([0, 2, 1, 1, 0])
    results = []
    for micro_batches in (1, 2):
        model.compile(keras.optimizers.SGD(0.0), metrics=["accuracy"], micro_batches=micro_batches)
        results.append(model.train_on_batch(IDS, y))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)


def test_answers_in_parts_that_fit_feeds() -> None:
    model = TFGPTJForQuestionAnswering(config())
    y = {"start_positions": np.array([0, 1, 7, 2, 3]), "end_positions": np.array([4, 2, 9, 9, 3])}
    losses = []
    for micro_batches in (1, 2):
        model.compile(keras.optimizers.SGD(0.0), micro_batches=micro_batches)
        history = model.fit({"input_ids": IDS}, y, batch_size=3, shuffle=False, verbose=0).history
        losses.append(history["loss"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Metrics


@pytest.mark.core
def test_metrics_are_exact_over_ragged_batches() -> None:
    model = TFGPTJForCausalLM(config())
    bytes_of = np.arange(31) % 5
    made = lambda: [Perplexity(), TokenAccuracy(), BitsPerByte(bytes_of)]  # noqa: E731
    logits = numbers(model(IDS)).astype("float64")[:, :-1]
    targets = LABELS[:, 1:]
    kept = targets != -100
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(shares, np.maximum(targets, 0)[..., None], -1))[..., 0][kept]
    expected = [
        np.exp(nats.mean()),
        (logits.argmax(-1) == targets)[kept].mean(),
        nats.sum() / np.log(2) / bytes_of[targets[kept]].sum(),
    ]
    model.compile(keras.optimizers.SGD(0.0), metrics=made())
    assert model.needs_no_logits
    np.testing.assert_allclose(model.evaluate(IDS, LABELS, batch_size=2, verbose=0)[1:], expected, rtol=1e-5)
    model.compile(keras.optimizers.SGD(0.0), metrics=made(), label_smoothing=0.1, micro_batches=2)
    history = model.fit(IDS, LABELS, batch_size=3, verbose=0).history
    np.testing.assert_allclose([history[m.name][0] for m in made()], expected, rtol=1e-5)
    alone = made()
    for metric in alone:
        for rows in (slice(0, 2), slice(2, 5)):
            metric.update_state(LABELS[rows], numbers(model(IDS[rows])))
    np.testing.assert_allclose([numbers(m.result()) for m in alone], expected, rtol=1e-5)


def test_a_metric_counts_on_where_float32_stops() -> None:
    metric = Perplexity()
    metric.add(2.0**25, 2.0**25)
    for _ in range(64):
        metric.add(0.0, 1.0)
    assert float(numbers(metric.quotient())) == pytest.approx(2**25 / (2**25 + 64), rel=1e-7, abs=0)


def test_bytes_are_those_of_the_tokenizer() -> None:
    from tfgptj import GPTJTokenizer

    tokenizer = GPTJTokenizer.from_pretrained("shakespeare")
    lengths = BitsPerByte(tokenizer).bytes_of
    text = "O, what a rogue and peasant slave am I! – ü"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[tokenizer.eos_token_id] == 0


def test_metrics_refuse_what_they_cannot_use() -> None:
    with pytest.raises(InputError, match="perplexity has no weights: give it as one of metrics"):
        Perplexity().update_state(LABELS, np.zeros((5, 6, 31), "float32"), WEIGHTS)
    for lengths in ([], [[1]], [-1]):
        with pytest.raises(InputError, match="bits per byte need a tokenizer, or a row of its tokens' lengths"):
            BitsPerByte(lengths)
    from tfgptj.training.metrics import TokenMetric

    with pytest.raises(InputError, match="TokenMetric has no sums of its own"):
        TokenMetric("nothing").update_sums(LABELS, nats=0.0, hits=0.0)


# Arguments


def test_options_are_saved_with_the_model(tmp_path: Path) -> None:
    model = TFGPTJForCausalLM(config())
    metrics = [Perplexity(), BitsPerByte(np.arange(31))]
    model.compile("adam", metrics=metrics, label_smoothing=0.1, z_loss=1e-4, micro_batches=2)
    model.train_on_batch(IDS, LABELS)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert (again.smoothing, again.micro_batches) == (Smoothing(0.1, 1e-4), 2) and again.needs_no_logits
    np.testing.assert_allclose(
        again.evaluate(IDS, LABELS, verbose=0), model.evaluate(IDS, LABELS, verbose=0), rtol=1e-6
    )
    for one, other in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        assert_near(one, numbers(other))
    assert TFGPTJForCausalLM(config()).get_compile_config() == {}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"micro_batches": 2.0}, InputTypeError, "micro_batches must be an integer, got 2.0"),
        ({"micro_batches": True}, InputTypeError, "micro_batches must be an integer, got True"),
        ({"micro_batches": 0}, InputError, "micro_batches must be at least 1, got 0"),
        ({"micro_batches": 2, "loss": "mse"}, InputError, "gradient_accumulation_steps instead"),
        ({"label_smoothing": "0.1"}, InputTypeError, "label_smoothing must be a number, got '0.1'"),
        ({"label_smoothing": 1.0}, InputError, "label_smoothing must be at least 0 and less than 1, got 1.0"),
        ({"z_loss": -1e-4}, InputError, "z_loss must be at least 0 and less than inf, got -0.0001"),
        ({"z_loss": float("nan")}, InputError, "z_loss must be at least 0 and less than inf, got nan"),
        ({"z_loss": 1e-4, "loss": "mse"}, InputError, "z_loss belongs to the head's own loss"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        TFGPTJForCausalLM(config()).compile("sgd", **options)


def test_a_head_must_say_what_it_divides_by() -> None:
    class Headless(GPTJHead):
        """A head without a loss."""

    headless = Headless.__new__(Headless)
    with pytest.raises(InputError, match="Headless has no loss of its own"):
        Headless.count_labels(headless, LABELS, IDS)
    with pytest.raises(InputError, match="Headless has no loss of hidden states"):
        Headless.loss_of_features(headless, LABELS, IDS, None, 1.0, True)
