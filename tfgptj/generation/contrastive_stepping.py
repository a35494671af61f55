"""Contrastive search one step at a time: what :mod:`tfgptj.generation.stepping` is to a plain run."""

from __future__ import annotations

from typing import Any

from tfgptj.generation import contrastive
from tfgptj.generation.loop import Controls, Plan, State
from tfgptj.generation.stepping import Stepper, whole
from tfgptj.generation.stepping import part as part
from tfgptj.heads import TFGPTJForCausalLM


def begin(
    model: TFGPTJForCausalLM, static: tuple[Plan, bool], ids: Any, real: Any, controls: Controls
) -> tuple[State, tuple[Any, ...]]:
    """The state after the prompt, and all hidden states and attentions if the static argument says so."""
    plan, recording = static
    record: list[Any] | None = [] if recording else None
    return contrastive.start(model, plan, ids, real, controls, record), tuple(record or ())


def pick(
    model: TFGPTJForCausalLM, static: tuple[Plan, bool], scores: Any, state: State, controls: Controls
) -> tuple[State, tuple[Any, ...]]:
    """The state after each row's next token was chosen by its scores, and what the model made of that token."""
    plan, recording = static
    record: list[Any] | None = [] if recording else None
    return contrastive.settle(model, plan, whole(model, scores), state, controls, record), tuple(record or ())


class ContrastiveStepper(Stepper):
    """Makes one step after the other: see :class:`tfgptj.generation.stepping.Stepper`."""

    def step(self, state: State | None, ids: Any = None, real: Any = None, past: Any = ()) -> State:
        if state is None:
            state, self.record = self._begin(ids, real, past)
        scores = self._scores(state.search.logits, state)
        self.records.add(state.search.logits, scores, self.record, int(state.slot), int(state.step))
        static = (self.plan, self.records.recording)
        state, self.record = self.compiled("pick")(static, scores, state, self.controls)
        return state
