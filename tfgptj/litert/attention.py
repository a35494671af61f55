"""Attention over cached keys and values, between the graphs of a block: by NumPy, or by a graph for many tokens.

The same computation as in :mod:`tfgptj.attention` and :mod:`tfgptj.rotary`. A graph copies keys and values before it
reads them, which for a few tokens is most of its work. NumPy takes them as they are. Its library gets one thread,
because its own threads and those of LiteRT would wait for each other's processors; heads are shared out among threads
where they have much to read.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from tfgptj.attention import MASKED
from tfgptj.config import GPTJConfig
from tfgptj.litert.engine import Program
from tfgptj.rotary import BASE

Cache = tuple[np.ndarray, np.ndarray]  # keys and values, float32 [B, N, S, H] each

_MANY = 16  # tokens from which the graph is faster
_MUCH = 2**20  # numbers in the keys from which threads are worth waking


class Places(NamedTuple):
    """Where new tokens stand, and what they may look at: the same in all blocks."""

    sin: np.ndarray  # float32 [B, T, 1, R / 2]
    cos: np.ndarray
    bias: np.ndarray  # float32 [B, 1, T, stop], 0 for a slot that is looked at
    slot: int  # of the first new token

    @property
    def stop(self) -> int:
        """The slot after that of the last new token."""
        return self.bias.shape[3]


def places(config: GPTJConfig, positions: np.ndarray, mask: np.ndarray, slot: int) -> Places:
    """Where new tokens stand.

    Args:
        config: of the model.
        positions: int [B, T].
        mask: bool [B, 1, T, S], the slots that each query may look at; none from `slot` + T on.
        slot: that of the first new token.
    """
    width = config.rotary_width
    frequencies = (1.0 / BASE ** (np.arange(0, width, 2) / width)).astype("float32")  # [R / 2]
    angles = positions[:, :, None, None].astype("float32") * frequencies
    seen = mask[..., : slot + mask.shape[2]]
    return Places(np.sin(angles), np.cos(angles), np.where(seen, np.float32(0), np.float32(MASKED)), slot)


class Attention:
    """Attention of all blocks.

    Args:
        config: of the model.
        graph: that of :func:`tfgptj.litert.blocks.attention_graph`.
        threads: that it may take.
    """

    def __init__(self, config: GPTJConfig, graph: Program, threads: int) -> None:
        self._scale = np.float32(1 / math.sqrt(config.head_dim))
        self._graph, self._threads = graph, threads
        self._pool = ThreadPoolExecutor(threads)
        self._libraries = ThreadpoolController()

    def alone(self) -> Any:
        """A context in which NumPy's library takes one thread: it costs too much for each block."""
        return self._libraries.limit(limits=1, user_api="blas")

    def __call__(
        self, projected: np.ndarray, where: Places, cache: Cache, recorded: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Write new keys and values into a cache, and mix the values.

        Args:
            projected: float32 [B, T, 3, N, H], queries, keys and values, which is overwritten.
            where: of the new tokens.
            cache: written in place.
            recorded: whether the attention weights are wanted.

        Returns:
            float32 [B, T, N, H], and the attention weights [B, N, T, stop] if they are recorded.
        """
        query, key, value = turned(projected, where)
        query = query * self._scale
        for slots, new in zip(cache, (key, value), strict=True):
            slots[:, :, where.slot : where.stop] = new
        keys, values = (slots[:, :, : where.stop] for slots in cache)
        if query.shape[2] >= _MANY and not recorded:
            [mixed] = self._graph(query, keys, values, where.bias)
            return mixed.swapaxes(1, 2), None
        if keys.size < _MUCH or self._threads == 1:
            mixed, weights = attended(query, keys, values, where.bias)
            return mixed.swapaxes(1, 2), weights
        parts = [np.array_split(array, self._threads, axis=1) for array in (query, keys, values)]
        found = list(self._pool.map(attended, *parts, [where.bias] * self._threads))
        mixed, weights = (np.concatenate(each, axis=1) for each in zip(*found, strict=True))
        return mixed.swapaxes(1, 2), weights


def turned(projected: np.ndarray, where: Places) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values [B, N, T, H] each of [B, T, 3, N, H], in which queries and keys are rotated in place."""
    turn(projected[:, :, :2], where.sin[:, :, None], where.cos[:, :, None])
    query, key, value = projected.transpose(2, 0, 3, 1, 4)
    return query, key, value


def turn(x: np.ndarray, sin: np.ndarray, cos: np.ndarray) -> None:
    """Rotate the first R dimensions of x [..., H] in place, by angles whose sines and cosines are [..., R / 2]."""
    width = 2 * sin.shape[-1]
    first, second = x[..., 0:width:2], x[..., 1:width:2]
    turned = first * cos - second * sin
    second *= cos
    second += first * sin
    first[...] = turned


def attended(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mixed values [B, N, T, H] and attention weights [B, N, T, S] of queries [B, N, T, H]."""
    weights = softmax(query @ keys.swapaxes(2, 3) + bias)
    return weights @ values, weights


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    x = x - x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)
    return x


def normalised(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float) -> np.ndarray:
    """The layer normalisation of the last dimension."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(epsilon)) * gamma + beta
