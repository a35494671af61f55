"""RotaryAttention: GPT-J's causal self-attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import keras
from keras import ops

from tfgptj.config import GPTJConfig
from tfgptj.in_turn import pays
from tfgptj.lean_attention import mixed_by_heads
from tfgptj.products import leading
from tfgptj.projection import Projection
from tfgptj.rotary import apply_rotary

# Score of a forbidden key. Finite, so that a query with no allowed key averages over all keys instead of giving NaN.
MASKED = -1e9

# (keys, values), each [B, N, S, H]: as the products with them want them, so that no step transposes a cache. Keys are
# stored after their rotation.
Cache = tuple[Any, Any]

# How the program that is being traced writes into a cache, where it has a better way than `ops.slice_update`: a
# function like `write_slots`.
WRITER: ContextVar[Callable[[Any, Any, Any], Any] | None] = ContextVar("WRITER", default=None)


class ConfiguredLayer(keras.layers.Layer):
    """A layer whose only argument, beside Keras's own, is a :class:`GPTJConfig`."""

    def __init__(self, config: GPTJConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "config": self.config.to_dict()}

    @classmethod
    def from_config(cls, fields: dict[str, Any]) -> ConfiguredLayer:
        fields = dict(fields)
        return cls(GPTJConfig.from_dict(fields.pop("config")), **fields)


@keras.saving.register_keras_serializable(package="tfgptj")
class RotaryAttention(ConfiguredLayer):
    """Multi-head attention whose queries and keys are rotated by their positions.

    No bias in any projection; scores and softmax in float32 whatever the dtype policy.

    Args:
        config: :class:`GPTJConfig`.

    Call arguments:
        x: float [B, T, D].
        sin, cos: float32 [B, T, 1, R], from :class:`tfgptj.rotary.RotaryEmbedding`.
        mask: bool [B or 1, 1, T, T], true where a query (row) may look at a key (column).
        lean: save memory in training: see :mod:`tfgptj.lean_attention`.

    Returns:
        float [B, T, D]; with `config.output_attentions` a pair of it and the attention weights [B, N, T, T].

    Source: transformers, modeling_gptj.py, `GPTJAttention`.
    """

    def __init__(self, config: GPTJConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.q_proj = self._projection("q_proj")
        self.k_proj = self._projection("k_proj")
        self.v_proj = self._projection("v_proj")
        self.out_proj = self._projection("out_proj")
        self.attn_dropout = keras.layers.Dropout(config.attn_pdrop, dtype=self.dtype_policy, name="attn_dropout")
        self.resid_dropout = keras.layers.Dropout(config.resid_pdrop, dtype=self.dtype_policy, name="resid_dropout")

    def _projection(self, name: str) -> Projection:
        normal = keras.initializers.RandomNormal(stddev=self.config.initializer_range)
        return Projection(
            self.config.n_embd, use_bias=False, kernel_initializer=normal, dtype=self.dtype_policy, name=name
        )

    def build(self, input_shape: Any) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            projection.build((None, None, self.config.n_embd))

    def call(self, x: Any, sin: Any, cos: Any, mask: Any, training: bool | None = None, lean: bool = False) -> Any:
        query, key, value = self._project(x, sin, cos, training)
        if lean and not (self.config.output_attentions or self.config.attn_pdrop) and pays():
            mixed = _swapped(mixed_by_heads(query, key, value, mask, 1.0 / math.sqrt(self.config.head_dim), MASKED))
            mixed = ops.reshape(mixed, (*leading(mixed)[:2], self.config.n_embd))
            return self.resid_dropout(self.out_proj(mixed), training=training)
        mixed, weights = self._attend(query, key, value, mask, training)
        x = self.resid_dropout(self.out_proj(mixed), training=training)
        return (x, weights) if self.config.output_attentions else x

    def step(
        self,
        x: Any,
        sin: Any,
        cos: Any,
        mask: Any,
        cache: Cache | None = None,
        slot: Any = None,
        record: list[Any] | None = None,
    ) -> tuple[Any, Cache]:
        """Attend with a cache of earlier keys and values.

        Args:
            x: float [B, T, D], the new tokens.
            sin, cos: float32 [B, T, 1, R] at the new tokens' positions.
            mask: bool [B, 1, T, S].
            cache: keys and values [B, N, S, H], or None to start one from these tokens alone (S = T).
            slot: int scalar, the cache slot of the first new token.
            record: a list to which the attention weights [B, N, T, S] are appended.

        Returns:
            float [B, T, D], and the cache with the new tokens written.
        """
        query, key, value = self._project(x, sin, cos, training=False)
        if cache is not None:
            key, value = write_slots(cache[0], slot, key), write_slots(cache[1], slot, value)
        mixed, weights = self._attend(query, key, value, mask, training=False)
        if record is not None:
            record.append(weights)
        return self.out_proj(mixed), (key, value)

    def _project(self, x: Any, sin: Any, cos: Any, training: bool | None) -> tuple[Any, Any, Any]:
        """Rotated queries, rotated keys, and values, each [B, N, T, H]."""
        heads = (*leading(x), self.config.n_head, self.config.head_dim)
        query, key, value = (
            ops.reshape(projection(x), heads) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (apply_rotary(x, sin, cos, training) for x in (query, key))
        return tuple(_swapped(x) for x in (query, key, value))

    def _attend(self, query: Any, key: Any, value: Any, mask: Any, training: bool | None) -> tuple[Any, Any]:
        """Mix the values: [B, T, D], and the attention weights [B, N, T, S]."""
        scale = 1.0 / math.sqrt(self.config.head_dim)
        query, key = ops.cast(query, "float32") * scale, ops.cast(key, "float32")
        scores = ops.where(mask, ops.matmul(query, ops.swapaxes(key, 2, 3)), MASKED)  # [B, N, T, S]
        # Keras warns of a softmax over a single key; it is 1.
        weights = ops.ones_like(scores) if scores.shape[-1] == 1 else ops.softmax(scores, axis=-1)
        weights = ops.cast(weights, value.dtype)
        weights = self.attn_dropout(weights, training=training)
        mixed = _swapped(ops.matmul(weights, value))  # [B, T, N, H]
        return ops.reshape(mixed, (*leading(mixed)[:2], self.config.n_embd)), weights


def _swapped(x: Any) -> Any:
    """[B, T, N, H] → [B, N, T, H], or back."""
    first, second, width = x.shape[1:]
    if 1 in (first, second) and None not in (first, second):  # the same numbers in the same order
        return ops.reshape(x, (-1, second, first, width))
    return ops.swapaxes(x, 1, 2)


def write_slots(cache: Any, slot: Any, new: Any) -> Any:
    """A cache [B, N, S, H] with new keys or values [B, N, T, H] from a slot on."""
    writer = WRITER.get()
    return ops.slice_update(cache, (0, 0, slot, 0), new) if writer is None else writer(cache, slot, new)
