"""The dense layer of GPT-J's projections, against NumPy and against Keras's own."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from conftest import assert_near, numbers
from keras import ops

from tfgptj.errors import InputError
from tfgptj.projection import Projection

X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
RANK, ALPHA = 3, 7.0
SCALE = ALPHA / RANK


def adapted(dtype: str = "float32", mode: str | None = None, cls: type = Projection, **options: Any) -> Any:
    """A layer whose adapters and bias matter; the same numbers for every class."""
    keras.utils.set_random_seed(1)
    layer = cls(6, dtype=dtype)
    layer.build((None, None, 8))
    layer.bias.assign(np.arange(6))
    kernel = np.random.default_rng(2).standard_normal((6, 8)).astype("float32")
    layer.kernel.assign(kernel if cls is Projection else kernel.T)
    if mode is not None:
        layer.quantize(mode)
    layer.enable_lora(RANK, lora_alpha=ALPHA, b_initializer=keras.initializers.RandomNormal(stddev=0.5), **options)
    return layer


def bits(layer: Projection) -> list[np.ndarray]:
    return [np.array(ops.convert_to_numpy(ops.convert_to_tensor(variable))) for variable in layer.variables]


def delta(layer: Projection) -> np.ndarray:
    return SCALE * numbers(layer.lora_kernel_a.value) @ numbers(layer.lora_kernel_b.value)


@pytest.mark.core
def test_adapters_count_alpha_over_rank_times() -> None:
    layer = adapted()
    expected = X @ (numbers(layer.base_kernel.value).T + delta(layer)) + np.arange(6)
    assert_near(layer(X), expected)
    assert_near(layer.kernel, numbers(layer.base_kernel.value) + delta(layer).T)
    assert_near(layer(X), numbers(adapted(cls=keras.layers.Dense)(X)))


@pytest.mark.core
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_quantized_layers_compute_as_keras_does(mode: str, dtype: str) -> None:
    ours, theirs = adapted(dtype, mode), adapted(dtype, mode, keras.layers.Dense)
    np.testing.assert_array_equal(numbers(ours(X)), numbers(theirs(X)))
    assert keras.backend.standardize_dtype(ours(X).dtype) == ours.compute_dtype


@pytest.mark.core
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16", "float16"])
def test_adapters_are_float32_and_compute_in_the_dtype_of_the_rest(dtype: str) -> None:
    layer = adapted(dtype)
    y = layer(X)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    assert keras.backend.standardize_dtype(layer.lora_kernel_a.dtype) == "float32"
    assert keras.backend.standardize_dtype(layer.kernel.dtype) == layer.variable_dtype
    assert_near(y, X @ (numbers(layer.base_kernel.value).T + delta(layer)) + np.arange(6), 2e-2)


@pytest.mark.core
@pytest.mark.parametrize("mode", [None, "int8"])
def test_dropout_is_for_the_adapters_alone_and_for_training(mode: str | None) -> None:
    layer, without = adapted(mode=mode, dropout=0.5), adapted(mode=mode)
    np.testing.assert_array_equal(numbers(layer(X)), numbers(without(X)))
    without.lora_enabled = False
    base = numbers(without(X))
    # An input that is dropped or doubled: each row's difference is the adapters' of a mask of zeros and twos.
    found = (numbers(layer(X[:1, :1], training=True)) - base[:1, :1]).reshape(-1)
    masks = 2.0 * (np.arange(2**8)[:, None] >> np.arange(8) & 1)
    distances = np.abs((masks * X[0, 0]) @ delta(layer) - found).max(1)
    assert distances.min() < 1e-4
    assert np.abs(X[0, 0] @ delta(layer) - found).max() > 1e-2
    assert np.abs(numbers(layer(X, training=True)) - numbers(layer(X, training=True))).max() > 1e-2


@pytest.mark.core
@pytest.mark.parametrize(
    ("dtype", "mode"), [("float32", None), ("bfloat16", None), ("float32", "int8"), ("float32", "int4")]
)
def test_merging_can_be_undone_bit_for_bit(dtype: str, mode: str | None) -> None:
    layer = adapted(dtype, mode)
    before, shown, y = bits(layer), numbers(layer.kernel), numbers(layer(X))
    layer.merge()
    assert layer.merged
    assert not layer.lora_enabled
    if mode is None:
        np.testing.assert_array_equal(numbers(layer.base_kernel.value), shown)
    # Rounded to 8 or 16 bits, or to 4.
    assert_near(layer(X), y, {("float32", None): 1e-6, ("float32", "int4"): 0.3}.get((dtype, mode), 2e-2))
    layer.unmerge()
    assert layer.lora_enabled
    for old, new in zip(before, bits(layer), strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(numbers(layer(X)), y)


def test_a_merged_layer_does_not_train() -> None:
    layer = adapted()
    layer.merge()
    with pytest.raises(InputError, match="projection.*: its adapters are merged or disabled; .* before training"):
        layer(X, training=True)


@pytest.mark.core
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_removed_adapters_leave_nothing(dropout: float) -> None:
    layer = adapted(dropout=dropout)
    layer.remove_lora()
    assert [variable.name for variable in layer.variables] == ["kernel", "bias"]
    assert (layer.lora_rank, layer.lora_enabled, layer.merged) == (None, False, False)
    assert_near(layer(X), X @ numbers(layer.base_kernel.value).T + np.arange(6))
    layer.enable_lora(2, dropout=dropout)
    assert layer.lora_kernel_a.shape == (8, 2)


def test_keras_saves_kernel_and_adapters_apart() -> None:
    layer, other, plain = adapted(), adapted(), Projection(6)
    plain.build((None, None, 8))
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    for variable in other.trainable_variables:
        variable.assign(variable + 1)
    other.load_own_variables(store)
    for old, new in zip(bits(layer), bits(other), strict=True):
        np.testing.assert_array_equal(old, new)
    with pytest.raises(ValueError, match="expected 2 variables, but received 4"):
        plain.load_own_variables(store)

    store = {}
    plain.save_own_variables(store)
    start = numbers(other.lora_kernel_a.value)
    other.load_own_variables(store)
    np.testing.assert_array_equal(numbers(other.kernel), numbers(plain.kernel))
    np.testing.assert_array_equal(numbers(other.lora_kernel_a.value), start)

    layer.merge()
    merged: dict[str, Any] = {}
    layer.save_own_variables(merged)
    plain.load_own_variables(merged)
    np.testing.assert_array_equal(numbers(plain(X)), numbers(layer(X)))
    with pytest.raises(InputError, match="merged or disabled; unmerge or enable them before loading"):
        layer.load_own_variables(merged)
