"""Beam search, beam sampling and diverse beams: several continuations of each prompt at once, compiled as one loop.

The K beams of a prompt are branches of one tree that shares one cache, [B, P + K · M, N, H]: the prompt's P slots, then
K slots for each step, one per beam. A mask says which slots belong to a beam's text. Beams that change places take
their masks along, while keys and values stay where they were written: none is ever copied, and the prompt is read and
stored once for all its beams. To the model, the beams of a prompt are K queries of one row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from tfgptj.attention import Cache
from tfgptj.generation.chain import process
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.hypotheses import BEHIND, NOTHING, Found, Rules, Step, extend, of_all, of_group, step_group
from tfgptj.generation.loop import Controls, Plan, State, context_of, read_prompt
from tfgptj.generation.tokens import FORBIDDEN
from tfgptj.heads import TFGPTJForCausalLM


class Branches(NamedTuple):
    """What beams have beside their text. Rows are beams: the K of the first prompt, then those of the second."""

    visible: Any  # bool [B · K, P + K · M], the cache slots of each beam's text
    scores: Any  # float32 [B · K], sums of log-probabilities
    parents: Any  # int32 [B · K, M], the row that each new token was chosen in; -1 where there is none yet
    found: Found  # the best finished texts
    step_scores: Any  # float32 [B · K, V], what the last step chose by, without the sums; [B · K, 0] if not kept
    step_logits: Any  # float32 [B · K, V], the same before all processors; [B · K, 0] if not kept


class Result(NamedTuple):
    """What a search found: R texts for each prompt, the best first."""

    tokens: np.ndarray  # int32 [B · R, new]
    scores: np.ndarray  # float32 [B · R], sums of log-probabilities divided by length ** length_penalty
    beam_indices: np.ndarray  # int32 [B · R, new], the row of [B · K] that each token was chosen in; -1 after the end


def rules_of(config: GenerationConfig) -> Rules:
    """What a configuration with beams fixes in the graph."""
    beams, groups = config.num_beams, config.num_beam_groups
    # All end-of-text tokens of a beam may come first, and there must be a text to go on with.
    candidates = max(2, 1 + len(config.eos_token_ids)) * (beams // groups)
    keep = config.return_dict_in_generate and bool(config.output_scores or config.output_logits)
    return Rules(beams, groups, candidates, config.early_stopping, config.samples, keep)


def prefill(model: TFGPTJForCausalLM, plan: Plan, ids: Any, real: Any, controls: Controls) -> State:
    """Read the prompts and choose the first token of each beam: see :func:`tfgptj.generation.loop.prefill`.

    Args:
        model, ids, real: see there; ids int32 and real bool [B, S] have one row per prompt.
        plan: `plan.search` is :class:`tfgptj.generation.hypotheses.Rules`.
        controls: `controls.uniforms` is float32 [B, M · draws], `controls.search` the length penalty.
    """
    rules, batch = plan.search, ops.shape(ids)[0]
    rows, room = batch * rules.beams, ops.shape(controls.uniforms)[1] // rules.draws
    logits, state = read_prompt(model, ids, real, room, past=controls.past)

    def of_beams(table: Any) -> Any:
        return ops.repeat(table, rules.beams, axis=0)

    def grown(cache: Any) -> Any:  # [B, P + K · M, N, H]
        more = (batch, (rules.beams - 1) * room, model.config.n_head, model.config.head_dim)
        return ops.concatenate([cache, ops.zeros(more, dtype=cache.dtype)], axis=1)

    no_tokens = ops.zeros((batch, (rules.beams - 1) * room), dtype="bool")
    # Each group starts with one beam: equal ones would stay equal.
    is_first = ops.arange(rows, dtype="int32") % rules.size == 0
    no_parents = ops.zeros((rows, room), dtype="int32") - 1
    no_texts = ops.zeros((rows, room), dtype="int32") + controls.pad
    kept = ops.zeros((rows, model.config.vocab_size if rules.keep else 0), dtype="float32")
    branches = Branches(
        visible=of_beams(ops.concatenate([real, no_tokens], axis=1)),
        scores=ops.where(is_first, 0.0, BEHIND),
        parents=no_parents,
        found=Found(no_texts, no_parents, ops.zeros((rows,), dtype="float32") + NOTHING),
        step_scores=kept,
        step_logits=kept,
    )
    state = state._replace(
        caches=tuple((grown(key), grown(value)) for key, value in state.caches),
        ids=of_beams(ids),
        real=of_beams(real),
        length=of_beams(state.length),
        finished=of_beams(state.finished),
        search=branches,
    )
    return choose(plan, of_beams(logits), state, controls)


def decode(model: TFGPTJForCausalLM, plan: Plan, state: State, limit: Any, controls: Controls) -> State:
    """Add tokens until no open text can become better than those found, or all have `limit` (int32 scalar) tokens."""

    def unfinished(*state: Any) -> Any:
        current = State(*state)
        return ops.logical_and(current.step < limit, ops.logical_not(ops.all(current.finished)))

    def body(*state: Any) -> State:
        logits, caches = forward(model, plan.search, State(*state))
        return choose(plan, logits, State(*state)._replace(caches=caches), controls)

    return State(*ops.while_loop(unfinished, body, tuple(state)))


def forward(model: TFGPTJForCausalLM, rules: Rules, state: State) -> tuple[Any, tuple[Cache, ...]]:
    """Run the model over each beam's newest token: the next logits [B · K, V], and the caches with its keys."""
    newest = ops.take(state.ids, ops.expand_dims(state.slot - 1, 0), axis=1)  # [B · K, 1]
    visible = state.search.visible
    hidden, caches = model.transformer.step(
        ops.reshape(newest, (-1, rules.beams)),
        ops.reshape(state.length - 1, (-1, rules.beams)),
        ops.reshape(visible, (-1, 1, rules.beams, ops.shape(visible)[1])),
        state.caches,
        _branch_slot(rules, state, state.step - 1),
    )
    return ops.reshape(model.lm_head(hidden), (-1, model.config.vocab_size)), caches


