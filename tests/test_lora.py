"""LoRA on whole models: what trains, what stays, and what comes of merging, disabling and removing adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import assert_near, foremost, numbers
from keras import ops

from tfgptj import (
    GPTJConfig,
    PrefixCache,
    TFGPTJForCausalLM,
    TFGPTJForQuestionAnswering,
    TFGPTJForSequenceClassification,
)
from tfgptj.errors import ConfigError, InputError, InputTypeError
from tfgptj.training.lora import adaptation_of, add_lora, report

SIZES: dict[str, Any] = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 32}
IDS = np.random.default_rng(0).integers(0, 48, (4, 12)).astype("int32")

pytestmark = pytest.mark.usefixtures("eager_steps", "eager_generation")


def build(mode: str | None = None, dtype: str = "float32", cls: Any = TFGPTJForCausalLM, **fields: Any) -> Any:
    """Always the same weights."""
    keras.utils.set_random_seed(0)
    model = cls(GPTJConfig(**SIZES, eos_token_id=None, **fields), dtype=dtype)
    if mode is not None:
        model.quantize(mode)
    return model


def partly_quantized(mode: str, names: str) -> Any:
    """Keras takes its time for each layer."""
    model = build()
    model.quantize(mode, filters=names)
    return model


def stir(model: Any, seed: int = 0) -> Any:
    """Give what trains values that matter."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(0.3 * rng.standard_normal(variable.shape))
    return model


def all_bits(model: Any) -> dict[str, np.ndarray]:
    return {
        variable.path: np.array(ops.convert_to_numpy(ops.convert_to_tensor(variable))) for variable in model.variables
    }


def greedy(model: Any, ids: np.ndarray, count: int) -> np.ndarray:
    """Greedy search without a cache, and without anything compiled."""
    for _ in range(count):
        best = numbers(model(ids))[:, -1].argmax(-1)
        ids = np.concatenate([ids, best[:, None].astype("int32")], axis=1)
    return ids


@pytest.mark.parametrize(
    ("mode", "dtype"),
    foremost(
        [(None, "float32"), ("int8", "float32"), ("int4", "float32"), (None, "mixed_bfloat16")],
        *((None, "float32"), ("int8", "float32")),
    ),
)
def test_training_changes_adapters_alone_and_generation_sees_them(mode: str | None, dtype: str) -> None:
    model = build(mode, dtype, initializer_range=0.3)
    logits, text = numbers(model(IDS)), model.generate(IDS[:2], max_new_tokens=6)
    model.compile("adam")
    model.add_lora(rank=4, alpha=8, targets=["all-linear", "lm_head"])
    np.testing.assert_array_equal(numbers(model(IDS)), logits)
    trained = {variable.path for variable in model.trainable_variables}
    assert len(trained) == 26
    assert all("lora_kernel" in path for path in trained)

    before = all_bits(model)
    model.compile(keras.optimizers.Adam(0.05))
    losses = model.fit(IDS, batch_size=4, epochs=12, verbose=0).history["loss"]
    assert losses[-1] < 0.3 * losses[0]
    after = all_bits(model)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == trained
    assert len(model.optimizer.variables) < 60  # no moments of frozen weights

    adapted = model.generate(IDS[:2], max_new_tokens=6)
    assert (adapted != text).any()
    if dtype == "float32":
        np.testing.assert_array_equal(adapted, greedy(model, IDS[:2], 6))


