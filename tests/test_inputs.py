"""Inputs are checked, with a message that helps, before they meet a graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from conftest import numbers
from keras import ops

from tfgptj.config import GPTJConfig
from tfgptj.errors import InputError, InputTypeError
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.inputs import INPUTS, LABELS, check_arrays, complete_inputs, concrete, split_labels

pytestmark = pytest.mark.core
BACKEND = keras.backend.backend()
CONFIG = GPTJConfig(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
IDS = np.array([[1, 2, 3], [4, 5, 49]])
EMBEDDINGS = np.ones((2, 3, 16), "float32")


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    model = TFGPTJForCausalLM(CONFIG)
    model.compile("sgd")
    return model


def traced(function: Callable[[Any], Any], *shape: int | None) -> None:
    """Run a function on an int32 tensor that has a shape but no values yet, as a compiler does."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.function(function, autograph=False).get_concrete_function(tf.TensorSpec(shape, "int32"))
    elif BACKEND == "jax":
        import jax

        jax.eval_shape(function, jax.ShapeDtypeStruct([3 if size is None else size for size in shape], "int32"))
    else:
        pytest.skip("PyTorch runs eagerly: there are no symbolic tensors")


# What is accepted


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_ids_of_every_integer_dtype_become_int32(dtype: str) -> None:
    ids = complete_inputs(IDS.astype(dtype), CONFIG)["input_ids"]
    assert ids.dtype == "int32"
    assert ids.tolist() == IDS.tolist()


@pytest.mark.parametrize("dtype", ["int32", "int16", "uint8"])
def test_tensors_stay_tensors(dtype: str) -> None:
    ids = complete_inputs(ops.convert_to_tensor(IDS, dtype=dtype), CONFIG)["input_ids"]
    assert ops.is_tensor(ids)
    assert keras.backend.standardize_dtype(ids.dtype) == "int32"
    assert numbers(ids).tolist() == IDS.tolist()


@pytest.mark.parametrize("ids", [IDS.tolist(), tuple(map(tuple, IDS)), list(IDS)], ids=["lists", "tuples", "arrays"])
def test_nested_sequences_are_arrays(ids: Any) -> None:
    assert complete_inputs(ids, CONFIG)["input_ids"].tolist() == IDS.tolist()


@pytest.mark.parametrize("mask", [[[True, False, True]], [[1, 0, 1]]], ids=["bool", "int"])
def test_a_mask_may_be_boolean_or_integer(mask: Any) -> None:
    checked = complete_inputs({"input_ids": [[1, 2, 3]], "attention_mask": mask}, CONFIG)["attention_mask"]
    assert checked.dtype == "int32"
    assert checked.tolist() == [[1, 0, 1]]


def test_what_is_not_given_is_none() -> None:
    checked = complete_inputs({"inputs_embeds": EMBEDDINGS, "position_ids": IDS % 8}, CONFIG)
    assert tuple(checked) == INPUTS
    absent = ["input_ids", "attention_mask", "token_type_ids", "segment_ids"]
    assert [name for name, x in checked.items() if x is None] == absent


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_embeddings_of_every_float_dtype_pass(dtype: str) -> None:
    assert complete_inputs({"inputs_embeds": EMBEDDINGS.astype(dtype)}, CONFIG)["inputs_embeds"].dtype == dtype


def test_bfloat16_embeddings_pass() -> None:
    embeddings = ops.convert_to_tensor(EMBEDDINGS, dtype="bfloat16")
    assert complete_inputs({"inputs_embeds": embeddings}, CONFIG)["inputs_embeds"] is embeddings


def test_the_limits_themselves_are_inside() -> None:
    inputs = {"input_ids": [[0, 49] * 4], "position_ids": [[0, 7] * 4], "token_type_ids": [[49, 0] * 4]}
    assert complete_inputs(inputs, CONFIG)["position_ids"].max() == 7


def test_labels_travel_with_the_inputs() -> None:
    labels = {name: object() for name in LABELS}
    inputs, parted = split_labels({"input_ids": IDS, **labels})
    assert parted == labels
    assert tuple(inputs) == INPUTS and inputs["input_ids"] is IDS
    assert split_labels(IDS)[1] == {}
    assert set(complete_inputs({"input_ids": IDS, **labels}, CONFIG)) == set(INPUTS)


# What is refused, and the text that says so

