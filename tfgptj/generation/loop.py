"""The decoding loop: one prefill over the prompt, then one token per step with a cache, compiled.

The functions use `keras.ops` alone; :mod:`tfgptj.generation.compiling` wraps them for each backend.

Slots: the prompt has the first P, new tokens follow, the same slot in every row. Prompts are aligned to the right, so a
row's real tokens, those of the prompt and the new ones, follow each other; padding before them keeps its slot and is
masked. Positions are counted per row from its first real token, so a row's text does not depend on its padding or its
neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from tfgptj.attention import Cache
from tfgptj.backbone import TFGPTJModel
from tfgptj.generation import processors
from tfgptj.generation.caches import empty_caches, with_room
from tfgptj.generation.casting import weights_cast
from tfgptj.generation.chain import Context, Names, process
from tfgptj.generation.compiling import library_of, runs_itself, to_numpy
from tfgptj.heads import TFGPTJForCausalLM


class Plan(NamedTuple):
    """What changes the graph of a run; the numbers are in :class:`Controls`."""

    do_sample: bool = False
    processors: Names = ()  # what is done to the logits, in this order
    search: Any = None  # what a search, such as that of beams, fixes in the graph
    resumed: bool = False  # whether a part of the prompt was read before: see :class:`Past`

    @property
    def guided(self) -> bool:
        """Whether each row has a second one after all others, of its negative prompt, that gets the same tokens."""
        return self._has("guidance")

    @property
    def tolerant(self) -> bool:
        """Whether logits may be NaN or infinite."""
        return self._has("remove_invalid_values")

    def _has(self, processor: str) -> bool:
        return any(name == processor for name, _ in self.processors)


class Past(NamedTuple):
    """A prompt of which only the last columns are still to be read."""

    caches: tuple[Cache, ...]  # with all slots, S; keys and values stand in those of the columns before
    ids: Any  # int32 [B, w], the columns that are left
    hidden: Any = ()  # [B, P, D], last hidden states of the columns before, where a search needs them


class Controls(NamedTuple):
    """Tensors that steer a run without changing its graph."""

    processors: tuple[tuple[Any, ...], ...]  # the numbers of each processor
    eos: Any  # int32 [E], the tokens that end a row; may be empty
    pad: Any  # int32 scalar, what finished rows are filled with
    limit: Any  # int32 scalar, or [B], new tokens that a row may have
    uniforms: Any  # float32 [B, M], one random number per row and step
    search: Any = ()  # the numbers of a search
    past: Any = ()  # of the first step only: a :class:`Past`, or () to read the whole prompt


class State(NamedTuple):
    """Everything that a step reads and writes."""

    caches: tuple[Cache, ...]  # per layer keys and values, with all slots: S = P + M
    ids: Any  # int32 [B, S], the prompt and the new tokens; the pad token where there is none yet
    real: Any  # bool [B, S], where there is a token
    length: Any  # int32 [B], tokens of each row so far
    slot: Any  # int32 scalar, where the next token goes
    step: Any  # int32 scalar, new tokens so far
    finished: Any  # bool [B], an end-of-text token was produced, or as many tokens as there may be
    finite: Any  # bool scalar, no logit was NaN or infinite so far
    possible: Any  # bool scalar, there was always a token that was not forbidden
    search: Any = ()  # what a search keeps beside these


def prefill(model: TFGPTJForCausalLM, plan: Plan, ids: Any, real: Any, controls: Controls) -> State:
    """Read the prompt and choose the first new token.

    Args:
        model: the language model.
        plan: see there.
        ids: int32 [B, S], the prompt in the first P slots, then room for the new tokens; with guidance [2 B, S].
        real: bool [B, S], where the prompt has tokens; the last of each row is in slot P - 1.
        controls: see there.
    """
    logits, state = start(model, plan, ids, real, controls)
    return choose(plan, logits, state, controls)


def start(
    model: TFGPTJForCausalLM, plan: Plan, ids: Any, real: Any, controls: Controls, record: list[Any] | None = None
) -> tuple[Any, State]:
    """The logits [B, V] after the prompt, with guidance [2 B, V], and the state before any new token."""
    logits, state = read_prompt(model, ids, real, ops.shape(controls.uniforms)[1], record, controls.past)
    if plan.guided:
        state = state._replace(finished=state.finished[: ops.shape(ids)[0] // 2])
    return logits, state


def read_prompt(
    model: TFGPTJForCausalLM, ids: Any, real: Any, room: Any, record: list[Any] | None = None, past: Any = ()
) -> tuple[Any, State]:
    """The logits [B, V] after the prompt, and the state before any new token.

    Args:
        model: the language model.
        ids, real: as for :func:`prefill`.
        room: int, the slots after the prompt (M).
        record: as for :meth:`tfgptj.backbone.TFGPTJModel.step`.
        past: `Controls.past`.
    """
    hidden, state = read(model, ids, real, room, record, past)
    return next_logits(model, hidden), state


def read(
    model: TFGPTJForCausalLM, ids: Any, real: Any, room: Any, record: list[Any] | None = None, past: Any = ()
) -> tuple[Any, State]:
    """As :func:`read_prompt`, with last hidden states in place of the logits: [B, P, D], of a resumed prompt [B, w, D]
    unless `past` has those before them."""
    batch, size = ops.shape(ids)[:2]
    prompt = size - room
    mask = real[:, :prompt]
    if past:
        hidden, caches = read_columns(model, past, real, ops.cast(prompt - ops.shape(past.ids)[1], "int32"), record)
    elif runs_itself(model):  # it writes into caches in place: they are made once, with their room
        empty = empty_caches(model, batch, size)
        hidden, caches = read_whole(model.transformer, ids[:, :prompt], mask, record, empty)
    else:
        hidden, caches = read_whole(model.transformer, ids[:, :prompt], mask, record)
        caches = with_room(caches, room)
    start = State(
        caches=caches,
        ids=ids,
        real=real,
        length=ops.sum(ops.cast(mask, "int32"), axis=1),
        slot=ops.cast(prompt, "int32"),
        step=ops.zeros((), dtype="int32"),
        finished=ops.zeros((batch,), dtype="bool"),
        finite=ops.ones((), dtype="bool"),
        possible=ops.ones((), dtype="bool"),
    )
    return hidden, _on_host(start) if runs_itself(model) else start


def read_whole(
    transformer: TFGPTJModel, ids: Any, mask: Any, record: list[Any] | None = None, caches: Any = None
) -> tuple[Any, tuple[Cache, ...]]:
    """Hidden states [B, P, D] and caches of P slots, of ids int32 [B, P] at which nothing else is looked.

    Args:
        transformer: the model without its head.
        ids: int32 [B, P], with padding on either side.
        mask: bool [B, P], where there are tokens.
        record: as for :meth:`tfgptj.backbone.TFGPTJModel.step`.
        caches: empty ones of at least P slots, for an engine.
    """
    slots = ops.arange(ops.shape(ids)[1], dtype="int32")  # [P]
    positions = ops.maximum(ops.cumsum(ops.cast(mask, "int32"), axis=1) - 1, 0)  # [B, P]
    visible = ops.logical_and(slots[:, None] >= slots[None, :], mask[:, None, None, :])  # [B, 1, P, P]
    return transformer.step(ids, positions, visible, caches, None if caches is None else 0, record)


def read_columns(
    model: TFGPTJForCausalLM, past: Past, real: Any, slot: Any, record: list[Any] | None = None
) -> tuple[Any, tuple[Cache, ...]]:
    """Read the columns `past.ids` behind those before `slot`: their hidden states and the caches with their keys.

    The hidden states are [B, w, D], or with `past.hidden` [B, P, D], those before them included.
    """
    queries = slot + ops.arange(ops.shape(past.ids)[1], dtype="int32")  # [w]
    slots = ops.arange(ops.shape(real)[1], dtype="int32")  # [S]
    visible = ops.logical_and(queries[:, None] >= slots[None, :], real[:, None, None, :])  # [B, 1, w, S]
    padding = ops.cast(ops.argmax(ops.cast(real, "int32"), axis=1), "int32")  # [B]
    positions = ops.maximum(queries[None, :] - padding[:, None], 0)  # [B, w]
    hidden, caches = model.transformer.step(past.ids, positions, visible, past.caches, slot, record)
    if not isinstance(past.hidden, tuple):
        hidden = ops.slice_update(past.hidden, (0, slot, 0), hidden)
    return hidden, caches


def read_piece(
    model: TFGPTJForCausalLM, keeps_hidden: bool, past: Past, real: Any, slot: Any
) -> tuple[tuple[Cache, ...], Any, Any]:
    """The caches after some columns, all hidden states so far or (), and the slot after them."""
    hidden, caches = read_columns(model, past, real, slot)
    return caches, hidden if keeps_hidden else (), slot + ops.shape(past.ids)[1]


def decode(model: TFGPTJForCausalLM, plan: Plan, state: State, limit: Any, controls: Controls) -> State:
    """Add tokens until every row is finished or has `limit` (int32 scalar) new tokens."""

    def unfinished(*state: Any) -> Any:
        current = State(*state)
        return ops.logical_and(current.step < limit, ops.logical_not(ops.all(current.finished)))

    def body(*state: Any) -> State:
        logits, current = forward(model, State(*state))
        return choose(plan, logits, current, controls)

    with weights_cast(model):
        return State(*ops.while_loop(unfinished, body, tuple(state)))


def forward(model: TFGPTJForCausalLM, state: State, record: list[Any] | None = None) -> tuple[Any, State]:
    """Run the model over each row's newest token: the next logits [B, V], and the state with its keys and values."""
    now = _on_host(state) if runs_itself(model) else state
    library = library_of(now.ids)
    newest = library.take(now.ids, library.expand_dims(now.slot - 1, 0), axis=1)  # [B, 1]
    # A pad token that fills a finished row may be none of V.
    newest = library.minimum(newest, model.config.vocab_size - 1)
    hidden, caches = model.transformer.step(
        newest, now.length[:, None] - 1, now.real[:, None, None, :], state.caches, now.slot - 1, record
    )
    return next_logits(model, hidden), now._replace(caches=caches)