def _branch_slot(rules: Rules, state: State, step: Any) -> Any:
    """The slot in the caches of a step's first token, int32 scalar."""
    prompt = ops.shape(state.ids)[1] - ops.shape(state.search.parents)[1]
    return ops.cast(prompt + step * rules.beams, "int32")


def choose(plan: Plan, logits: Any, state: State, controls: Controls) -> State:
    """Choose what the beams go on with from the logits [B · K, V], and keep the texts that end."""
    rules: Rules = plan.search
    steps: list[Step] = []
    scores: list[Any] = []
    log_probs = ops.log_softmax(logits, axis=-1)
    for group in range(rules.groups):
        own = {name: of_group(rules, getattr(state, name), group) for name in ("ids", "real", "length")}
        context = context_of(state._replace(**own), controls)
        if steps:
            taken = ops.concatenate([ops.reshape(step.beams.tokens, (-1, rules.size)) for step in steps], axis=1)
            context = context._replace(taken=ops.repeat(taken, rules.size, axis=0))
        processed = process(plan.processors, controls.processors, of_group(rules, log_probs, group), context)
        scores.append(ops.maximum(processed, FORBIDDEN))  # what is drawn is set below that
        steps.append(step_group(rules, group, scores[-1], state, controls))
    possible = state.possible
    for step in steps:
        possible = ops.logical_and(possible, step.possible)
    state = state._replace(possible=possible)
    if not plan.tolerant:
        state = state._replace(finite=ops.logical_and(state.finite, ops.all(ops.isfinite(logits))))
    if rules.keep:
        branches = state.search._replace(step_scores=of_all(rules, scores), step_logits=logits)
        state = state._replace(search=branches)
    return _advance(rules, state, steps)


def _advance(rules: Rules, state: State, steps: list[Step]) -> State:
    """Write down what each group chose."""
    origin, tokens, sums = (of_all(rules, [step.beams[i] for step in steps]) for i in range(3))  # [B · K] each
    found = Found(*(of_all(rules, [step.found[i] for step in steps]) for i in range(3)))
    closed = of_all(rules, [ops.repeat(step.closed, rules.size, axis=0) for step in steps])
    branches = state.search
    slots = ops.arange(ops.shape(branches.visible)[1], dtype="int32")
    beam = ops.arange(ops.shape(origin)[0], dtype="int32") % rules.beams
    own = (_branch_slot(rules, state, state.step) + beam)[:, None] == slots[None]  # [B · K, P + K · M]
    branches = branches._replace(
        visible=ops.logical_or(ops.take(branches.visible, origin, axis=0), own),
        scores=sums,
        parents=extend(branches.parents, origin, origin, state.step),
        found=found,
    )
    return state._replace(
        ids=extend(state.ids, origin, tokens, state.slot),
        real=ops.slice_update(state.real, (0, state.slot), ops.ones_like(tokens[:, None], dtype="bool")),
        length=state.length + 1,
        slot=state.slot + 1,
        step=state.step + 1,
        finished=closed,
        search=branches,
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