GOOD = {"input_ids": IDS}
WRONG_TYPES: dict[str, tuple[Any, str]] = {
    "nothing": (None, "called without inputs: give input_ids [B, T], or a dict of inputs"),
    "text": ("hello", "input_ids must be an array or a tensor, got str"),
    "a number": (5, "input_ids must be an array or a tensor, got int"),
    "an iterator": (iter([1]), "input_ids must be an array or a tensor, got list_iterator"),
    "nested dict": ({"input_ids": GOOD}, "input_ids must be an array or a tensor, got dict"),
    "floats": (IDS.astype("float32"), "input_ids must hold integers, got dtype float32"),
    "booleans": (IDS > 2, "input_ids must hold integers, got dtype bool"),
    "complex": (IDS * 1j, "input_ids must hold integers, got dtype complex128"),
    "None inside": ([[1, None]], "input_ids must hold integers, got dtype object"),
    "texts": (["hello", "world"], "input_ids must hold integers, got dtype"),
    "dates": (IDS.astype("datetime64[s]"), "input_ids must hold integers, got dtype datetime64[s]"),
    "boolean positions": ({**GOOD, "position_ids": IDS > 2}, "position_ids must hold integers, got dtype bool"),
    "float mask": ({**GOOD, "attention_mask": IDS / 1}, "must hold integers (or booleans), got dtype float64"),
    "int embeddings": ({"inputs_embeds": EMBEDDINGS.astype(int)}, "must hold floating point numbers, got dtype int64"),
}
WRONG_VALUES: dict[str, tuple[Any, str]] = {
    "empty dict": ({}, "give either input_ids or inputs_embeds, and not both"),
    "both": ({**GOOD, "inputs_embeds": EMBEDDINGS}, "give either input_ids or inputs_embeds, and not both"),
    "mask alone": ({"attention_mask": IDS}, "give either input_ids or inputs_embeds, and not both"),
    "unknown": (
        {**GOOD, "past": 1, "mask": 2},
        "unknown inputs past, mask; the model takes input_ids, attention_mask,",
    ),
    "unknown key": ({**GOOD, 3: 1}, "unknown inputs 3; the model takes"),
    # shapes
    "scalar": (np.int64(3), "input_ids must have the shape [B, T], got (); a single row is input_ids[None]"),
    "one row": (IDS[0], "input_ids must have the shape [B, T], got (3,); a single row is input_ids[None]"),
    "cube": (IDS[None], "input_ids must have the shape [B, T], got (1, 2, 3)"),
    "ragged": ([[1, 2], [3]], "input_ids has rows of differing lengths: pad them, and give an attention_mask"),
    "no rows": (IDS[:0], "input_ids is empty: shape (0, 3); give at least one row of one token"),
    "no tokens": (IDS[:, :0], "input_ids is empty: shape (2, 0); give at least one row of one token"),
    "empty row": ([[]], "input_ids is empty: shape (1, 0); give at least one row of one token"),
    "empty list": ([], "input_ids is empty: shape (0,); give at least one row of one token"),
    "flat embeddings": ({"inputs_embeds": EMBEDDINGS[0]}, "must have the shape [B, T, 16], got (3, 16)"),
    "narrow embeddings": ({"inputs_embeds": EMBEDDINGS[..., :8]}, "must have the shape [B, T, 16], got (2, 3, 8)"),
    "no embeddings": ({"inputs_embeds": EMBEDDINGS[:, :0]}, "inputs_embeds is empty: shape (2, 0, 16)"),
    "short mask": (
        {**GOOD, "attention_mask": IDS[:, 1:] > 0},
        "attention_mask has shape (2, 2), but input_ids has [B, T] = (2, 3)",
    ),
    "one row of positions": (
        {"inputs_embeds": EMBEDDINGS, "position_ids": [[0, 1, 2]]},
        "position_ids has shape (1, 3), but inputs_embeds has [B, T] = (2, 3)",
    ),
    "too long": (
        np.ones((1, 9), int),
        "input_ids holds 9 positions, but the model has n_positions=8: shorten the text",
    ),
    "too many embeddings": (
        {"inputs_embeds": np.ones((1, 9, 16))},
        "inputs_embeds holds 9 positions, but the model has",
    ),
    # ranges
    "id V": (
        [[1, 2], [3, 50]],
        "input_ids[1, 1] is 50, outside 0…49: vocab_size is 50; does the tokenizer belong to this",
    ),
    "id -1": ([[1, -1]], "input_ids[0, 1] is -1, outside 0…49: vocab_size is 50"),
    "id 2^32": ([[2**32]], "input_ids[0, 0] is 4294967296, outside 0…49"),
    "id 2^63": (np.array([[2**63]], "uint64"), "input_ids[0, 0] is 9223372036854775808, outside 0…49"),
    "type V": ({**GOOD, "token_type_ids": IDS + 1}, "token_type_ids[1, 2] is 50, outside 0…49: vocab_size is 50"),
    "position n": ({**GOOD, "position_ids": IDS % 8 + 5}, "is 10, outside 0…7: n_positions is 8"),
    "mask 2": ({**GOOD, "attention_mask": IDS}, "is 49, outside 0…1: 1 marks a real token, 0 padding"),
    "mask -1": ({**GOOD, "attention_mask": -(IDS % 2)}, "attention_mask[0, 0] is -1, outside 0…1: 1 marks"),
}