def _on_host(state: State) -> State:
    """A state in NumPy's arrays, but for what belongs to the engine or to a search.

    An engine is called from the host, where Keras's operators would take longer than a small model's layers.
    """
    names = [name for name in State._fields if name not in ("caches", "search")]
    values: dict[str, Any] = {name: to_numpy(getattr(state, name)) for name in names}
    return state._replace(**values)


def next_logits(model: TFGPTJForCausalLM, hidden: Any) -> Any:
    """Logits float32 [B, V] from the hidden states [B, T, D], of which the last counts."""
    return model.lm_head(hidden[:, -1:])[:, 0]


def choose(plan: Plan, logits: Any, state: State, controls: Controls) -> State:
    """Choose each row's next token and write it down."""
    scores = process(plan.processors, controls.processors, logits, context_of(state, controls, plan.guided))
    return settle(plan, logits, scores, state, controls)


def settle(plan: Plan, logits: Any, scores: Any, state: State, controls: Controls) -> State:
    """Choose each row's next token by its scores [B, V], which are processed logits [B or 2 B, V]."""
    library = library_of(scores)
    if not plan.tolerant:
        state = state._replace(finite=library.logical_and(state.finite, library.all(library.isfinite(logits))))
    if plan.do_sample:
        uniform = ops.squeeze(ops.take(controls.uniforms, ops.expand_dims(state.step, 0), axis=1), axis=1)  # [B]
        token = processors.draw(scores, uniform)
    else:
        token = processors.greedy(scores)
    served = library.logical_or(processors.any_left(scores), state.finished)  # [B]
    possible = library.logical_and(state.possible, library.all(served))
    return write(token, state._replace(possible=possible), controls, plan.guided)


def context_of(state: State, controls: Controls, guided: bool = False) -> Context:
    """What processors may know of the tokens so far."""
    ids, real, length = state.ids, state.real, state.length
    if guided:
        rows = ops.shape(state.finished)[0]
        ids, real, length = ids[:rows], real[:rows], length[:rows]
    return Context(ids, real, state.slot, length, state.step, controls.limit, controls.eos)


def write(token: Any, state: State, controls: Controls, guided: bool = False) -> State:
    """Append a token, int32 [B], to each row; to those that are finished the pad token."""
    library = library_of(token)
    token = library.where(state.finished, controls.pad, token)  # [B]
    ended = library.any(token[:, None] == controls.eos[None, :], axis=1)
    if guided:
        token = library.concatenate([token, token], axis=0)  # [2 B]
    ended = library.logical_or(ended, state.step + 1 >= controls.limit)
    here = library.arange(library.shape(state.ids)[1], dtype="int32") == state.slot  # [S]
    return state._replace(
        ids=library.where(here, token[:, None], state.ids),
        real=library.logical_or(state.real, here),
        length=state.length + 1,
        slot=state.slot + 1,
        step=state.step + 1,
        finished=library.logical_or(state.finished, ended),
    )