def test_merged_disabled_and_removed() -> None:
    model = build()
    base, plain = all_bits(model), model.generate(IDS[:1], max_new_tokens=5)
    base_logits = numbers(model(IDS))
    stir_report = model.add_lora(rank=2, targets=("q_proj", "fc_in", "lm_head"))
    assert len(stir_report.layers) == 5
    logits, text = numbers(stir(model)(IDS)), model.generate(IDS[:1], max_new_tokens=5)
    assert (plain != text).any()

    with model.adapters_disabled():
        np.testing.assert_array_equal(numbers(model(IDS)), base_logits)
        np.testing.assert_array_equal(model.generate(IDS[:1], max_new_tokens=5), plain)
        with pytest.raises(InputError, match="disabled: leave the adapters_disabled"), model.adapters_disabled():
            pass
    np.testing.assert_array_equal(model.generate(IDS[:1], max_new_tokens=5), text)

    model.merge_lora()
    assert_near(model(IDS), logits)
    np.testing.assert_array_equal(model.generate(IDS[:1], max_new_tokens=5), text)
    model.unmerge_lora()
    np.testing.assert_array_equal(numbers(model(IDS)), logits)

    model.merge_lora()
    model.remove_lora()
    assert all_bits(model).keys() == base.keys()
    assert all(np.array_equal(value, base[path]) for path, value in all_bits(model).items())
    np.testing.assert_array_equal(model.generate(IDS[:1], max_new_tokens=5), plain)
    assert len(model.trainable_variables) == len(base)


def test_kept_prefixes_are_those_of_the_adapters() -> None:
    model, cache = build(), PrefixCache()
    model.add_lora(rank=2, targets="all-linear")
    expected = stir(model).generate(IDS[:1], max_new_tokens=5)
    with model.adapters_disabled():
        plain = model.generate(IDS[:1], max_new_tokens=5, prefix_cache=cache)
    assert (plain != expected).any()
    np.testing.assert_array_equal(model.generate(IDS[:1], max_new_tokens=5, prefix_cache=cache), expected)


def test_adapters_of_the_backbone_are_the_model_s() -> None:
    model = build()
    model.generate(IDS[:1], max_new_tokens=4)
    model.compile("adam")
    model.transformer.add_lora(rank=2, targets="all-linear")
    assert model.optimizer is None
    stir(model.transformer)
    np.testing.assert_array_equal(model.generate(IDS[:1], max_new_tokens=4), greedy(model, IDS[:1], 4))


def test_a_merge_for_good_leaves_a_plain_model() -> None:
    model = build()
    model.add_lora(rank=2)
    logits = numbers(stir(model)(IDS))
    model.merge_lora(keep_base=False)
    assert adaptation_of(model) is None
    assert all(variable.trainable for variable in model.variables)
    assert_near(model(IDS), logits)
    with pytest.raises(InputError, match="no merged adapters; a merge with keep_base=False cannot be undone"):
        model.unmerge_lora()


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_base_is_merged_on_demand_and_restored(mode: str) -> None:
    model = partly_quantized(mode, "q_proj|v_proj")
    model.add_lora(rank=2)
    stir(model)
    before, logits = all_bits(model), numbers(model(IDS))
    with pytest.raises(InputError, match=rf"h\.0\.attn\.q_proj is quantized to {mode}: .* pass requantize=True"):
        model.merge_lora()
    model.merge_lora(requantize=True)
    assert_near(model(IDS), logits, 0.3)
    model.unmerge_lora()
    assert all(np.array_equal(value, before[path]) for path, value in all_bits(model).items())
    model.merge_lora(requantize=True, keep_base=False)
    assert not any("attn/q_proj" in variable.path for variable in model.trainable_variables)


def test_a_merge_that_fails_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    model.add_lora(rank=2)
    stir(model)
    before, layer = all_bits(model), model.transformer.blocks[1].attn.q_proj
    monkeypatch.setattr(type(layer), "merge", fail_at(layer, type(layer).merge))
    with pytest.raises(MemoryError):
        model.merge_lora()
    assert all(np.array_equal(value, before[path]) for path, value in all_bits(model).items())
    assert layer.lora_enabled


def fail_at(layer: Any, merge: Any) -> Any:
    def failing(self: Any) -> None:
        if self is layer:
            raise MemoryError
        merge(self)

    return failing


