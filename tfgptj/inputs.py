"""What a caller gives a model: one dict of tensors, checked before it meets a graph.

Inside a compiled graph an id out of range is not an error on every device: XLA clamps it, a GPU reads zeros. So
everything that can be seen before the graph is checked here, with NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj.config import GPTJConfig
from tfgptj.errors import InputError, InputTypeError
from tfgptj.limits import MAX_ID

IDS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "segment_ids")  # int [B, T] each
INPUTS = (*IDS, "inputs_embeds")  # and float [B, T, D]
LABELS = ("labels", "start_positions", "end_positions")  # may travel in the same dict, as Hugging Face's do


def complete_inputs(inputs: Any, config: GPTJConfig) -> dict[str, Any]:
    """Check a model's inputs and fill in what is missing with None.

    Args:
        inputs: a dict with some of :data:`INPUTS` (labels in it are left out), or the `input_ids` alone; NumPy arrays,
            lists, tensors or symbolic tensors. Of a symbolic tensor only rank, dtype and static shape can be checked.
        config: :class:`GPTJConfig`, for the vocabulary size, positions and width.

    Returns:
        A dict with all of :data:`INPUTS` as keys: int32 [B, T], float [B, T, D], or None.

    Raises:
        InputError: for unknown keys, wrong ranks or shapes, ids out of range, sequences over `n_positions`.
        InputTypeError: for tensors of a wrong dtype, or things that are no tensors.
    """
    given = split_labels(inputs)[0]
    if (given["input_ids"] is None) == (given["inputs_embeds"] is None):
        raise InputError("give either input_ids or inputs_embeds, and not both")
    main = "inputs_embeds" if given["input_ids"] is None else "input_ids"
    checked = {name: None if x is None else _check_tensor(name, x, config) for name, x in given.items()}
    shape = _static_shape(checked[main])[:2]
    for name in IDS:
        if checked[name] is not None and not _compatible(_static_shape(checked[name]), shape):
            raise InputError(f"{name} has shape {_static_shape(checked[name])}, but {main} has [B, T] = {shape}")
    return checked


def split_labels(inputs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a model's inputs, all keys present, from the labels that travel with them.

    Raises:
        InputError: for an unknown key.
        InputTypeError: when the inputs are None.
    """
    if inputs is None:
        raise InputTypeError("the model was called without inputs: give input_ids [B, T], or a dict of inputs")
    given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    labels = {name: given.pop(name) for name in LABELS if name in given}
    unknown = [str(name) for name in given if name not in INPUTS]
    if unknown:
        raise InputError(f"unknown inputs {', '.join(unknown)}; the model takes {', '.join(INPUTS)}")
    return {name: given.get(name) for name in INPUTS}, labels


def check_arrays(x: Any, config: GPTJConfig) -> Any:
    """Check what is given to `fit`, `evaluate` or `predict`; datasets and generators pass unseen.

    Returns:
        `x` unchanged.
    """
    arrays = dict(x) if isinstance(x, Mapping) else {"input_ids": x}
    if all(value is None or isinstance(value, np.ndarray) or ops.is_tensor(value) for value in arrays.values()):
        complete_inputs(x, config)
    return x


def concrete(x: Any) -> np.ndarray | None:
    """The values of a tensor or array, or None while it is symbolic."""
    if isinstance(x, keras.KerasTensor):
        return None
    if not ops.is_tensor(x):
        return np.asarray(x)
    try:
        return ops.convert_to_numpy(x)
    except (NotImplementedError, TypeError):  # a TensorFlow graph tensor, a JAX tracer
        return None


def _check_tensor(name: str, x: Any, config: GPTJConfig) -> Any:
    if isinstance(x, (list, tuple)):
        try:
            x = np.asarray(x)
        except ValueError:
            raise InputError(f"{name} has rows of differing lengths: pad them, and give an attention_mask") from None
    if not (isinstance(x, (np.ndarray, np.generic)) or ops.is_tensor(x) or isinstance(x, keras.KerasTensor)):
        raise InputTypeError(f"{name} must be an array or a tensor, got {type(x).__name__}")
    if hasattr(x, "row_splits"):  # TensorFlow's ragged tensors
        raise InputError(f"{name} has rows of differing lengths: pad them, and give an attention_mask")
    if isinstance(x, np.ndarray) and x.size == 0:
        raise InputError(f"{name} is empty: shape {x.shape}; give at least one row of one token")
    if name == "inputs_embeds":
        return _check_embeddings(x, config)
    dtype = x.dtype.name if isinstance(x, (np.ndarray, np.generic)) else keras.backend.standardize_dtype(x.dtype)
    if not (dtype.startswith(("int", "uint")) or (dtype == "bool" and name == "attention_mask")):
        hint = "integers (or booleans)" if name == "attention_mask" else "integers"
        raise InputTypeError(f"{name} must hold {hint}, got dtype {dtype}")
    if getattr(x.shape, "rank", 0) is None:
        raise InputError(f"{name} must have the shape [B, T], got a tensor of unknown rank")
    shape = _static_shape(x)
    if len(shape) != 2:
        raise InputError(f"{name} must have the shape [B, T], got {shape}; a single row is input_ids[None]")
    _check_length(name, shape, config)
    values = concrete(x)
    if values is not None:
        _check_range(name, values, config)
    return ops.cast(x, "int32") if ops.is_tensor(x) or isinstance(x, keras.KerasTensor) else x.astype("int32")


def _check_embeddings(x: Any, config: GPTJConfig) -> Any:
    shape = _static_shape(x)
    if len(shape) != 3 or shape[-1] not in (None, config.n_embd):
        raise InputError(f"inputs_embeds must have the shape [B, T, {config.n_embd}], got {shape}")
    if "float" not in str(x.dtype):
        raise InputTypeError(f"inputs_embeds must hold floating point numbers, got dtype {x.dtype}")
    _check_length("inputs_embeds", shape, config)
    return x


def _check_length(name: str, shape: tuple[int | None, ...], config: GPTJConfig) -> None:
    if 0 in shape:
        raise InputError(f"{name} is empty: shape {shape}; give at least one row of one token")
    if shape[1] is not None and shape[1] > config.n_positions:
        raise InputError(
            f"{name} holds {shape[1]} positions, but the model has n_positions={config.n_positions}: shorten the text"
        )


def _check_range(name: str, values: np.ndarray, config: GPTJConfig) -> None:
    stops = {"attention_mask": 2, "position_ids": config.n_positions, "segment_ids": MAX_ID + 1}
    stop = stops.get(name, config.vocab_size)
    low, high = values.min(), values.max()
    if low < 0 or high >= stop:
        wrong = low if low < 0 else high
        row, column = np.argwhere(values == wrong)[0]
        reason = {
            "attention_mask": "1 marks a real token, 0 padding",
            "position_ids": f"n_positions is {config.n_positions}",
            "segment_ids": "they number the documents of a row",
        }.get(name, f"vocab_size is {config.vocab_size}; does the tokenizer belong to this model?")
        raise InputError(f"{name}[{row}, {column}] is {wrong}, outside 0…{stop - 1}: {reason}")


def _static_shape(x: Any) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in x.shape)


def _compatible(shape: tuple[int | None, ...], other: tuple[int | None, ...]) -> bool:
    return all(None in pair or pair[0] == pair[1] for pair in zip(shape, other, strict=True))
