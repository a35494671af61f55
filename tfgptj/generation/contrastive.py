"""Contrastive search: of the likeliest tokens the one whose hidden state is least like those of the text so far.

All candidates of a step go through the model at once, as several queries of one row that do not see each other. Their
keys and values stand side by side in the cache; the chosen one's are moved to the first place, the others overwritten
in the next step. Only the chosen one goes through the LM head. With guidance each row has a second one after all
others, of its negative prompt, that gets the same tokens; likeness is measured in the first.

Source: transformers 4.55, `_contrastive_search`; arXiv 2202.06417.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from tfgptj.attention import write_slots
from tfgptj.generation.caches import with_room
from tfgptj.generation.casting import weights_cast
from tfgptj.generation.chain import process
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.loop import Controls, Plan, State, context_of, next_logits, read, write
from tfgptj.generation.processors import any_left
from tfgptj.heads import TFGPTJForCausalLM


class Ahead(NamedTuple):
    """What contrastive search keeps beside the text: the model is one token ahead of it."""

    logits: Any  # float32 [B, V], for the next token; with guidance [2 B, V]
    directions: Any  # float32 [B, S, D], last hidden states at length 1


def candidates_of(config: GenerationConfig, vocab_size: int) -> int:
    """How many candidates a configuration compares in each step."""
    return min(int(config.top_k), vocab_size)


def prefill(model: TFGPTJForCausalLM, plan: Plan, ids: Any, real: Any, controls: Controls) -> State:
    """Read the prompt and choose the first new token: see :func:`tfgptj.generation.loop.prefill`.

    Args:
        model, ids, real: see there.
        plan: `plan.search` is the number of candidates k.
        controls: `controls.search` is `penalty_alpha`, a float32 scalar.
    """
    return advance(model, plan, start(model, plan, ids, real, controls), controls)


def start(
    model: TFGPTJForCausalLM, plan: Plan, ids: Any, real: Any, controls: Controls, record: list[Any] | None = None
) -> State:
    """The state before any new token."""
    rows, room = ops.shape(controls.uniforms)[:2]
    hidden, state = read(model, ids, real, room, record, controls.past)

    directions = _directions(hidden[:rows])
    no_tokens = ops.zeros((rows, room, model.config.n_embd), dtype=directions.dtype)
    more = plan.search - 1  # slots
    return state._replace(
        caches=with_room(state.caches, more),
        finished=state.finished[:rows],
        search=Ahead(next_logits(model, hidden), ops.concatenate([directions, no_tokens], axis=1)),
    )


def decode(model: TFGPTJForCausalLM, plan: Plan, state: State, limit: Any, controls: Controls) -> State:
    """Add tokens until every row is finished or has `limit` (int32 scalar) new tokens."""

    def unfinished(*state: Any) -> Any:
        current = State(*state)
        return ops.logical_and(current.step < limit, ops.logical_not(ops.all(current.finished)))

    def body(*state: Any) -> State:
        return advance(model, plan, State(*state), controls)

    with weights_cast(model):
        return State(*ops.while_loop(unfinished, body, tuple(state)))


def advance(model: TFGPTJForCausalLM, plan: Plan, state: State, controls: Controls) -> State:
    """Choose each row's next token and write it down, with what the model makes of it."""
    logits = ops.reshape(state.search.logits, (-1, model.config.vocab_size))  # its width is not known in a loop
    scores = process(plan.processors, controls.processors, logits, context_of(state, controls, plan.guided))
    return settle(model, plan, scores, state, controls)