def test_saved_weights_are_merged(tmp_path: Path) -> None:
    model = build()
    model.add_lora(rank=2, targets=("q_proj", "lm_head"))
    logits = numbers(stir(model)(IDS))
    model.save_pretrained(tmp_path)
    loaded = TFGPTJForCausalLM.from_pretrained(tmp_path)
    assert_near(loaded(IDS), logits)
    model.merge_lora()
    for ours, theirs in zip(model.transformer.blocks, loaded.transformer.blocks, strict=True):
        np.testing.assert_array_equal(numbers(ours.attn.q_proj.kernel), numbers(theirs.attn.q_proj.kernel))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_keras_files_bring_adapters_and_optimizer_back(tmp_path: Path, dropout: float) -> None:
    model = build()
    model.add_lora(rank=2, alpha=3, dropout=dropout, also_train="ln_f")
    model.compile(keras.optimizers.Adam(0.01))
    model.train_on_batch(IDS, IDS)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert adaptation_of(loaded) == adaptation_of(model)
    assert report(loaded) == report(model)
    np.testing.assert_array_equal(numbers(loaded(IDS)), numbers(model(IDS)))
    if dropout:  # Keras saves no state of random numbers
        return
    assert float(model.train_on_batch(IDS, IDS)) == pytest.approx(float(loaded.train_on_batch(IDS, IDS)), rel=1e-6)
    for ours, theirs in zip(model.trainable_variables, loaded.trainable_variables, strict=True):
        assert_near(theirs.value, numbers(ours.value), 1e-5)


def test_merged_adapters_are_no_adapters_in_keras_files(tmp_path: Path) -> None:
    model = build()
    model.add_lora(rank=2)
    stir(model).merge_lora()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert adaptation_of(loaded) is None
    np.testing.assert_array_equal(numbers(loaded(IDS)), numbers(model(IDS)))


def test_weights_and_biases_that_train_too() -> None:
    model = build()
    told = model.add_lora(rank=2, targets="fc_in", also_train=["ln_f", r".*\.0\.ln_1"], bias="lora_only")
    assert told.weights == tuple(
        f"transformer.{name}"
        for name in ("h.0.ln_1.weight", "h.0.ln_1.bias", "h.0.mlp.fc_in.bias", "h.1.mlp.fc_in.bias", "ln_f.weight")
        + ("ln_f.bias",)
    )
    assert told.trainable == model.num_parameters(only_trainable=True) == 2 * 2 * (16 + 64) + 4 * 16 + 2 * 64
    assert told.total == model.num_parameters()
    assert str(told) == (
        f"{told.trainable:,} of {told.total:,} parameters are trainable (6.17 %); 2 layers have adapters, "
        "6 weights are trained whole"
    )
    model = build()
    told = model.add_lora(rank=2, bias="all")
    assert len(told.weights) == 2 * 3 + 1 + 1
    assert all(name.endswith(".bias") for name in told.weights)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (TFGPTJForSequenceClassification, ("score.weight",)),
        (TFGPTJForQuestionAnswering, ("qa_outputs.weight", "qa_outputs.bias")),
    ],
)
def test_a_head_that_begins_at_random_trains(cls: Any, expected: tuple[str, ...]) -> None:
    assert build(cls=cls).add_lora(rank=2).weights == expected
    assert build(cls=cls).add_lora(rank=2, also_train=()).weights == ()
    assert build(cls=cls).add_lora(rank=2, targets=["q_proj", expected[0].split(".")[0]]).weights == ()


def test_stabilized_ranks_and_the_first_a() -> None:
    model = build()
    model.add_lora(rank=4, alpha=6, rank_stabilized=True)
    assert next(iter(adaptation_of(model).layers.values())).alpha == 12  # type: ignore[union-attr]
    first = [numbers(block.attn.q_proj.lora_kernel_a.value) for block in model.transformer.blocks]
    assert (first[0] != first[1]).any()
    assert all(0.2 < np.abs(values).max() <= 0.25 for values in first)  # 1 / sqrt(16)


