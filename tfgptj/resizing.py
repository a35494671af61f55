"""Give a model another vocabulary size, in place."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj import limits
from tfgptj.compiled import forget_compiled
from tfgptj.errors import InputError, InputTypeError


def resize_token_embeddings(model: Any, size: int) -> keras.layers.Embedding:
    """Resize the embedding and, where there is one, the LM head's kernel and bias together.

    Rows of tokens that stay are kept bit for bit; new ones are initialised as in a new model. The optimizer's state no
    longer fits: compile again before training.

    Args:
        model: a model of :mod:`tfgptj.backbone` or :mod:`tfgptj.heads`.
        size: int, the new `vocab_size`.

    Returns:
        The embedding layer.

    Raises:
        InputError, InputTypeError: if the size is no positive integer, or the LM head has LoRA adapters.
    """
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
        raise InputTypeError(f"the new vocabulary size must be an integer, got {size!r}")
    if not 1 <= size <= limits.MAX_VOCAB:
        raise InputError(f"the new vocabulary size must be between 1 and {limits.MAX_VOCAB:,}, got {size:,}")
    size, transformer = int(size), getattr(model, "transformer", model)
    embedding, head = transformer.embedding.wte, getattr(model, "lm_head", None)
    if head is not None and head.tied is None and head.dense.lora_rank:
        raise InputError("lm_head has LoRA adapters, which fit the old size only: merge or remove them first")
    deviation = model.config.initializer_range
    _resize(embedding, embedding.embeddings, 0, size, deviation)
    embedding.input_dim = size
    if head is not None and head.tied is None:
        _resize(head.dense, head.dense.kernel, 0, size, deviation)
        _resize(head.dense, head.dense.bias, 0, size, 0.0)
        head.dense.units = size
    elif head is not None:
        _resize(head, head.bias, 0, size, 0.0)
    for part in {id(part): part for part in (model, transformer)}.values():
        part.config.vocab_size = size
    forget_compiled(model)
    if head is not None:
        head.config.vocab_size = size
        head.output._shape = (*head.output.shape[:-1], size)  # what summary() and compute_output_spec() report
    return embedding


def _resize(layer: keras.layers.Layer, variable: keras.Variable, axis: int, size: int, deviation: float) -> None:
    """Cut or extend one axis of a variable; new entries are drawn from a normal distribution."""
    old = ops.convert_to_tensor(variable)
    kept = min(old.shape[axis], size)
    value = ops.take(old, np.arange(kept), axis=axis)
    if size > kept:
        shape = [*old.shape[:axis], size - kept, *old.shape[axis + 1 :]]
        value = ops.concatenate([value, ops.cast(keras.random.normal(shape, stddev=deviation), old.dtype)], axis=axis)
    # Keras has no public way to change a variable's shape; these are the two steps of its own constructor.
    variable._initialize(value)
    variable._shape = tuple(value.shape)
    if keras.backend.backend() == "torch":
        layer._track_variables()  # PyTorch's own list of parameters
