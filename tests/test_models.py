"""The models as Keras models: saving, training, exporting, resizing, dtype policies."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import assert_near, elsewhere, foremost, numbers

from tfgptj.backbone import TFGPTJModel
from tfgptj.config import GPTJConfig
from tfgptj.errors import ConfigError, InputError, InputTypeError
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification

CLASSES = (TFGPTJModel, TFGPTJForCausalLM, TFGPTJForSequenceClassification, TFGPTJForQuestionAnswering)
HEADS = CLASSES[1:]
SHAPE: dict[str, Any] = {"vocab_size": 31, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
IDS = np.array([[3, 5, 7, 9], [2, 4, 6, 8]], "int32")
LABELS: dict[type, Any] = {
    TFGPTJForCausalLM: {"labels": IDS},
    TFGPTJForSequenceClassification: {"labels": np.array([0, 1])},
    TFGPTJForQuestionAnswering: {"start_positions": np.array([0, 1]), "end_positions": np.array([2, 3])},
}


def config(**changes: Any) -> GPTJConfig:
    return GPTJConfig(**{**SHAPE, "initializer_range": 0.2, **changes})


def same(a: Any, b: Any) -> None:
    for left, right in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        np.testing.assert_array_equal(numbers(left), numbers(right))


@pytest.mark.core
@pytest.mark.parametrize("cls", elsewhere(CLASSES, TFGPTJForQuestionAnswering))
def test_keras_file_round_trip(cls: type, tmp_path: Path) -> None:
    model = cls(config(output_hidden_states=True), name="mine")
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again) is cls and again.name == "mine"
    assert again.config == model.config
    same(again(IDS), model(IDS))


@pytest.mark.parametrize("cls", CLASSES)
def test_config_and_weights_files_round_trip(cls: type, tmp_path: Path) -> None:
    model = cls(config(), dtype="mixed_bfloat16")
    again = cls.from_config(model.get_config())
    assert again.dtype_policy.name == "mixed_bfloat16"
    model.save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")
    same(again(IDS), model(IDS))


@pytest.mark.usefixtures("eager_steps")
def test_compiled_model_survives_saving(tmp_path: Path) -> None:
    model = TFGPTJForCausalLM(config())
    model.compile("adam")
    model.fit(IDS, IDS, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.evaluate(IDS, IDS, verbose=0) == pytest.approx(model.evaluate(IDS, IDS, verbose=0), rel=1e-6)
    again.fit(IDS, IDS, verbose=0)


def test_the_model_keeps_its_own_copy_of_the_config() -> None:
    shared = config()
    model = TFGPTJForCausalLM(shared)
    shared.n_positions = 2
    assert model(IDS).shape == (2, 4, 31)


def test_summary_names_every_layer() -> None:
    lines: list[str] = []
    TFGPTJForCausalLM(config()).summary(print_fn=lines.append)
    text = "\n".join(lines)
    for name in ("embedding", "rotary", "h_0", "h_1", "ln_f", "lm_head"):
        assert name in text
    assert f"{config().num_parameters():,}" in text


@pytest.mark.usefixtures("eager_steps")
@pytest.mark.parametrize("cls", HEADS)
def test_labels_in_inputs_and_as_targets_give_one_loss(cls: type) -> None:
    model, labels = cls(config()), LABELS[cls]
    model.compile("adam")
    y = labels.get("labels", labels)
    as_targets = model.evaluate({"input_ids": IDS}, y, verbose=0)
    assert model.evaluate({"input_ids": IDS, **labels}, verbose=0) == pytest.approx(as_targets, rel=1e-6)
    assert float(numbers(model.head_loss(y, model(IDS)))) == pytest.approx(as_targets, rel=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("cls", foremost(HEADS, TFGPTJForCausalLM))
def test_fit_learns(cls: type) -> None:
    model, labels = cls(config()), LABELS[cls]
    model.compile(keras.optimizers.Adam(0.01))
    history = model.fit({"input_ids": IDS}, labels.get("labels", labels), epochs=12, verbose=0)
    assert history.history["loss"][-1] < 0.7 * history.history["loss"][0]


@pytest.mark.usefixtures("eager_steps")
def test_language_model_needs_no_labels() -> None:
    model = TFGPTJForCausalLM(config())
    model.compile("adam")
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    masked = np.where(mask == 1, IDS, -100)
    alone = model.evaluate({"input_ids": IDS, "attention_mask": mask}, verbose=0)
    assert alone == pytest.approx(
        model.evaluate({"input_ids": IDS, "attention_mask": mask}, masked, verbose=0), rel=1e-6
    )
    assert model.evaluate(IDS, verbose=0) == pytest.approx(model.evaluate(IDS, IDS, verbose=0), rel=1e-6)


def test_other_heads_say_that_labels_are_missing() -> None:
    model = TFGPTJForSequenceClassification(config())
    model.compile("adam")
    with pytest.raises(InputError, match="no labels: give them as y"):
        model.evaluate(IDS, verbose=0)


def test_a_loss_of_ones_own_is_used() -> None:
    model = TFGPTJForSequenceClassification(config())
    model.compile("adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    own = TFGPTJForSequenceClassification.from_config(model.get_config())
    own.set_weights(model.get_weights())
    own.compile("adam")
    y = np.array([0, 1])
    assert model.evaluate(IDS, y, verbose=0)[0] == pytest.approx(own.evaluate(IDS, y, verbose=0), rel=1e-5)


@pytest.mark.usefixtures("eager_steps")
def test_all_labels_ignored_trains_on_nothing() -> None:
    model = TFGPTJForCausalLM(config())
    before = [w.copy() for w in model.get_weights()]
    model.compile(keras.optimizers.SGD(1.0))
    history = model.fit(IDS, np.full_like(IDS, -100), verbose=0)
    assert history.history["loss"] == [0.0]
    same(before, model.get_weights())


@pytest.mark.core
@pytest.mark.parametrize("cls", elsewhere(CLASSES, TFGPTJForCausalLM))
def test_a_row_of_padding_poisons_nothing(cls: type) -> None:
    model = cls(config(pad_token_id=0))
    mask = np.array([[1, 1, 1, 1], [0, 0, 0, 0]])
    outputs = model({"input_ids": IDS, "attention_mask": mask})
    alone = model({"input_ids": IDS[:1], "attention_mask": mask[:1]})
    for both, one in zip(keras.tree.flatten(outputs), keras.tree.flatten(alone), strict=True):
        assert np.isfinite(numbers(both)).all()
        assert_near(both[:1], numbers(one), 1e-6)


def test_classifier_reads_the_last_real_token() -> None:
    model = TFGPTJForSequenceClassification(config(pad_token_id=0))
    alone = numbers(model(IDS[:1, :3]))
    padded = np.array([[3, 5, 7, 0, 0], [0, 0, 3, 5, 7]], "int32")
    mask = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    assert_near(model({"input_ids": padded, "attention_mask": mask}), np.repeat(alone, 2, axis=0), 1e-5)
    assert_near(model(padded[:1]), alone, 1e-5)  # no mask: by pad_token_id
    unpadded = TFGPTJForSequenceClassification(config())
    unpadded.set_weights(model.get_weights())
    assert_near(unpadded(IDS[:1, :3]), alone, 1e-6)  # neither: the last token


@pytest.mark.parametrize(
    ("probability", "layers"),
    [
        ("embd_pdrop", ("embedding.dropout",)),
        ("attn_pdrop", ("blocks.attn.attn_dropout",)),
        ("resid_pdrop", ("blocks.attn.resid_dropout", "blocks.mlp.dropout")),
    ],
)
def test_each_dropout_stands_where_pytorch_has_it(probability: str, layers: tuple[str, ...]) -> None:
    model = TFGPTJModel(config(**{probability: 0.5}))
    block = model.blocks[0]
    rates = {
        "embedding.dropout": model.embedding.dropout.rate,
        "blocks.attn.attn_dropout": block.attn.attn_dropout.rate,
        "blocks.attn.resid_dropout": block.attn.resid_dropout.rate,
        "blocks.mlp.dropout": block.mlp.dropout.rate,
    }
    assert rates == {name: 0.5 if name in layers else 0.0 for name in rates}
    same(model(IDS), model(IDS))
    assert (numbers(model(IDS, training=True)) != numbers(model(IDS, training=True))).any()


@pytest.mark.usefixtures("eager_steps")
@pytest.mark.parametrize(
    ("cls", "policy"),
    foremost(
        itertools.product(CLASSES, ["mixed_float16", "mixed_bfloat16", "bfloat16"]),
        *((TFGPTJForCausalLM, policy) for policy in ("mixed_float16", "mixed_bfloat16", "bfloat16")),
        *((cls, "mixed_bfloat16") for cls in CLASSES if cls is not TFGPTJForCausalLM),
    ),
)
def test_dtype_policies(cls: type, policy: str) -> None:
    model = cls(config(), dtype=policy)
    wanted = keras.dtype_policies.get(policy)
    assert {v.dtype for v in model.trainable_variables} == {wanted.variable_dtype}
    expected = wanted.compute_dtype if cls is TFGPTJModel else "float32"
    for output in keras.tree.flatten(model(IDS)):
        assert keras.backend.standardize_dtype(output.dtype) == expected
    if cls is not TFGPTJModel:
        model.compile("adam")
        labels = LABELS[cls]
        assert np.isfinite(model.fit(IDS, labels.get("labels", labels), verbose=0).history["loss"][0])


def test_the_global_policy_is_the_default() -> None:
    keras.config.set_dtype_policy("bfloat16")
    assert TFGPTJModel(config()).dtype_policy.name == "bfloat16"


@pytest.mark.core
def test_ways_to_call() -> None:
    model = TFGPTJForCausalLM(config())
    mask = np.ones_like(IDS)
    expected = numbers(model({"input_ids": IDS, "attention_mask": mask}))
    for result in (
        model(IDS),
        model(IDS.tolist()),
        model(IDS.astype("int64")),
        model(input_ids=IDS, attention_mask=mask),
        model(IDS, attention_mask=mask.astype(bool)),
        model.predict({"input_ids": IDS}, verbose=0),
        model.predict(IDS, verbose=0),
    ):
        assert_near(result, expected, 1e-6)


def test_it_composes_with_other_keras_layers() -> None:
    transformer = TFGPTJModel(config())
    pooled = keras.layers.GlobalAveragePooling1D()(transformer.output)
    model = keras.Model(transformer.input, keras.layers.Dense(3)(pooled))
    absent = dict.fromkeys(transformer.input)
    assert model({**absent, "input_ids": IDS}).shape == (2, 3)


def test_question_answering_has_two_outputs() -> None:
    with pytest.raises(ConfigError, match="got num_labels=3"):
        TFGPTJForQuestionAnswering(config(num_labels=3))


def test_default_size_by_arithmetic() -> None:
    assert GPTJConfig().num_parameters() == 6_050_882_784


@pytest.mark.parametrize("cls", foremost(CLASSES, TFGPTJModel))
@pytest.mark.parametrize("tied", [False, True])
def test_parameter_counts(cls: type, tied: bool) -> None:
    model = cls(config(tie_word_embeddings=tied))
    names = dict(zip(CLASSES, ("none", "causal_lm", "classification", "question_answering"), strict=True))
    assert model.num_parameters() == model.config.num_parameters(names[cls])


RESIZED = [(40, False), (40, True), (20, False), (20, True)]


@pytest.mark.core
@pytest.mark.usefixtures("eager_steps")
@pytest.mark.parametrize(("size", "tied"), elsewhere(foremost(RESIZED, (40, True), (20, False)), (40, True)))
def test_resizing_the_vocabulary(size: int, tied: bool) -> None:
    model = TFGPTJForCausalLM(config(tie_word_embeddings=tied))
    ids, kept = IDS % 20, min(size, 31)
    before = numbers(model(ids))
    embedding = model.resize_token_embeddings(size)
    after = numbers(model(ids))
    assert after.shape[-1] == size == model.config.vocab_size == embedding.input_dim == model.output_shape[-1]
    assert_near(after[..., :kept], before[..., :kept], 1e-6)
    assert model.num_parameters() == model.config.num_parameters()
    assert model.generate(ids, max_new_tokens=2, eos_token_id=None).shape == (2, 6)
    model.compile("adam")
    assert np.isfinite(model.fit(np.minimum(ids + 20, size - 1), verbose=0).history["loss"][0])
    if size > 31:
        assert model([[size - 1]]).shape == (1, 1, size)
    else:
        with pytest.raises(InputError, match="outside 0…19"):
            model([[25]])


def test_resized_model_saves_and_loads(tmp_path: Path) -> None:
    model = TFGPTJForCausalLM(config())
    model.resize_token_embeddings(37)
    model.save(tmp_path / "model.keras")
    same(keras.models.load_model(tmp_path / "model.keras")(IDS), model(IDS))
    model.save_pretrained(tmp_path / "saved")
    same(TFGPTJForCausalLM.from_pretrained(tmp_path / "saved")(IDS), model(IDS))


@pytest.mark.parametrize("cls", [TFGPTJModel, TFGPTJForSequenceClassification])
def test_resizing_without_an_lm_head(cls: type) -> None:
    model = cls(config())
    before = numbers(model(IDS))
    model.resize_token_embeddings(50)
    assert_near(model(IDS), before, 1e-6)
    model([[49]])


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [(0, InputError, "between 1 and"), (1.5, InputTypeError, "must be an integer"), (True, InputTypeError, "got True")],
)
def test_resizing_errors(size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TFGPTJModel(config()).resize_token_embeddings(size)


@pytest.mark.core
@pytest.mark.parametrize("policy", elsewhere(["float32", "mixed_bfloat16", "bfloat16"], "bfloat16"))
def test_outputs_are_what_the_built_model_tells(policy: str) -> None:
    model = TFGPTJForCausalLM(config(output_hidden_states=True, output_attentions=True), dtype=policy)
    told, given = keras.tree.flatten(model.output), keras.tree.flatten(model(IDS))
    assert len(told) == 1 + 3 + 2  # logits, hidden states, attentions
    for one, other in zip(told, given, strict=True):
        assert one.dtype == keras.backend.standardize_dtype(other.dtype)
        assert all(size in (None, real) for size, real in zip(one.shape, other.shape, strict=True))
