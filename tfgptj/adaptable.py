"""The methods of a model that have to do with LoRA; the work itself is done in `tfgptj.training`."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any


class Adaptable:
    """What every model has for LoRA beside Keras's methods."""

    def add_lora(self, rank: int = 8, **options: Any) -> Any:
        """Freeze the model and add adapters: see :func:`tfgptj.training.lora.add_lora`."""
        from tfgptj.training.lora import add_lora

        return add_lora(self, rank, **options)

    def remove_lora(self) -> None:
        """Take the adapters away: see :func:`tfgptj.training.lora.remove_lora`."""
        from tfgptj.training.lora import remove_lora

        remove_lora(self)

    def merge_lora(self, **options: Any) -> None:
        """Make the adapters part of the weights: see :func:`tfgptj.training.lora.merge_lora`."""
        from tfgptj.training.lora import merge_lora

        merge_lora(self, **options)

    def unmerge_lora(self) -> None:
        """Undo :meth:`merge_lora`: see :func:`tfgptj.training.lora.unmerge_lora`."""
        from tfgptj.training.lora import unmerge_lora

        unmerge_lora(self)

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """The base model for a while: see :func:`tfgptj.training.lora.adapters_disabled`."""
        from tfgptj.training.lora import adapters_disabled

        return adapters_disabled(self)

    def save_adapter(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the adapters in PEFT's layout: see :func:`tfgptj.training.adapters.save_adapter`."""
        from tfgptj.training.adapters import save_adapter

        save_adapter(self, directory, **options)

    def load_adapter(self, name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Load adapters, all or none: see :func:`tfgptj.training.adapters.load_adapter`."""
        from tfgptj.training.adapters import load_adapter

        return load_adapter(self, name_or_path, **options)
