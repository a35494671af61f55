"""Speculative decoding: tokens are guessed, and one pass of the model judges all guesses at once.

A pass goes over the newest token and the drafts after it, and gives the logits after each of them. Then tokens are
chosen one by one, as :mod:`tfgptj.generation.loop` chooses them, by the same processors and the same random number of
each step, as long as the token chosen is the one that was drafted: its successor's logits are there already. So every
token is the one that there would be without drafts, drawn tokens too, whatever the drafts are. Good drafts save passes;
bad ones cost a little time.

Drafts come from the text itself, where its newest tokens stood before, or from a smaller model with a cache of its own.
That model draws with the random numbers of the steps that it drafts, so that two models that would say nearly the same
draw nearly always the same.

What was rejected needs no removal: its slots are masked, and the next pass overwrites them. There is one row, or with
guidance two that get the same tokens.

Sources: Leviathan et al. 2022, arXiv:2211.17192; prompt lookup after transformers, candidate_generator.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from tfgptj.attention import Cache
from tfgptj.generation import loop, tokens
from tfgptj.generation.casting import weights_cast
from tfgptj.generation.chain import ON_THE_HOST, process
from tfgptj.generation.compiling import runs_itself
from tfgptj.heads import TFGPTJForCausalLM


class Pair(NamedTuple):
    """A model, and the one that drafts for it, if any."""

    model: TFGPTJForCausalLM
    draft: TFGPTJForCausalLM | None = None

    @property
    def runs_itself(self) -> bool:
        """Whether one of them does."""
        return any(runs_itself(model) for model in self if model is not None)

    @property
    def variables(self) -> list[Any]:
        """Of both."""
        return [*self.model.variables, *(self.draft.variables if self.draft is not None else ())]


class Drafting(NamedTuple):
    """How to draft; the numbers do not change the graph."""

    offsets: Any  # int32 [W], 0…W-1: there are never more drafts at once than W
    ngram: Any  # int32 scalar, tokens at most that must have stood before, where drafts come from the text
    width: Any  # int32 scalar, tokens to draft at first
    grows: Any  # bool scalar, whether that number follows the success of a model that drafts
    confidence: Any  # float32 scalar, the model stops after a draft with less probability than that


class Progress(NamedTuple):
    """What is kept beside the tokens."""

    passes: Any  # int32 scalar, how often the model was run
    drafted: Any  # int32 scalar, how often the draft model was run
    width: Any  # int32 scalar, tokens to draft next
    finite: Any  # bool scalar, no logit of the draft model was NaN or infinite so far
    caches: tuple[Cache, ...]  # of the draft model


def prefill(pair: Pair, plan: loop.Plan, ids: Any, real: Any, controls: loop.Controls) -> loop.State:
    """Read the prompt and choose the first new token: see :func:`tfgptj.generation.loop.prefill`."""
    state = loop.prefill(pair.model, plan, ids, real, controls)
    return state._replace(search=_start(pair, ids, real, controls))


def begin(
    pair: Pair, static: tuple[loop.Plan, bool], ids: Any, real: Any, controls: loop.Controls
) -> tuple[Any, loop.State, tuple[Any, ...]]:
    """As :func:`tfgptj.generation.stepping.begin`."""
    plan, recording = static
    record: list[Any] | None = [] if recording else None
    logits, state = loop.start(pair.model, plan, ids, real, controls, record)
    return logits, state._replace(search=_start(pair, ids, real, controls)), tuple(record or ())


def _start(pair: Pair, ids: Any, real: Any, controls: loop.Controls) -> Progress:
    caches: tuple[Cache, ...] = ()
    if pair.draft is not None:
        _, own = loop.read(pair.draft, ids, real, ops.shape(controls.uniforms)[1])
        caches = own.caches
    one = ops.ones((), dtype="int32")
    drafted = one * int(pair.draft is not None)
    return Progress(one, drafted, controls.search.width, ops.ones((), dtype="bool"), caches)


def decode(pair: Pair, plan: loop.Plan, state: loop.State, limit: Any, controls: loop.Controls) -> loop.State:
    """Add tokens until the row is finished or has `limit` (int32 scalar) new tokens, or some more."""

    def unfinished(*state: Any) -> Any:
        current = loop.State(*state)
        return ops.logical_and(current.step < limit, ops.logical_not(ops.all(current.finished)))

    def body(*state: Any) -> loop.State:
        logits, drafts, count, current, _ = look_ahead(pair, (plan, False), loop.State(*state), controls)
        return accept(pair, plan, logits, drafts, count, current, controls)

    with weights_cast(pair.model):
        return loop.State(*ops.while_loop(unfinished, body, tuple(state)))


def look_ahead(
    pair: Pair, static: tuple[loop.Plan, bool], state: loop.State, controls: loop.Controls
) -> tuple[Any, Any, Any, loop.State, tuple[Any, ...]]:
    """Draft, and run the model over the newest token and the drafts.

    Args:
        pair: see there.
        static: the plan, whose `search` tells whether shapes are fixed, and whether to keep hidden states and
            attentions.
        state, controls: see there.

    Returns:
        The logits [B, 1 + n, V] after the newest token and after each draft, the drafts int32 [W], how many there are
        (int32 scalar; n is as many, or W where shapes are fixed), the state with the keys and values of all of them,
        and hidden states and attentions in turn.
    """
    plan, recording = static
    record: list[Any] | None = [] if recording else None
    if pair.draft is None:
        search = controls.search
        drafts, count = look_up(loop.context_of(state, controls, plan.guided), search.ngram, search.offsets)
        count = ops.minimum(count, state.search.width)
    else:
        drafts, count, state = _drafts_of(pair.draft, plan, state, controls)
    count = ops.minimum(count, controls.limit - state.step - 1)  # a pass gives one token more than were drafted
    logits, caches = _judged(pair, plan, state, drafts, count, record)
    progress = state.search._replace(passes=state.search.passes + 1)
    return logits, drafts, count, state._replace(caches=caches, search=progress), tuple(record or ())


def _judged(
    pair: Pair, plan: loop.Plan, state: loop.State, drafts: Any, count: Any, record: list[Any] | None
) -> tuple[Any, tuple[Cache, ...]]:
    """Logits [B, 1 + n, V] after the newest token and after each draft, and the cache."""
    newest = ops.take(state.ids, ops.expand_dims(state.slot - 1, 0), axis=1)  # [B, 1]

    def judged(drafts: Any) -> tuple[Any, tuple[Cache, ...]]:
        after = ops.broadcast_to(drafts[None], (ops.shape(newest)[0], ops.shape(drafts)[0]))
        row = ops.concatenate([newest, after], axis=1)  # [B, 1 + n]
        hidden, caches = _run_over(pair.model, state, row, state.slot - 1, record)
        return pair.model.lm_head(hidden), caches

    def narrow() -> tuple[Any, tuple[Cache, ...]]:
        logits, caches = judged(drafts[:1])
        return ops.pad(logits, ((0, 0), (0, most - 1), (0, 0))), caches

    if not plan.search:
        return judged(drafts[:count])
    most = drafts.shape[0]
    if most == 1 or pair.draft is not None or record is not None:
        return judged(drafts)
    # Shapes are fixed: there are two programs, so that text without repetitions does not cost much more than without
    # drafts.
    return ops.cond(count > 1, lambda: judged(drafts), narrow)


def accept(
    pair: Pair, plan: loop.Plan, logits: Any, drafts: Any, count: Any, state: loop.State, controls: loop.Controls
) -> loop.State:
    """Choose tokens as long as they are the drafted ones, and one more.

    Args:
        logits, drafts, count, state: as :func:`look_ahead` gives them.
        pair, plan, controls: see there.
    """

    def going_on(place: Any, agreed: Any, *state: Any) -> Any:
        return agreed

    def body(place: Any, agreed: Any, *state: Any) -> tuple[Any, ...]:
        after = ops.squeeze(ops.take(logits, ops.expand_dims(place, 0), axis=1), axis=1)  # [B, V]
        current = loop.choose(plan, after, loop.State(*state), controls)
        drafted = ops.take(drafts, ops.minimum(place, ops.shape(drafts)[0] - 1))
        agreed = ops.logical_and(place < count, newest_of(current) == drafted)
        agreed = ops.logical_and(agreed, ops.logical_not(ops.all(current.finished)))
        return (place + 1, agreed, *current)

    # What no choice changes stays outside of the loop.
    parts = (ops.zeros((), dtype="int32"), ops.ones((), dtype="bool"), *state._replace(caches=(), search=()))
    place, _, *chosen = ops.while_loop(going_on, body, parts)
    width = (next_width if pair.draft is None else scheduled_width)(
        state.search.width, place - 1, count, controls.search
    )
    progress = state.search._replace(width=width)
    return loop.State(*chosen)._replace(caches=state.caches, search=progress)


def next_width(width: Any, accepted: Any, count: Any, drafting: Drafting) -> Any:
    """How many tokens to take from the text next: twice as many after full success, otherwise down to half.

    In most texts the newest token stood before, and what followed it then rarely follows now: drafts that are wrong
    time after time must cost next to nothing.
    """
    longer = ops.minimum(2 * width, ops.shape(drafting.offsets)[0])
    shorter = ops.maximum(ops.maximum(width // 2, accepted + 1), 1)
    return ops.where(count == 0, width, ops.where(accepted == count, longer, shorter))


def scheduled_width(width: Any, accepted: Any, count: Any, drafting: Drafting) -> Any:
    """How many tokens a model is to draft next: two more after full success, otherwise one less, if that may change."""
    longer = ops.minimum(width + 2, ops.shape(drafting.offsets)[0])
    return ops.where(drafting.grows, ops.where(accepted == count, longer, ops.maximum(width - 1, 1)), width)


def newest_of(state: loop.State) -> Any:
    """The row's newest token, int32 scalar."""
    return ops.reshape(ops.take(state.ids[:1], ops.expand_dims(state.slot - 1, 0), axis=1), ())


