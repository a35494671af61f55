"""Beam search, beam sampling and diverse beams: several continuations of each prompt at once, compiled as one loop.

The K beams of a prompt are branches of one tree that shares one cache, [B, N, P + K · M, H]: the prompt's P slots, then
K slots for each step, one per beam. A mask says which slots belong to a beam's text. Beams that change places take
their masks along, while keys and values stay where they were written: none is ever copied, and the prompt is read and
stored once for all its beams. To the model, the beams of a prompt are K queries of one row.

With guidance each beam has a twin after its negative prompt, that gets the same tokens: the twins' rows stand below all
others, [2 B, …] in the caches and [2 B · K, …] in what a row's text is. Of what is chosen and found there is one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from tfgptj.attention import Cache
from tfgptj.generation.caches import with_room
from tfgptj.generation.casting import weights_cast
from tfgptj.generation.chain import process
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.hypotheses import (
    BEHIND,
    NOTHING,
    Found,
    Rules,
    Step,
    candidates,
    extend,
    of_all,
    of_group,
    settle,
)
from tfgptj.generation.loop import Controls, Plan, State, context_of, read_prompt
from tfgptj.generation.tokens import FORBIDDEN, Context
from tfgptj.heads import TFGPTJForCausalLM


class Branches(NamedTuple):
    """What beams have beside their text. Rows are beams: the K of the first prompt, then those of the second."""

    visible: Any  # bool [B · K, P + K · M], the cache slots of each beam's text; of twins too, as `ids` of the state
    scores: Any  # float32 [B · K], sums of log-probabilities
    parents: Any  # int32 [B · K, M], the row that each new token was chosen in; -1 where there is none yet
    found: Found  # the best finished texts


class Result(NamedTuple):
    """What a search found: R texts for each prompt, the best first."""

    tokens: np.ndarray  # int32 [B · R, new]
    scores: np.ndarray  # float32 [B · R], sums of log-probabilities divided by length ** length_penalty
    beam_indices: np.ndarray  # int32 [B · R, new], the row of [B · K] that each token was chosen in; -1 after the end


def rules_of(config: GenerationConfig) -> Rules:
    """What a configuration with beams fixes in the graph."""
    beams, groups = config.num_beams, config.num_beam_groups
    # All end-of-text tokens of a beam may come first, and there must be a text to go on with.
    count = max(2, 1 + len(config.eos_token_ids)) * (beams // groups)
    return Rules(beams, groups, count, config.early_stopping, config.samples)


def prefill(model: TFGPTJForCausalLM, plan: Plan, ids: Any, real: Any, controls: Controls) -> State:
    """Read the prompts and choose the first token of each beam: see :func:`tfgptj.generation.loop.prefill`.

    Args:
        model, ids, real: see there; ids int32 and real bool [B, S] have one row per prompt, with guidance [2 B, S].
        plan: `plan.search` is :class:`tfgptj.generation.hypotheses.Rules`.
        controls: `controls.uniforms` is float32 [B, M · draws], `controls.search` the length penalty.
    """
    logits, state = start(model, plan, ids, real, controls)
    return choose(plan, logits, state, controls)


def start(
    model: TFGPTJForCausalLM, plan: Plan, ids: Any, real: Any, controls: Controls, record: list[Any] | None = None
) -> tuple[Any, State]:
    """The logits [B · K, V] after the prompts, with guidance [2 B · K, V], and the state before any new token."""
    rules = plan.search
    rows, room = ops.shape(controls.uniforms)[0] * rules.beams, ops.shape(controls.uniforms)[1] // rules.draws
    logits, state = read_prompt(model, ids, real, room, record, controls.past)
    more = (rules.beams - 1) * room  # slots
    no_tokens = ops.zeros((ops.shape(ids)[0], more), dtype="bool")

    def of_beams(table: Any) -> Any:
        return ops.repeat(table, rules.beams, axis=0)

    # Each group starts with one beam: equal ones would stay equal.
    is_first = ops.arange(rows, dtype="int32") % rules.size == 0
    no_parents = ops.zeros((rows, room), dtype="int32") - 1
    no_texts = ops.zeros((rows, room), dtype="int32") + controls.pad
    branches = Branches(
        visible=of_beams(ops.concatenate([real, no_tokens], axis=1)),
        scores=ops.where(is_first, 0.0, BEHIND),
        parents=no_parents,
        found=Found(no_texts, no_parents, ops.zeros((rows,), dtype="float32") + NOTHING),
    )
    state = state._replace(
        caches=with_room(state.caches, more),
        ids=of_beams(ids),
        real=of_beams(real),
        length=of_beams(state.length),
        finished=ops.zeros((rows,), dtype="bool"),
        search=branches,
    )
    if record is not None:
        record[:] = [of_beams(each) for each in record]
    return of_beams(logits), state


def decode(model: TFGPTJForCausalLM, plan: Plan, state: State, limit: Any, controls: Controls) -> State:
    """Add tokens until no open text can become better than those found, or all have `limit` (int32 scalar) tokens."""

    def unfinished(*state: Any) -> Any:
        current = State(*state)
        return ops.logical_and(current.step < limit, ops.logical_not(ops.all(current.finished)))

    def body(*state: Any) -> State:
        logits, caches = forward(model, plan.search, State(*state))
        return choose(plan, logits, State(*state)._replace(caches=caches), controls)

    with weights_cast(model):
        return State(*ops.while_loop(unfinished, body, tuple(state)))


def forward(
    model: TFGPTJForCausalLM, rules: Rules, state: State, record: list[Any] | None = None
) -> tuple[Any, tuple[Cache, ...]]:
    """Run the model over each beam's newest token: the next logits [B · K, V], and the caches with its keys.

    Args:
        model, rules, state: see there.
        record: a list for the hidden states [B · K, 1, D] and attention weights [B · K, N, 1, P + M] of each block, in
            the order of the text.
    """
    newest = ops.take(state.ids, ops.expand_dims(state.slot - 1, 0), axis=1)  # [B · K, 1]
    visible = state.search.visible
    hidden, caches = model.transformer.step(
        ops.reshape(newest, (-1, rules.beams)),
        ops.reshape(state.length - 1, (-1, rules.beams)),
        ops.reshape(visible, (-1, 1, rules.beams, ops.shape(visible)[1])),
        state.caches,
        _branch_slot(rules, state, state.step - 1),
        record,
    )
    if record is not None:
        record[::2] = [ops.reshape(each, (-1, 1, model.config.n_embd)) for each in record[::2]]
        record[1::2] = [_as_texts(rules, each, state) for each in record[1::2]]
    return ops.reshape(model.lm_head(hidden), (-1, model.config.vocab_size)), caches


def _as_texts(rules: Rules, weights: Any, state: State) -> Any:
    """Attention weights [B, N, K, P + K · M] as each beam has them over its own text, [B · K, N, 1, P + M]."""
    heads, room = weights.shape[1], ops.shape(state.search.parents)[1]
    weights = ops.reshape(ops.transpose(weights, (0, 2, 1, 3)), (-1, heads, 1, ops.shape(weights)[3]))
    prompt = ops.shape(state.ids)[1] - room
    steps = ops.reshape(weights[:, :, :, prompt:], (-1, heads, 1, room, rules.beams))
    # Of a step's slots a text has one: the others have no weight.
    return ops.concatenate([weights[:, :, :, :prompt], ops.sum(steps, axis=-1)], axis=-1)


def _branch_slot(rules: Rules, state: State, step: Any) -> Any:
    """The slot in the caches of a step's first token, int32 scalar."""
    prompt = ops.shape(state.ids)[1] - ops.shape(state.search.parents)[1]
    return ops.cast(prompt + step * rules.beams, "int32")


