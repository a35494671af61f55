"""Contrastive search: of the likeliest tokens the one whose hidden state is least like those of the text so far.

All candidates of a step go through the model at once, as several queries of one row that do not see each other. Their
keys and values stand side by side in the cache; the chosen one's are moved to the first place, the others overwritten
in the next step. Only the chosen one goes through the LM head.

Source: transformers 4.55, `_contrastive_search`; arXiv 2202.06417.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from tfgptj.generation.chain import process
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.loop import Controls, Plan, State, context_of, next_logits, read, write
from tfgptj.generation.processors import any_left
from tfgptj.heads import TFGPTJForCausalLM


class Ahead(NamedTuple):
    """What contrastive search keeps beside the text: the model is one token ahead of it."""

    logits: Any  # float32 [B, V], for the next token
    directions: Any  # float32 [B, S, D], last hidden states at length 1


def candidates_of(config: GenerationConfig) -> int:
    """How many candidates a configuration compares in each step."""
    return int(config.top_k)


def prefill(model: TFGPTJForCausalLM, plan: Plan, ids: Any, real: Any, controls: Controls) -> State:
    """Read the prompt and choose the first new token: see :func:`tfgptj.generation.loop.prefill`.

    Args:
        model, ids, real: see there.
        plan: `plan.search` is the number of candidates k.
        controls: `controls.search` is `penalty_alpha`, a float32 scalar.
    """
    room = ops.shape(controls.uniforms)[1]
    hidden, state = read(model, ids, real, room, past=controls.past)
    batch = ops.shape(ids)[0]

    def grown(table: Any, slots: Any) -> Any:
        more = ops.zeros((batch, slots, *table.shape[2:]), dtype=table.dtype)
        return ops.concatenate([table, more], axis=1)

    count = min(plan.search, model.config.vocab_size)
    return advance(
        model,
        plan,
        state._replace(
            caches=tuple((grown(key, count - 1), grown(value, count - 1)) for key, value in state.caches),
            search=Ahead(next_logits(model, hidden), grown(_directions(hidden), room)),
        ),
        controls,
    )


def decode(model: TFGPTJForCausalLM, plan: Plan, state: State, limit: Any, controls: Controls) -> State:
    """Add tokens until every row is finished or has `limit` (int32 scalar) new tokens."""

    def unfinished(*state: Any) -> Any:
        current = State(*state)
        return ops.logical_and(current.step < limit, ops.logical_not(ops.all(current.finished)))

    def body(*state: Any) -> State:
        return advance(model, plan, State(*state), controls)

    return State(*ops.while_loop(unfinished, body, tuple(state)))


def advance(model: TFGPTJForCausalLM, plan: Plan, state: State, controls: Controls) -> State:
    """Choose each row's next token and write it down, with what the model makes of it."""
    vocabulary = model.config.vocab_size
    logits = ops.reshape(state.search.logits, (-1, vocabulary))  # its width is not known in a loop
    finite = state.finite
    if not plan.tolerant:
        finite = ops.logical_and(finite, ops.all(ops.isfinite(logits)))
    logits = process(plan.processors, controls.processors, logits, context_of(state, controls))
    left = any_left(logits)
    possible = ops.logical_and(state.possible, ops.all(ops.logical_or(left, state.finished)))
    count = min(plan.search, vocabulary)
    shares, tokens = ops.top_k(ops.softmax(logits, axis=-1), count)  # [B, k]
    tokens = ops.cast(tokens, "int32")
    hidden, caches = _try(model, tokens, state)  # [B, k, D]

    directions = _directions(hidden)
    likeness = ops.einsum("BSD,BKD->BKS", state.search.directions, directions)
    likeness = ops.max(ops.where(state.real[:, None], likeness, -2.0), axis=-1)  # [B, k]; a cosine is at least -1
    chosen = ops.argmax((1 - controls.search) * shares - controls.search * likeness, axis=-1)
    is_chosen = ops.arange(count, dtype="int32") == ops.cast(chosen, "int32")[:, None]  # [B, k]

    def of_chosen(table: Any) -> Any:  # [B, k, …] → [B, 1, …]
        mask = ops.reshape(is_chosen, (-1, count, *(1,) * (len(table.shape) - 2)))
        return ops.sum(ops.where(mask, table, ops.zeros_like(table)), axis=1, keepdims=True)

    def settled(cache: Any) -> Any:
        places = state.slot + ops.arange(count, dtype="int32")
        return ops.slice_update(cache, (0, state.slot, 0, 0), of_chosen(ops.take(cache, places, axis=1)))

    ahead = Ahead(
        logits=next_logits(model, of_chosen(hidden)),
        directions=ops.slice_update(state.search.directions, (0, state.slot, 0), of_chosen(directions)),
    )
    caches = tuple((settled(key), settled(value)) for key, value in caches)
    state = state._replace(caches=caches, finite=finite, possible=possible, search=ahead)
    return write(of_chosen(tokens)[:, 0], state, controls)


def _try(model: TFGPTJForCausalLM, tokens: Any, state: State) -> tuple[Any, Any]:
    """Run the model over candidates, int32 [B, k], for one place: hidden states [B, k, D], and caches with all keys."""
    count = tokens.shape[1]
    places = state.slot + ops.arange(count, dtype="int32")
    slots = ops.arange(ops.shape(state.real)[1] + count - 1, dtype="int32")
    nothing = ops.zeros((ops.shape(tokens)[0], count - 1), dtype="bool")
    text = ops.concatenate([state.real, nothing], axis=1)[:, None, None, :]  # [B, 1, 1, S + k - 1]
    visible = ops.logical_or(text, places[:, None] == slots[None])  # [B, 1, k, S + k - 1]
    positions = ops.repeat(state.length[:, None], count, axis=1)
    return model.transformer.step(tokens, positions, visible, state.caches, state.slot)


def _directions(hidden: Any) -> Any:
    """Hidden states [B, T, D] in float32 at length 1."""
    hidden = ops.cast(hidden, "float32")
    length = ops.sqrt(ops.sum(ops.square(hidden), axis=-1, keepdims=True))
    return hidden / ops.maximum(length, 1e-30)