def look_up(context: tokens.Context, ngram: Any, offsets: Any) -> tuple[Any, Any]:
    """What followed the newest tokens where they stood before.

    Of all places those count where most of the newest tokens stood, `ngram` at most, and of these the first.

    Args:
        context: the text, one row.
        ngram: int32 scalar.
        offsets: int32 [W], 0…W-1.

    Returns:
        int32 [W], and how many of them are drafts, int32 scalar: 0 where the newest token is new.
    """

    def longer(distance: Any, found: Any) -> Any:
        alike, length = found
        same = tokens.before(context.ids, distance) == tokens.back(context, distance)
        inside = ops.logical_and(tokens.before(text, distance), tokens.slots(context) >= distance)
        alike = ops.logical_and(ops.logical_and(alike, same), inside)
        return alike, length + ops.cast(alike, "int32")

    text = tokens.text(context)  # [1, S]
    _, length = ops.fori_loop(ops.ones_like(ngram), ngram + 1, longer, (text, ops.zeros_like(context.ids)))
    place = ops.cast(ops.argmax(length[0]), "int32")  # the first of the longest
    found = ops.max(length) > 0
    count = ops.where(found, ops.minimum(ops.shape(offsets)[0], context.slot - place), 0)
    return ops.take(context.ids[0], ops.minimum(place + offsets, context.slot - 1)), count


