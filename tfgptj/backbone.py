"""TFGPTJModel: GPT-J without a head, as a functional Keras model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import keras
from keras import ops

from tfgptj.attention import Cache, ConfiguredLayer
from tfgptj.base import GPTJBase
from tfgptj.block import ParallelBlock
from tfgptj.config import GPTJConfig
from tfgptj.inputs import IDS
from tfgptj.rotary import RotaryEmbedding

# How the program that is being traced takes a block's step, where it has a better way than :meth:`ParallelBlock.step`,
# whose arguments, the block first, and results it has.
STEP: ContextVar[Callable[..., tuple[Any, Cache]] | None] = ContextVar("STEP", default=None)


@keras.saving.register_keras_serializable(package="tfgptj")
class InputEmbedding(ConfiguredLayer):
    """Token ids to vectors: wte[input_ids], plus wte[token_type_ids] when those are given.

    Call arguments:
        inputs: dict with `input_ids` int [B, T] or `inputs_embeds` float [B, T, D], and perhaps `token_type_ids`.

    Returns:
        float [B, T, D].
    """

    def __init__(self, config: GPTJConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        normal = keras.initializers.RandomNormal(stddev=config.initializer_range)
        self.wte = keras.layers.Embedding(
            config.vocab_size, config.n_embd, embeddings_initializer=normal, dtype=self.dtype_policy, name="wte"
        )
        self.dropout = keras.layers.Dropout(config.embd_pdrop, dtype=self.dtype_policy, name="dropout")

    def build(self, input_shape: Any) -> None:
        self.wte.build((None, None))

    def call(self, inputs: dict[str, Any], training: bool | None = None) -> Any:
        if inputs.get("input_ids") is not None:
            x = self.wte(inputs["input_ids"])
        else:
            x = ops.cast(inputs["inputs_embeds"], self.compute_dtype)
        if inputs.get("token_type_ids") is not None:
            x = x + self.wte(inputs["token_type_ids"])
        return self.dropout(x, training=training)


@keras.saving.register_keras_serializable(package="tfgptj")
class CausalContext(keras.layers.Layer):
    """Where each token stands, and which tokens it may look at.

    Call arguments:
        inputs: dict with `x` float [B, T, D], of which only T is read, and perhaps `attention_mask`, `position_ids`,
            `segment_ids`.

    Returns:
        positions int32 [B or 1, T], and the mask bool [B or 1, 1, T, T]: earlier tokens and itself, without padding
        and other segments. Positions count from 0 in every row whatever its padding and wherever its segments begin:
        the rotation only sees their differences.
    """

    def build(self, input_shape: Any = None) -> None:
        self.built = True  # nothing to create

    def call(self, inputs: dict[str, Any]) -> tuple[Any, Any]:
        steps = ops.arange(ops.shape(inputs["x"])[1], dtype="int32")  # [T]
        mask = (steps[:, None] >= steps[None, :])[None, None]  # [1, 1, T, T]
        if inputs.get("attention_mask") is not None:
            mask = ops.logical_and(mask, ops.cast(inputs["attention_mask"], "bool")[:, None, None, :])  # [B, 1, T, T]
        segments = inputs.get("segment_ids")
        if segments is not None:
            same = segments[:, :, None] == segments[:, None, :]  # [B, T, T]
            mask = ops.logical_and(mask, same[:, None])  # [B, 1, T, T]
        positions = inputs.get("position_ids")
        return (steps[None] if positions is None else positions), mask


@keras.saving.register_keras_serializable(package="tfgptj")
class TFGPTJModel(GPTJBase):
    """GPT-J without a head.

    Args:
        config: :class:`GPTJConfig`.
        dtype: Keras dtype policy or its name ("float32", "mixed_bfloat16", "bfloat16", …); None takes the global one.
        **kwargs: `name` and `trainable`, as for every Keras model.

    Call arguments:
        inputs: int [B, T] token ids, or a dict with `input_ids` int [B, T] or `inputs_embeds` float [B, T, D], and
            optionally `attention_mask` int or bool [B, T] (1: real token, 0: padding), `position_ids` int [B, T],
            `token_type_ids` int [B, T], `segment_ids` int [B, T] (a token sees only those with its own number: for
            several documents in one row).

    Returns:
        The last hidden state, float [B, T, D]. With `config.output_hidden_states` or `config.output_attentions` a dict
        of `last_hidden_state`, `hidden_states` (L + 1 tensors [B, T, D]: the input of every block, then the last hidden
        state) and `attentions` (L tensors [B, N, T, T]).

    Raises:
        InputError, InputTypeError: before the graph runs, for inputs that no GPT-J of this configuration can take.

    Source: transformers, modeling_gptj.py, `GPTJModel`.

    >>> model = TFGPTJModel(GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4))
    >>> model([[1, 2, 3]]).shape
    TensorShape([1, 3, 16])
    """

    def __init__(self, config: GPTJConfig, dtype: Any = None, **kwargs: Any) -> None:
        config = copy.deepcopy(config)  # a later change of the caller's must not change this model
        config.validate()
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        embedding = InputEmbedding(config, dtype=policy, name="embedding")
        context = CausalContext(dtype="float32", name="context")
        rotary = RotaryEmbedding(config.rotary_width, dtype="float32", name="rotary")
        blocks = [ParallelBlock(config, dtype=policy, name=f"h_{i}") for i in range(config.n_layer)]
        ln_f = keras.layers.LayerNormalization(epsilon=config.layer_norm_epsilon, dtype=policy, name="ln_f")

        inputs = {name: keras.Input((None,), dtype="int32", name=name, optional=True) for name in IDS}
        inputs["inputs_embeds"] = keras.Input((None, config.n_embd), name="inputs_embeds", optional=True)
        x = embedding({name: inputs[name] for name in ("input_ids", "inputs_embeds", "token_type_ids")})
        places = {name: inputs[name] for name in ("attention_mask", "position_ids", "segment_ids")}
        positions, mask = context({"x": x, **places})
        sin, cos = rotary(positions)
        hidden_states, attentions = [], []
        for block in blocks:
            hidden_states.append(x)
            x = block(x, sin, cos, mask)
            if config.output_attentions:
                x, weights = x
                attentions.append(weights)
        x = ln_f(x)
        hidden_states.append(x)

        super().__init__(
            inputs=inputs,
            outputs=with_extras(config, last_hidden_state=x, hidden_states=hidden_states, attentions=attentions),
            **kwargs,
        )
        self.config = config
        self.dtype_policy = policy
        self.embedding, self.rotary, self.blocks, self.ln_f = embedding, rotary, blocks, ln_f
        self.last_hidden_state = x

    def step(
        self,
        input_ids: Any,
        positions: Any,
        mask: Any,
        caches: tuple[Cache, ...] | None = None,
        slot: Any = None,
        record: list[Any] | None = None,
    ) -> tuple[Any, tuple[Cache, ...]]:
        """The forward pass over new tokens with a cache: what generation is made of.

        Args:
            input_ids: int32 [B, T], the new tokens.
            positions: int32 [B, T], their positions.
            mask: bool [B, 1, T, S], the cache slots that each new token may look at.
            caches: per layer (keys, values), each [B, N, S, H]; None starts them from these tokens (S = T).
            slot: int scalar, the slot that the first new token takes.
            record: a list to which each block's input [B, T, D] and its attention weights [B, N, T, S] are appended,
                and the last hidden state.

        Returns:
            The last hidden state, float [B, T, D], and the caches with the new tokens written.
        """
        x = self.embedding({"input_ids": input_ids}, training=False)
        sin, cos = self.rotary(positions)
        new, step = [], STEP.get() or ParallelBlock.step
        for i, block in enumerate(self.blocks):
            if record is not None:
                record.append(x)
            x, cache = step(block, x, sin, cos, mask, None if caches is None else caches[i], slot, record)
            new.append(cache)
        x = self.ln_f(x)
        if record is not None:
            record.append(x)
        return x, tuple(new)


def with_extras(config: GPTJConfig, *, hidden_states: Any, attentions: Any, **results: Any) -> Any:
    """A model's results: the bare tensor or dict, or a dict with the hidden states and attentions asked for too."""
    extras = {}
    if config.output_hidden_states:
        extras["hidden_states"] = tuple(hidden_states)
    if config.output_attentions:
        extras["attentions"] = tuple(attentions)
    if not extras and len(results) == 1:
        return next(iter(results.values()))
    return {**results, **extras}
