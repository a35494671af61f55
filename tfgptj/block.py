"""ParallelBlock: one layer of GPT-J, attention and feed-forward side by side.

       x ──────────────────────┐
       │                       │
      ln_1                     │
     ┌─┴──────────┐            │
attention    feed-forward      │        x + attention(ln_1(x)) + feed_forward(ln_1(x))
     └─────(+)────┘            │
            └───────(+)────────┘
"""

from __future__ import annotations

from typing import Any

import keras

from tfgptj.activations import activation_layer
from tfgptj.attention import Cache, ConfiguredLayer, RotaryAttention
from tfgptj.config import GPTJConfig
from tfgptj.projection import Projection
from tfgptj.recompute import recomputed


@keras.saving.register_keras_serializable(package="tfgptj")
class FeedForward(ConfiguredLayer):
    """Two dense layers with the configured activation between them: [B, T, D] → [B, T, F] → [B, T, D].

    Args:
        config: :class:`GPTJConfig`.
    """

    def __init__(self, config: GPTJConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        normal = keras.initializers.RandomNormal(stddev=config.initializer_range)
        policy = self.dtype_policy
        self.fc_in = Projection(config.inner_dim, kernel_initializer=normal, dtype=policy, name="fc_in")
        self.act = activation_layer(config.activation_function, dtype=policy)
        self.fc_out = Projection(config.n_embd, kernel_initializer=normal, dtype=policy, name="fc_out")
        self.dropout = keras.layers.Dropout(config.resid_pdrop, dtype=policy, name="dropout")

    def build(self, input_shape: Any) -> None:
        inner_shape = (None, None, self.config.inner_dim)
        self.fc_in.build((None, None, self.config.n_embd))
        self.act.build(inner_shape)
        self.fc_out.build(inner_shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.dropout(self.fc_out(self.act(self.fc_in(x))), training=training)


@keras.saving.register_keras_serializable(package="tfgptj")
class ParallelBlock(ConfiguredLayer):
    """x + attention(ln(x)) + feed_forward(ln(x)): both branches read one normalised input.

    Args:
        config: :class:`GPTJConfig`.

    Call arguments, returns:
        as :class:`tfgptj.attention.RotaryAttention`.

    With `gradient_checkpointing` set, training keeps only the block's input, and computes the rest again.

    Source: transformers, modeling_gptj.py, `GPTJBlock`.
    """

    gradient_checkpointing = False

    def __init__(self, config: GPTJConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.ln_1 = keras.layers.LayerNormalization(
            epsilon=config.layer_norm_epsilon, dtype=self.dtype_policy, name="ln_1"
        )
        self.attn = RotaryAttention(config, dtype=self.dtype_policy, name="attn")
        self.mlp = FeedForward(config, dtype=self.dtype_policy, name="mlp")

    def build(self, input_shape: Any) -> None:
        shape = (None, None, self.config.n_embd)
        self.ln_1.build(shape)
        self.attn.build(shape)
        self.mlp.build(shape)

    def compute_output_spec(self, x: Any, sin: Any, cos: Any, mask: Any, training: bool | None = None) -> Any:
        """What Keras needs to know while it builds a model; to find out, it would trace each block."""
        y = keras.KerasTensor(x.shape, self.compute_dtype)
        if not self.config.output_attentions:
            return y
        length = x.shape[1]
        return y, keras.KerasTensor((x.shape[0], self.config.n_head, length, length), self.compute_dtype)

    def call(self, x: Any, sin: Any, cos: Any, mask: Any, training: bool | None = None) -> Any:
        if not (training and self.gradient_checkpointing):
            return self._forward(x, sin, cos, mask, training)
        return recomputed(self, lambda x: self._forward(x, sin, cos, mask, training, lean=True), x)

    def _forward(self, x: Any, sin: Any, cos: Any, mask: Any, training: bool | None, lean: bool = False) -> Any:
        normalised = self.ln_1(x)
        attended = self.attn(normalised, sin, cos, mask, training=training, lean=lean)
        fed = self.mlp(normalised, training=training)
        if self.config.output_attentions:
            attended, weights = attended
            return x + attended + fed, weights
        return x + attended + fed

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
        """The block with a cache: see :meth:`tfgptj.attention.RotaryAttention.step`."""
        normalised = self.ln_1(x)
        attended, cache = self.attn.step(normalised, sin, cos, mask, cache, slot, record)
        return x + attended + self.mlp(normalised), cache