def _drafts_of(
    draft: TFGPTJForCausalLM, plan: loop.Plan, state: loop.State, controls: loop.Controls
) -> tuple[Any, Any, loop.State]:
    """Drafts int32 [W] of a model, how many there are, and the state with the model's keys and values."""
    progress, drafting = state.search, controls.search
    kept = [i for i, (name, _) in enumerate(plan.processors) if name not in ON_THE_HOST]
    plan = plan._replace(processors=tuple(plan.processors[i] for i in kept))
    controls = controls._replace(processors=tuple(controls.processors[i] for i in kept))

    def suggest(logits: Any, own: loop.State) -> tuple[Any, loop.State]:
        scores = process(plan.processors, controls.processors, logits, loop.context_of(own, controls, plan.guided))
        own = loop.settle(plan, logits, scores, own, controls)
        share = ops.take(ops.softmax(scores, axis=-1)[0], newest_of(own))
        return share >= drafting.confidence, own

    def going_on(sure: Any, *own: Any) -> Any:
        current = loop.State(*own)
        enough = ops.logical_or(current.step - state.step >= progress.width, current.step >= controls.limit)
        return ops.logical_and(sure, ops.logical_not(ops.logical_or(enough, ops.all(current.finished))))

    def body(sure: Any, *own: Any) -> tuple[Any, ...]:
        sure, current = suggest(*loop.forward(draft, loop.State(*own)))
        return (sure, *current)

    # The last draft may have been accepted before the model has read it: the newest two tokens are read.
    own = state._replace(caches=progress.caches, search=())
    last = ops.take(own.ids, state.slot - 2 + ops.arange(2, dtype="int32"), axis=1)  # [B, 2]
    hidden, caches = _run_over(draft, own, last, state.slot - 2)
    sure, own = suggest(loop.next_logits(draft, hidden), own._replace(caches=caches))
    own = loop.State(*ops.while_loop(going_on, body, (sure, *own))[1:])
    count = own.step - state.step
    places = ops.minimum(state.slot + drafting.offsets, ops.shape(own.ids)[1] - 1)
    progress = progress._replace(
        drafted=progress.drafted + count,
        finite=ops.logical_and(progress.finite, own.finite),
        caches=own.caches,
    )
    return ops.take(own.ids[0], places), count, state._replace(search=progress)


def _run_over(
    model: TFGPTJForCausalLM, state: loop.State, row: Any, first: Any, record: list[Any] | None = None
) -> tuple[Any, tuple[Cache, ...]]:
    """Run a model over tokens int32 [B, T] at the slots from `first` on: hidden states [B, T, D], and its cache."""
    steps = ops.arange(ops.shape(row)[1], dtype="int32")  # [T]
    slots = ops.arange(ops.shape(state.real)[1], dtype="int32")  # [S]
    there = ops.logical_or(state.real, slots >= first)[:, None, None, :]  # [B, 1, 1, S]
    visible = ops.logical_and(there, slots <= (first + steps)[:, None])  # [B, 1, T, S]
    positions = (state.length - state.slot + first)[:, None] + steps  # [B, T]
    return model.transformer.step(row, positions, visible, state.caches, first, record)