@pytest.mark.parametrize(("inputs", "text"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_what_holds_no_numbers_of_the_kind_is_refused(inputs: Any, text: str) -> None:
    with pytest.raises(InputTypeError, match=re.escape(text)):
        complete_inputs(inputs, CONFIG)


@pytest.mark.parametrize(("inputs", "text"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_what_no_model_can_take_is_refused(inputs: Any, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        complete_inputs(inputs, CONFIG)


@pytest.mark.parametrize("value", [50, -1, 2**31 - 1])
def test_tensors_are_checked_like_arrays(value: int) -> None:
    with pytest.raises(InputError, match=rf"input_ids\[0, 1\] is {value}, outside 0…49"):
        complete_inputs(ops.convert_to_tensor(np.array([[1, value]], "int32")), CONFIG)
    with pytest.raises(InputTypeError, match="input_ids must hold integers, got dtype float32"):
        complete_inputs(ops.convert_to_tensor(np.ones((1, 2), "float32")), CONFIG)


# Symbolic tensors: rank, dtype and static shape are known, values are not


def test_values_of_a_traced_tensor_cannot_be_checked() -> None:
    seen = []

    def check(ids: Any) -> Any:
        assert concrete(ids) is None
        seen.append(complete_inputs(ids, CONFIG)["input_ids"])
        return seen[-1]

    traced(check, 2, 3)
    traced(check, None, None)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((3,), "input_ids must have the shape [B, T], got (3,)"),
        ((2, 9), "input_ids holds 9 positions, but the model has n_positions=8"),
        ((2, 0), "input_ids is empty: shape (2, 0)"),
    ],
)
def test_the_shape_of_a_traced_tensor_is_checked(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        traced(lambda ids: complete_inputs(ids, CONFIG)["input_ids"], *shape)


def test_traced_shapes_must_agree_where_they_are_known() -> None:
    def check(ids: Any) -> Any:
        return complete_inputs({"input_ids": ids, "attention_mask": np.ones((2, 4), int)}, CONFIG)["input_ids"]

    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 4\), but input_ids has"):
        traced(check, 2, 3)
    if BACKEND == "tensorflow":
        traced(check, None, None)


def test_keras_inputs_are_symbolic() -> None:
    assert concrete(keras.Input((None,), dtype="int32")) is None
    checked = complete_inputs(keras.Input((None,), dtype="int64"), CONFIG)
    assert (checked["input_ids"].shape, checked["input_ids"].dtype) == ((None, None), "int32")
    with pytest.raises(InputTypeError, match="input_ids must hold integers, got dtype float32"):
        complete_inputs(keras.Input((None,)), CONFIG)
    with pytest.raises(InputError, match="input_ids holds 9 positions"):
        complete_inputs(keras.Input((9,), dtype="int32"), CONFIG)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.TensorSpec belongs to TensorFlow")
def test_a_tensor_of_unknown_rank_is_refused() -> None:
    import tensorflow as tf

    function = tf.function(lambda ids: complete_inputs(ids, CONFIG)["input_ids"], autograph=False)
    with pytest.raises(InputError, match=r"input_ids must have the shape \[B, T\]"):
        function.get_concrete_function(tf.TensorSpec(None, "int32"))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.RaggedTensor belongs to TensorFlow")
def test_a_ragged_tensor_is_refused() -> None:
    import tensorflow as tf

    with pytest.raises((InputError, InputTypeError), match="input_ids"):
        complete_inputs(tf.ragged.constant([[1, 2], [3]]), CONFIG)


def test_concrete_gives_values() -> None:
    for x in (IDS.tolist(), IDS, ops.convert_to_tensor(IDS)):
        assert concrete(x).tolist() == IDS.tolist()


# Models


def test_a_model_is_called_with_a_tensor_a_dict_or_keywords(model: TFGPTJForCausalLM) -> None:
    mask = np.array([[1, 1, 1], [0, 1, 1]])
    expected = numbers(model({"input_ids": IDS, "attention_mask": mask}))
    for logits in (model(IDS, attention_mask=mask), model(input_ids=IDS, attention_mask=mask)):
        assert np.array_equal(numbers(logits), expected)
    assert np.array_equal(numbers(model(IDS)), numbers(model(input_ids=IDS)))
    embeddings = numbers(model.transformer.embedding.wte(IDS))
    np.testing.assert_allclose(numbers(model(inputs_embeds=embeddings)), numbers(model(IDS)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "text"),
    [
        ((), {}, InputTypeError, "the model was called without inputs"),
        ((None,), {}, InputTypeError, "the model was called without inputs"),
        ((IDS + 1,), {}, InputError, "input_ids[1, 2] is 50, outside 0…49"),
        ((), {"input_ids": IDS + 1}, InputError, "input_ids[1, 2] is 50, outside 0…49"),
        ((IDS,), {"attention_mask": IDS}, InputError, "is 49, outside 0…1"),
        ((IDS,), {"inputs_embeds": EMBEDDINGS}, InputError, "give either input_ids or inputs_embeds, and not both"),
    ],
)
def test_a_model_refuses_before_it_computes(
    model: TFGPTJForCausalLM, arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        model(*arguments, **keywords)


METHODS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["array", "tensor"])
def test_keras_s_methods_refuse_ids_out_of_range(model: TFGPTJForCausalLM, method: str, as_tensor: bool) -> None:
    ids = IDS + 1
    with pytest.raises(InputError, match=r"input_ids\[1, 2\] is 50, outside 0…49"):
        getattr(model, method)(ops.convert_to_tensor(ids) if as_tensor else ids)
    with pytest.raises(InputError, match=r"input_ids\[1, 2\] is 50, outside 0…49"):
        getattr(model, method)({"input_ids": ids, "attention_mask": np.ones_like(ids)})


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (None, InputTypeError, "the model was called without inputs"),
        ({"input_ids": None}, InputError, "give either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "ids": IDS}, InputError, "unknown inputs ids"),
        (IDS.astype("float32"), InputTypeError, "input_ids must hold integers"),
        (np.ones((1, 9), int), InputError, "input_ids holds 9 positions"),
    ],
)
def test_keras_s_methods_refuse_what_is_no_input(
    model: TFGPTJForCausalLM, method: str, x: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        getattr(model, method)(x)


def test_validation_data_is_checked() -> None:
    model = TFGPTJForCausalLM(CONFIG)
    model.compile("sgd")
    with pytest.raises(InputError, match=r"input_ids\[1, 2\] is 50, outside 0…49"):
        model.fit(IDS, IDS, validation_data=(IDS + 1, IDS), verbose=0)


def test_keras_s_methods_take_good_arrays(model: TFGPTJForCausalLM) -> None:
    inputs = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    for x in (IDS, IDS.astype("int32"), ops.convert_to_tensor(IDS), inputs, {**inputs, "labels": IDS}):
        assert model.predict(x, verbose=0).shape == (2, 3, 50)
        assert np.isfinite(model.evaluate(x, verbose=0))


def test_datasets_and_generators_pass_unseen() -> None:
    class Sequence(keras.utils.PyDataset):
        """Stands for everything that yields its arrays later."""

    for x in (Sequence(), iter([IDS]), {"input_ids": iter([IDS])}):
        assert check_arrays(x, CONFIG) is x


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.data feeds TensorFlow")
def test_a_dataset_feeds_the_model(model: TFGPTJForCausalLM) -> None:
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices({"input_ids": IDS, "attention_mask": np.ones_like(IDS)}).batch(2)
    assert model.predict(dataset, verbose=0).shape == (2, 3, 50)
    np.testing.assert_allclose(model.evaluate(dataset, verbose=0), model.evaluate(IDS, verbose=0), rtol=1e-6)


def test_one_token_is_enough(model: TFGPTJForCausalLM) -> None:
    assert tuple(model([[1]]).shape) == (1, 1, 50)  # warnings are errors here
    assert model.predict(np.array([[1]]), verbose=0).shape == (1, 1, 50)


# Arguments that no layer would look at


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foo": 1}, "a model's call has no argument foo, only input_ids, .* and training$"),
        ({"labels": IDS}, "no argument labels, .*; for labels: compile the model and give them to fit"),
        ({"output_hidden_states": True, "use_cache": True}, "for output_hidden_states: give it to from_pretrained"),
    ],
)
def test_a_call_with_other_arguments_is_refused(
    model: TFGPTJForCausalLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputTypeError, match=message):
        model(IDS, **options)
