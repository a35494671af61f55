"""The decoding loop: one prefill over the prompt, then one token per step with a cache, compiled.

Both functions use `keras.ops` alone; :mod:`tfgptj.generation.compiling` wraps them for each backend.

Slots of the cache: the prompt has the first P, new tokens follow, the same slot in every row. Padding inside the prompt
keeps its slot and is masked. Positions are counted per row from its first real token, so a row's text does not depend
on its padding or its neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from tfgptj.attention import Cache
from tfgptj.generation import processors
from tfgptj.heads import TFGPTJForCausalLM


class Sampler(NamedTuple):
    """How the next token is chosen. What changes the graph is here; the numbers are in :class:`Controls`."""

    do_sample: bool = False
    top_k: int = 0
    use_top_p: bool = False


class Controls(NamedTuple):
    """Tensors that steer a run without changing its graph."""

    temperature: Any  # float32 scalar
    top_p: Any  # float32 scalar
    eos: Any  # int32 [E], the tokens that end a row; may be empty
    pad: Any  # int32 scalar, what finished rows are filled with
    uniforms: Any  # float32 [B, M], one random number per row and step


class State(NamedTuple):
    """Everything that a step reads and writes."""

    caches: tuple[Cache, ...]  # per layer keys and values, [B, S, N, H] each; S = P + M
    prompt_mask: Any  # bool [B, S], real tokens of the prompt
    tokens: Any  # int32 [B, M], the new tokens; the pad token where there is none yet
    step: Any  # int32 scalar, new tokens so far
    position: Any  # int32 [B], position of the last token
    finished: Any  # bool [B], an end-of-text token was produced
    finite: Any  # bool scalar, no logit was NaN or infinite so far


def prefill(
    model: TFGPTJForCausalLM, sampler: Sampler, input_ids: Any, mask: Any, tokens: Any, controls: Controls
) -> State:
    """Read the prompt and choose the first new token.

    Args:
        input_ids: int32 [B, P].
        mask: bool [B, P], true for real tokens.
        tokens: int32 [B, M], room for the new tokens.
        controls: see there.
    """
    batch, length = ops.shape(input_ids)[:2]
    slots = ops.arange(length, dtype="int32")  # [P]
    positions = ops.maximum(ops.cumsum(ops.cast(mask, "int32"), axis=1) - 1, 0)  # [B, P]
    visible = ops.logical_and(slots[:, None] >= slots[None, :], mask[:, None, None, :])  # [B, 1, P, P]
    hidden, caches = model.transformer.step(input_ids, positions, visible)
    last = ops.max(slots * ops.cast(mask, "int32"), axis=1)  # [B]
    logits = next_logits(model, ops.take_along_axis(hidden, last[:, None, None], axis=1))

    room = ops.shape(tokens)[1]
    heads = (model.config.n_head, model.config.head_dim)

    def extended(cache: Any) -> Any:  # [B, S, N, H]
        return ops.concatenate([cache, ops.zeros((batch, room, *heads), dtype=cache.dtype)], axis=1)

    state = State(
        caches=tuple((extended(key), extended(value)) for key, value in caches),
        prompt_mask=ops.concatenate([mask, ops.zeros((batch, room), dtype="bool")], axis=1),
        tokens=tokens,
        step=ops.zeros((), dtype="int32"),
        position=ops.max(positions, axis=1),
        finished=ops.zeros((batch,), dtype="bool"),
        finite=ops.ones((), dtype="bool"),
    )
    return choose(sampler, logits, state, controls)


def decode(model: TFGPTJForCausalLM, sampler: Sampler, state: State, limit: Any, controls: Controls) -> State:
    """Add tokens until every row is finished or has `limit` (int32 scalar) new tokens."""

    def unfinished(*state: Any) -> Any:
        current = State(*state)
        return ops.logical_and(current.step < limit, ops.logical_not(ops.all(current.finished)))

    def body(*state: Any) -> State:
        current = State(*state)
        logits, current = forward(model, current)
        return choose(sampler, logits, current, controls)

    return State(*ops.while_loop(unfinished, body, tuple(state)))


def forward(model: TFGPTJForCausalLM, state: State) -> tuple[Any, State]:
    """Run the model over each row's newest token: the next logits [B, V], and the state with its keys and values."""
    newest = ops.take(state.tokens, ops.expand_dims(state.step - 1, 0), axis=1)  # [B, 1]
    position = state.position + 1
    size, room = ops.shape(state.prompt_mask)[1], ops.shape(state.tokens)[1]
    slot = size - room + state.step - 1
    slots = ops.arange(size, dtype="int32")  # [S]
    generated = ops.logical_and(slots >= size - room, slots <= slot)
    visible = ops.logical_or(state.prompt_mask, generated)[:, None, None, :]  # [B, 1, 1, S]
    hidden, caches = model.transformer.step(newest, position[:, None], visible, state.caches, slot)
    return next_logits(model, hidden), state._replace(caches=caches, position=position)


def next_logits(model: TFGPTJForCausalLM, hidden: Any) -> Any:
    """Logits float32 [B, V] from the hidden state [B, 1, D] of one token per row."""
    return ops.squeeze(model.lm_head(hidden), axis=1)


def choose(sampler: Sampler, logits: Any, state: State, controls: Controls) -> State:
    """Choose each row's next token and write it down."""
    finite = ops.logical_and(state.finite, ops.all(ops.isfinite(logits)))
    if sampler.do_sample:
        # With the likeliest at 0, no temperature is so low that a logit overflows.
        logits = processors.temperature(logits - ops.max(logits, axis=-1, keepdims=True), controls.temperature)
        if sampler.top_k:
            logits = processors.top_k(logits, sampler.top_k)
        if sampler.use_top_p:
            logits = processors.top_p(logits, controls.top_p)
        uniform = ops.squeeze(ops.take(controls.uniforms, ops.expand_dims(state.step, 0), axis=1), axis=1)  # [B]
        token = processors.draw(logits, uniform)
    else:
        token = processors.greedy(logits)
    token = ops.where(state.finished, controls.pad, token)  # [B]
    ended = ops.any(token[:, None] == controls.eos[None, :], axis=1)
    return state._replace(
        tokens=ops.slice_update(state.tokens, (0, state.step), token[:, None]),
        step=state.step + 1,
        finished=ops.logical_or(state.finished, ended),
        finite=finite,
    )
