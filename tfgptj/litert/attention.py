"""Attention over cached keys and values, with NumPy: what has no weights, between the graphs of a block.

The same computation as in :mod:`tfgptj.attention` and :mod:`tfgptj.rotary`.
"""

from __future__ import annotations

import math

import numpy as np

from tfgptj.attention import MASKED
from tfgptj.rotary import BASE

Cache = tuple[np.ndarray, np.ndarray]  # keys and values, float32 [B, N, S, H] each


def angles(positions: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Sines and cosines float32 [B, T, 1, R / 2] at positions int [B, T]."""
    frequencies = (1.0 / BASE ** (np.arange(0, width, 2) / width)).astype("float32")
    turns = positions[:, :, None, None].astype("float32") * frequencies
    return np.sin(turns), np.cos(turns)


def turn(x: np.ndarray, sin: np.ndarray, cos: np.ndarray) -> None:
    """Rotate the first R dimensions of x [B, T, N, H] in place."""
    width = 2 * sin.shape[-1]
    even, odd = x[..., 0:width:2], x[..., 1:width:2]
    turned = even * cos - odd * sin
    x[..., 1:width:2] = odd * cos + even * sin
    x[..., 0:width:2] = turned


def attend(
    projected: np.ndarray, sin: np.ndarray, cos: np.ndarray, mask: np.ndarray, cache: Cache, slot: int
) -> tuple[np.ndarray, np.ndarray]:
    """Write new keys and values into a cache, and mix the values.

    Args:
        projected: float32 [B, T, 3, N, H], queries, keys and values, which is overwritten.
        sin, cos: of :func:`angles`.
        mask: bool [B, 1, T, S], the slots that each query may look at; none from `slot` + T on.
        cache: written in place.
        slot: that of the first new token.

    Returns:
        float32 [B, T, D], and the attention weights [B, N, T, slot + T].
    """
    batch, count, _, heads, width = projected.shape
    stop = slot + count
    turn(projected[:, :, 0], sin, cos)
    turn(projected[:, :, 1], sin, cos)
    query, key, value = np.moveaxis(projected, (2, 3), (0, 2))  # [B, N, T, H] each
    keys, values = cache
    keys[:, :, slot:stop], values[:, :, slot:stop] = key, value
    scores = (query * np.float32(1 / math.sqrt(width))) @ keys[:, :, :stop].swapaxes(2, 3)  # [B, N, T, stop]
    if not mask.all():
        np.copyto(scores, np.float32(MASKED), where=~mask)
    scores -= scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores, out=scores)
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = weights @ values[:, :, :stop]  # [B, N, T, H]
    return mixed.swapaxes(1, 2).reshape(batch, count, heads * width), weights


def normalised(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float) -> np.ndarray:
    """The layer normalisation of the last dimension."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(epsilon)) * gamma + beta
