"""What a model has compiled so far, and when it must be thrown away."""

from __future__ import annotations

import weakref
from typing import Any

_VERSION = "_forward_version"
_WHOLE = "_model_with_head"


def set_whole(transformer: Any, whole: Any) -> None:
    """Let a backbone know the model whose part it is, so that what is done to the one is known to the other."""
    transformer.__dict__[_WHOLE] = weakref.ref(whole)


def forget_programs(model: Any) -> None:
    """Drop compiled functions, of training and of generation: they were traced for another forward pass."""
    for part in _parts(model):
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
    for part in _parts(model):
        part.optimizer, part.compiled = None, False


def _parts(model: Any) -> list[Any]:
    """A model, its backbone, and the model whose backbone it is."""
    reference = model.__dict__.get(_WHOLE)
    parts = (model, getattr(model, "transformer", None), reference() if reference is not None else None)
    return [part for part in parts if part is not None]