def choose(plan: Plan, logits: Any, state: State, controls: Controls) -> State:
    """Choose what the beams go on with from the logits [B · K, V], and keep the texts that end."""
    rules: Rules = plan.search
    steps: list[Step] = []
    log_probs = ops.log_softmax(logits, axis=-1)
    for group in range(rules.groups):
        context = group_context(plan, group, state, controls, tuple(step.beams.tokens for step in steps))
        processed = process(plan.processors, controls.processors, of_group(rules, log_probs, group), context)
        texts = candidates(rules, group, floored(processed), state, controls)
        steps.append(settle(rules, group, texts, state, controls))
    return advance(plan, logits, tuple(steps), state)


def floored(scores: Any) -> Any:
    """Scores [B · G, V] above what is set for tokens that were drawn."""
    return ops.maximum(scores, FORBIDDEN)


def group_context(plan: Plan, group: int, state: State, controls: Controls, taken: tuple[Any, ...]) -> Context:
    """What processors may know of a group's texts, and of the tokens [B · G] that each earlier group chose."""
    rules = plan.search
    own = {name: of_group(rules, getattr(state, name), group) for name in ("ids", "real", "length", "finished")}
    context = context_of(state._replace(**own), controls, plan.guided)
    if not taken:
        return context
    tokens = ops.concatenate([ops.reshape(each, (-1, rules.size)) for each in taken], axis=1)
    return context._replace(taken=ops.repeat(tokens, rules.size, axis=0))


