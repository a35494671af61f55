"""Gradient checkpointing: the same gradients from less that is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import elsewhere, numbers
from keras import ops
from test_models import CLASSES, HEADS, IDS, LABELS, config

from tfgptj import TFGPTJForCausalLM, TFGPTJModel
from tfgptj.attention import RotaryAttention

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()
DROPOUT = {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}


def build(cls: Any = TFGPTJForCausalLM, *, dtype: str = "float32", lora: bool = False, **changes: Any) -> Any:
    """Always the same weights, adapters, and state of the random numbers."""
    keras.utils.set_random_seed(0)
    model = cls(config(**changes), dtype=dtype)
    if lora:
        model.add_lora(rank=2, targets="all-linear", dropout=changes.get("resid_pdrop", 0.0))
        for i, variable in enumerate(model.trainable_variables):
            variable.assign(np.random.default_rng(i).normal(0, 0.3, variable.shape))
    return model


def trained(model: Any, *, rate: float = 1.0, steps: int = 1, **options: Any) -> dict[str, np.ndarray]:
    """What `fit` makes of the weights that train: after one step of plain gradient descent, their gradients."""
    before = {v.path: numbers(v) for v in model.trainable_variables}
    model.compile(keras.optimizers.SGD(rate), **options)
    keras.utils.set_random_seed(1)
    model.fit({"input_ids": IDS, **LABELS[type(model)]}, batch_size=2, epochs=steps, verbose=0)
    return {v.path: numbers(v) - before[v.path] for v in model.trainable_variables}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    largest = max(float(np.abs(x).max()) for x in expected.values())
    assert largest > 0 and actual.keys() == expected.keys()
    for path, value in expected.items():
        assert float(np.abs(actual[path] - value).max()) <= tolerance * largest, path


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "dropout": (DROPOUT, {}),
    "attentions": ({"output_attentions": True, "output_hidden_states": True}, {}),
    "lora": ({**DROPOUT, "lora": True}, {}),
    "xla": ({}, {"jit_compile": True}),
    "xla with dropout": (DROPOUT, {"jit_compile": True}),
    "eager": ({**DROPOUT, "lora": True}, {"run_eagerly": True}),
}


@pytest.mark.parametrize("case", elsewhere(CASES, "dropout", "attentions", "lora"))
def test_gradients_are_the_same(case: str) -> None:
    settings, options = CASES[case]
    model = build(**settings)
    assert not model.is_gradient_checkpointing
    expected = trained(model, **options)
    model = build(**settings)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.transformer.is_gradient_checkpointing
    assert_same(trained(model, **options), expected)
