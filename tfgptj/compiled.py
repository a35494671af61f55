"""What a model has compiled so far, and when it must be thrown away."""

from __future__ import annotations

from typing import Any

_VERSION = "_forward_version"


def forget_programs(model: Any) -> None:
    """Drop compiled functions, of training and of generation: they were traced for another forward pass."""
    for part in {id(part): part for part in (model, getattr(model, "transformer", model))}.values():
        part.__dict__.pop("_generation_programs", None)
        part.train_function = part.test_function = part.predict_function = None
        part.__dict__[_VERSION] = forward_version(part) + 1


def forward_version(model: Any) -> int:
    """How often :func:`forget_programs` was called: what was computed under another number may be different now."""
    version: int = model.__dict__.get(_VERSION, 0)
    return version


def forget_compiled(model: Any) -> None:
    """Drop compiled functions and the optimizer, whose state belongs to other variables: compile again to train."""
    forget_programs(model)
    for part in {id(part): part for part in (model, getattr(model, "transformer", model))}.values():
        part.optimizer, part.compiled = None, False
