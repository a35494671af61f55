"""Serving: SavedModels that take text and give text, with TensorFlow alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfgptj.serving.export import export_saved_model as export_saved_model


def __getattr__(name: str) -> Any:
    if name != "export_saved_model":
        raise AttributeError(f"module 'tfgptj.serving' has no attribute {name!r}")
    from tfgptj.serving.export import export_saved_model  # not before it is used: clients need no TensorFlow

    return export_saved_model
