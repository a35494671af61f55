"""Beams one step at a time: what :mod:`tfgptj.generation.stepping` is to a plain run.

The host says which candidates end their text, as an end-of-text token would: those in which a stop string is complete,
or that a criterion of the caller's picks.

Source: transformers 4.57, `_beam_search`. In groups of beams the criteria of 4.55 end all texts or none; here they do
as in a plain search.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from tfgptj.generation import beams, hypotheses
from tfgptj.generation.chain import ON_THE_HOST, Names, Numbers, process
from tfgptj.generation.compiling import to_numpy
from tfgptj.generation.hypotheses import Beams, Rules, Step, of_all, of_group
from tfgptj.generation.loop import Controls, Plan, State
from tfgptj.generation.stepping import Stepper, texts_of, whole
from tfgptj.generation.stopping import BranchEnds
from tfgptj.heads import TFGPTJForCausalLM


def begin(
    model: TFGPTJForCausalLM, static: tuple[Plan, bool], ids: Any, real: Any, controls: Controls
) -> tuple[Any, State, tuple[Any, ...]]:
    """Logits after the prompts, the state, and all hidden states and attentions if the static argument says so."""
    plan, recording = static
    record: list[Any] | None = [] if recording else None
    logits, state = beams.start(model, plan, ids, real, controls, record)
    return logits, state, tuple(record or ())


def proceed(model: TFGPTJForCausalLM, static: tuple[Plan, bool], state: State) -> tuple[Any, State, tuple[Any, ...]]:
    """The same after the newest tokens."""
    plan, recording = static
    record: list[Any] | None = [] if recording else None
    logits, caches = beams.forward(model, plan.search, state, record)
    return logits, state._replace(caches=caches), tuple(record or ())


def share(model: TFGPTJForCausalLM, static: tuple[Plan, int], logits: Any) -> Any:
    """A group's log-probabilities [B · G, V]."""
    plan, group = static
    return of_group(plan.search, ops.log_softmax(whole(model, logits), axis=-1), group)


def part(
    model: TFGPTJForCausalLM,
    static: tuple[Plan, int, Names],
    scores: Any,
    numbers: Numbers,
    state: State,
    controls: Controls,
    taken: tuple[Any, ...],
) -> Any:
    """A group's scores [B · G, V] after a part of the chain; earlier groups have taken tokens [B · G]."""
    plan, group, names = static
    context = beams.group_context(plan, group, state, controls, taken)
    return process(names, numbers, whole(model, scores), context)


def look(model: TFGPTJForCausalLM, static: tuple[Plan, int], scores: Any, state: State, controls: Controls) -> Beams:
    """A group's candidates by its scores [B · G, V]."""
    plan, group = static
    return hypotheses.candidates(plan.search, group, beams.floored(whole(model, scores)), state, controls)


def settle(
    model: TFGPTJForCausalLM,
    static: tuple[Plan, int],
    texts: Beams,
    state: State,
    controls: Controls,
    ended: Any,
    stopped: Any,
) -> Step:
    """What becomes of a group's candidates, of which some, bool [B, C], end; all do if it is stopped."""
    plan, group = static
    rules: Rules = plan.search
    count = min(rules.candidates, rules.size * model.config.vocab_size)  # it is not known of a program's argument
    texts = Beams(*(ops.reshape(each, (-1, count)) for each in texts))
    return hypotheses.settle(rules, group, texts, state, controls, ops.reshape(ended, (-1, count)), stopped)


def advance(model: TFGPTJForCausalLM, plan: Plan, logits: Any, steps: tuple[Step, ...], state: State) -> State:
    """The state after a step of all groups."""
    return beams.advance(plan, logits, steps, state)


class BeamStepper(Stepper):
    """Makes one step after the other.

    Args:
        ends: says which candidates end.
        *arguments: see :class:`tfgptj.generation.stepping.Stepper`.
    """

    def __init__(self, ends: BranchEnds, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ends, self.rules = ends, self.plan.search

    def step(self, state: State | None, ids: Any = None, real: Any = None, past: Any = ()) -> State:
        if state is None:
            logits, state, record = self._begin(ids, real, past)
        else:
            logits, state, record = self.compiled("proceed")((self.plan, self.records.recording), state)
        steps: list[Step] = []
        scores: list[Any] = []
        for group in range(self.rules.groups):
            scores.append(self._of_group(group, logits, state, tuple(step.beams.tokens for step in steps)))
            if len(scores) == self.rules.groups:
                self.records.add(logits, of_all(self.rules, scores), record, int(state.slot), int(state.step))
            steps.append(self._settled(group, scores[-1], state))
        state = self.compiled("advance")(self.plan, logits, tuple(steps), state)
        self.ends.follow(*(to_numpy(of_all(self.rules, [step.beams[i] for step in steps])) for i in range(2)))
        return state

    def _of_group(self, group: int, logits: Any, state: State, taken: tuple[Any, ...]) -> Any:
        """Its processed scores [B · G, V]."""
        scores = self.compiled("share")((self.plan, group), logits)
        for names, numbers in self.parts:
            if names[0][0] in ON_THE_HOST:
                rows = np.arange(len(state.finished)).reshape(-1, self.rules.groups, self.rules.size)[:, group].ravel()
                every = texts_of(state)
                texts = [every[row] for row in rows]
                finished = to_numpy(state.finished)[rows]
                values = self.functions.apply(names[0][0], texts, to_numpy(scores), finished, self.rules.size)
                scores = ops.convert_to_tensor(values)
            else:
                static = (self.plan, group, names)
                scores = self.compiled("part")(static, scores, numbers, state, self.controls, taken)
        return scores

    def _settled(self, group: int, scores: Any, state: State) -> Step:
        static = (self.plan, group)
        texts: Beams = self.compiled("look")(static, scores, state, self.controls)
        origin, tokens = to_numpy(texts.origin), to_numpy(texts.tokens)
        written = to_numpy(state.ids)[:, int(state.slot) - int(state.step) : int(state.slot)]
        ended = self.ends.judge(origin, tokens, written, self.records.so_far)
        flags = (ops.convert_to_tensor(ended), ops.convert_to_tensor(self.ends.out_of_time))
        return self.compiled("settle")(static, texts, state, self.controls, *flags)
