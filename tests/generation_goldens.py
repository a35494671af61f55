"""What tests share that compare with `fixtures/goldens_generation`: its cases, its model, and functions by name."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
from conftest import FIXTURES

from tfgptj.heads import TFGPTJForCausalLM

DIRECTORY = FIXTURES / "goldens_generation"


def cases(part: str) -> list[dict[str, Any]]:
    """The cases of "processors", "strategies", "retired", "sampling" or "stop_strings"."""
    return json.loads((DIRECTORY / f"{part}.json").read_text(encoding="utf-8"))


@functools.cache
def arrays(part: str) -> Any:
    """Their arrays, keyed `<case>/<array>`."""
    return np.load(DIRECTORY / f"{part}.npz")


def load(name: str = "model") -> TFGPTJForCausalLM:
    """The checkpoint "model" or "draft"."""
    return TFGPTJForCausalLM.from_pretrained(DIRECTORY / name, dtype="float32")


def residue(batch_id: int, input_ids: np.ndarray) -> list[int]:
    """As in `make_generation_goldens.py`, for a vocabulary of 64, or 20 where all tokens are lower."""
    start = (batch_id + int(input_ids[-1])) % 3
    return list(range(start, 20 if input_ids.max() < 20 else 64, 3))


def favour_odd(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """As in `make_generation_goldens.py`."""
    return scores + np.arange(scores.shape[-1]) % 2


def parameters_of(case: dict[str, Any]) -> dict[str, Any]:
    """A case's parameters, with functions in place of their names."""
    given = dict(case["parameters"])
    if "prefix_allowed_tokens_fn" in given:
        given["prefix_allowed_tokens_fn"] = residue
    if "logits_processor" in given:
        given["logits_processor"] = favour_odd
    return given
