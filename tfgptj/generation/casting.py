"""Weights of mixed policies, cast once for many steps.

A layer of a mixed policy casts its weights whenever it is called. In a step that reads them for a few tokens, this
costs several times what the step itself does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

from tfgptj.generation.compiling import runs_itself
from tfgptj.heads import TFGPTJForCausalLM


@contextmanager
def weights_cast(model: TFGPTJForCausalLM) -> Iterator[None]:
    """Within it, layers read their matrices in the dtype that they compute in.

    The casts stand where this is entered: before a loop, if that is traced within. They take memory for a second copy
    of the matrices, in the smaller dtype, as long as the program runs. Nothing happens to models of one dtype.
    """
    cast = {id(matrix): ops.cast(matrix, dtype) for matrix, dtype in _to_cast(model)}
    if not cast:
        yield
        return
    # What an outer scope has for the other variables stays; a scope made with these would cast them back.
    scope = keras.StatelessScope(
        [(variable, variable.value) for variable in model.variables if id(variable) not in cast]
    )
    scope.state_mapping.update(cast)
    with scope:
        yield


def cast_bytes(model: TFGPTJForCausalLM) -> int:
    """Bytes of the copies that :func:`weights_cast` makes.

    >>> from tfgptj import GPTJConfig
    >>> cast_bytes(TFGPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)))
    0
    """
    return sum(math.prod(matrix.shape) * (4 if dtype == "float32" else 2) for matrix, dtype in _to_cast(model))


def _to_cast(model: TFGPTJForCausalLM) -> list[tuple[Any, str]]:
    """The matrices that are not of the dtype that their layers compute in, and that dtype."""
    return [
        (matrix, layer.compute_dtype)
        for layer in _dense_layers(model)
        for matrix in layer.variables
        if layer.quantization_mode is None and len(matrix.shape) == 2 and matrix.dtype != layer.compute_dtype
    ]


def _dense_layers(model: TFGPTJForCausalLM) -> list[Any]:
    if runs_itself(model):
        return []
    layers = [model.transformer.embedding.wte]
    for block in model.transformer.blocks:
        attention, fed = block.attn, block.mlp
        layers += [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, fed.fc_in, fed.fc_out]
    return layers if model.lm_head.tied is not None else [*layers, model.lm_head.dense]