def settle(
    model: TFGPTJForCausalLM, plan: Plan, scores: Any, state: State, controls: Controls, record: list[Any] | None = None
) -> State:
    """Choose each row's next token by its scores [B, V], which are processed logits.

    Args:
        model, plan, scores, state, controls: see :func:`prefill`.
        record: a list for the hidden states [B, 1, D] and attention weights [B, N, 1, S + k - 1] of the chosen tokens.
    """
    finite = state.finite
    if not plan.tolerant:
        finite = ops.logical_and(finite, ops.all(ops.isfinite(state.search.logits)))
    served = ops.logical_or(any_left(scores), state.finished)
    count = plan.search
    shares, tokens = ops.top_k(ops.softmax(scores, axis=-1), count)  # [B, k]
    tokens = ops.cast(tokens, "int32")
    hidden, caches = _try(model, ops.tile(tokens, (1 + plan.guided, 1)), state, record)  # [B, k, D]

    rows = ops.shape(tokens)[0]
    directions = _directions(hidden[:rows])
    likeness = ops.einsum("BSD,BKD->BKS", state.search.directions, directions)
    likeness = ops.where(state.real[:rows, None], likeness, -2.0)  # a cosine is at least -1
    likeness = ops.max(likeness, axis=-1)  # [B, k]
    chosen = ops.argmax((1 - controls.search) * shares - controls.search * likeness, axis=-1)
    is_chosen = ops.arange(count, dtype="int32") == ops.cast(chosen, "int32")[:, None]  # [B, k]
    every = ops.tile(is_chosen, (1 + plan.guided, 1))

    def settled(cache: Any) -> Any:
        places = state.slot + ops.arange(count, dtype="int32")
        return write_slots(cache, state.slot, _only(every, ops.take(cache, places, axis=2), axis=2))

    if record is not None:
        record[::2] = [_only(every, each) for each in record[::2]]
        record[1::2] = [_as_text(_only(every, each, axis=2), state.slot) for each in record[1::2]]
    ahead = Ahead(
        logits=next_logits(model, _only(every, hidden)),
        directions=ops.slice_update(state.search.directions, (0, state.slot, 0), _only(is_chosen, directions)),
    )
    state = state._replace(
        caches=tuple((settled(key), settled(value)) for key, value in caches),
        finite=finite,
        possible=ops.logical_and(state.possible, ops.all(served)),
        search=ahead,
    )
    return write(_only(is_chosen, tokens)[:, 0], state, controls, plan.guided)


def _try(model: TFGPTJForCausalLM, tokens: Any, state: State, record: list[Any] | None) -> tuple[Any, Any]:
    """Run the model over candidates, int32 [B, k], for one place: hidden states [B, k, D], and caches with all keys."""
    count = tokens.shape[1]
    places = state.slot + ops.arange(count, dtype="int32")
    slots = ops.arange(ops.shape(state.real)[1] + count - 1, dtype="int32")
    nothing = ops.zeros((ops.shape(tokens)[0], count - 1), dtype="bool")
    text = ops.concatenate([state.real, nothing], axis=1)[:, None, None, :]  # [B, 1, 1, S + k - 1]
    visible = ops.logical_or(text, places[:, None] == slots[None])  # [B, 1, k, S + k - 1]
    positions = ops.repeat(state.length[:, None], count, axis=1)
    return model.transformer.step(tokens, positions, visible, state.caches, state.slot, record)


def _only(is_chosen: Any, table: Any, axis: int = 1) -> Any:
    """What belongs to the candidates that were chosen, bool [B, k]: of a table [B, …, k, …] a table [B, …, 1, …]."""
    count = is_chosen.shape[1]
    mask = ops.reshape(is_chosen, [{0: -1, axis: count}.get(each, 1) for each in range(len(table.shape))])
    return ops.sum(ops.where(mask, table, ops.zeros_like(table)), axis=axis, keepdims=True)


def _as_text(weights: Any, slot: Any) -> Any:
    """Attention weights [B, N, 1, S + k - 1] of a chosen token, with that on itself in its new place."""
    slots = ops.arange(ops.shape(weights)[3], dtype="int32")
    own = ops.sum(ops.where(slots >= slot, weights, 0.0), axis=-1, keepdims=True)  # of the candidates it sees itself
    return ops.where(slots < slot, weights, ops.where(slots == slot, own, 0.0))


def _directions(hidden: Any) -> Any:
    """Hidden states [B, T, D] in float32 at length 1."""
    hidden = ops.cast(hidden, "float32")
    length = ops.sqrt(ops.sum(ops.square(hidden), axis=-1, keepdims=True))
    return hidden / ops.maximum(length, 1e-30)