def advance(plan: Plan, logits: Any, steps: tuple[Step, ...], state: State) -> State:
    """Write down what each group chose by the logits [B · K, V]."""
    rules: Rules = plan.search
    possible, finite = state.possible, state.finite
    for step in steps:
        possible = ops.logical_and(possible, step.possible)
    if not plan.tolerant:
        finite = ops.logical_and(finite, ops.all(ops.isfinite(logits)))
    origin, tokens, sums = (of_all(rules, [step.beams[i] for step in steps]) for i in range(3))  # [B · K] each
    found = Found(*(of_all(rules, [step.found[i] for step in steps]) for i in range(3)))
    closed = of_all(rules, [ops.repeat(step.closed, rules.size, axis=0) for step in steps])
    branches, parents = state.search, extend(state.search.parents, origin, origin, state.step)
    if plan.guided:  # the twins too
        origin = ops.concatenate([origin, origin + ops.shape(origin)[0]], axis=0)
        tokens = ops.concatenate([tokens, tokens], axis=0)
    slots = ops.arange(ops.shape(branches.visible)[1], dtype="int32")
    beam = ops.arange(ops.shape(origin)[0], dtype="int32") % rules.beams
    own = (_branch_slot(rules, state, state.step) + beam)[:, None] == slots[None]  # [B · K, P + K · M]
    visible = ops.logical_or(ops.take(branches.visible, origin, axis=0), own)
    return state._replace(
        ids=extend(state.ids, origin, tokens, state.slot),
        real=ops.logical_or(state.real, ops.arange(ops.shape(state.ids)[1], dtype="int32") == state.slot),
        length=state.length + 1,
        slot=state.slot + 1,
        step=state.step + 1,
        finished=closed,
        finite=finite,
        possible=possible,
        search=Branches(visible, sums, parents, found),
    )


def result_of(config: GenerationConfig, tokens: np.ndarray, parents: np.ndarray, scores: np.ndarray) -> Result:
    """The best `num_return_sequences` texts of each prompt.

    Args:
        config: see there.
        tokens, parents, scores: as in :class:`tfgptj.generation.hypotheses.Found`.
    """
    beams, returned = config.num_beams, config.num_return_sequences
    scores = scores.reshape(-1, beams)
    order = np.argsort(-scores, axis=1, kind="stable")
    if config.num_beam_groups > 1:
        order = np.argsort(scores, axis=1, kind="stable")[:, ::-1]  # of equal texts that of the last group comes first
        if config.eos_token_ids:  # which of them ended a text is not told, as in Hugging Face's search
            tokens = np.where(np.isin(tokens, config.eos_token_ids) & (parents >= 0), config.eos_token_ids[0], tokens)
    rows = (np.arange(len(scores))[:, None] * beams + order[:, :returned]).ravel()
    width = int((parents[rows] >= 0).sum(axis=1).max())
    return Result(tokens[rows, :width], scores.ravel()[rows], parents[rows, :width])
