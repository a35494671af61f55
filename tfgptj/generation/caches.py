"""What generation does with keys and values as a whole. Beside attention, this knows how they are laid out."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from tfgptj.attention import Cache
from tfgptj.generation.compiling import runs_itself
from tfgptj.heads import TFGPTJForCausalLM


def empty_caches(model: TFGPTJForCausalLM, rows: int, slots: int) -> tuple[Cache, ...]:
    """Caches in which nothing was written yet, with so many rows (B) and slots (S)."""
    shape = (rows, model.config.n_head, slots, model.config.head_dim)

    def zeros() -> Any:  # [B, N, S, H]
        return (np if runs_itself(model) else ops).zeros(shape, dtype=model.compute_dtype)

    return tuple((zeros(), zeros()) for _ in range(model.config.n_layer))


def with_room(caches: tuple[Cache, ...], room: Any) -> tuple[Cache, ...]:
    """Caches with so many empty slots after theirs."""

    def grown(cache: Any) -> Any:
        batch, heads, _, width = ops.shape(cache)
        return ops.concatenate([cache, ops.zeros((batch, heads, room, width), dtype=cache.dtype)], axis=2)

    return tuple((grown(key), grown(value)) for key, value in caches)


def moved(model: TFGPTJForCausalLM, static: None, caches: tuple[Cache, ...], index: Any) -> tuple[Cache, ...]:
    """Caches made of the first row of others, whose slot index[b, s] comes to slot s of row b.

    Keys were rotated by the positions of their tokens, so they are right in any slot.

    Args:
        model, static: of no use; as every program of generation has them.
        caches: with any number of rows.
        index: int32 [B, S], slots in them.
    """

    def taken(cache: Any) -> Any:  # [B, N, S, H]
        return ops.swapaxes(ops.take(cache[0], index, axis=1), 0, 1)

    return tuple((taken(key), taken(value)) for key, value in caches)