@pytest.fixture(scope="module")
def plain() -> Iterator[Any]:
    model = build()
    yield model
    assert all(variable.trainable for variable in model.variables)  # after all these errors
    assert adaptation_of(model) is None


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rank": 0}, InputError, "rank must be at least 1, got 0"),
        ({"rank": True}, InputTypeError, "rank must be an integer, got True"),
        ({"rank": 2.0}, InputTypeError, "rank must be an integer, got 2.0"),
        ({"alpha": 0}, InputError, "alpha must be positive and finite, got 0"),
        ({"alpha": float("nan")}, InputError, "alpha must be positive and finite, got nan"),
        ({"alpha": "8"}, InputTypeError, "alpha must be a number, got '8'"),
        ({"dropout": 1.0}, InputError, "dropout must be at least 0 and less than 1, got 1.0"),
        ({"dropout": None}, InputTypeError, "dropout must be a number, got None"),
        ({"bias": "some"}, InputError, "bias must be 'none', 'lora_only' or 'all', got 'some'"),
        ({"also_train": "head"}, InputError, "also_train: 'head' matches no layer"),
        ({"also_train": "q_proj"}, InputError, r"h\.0\.attn\.q_proj is to have adapters and to be trained whole"),
    ],
)
def test_arguments(plain: Any, options: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        add_lora(plain, **options)


def test_states_that_do_not_fit(plain: Any) -> None:
    for act in (plain.merge_lora, plain.remove_lora, plain.adapters_disabled().__enter__):
        with pytest.raises(InputError, match="the model has no LoRA adapters: add_lora"):
            act()
    with pytest.raises(ConfigError, match="Sequential is none of"):
        add_lora(keras.Sequential())
    model = build()
    model.add_lora(rank=2)
    with pytest.raises(InputError, match="has LoRA adapters already: remove_lora"):
        model.add_lora(rank=2)
    model.merge_lora()
    with pytest.raises(InputError, match="merged already; unmerge_lora"):
        model.merge_lora()
    with pytest.raises(InputError, match="are merged; unmerge_lora.. gives the base model"), model.adapters_disabled():
        pass


def test_quantized_layers_that_cannot() -> None:
    model = partly_quantized("int8", "dense")
    with pytest.raises(InputError, match="lm_head is quantized, and cannot be trained whole: .* with filters"):
        model.add_lora(rank=2, also_train="lm_head")
    model = partly_quantized("float8", "q_proj")
    with pytest.raises(
        InputError, match=r"q_proj is quantized to float8, which has no LoRA: take a float, int8 or int4"
    ):
        model.add_lora(rank=2)


def test_a_head_with_adapters_keeps_its_size() -> None:
    model = build()
    model.add_lora(rank=2, targets="lm_head")
    with pytest.raises(InputError, match="lm_head has LoRA adapters, which fit the old size only"):
        model.resize_token_embeddings(50)
    model.remove_lora()
    model.add_lora(rank=2)
    model.resize_token_embeddings(50)
    assert model(IDS).shape[-1] == 50


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        ({}, "lora is not what Keras saved: KeyError"),
        (
            {"layers": {"h.0.attn.q_proj": [0, 1, 0.0]}, "weights": []},
            "is not what Keras saved: InputError.*at least 1",
        ),
        (
            {"layers": {"h.7.attn.q_proj": [2, 2, 0.0]}, "weights": []},
            "is for 'h.7.attn.q_proj', which the model has not",
        ),
    ],
)
def test_configurations_of_adapters_that_are_not_ours(plain: Any, lora: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TFGPTJForCausalLM.from_config({**plain.get_config(), "lora": lora})


def test_quantizing_drops_what_was_compiled_and_warns_of_nothing() -> None:
    model = build()
    model.generate(IDS[:1], max_new_tokens=4)
    model.compile("adam")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.quantize("int8")
    assert model.optimizer is None
    np.testing.assert_array_equal(model.generate(IDS[:1], max_new_tokens=4), greedy(model, IDS[:1], 4))
