"""Generation one step at a time, with the scores, hidden states and attentions of each on the host.

It is for what the compiled loop cannot do: call the caller's functions, and return more than tokens. Each step is a few
compiled programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from tfgptj.config import GPTJConfig
from tfgptj.generation import loop
from tfgptj.generation.chain import ON_THE_HOST, Names, Numbers, cut_chain, process
from tfgptj.generation.compiling import library_of, to_numpy
from tfgptj.generation.functions import Functions
from tfgptj.generation.results import Records
from tfgptj.heads import TFGPTJForCausalLM

# What works on logits and tokens alone, not with the model.
WITHOUT_MODEL = ("part", "pick")


class Shapes:
    """What stands for a model in programs that do not run it.

    Args:
        config: the model's.
    """

    variables = ()

    def __init__(self, config: GPTJConfig) -> None:
        self.config = config


def begin(
    model: TFGPTJForCausalLM, static: tuple[loop.Plan, bool], ids: Any, real: Any, controls: loop.Controls
) -> tuple[Any, loop.State, tuple[Any, ...]]:
    """Logits after the prompt, the state, and all hidden states and attentions if the static argument says so."""
    plan, recording = static
    record: list[Any] | None = [] if recording else None
    logits, state = loop.start(model, plan, ids, real, controls, record)
    return logits, state, tuple(record or ())


def proceed(model: TFGPTJForCausalLM, recording: bool, state: loop.State) -> tuple[Any, loop.State, tuple[Any, ...]]:
    """The same after the newest token."""
    record: list[Any] | None = [] if recording else None
    logits, state = loop.forward(model, state, record)
    return logits, state, tuple(record or ())


def part(
    model: TFGPTJForCausalLM,
    static: tuple[loop.Plan, Names],
    logits: Any,
    numbers: Numbers,
    state: loop.State,
    controls: loop.Controls,
) -> Any:
    """Scores [B, V] after a part of the chain."""
    plan, names = static
    return process(names, numbers, whole(model, logits), loop.context_of(state, controls, plan.guided))


def pick(
    model: TFGPTJForCausalLM, plan: loop.Plan, logits: Any, scores: Any, state: loop.State, controls: loop.Controls
) -> loop.State:
    """The state after each row's next token was chosen by its scores."""
    return loop.settle(plan, whole(model, logits), whole(model, scores), state, controls)


def pick_on_host(
    model: TFGPTJForCausalLM, plan: loop.Plan, logits: Any, scores: Any, state: loop.State, controls: loop.Controls
) -> loop.State:
    """:func:`pick` without random numbers, in NumPy, for an engine: its logits and its state are there already."""
    eos, pad, limit = (to_numpy(number) for number in (controls.eos, controls.pad, controls.limit))
    controls = controls._replace(eos=eos, pad=pad, limit=limit)
    return loop.settle(plan, logits, to_numpy(scores), state, controls)


def whole(model: TFGPTJForCausalLM, logits: Any) -> Any:
    """Logits whose last dimension is known, which it is not of a program's argument."""
    return library_of(logits).reshape(logits, (-1, model.config.vocab_size))


class Stepper:
    """Makes one step after the other.

    Args:
        compiled: gives the program for a function of this module, by its name.
        plan: of the run; its processors may have the caller's functions among them.
        functions: those.
        controls: of the run, with the numbers of all processors.
        records: what to keep of each step.
    """

    def __init__(
        self,
        compiled: Callable[[str], Callable[..., Any]],
        plan: loop.Plan,
        functions: Functions,
        controls: loop.Controls,
        records: Records,
    ) -> None:
        self.compiled, self.functions, self.records = compiled, functions, records
        self.parts = cut_chain(plan.processors, controls.processors)
        # What chooses needs none of them, and none of their numbers.
        kept = tuple(link for link in plan.processors if link[0] in ("guidance", "remove_invalid_values"))
        self.plan = plan._replace(processors=kept)
        self.controls = controls._replace(processors=())

    def step(self, state: loop.State | None, ids: Any = None, real: Any = None, past: Any = ()) -> loop.State:
        """One more token for each row: the first after the prompt `ids`, later ones after a state."""
        logits, state, record = self._begin(ids, real, past) if state is None else self._proceed(state)
        caches, state = state.caches, state._replace(caches=())  # what follows does not look at them
        scores = self._scores(logits, state)
        self.records.add(logits, scores, record, int(state.slot), int(state.step))
        here = isinstance(logits, np.ndarray) and not self.plan.do_sample
        state = self.compiled("pick_on_host" if here else "pick")(self.plan, logits, scores, state, self.controls)
        return state._replace(caches=caches)

    def _begin(self, ids: Any, real: Any, past: Any) -> Any:
        """What the program `begin` gives."""
        static = (self.plan._replace(resumed=bool(past)), self.records.recording)
        return self.compiled("begin")(static, ids, real, self.controls._replace(past=past))

    def _proceed(self, state: loop.State) -> tuple[Any, loop.State, tuple[Any, ...]]:
        return self.compiled("proceed")(self.records.recording, state)

    def _scores(self, logits: Any, state: loop.State) -> Any:
        for names, numbers in self.parts:
            if names[0][0] in ON_THE_HOST:
                finished = to_numpy(state.finished)
                values = self.functions.apply(names[0][0], texts_of(state), to_numpy(logits), finished)
                logits = ops.convert_to_tensor(values)
            else:
                logits = self.compiled("part")((self.plan, names), logits, numbers, state, self.controls)
        return logits


def texts_of(state: loop.State) -> list[np.ndarray]:
    """The tokens of each row, int32 [n] each, prompt included, padding not."""
    ids, real = (to_numpy(table)[:, : int(state.slot)] for table in (state.ids, state.real))
    return [row[mask] for row, mask in zip(ids, real, strict=True)]
