"""Drafts on the host's side: see :mod:`tfgptj.generation.speculation`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from keras import ops

from tfgptj.errors import GenerationError, InputError, NonFiniteLogitsError
from tfgptj.generation import loop, speculation, stepping
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.prompts import Rows
from tfgptj.generation.results import GenerationOutput, Records
from tfgptj.generation.run import Run
from tfgptj.generation.stopping import Ends
from tfgptj.heads import TFGPTJForCausalLM

# Tokens that must have stood before, where nobody says how many.
NGRAM = 2

# What an assistant's own generation configuration may say.
OF_THE_ASSISTANT = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")


class SpeculativeRun(Run):
    """A generation with drafts, from the text itself or from an assistant.

    Several rows are generated one after the other: each row's drafts are accepted to another extent.
    """

    functions = speculation
    compiles = ("prefill", "decode", "begin", "look_ahead")

    def __init__(self, model: TFGPTJForCausalLM, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.model_steps = self.draft_steps = 0
        assistant, needed = self.extras.assistant, self.prompt.longest + self.room
        if assistant is not None and needed > assistant.config.n_positions:
            raise InputError(
                f"a prompt of {self.prompt.longest} tokens and {self.room} new ones are {needed}, over "
                f"n_positions={assistant.config.n_positions} of the assistant_model: leave it out, or shorten the text"
            )

    @property
    def search(self) -> bool:
        """Whether shapes are fixed."""
        return self.fixed

    @property
    def owner(self) -> speculation.Pair:
        return speculation.Pair(self.model, self.extras.assistant)

    @property
    def spare(self) -> int:
        return self._most if self.fixed else 0

    @property
    def _most(self) -> int:
        """Drafts at once, at most."""
        config = self.config
        if self.extras.assistant is None:
            return config.prompt_lookup_num_tokens
        constant = config.num_assistant_tokens_schedule == "constant"
        return config.num_assistant_tokens if constant else max(2 * config.num_assistant_tokens, 16)

    def _controls(self) -> loop.Controls:
        config = self.config
        drafting = speculation.Drafting(
            offsets=np.arange(self._most, dtype="int32"),
            ngram=np.int32(config.max_matching_ngram_size or NGRAM),
            width=np.int32(self._most if self.extras.assistant is None else config.num_assistant_tokens),
            grows=np.bool_(config.num_assistant_tokens_schedule != "constant"),
            confidence=np.float32(config.assistant_confidence_threshold or 0.0),
        )
        return super()._controls()._replace(search=speculation.Drafting(*map(ops.convert_to_tensor, drafting)))

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        if len(self.prompt.ids) == 1:
            return super().chunks(size)
        return self._one_after_the_other(size)

    def _one_after_the_other(self, size: int) -> Iterator[np.ndarray]:
        """All tokens at once."""
        start, parts = time.monotonic(), []
        for row in range(len(self.prompt.ids)):
            parts.append(self._alone(row, start))
            for _ in parts[-1].chunks(size):
                pass
        self._put_together(parts)
        yield self.new

    def _alone(self, row: int, start: float) -> SpeculativeRun:
        """One row, with its number for the caller's function, in what is left of the time."""
        part: Any = self.part(slice(row, row + 1))
        part.prompt = Rows(self.prompt.ids[row : row + 1], self.prompt.real[row : row + 1])
        allowed = self.extras.functions.prefix_allowed_tokens
        if allowed is not None:
            functions = self.extras.functions._replace(prefix_allowed_tokens=lambda _, text: allowed(row, text))
            part.extras = self.extras._replace(functions=functions)
        if self.config.max_time is not None:
            left = max(self.config.max_time - (time.monotonic() - start), 0.0)
            part.config = self.config.merged({"max_time": left})
        return part

    def _put_together(self, parts: list[SpeculativeRun]) -> None:
        width, pad = max(part.new.shape[1] for part in parts), self._pad_token()
        padded = [np.pad(part.new, ((0, 0), (0, width - part.new.shape[1])), constant_values=pad) for part in parts]
        self.new = np.concatenate(padded)
        self.ends = Ends(self.config, len(parts), self.extras.tokenizer, ())
        self.ends.lengths = np.array([part.new.shape[1] for part in parts])
        self.records = Records(self.config, len(parts), self.prompt.ids.shape[1])
        self.records.put_together([part.records for part in parts])
        self.model_steps = sum(part.model_steps for part in parts)
        self.draft_steps = sum(part.draft_steps for part in parts)

    def result(self) -> np.ndarray | GenerationOutput:
        output = super().result()
        if isinstance(output, np.ndarray):
            return output
        drafted = None if self.extras.assistant is None else self.draft_steps
        return dataclasses.replace(output, model_steps=self.model_steps, draft_steps=drafted)

    def _new_stepper(self) -> stepping.Stepper:
        return SpeculativeStepper(*self._of_steps())

    def _append(self, fresh: np.ndarray, done: int) -> None:
        if not self.extras.criteria:
            super()._append(fresh, done)
            return
        for place in range(fresh.shape[1]):  # the caller's criteria see each token as it comes
            if not self.ends.all_ended:
                super()._append(fresh[:, place : place + 1], done + place)

    def _check(self, state: loop.State) -> None:
        super()._check(state)
        self.model_steps, self.draft_steps = int(state.search.passes), int(state.search.drafted)
        if not bool(state.search.finite):
            raise NonFiniteLogitsError(
                f"the assistant_model produced NaN or infinite logits within {int(state.step)} new tokens: check its "
                "weights (tfgptj validate) and its dtype, or leave it out"
            )


class SpeculativeStepper(stepping.Stepper):
    """Makes one step after the other; the model is run only where no draft was right."""

    def __init__(self, compiled: Any, plan: loop.Plan, functions: Any, controls: loop.Controls, records: Any) -> None:
        super().__init__(compiled, plan, functions, controls, records)
        self.drafting = (plan, controls)
        self.place = self.count = 0  # of the last token among the drafts, and how many there are

    def _proceed(self, state: loop.State) -> tuple[Any, loop.State, tuple[Any, ...]]:
        agreed = self.place < self.count and int(speculation.newest_of(state)) == self.drafts[self.place]
        self.place += 1
        if not agreed:
            state = self._look_ahead(state)
        return self.logits[:, self.place], state, self._record_here()

    def _look_ahead(self, state: loop.State) -> loop.State:
        plan, controls = self.drafting
        ahead = self.compiled("look_ahead")((plan, self.records.recording), state, controls)
        self.logits, drafts, count, state, self.record = ahead
        self.drafts, self.count, self.place = ops.convert_to_numpy(drafts), int(count), 0
        return state

    def _record_here(self) -> tuple[Any, ...]:
        """What was recorded up to the query whose turn it is: hidden states and attentions in turn."""
        stop = self.place + 1
        return tuple(x[:, :, :stop] if i % 2 else x[:, :stop] for i, x in enumerate(self.record))


def mode_with(assistant: Any, config: GenerationConfig, model: TFGPTJForCausalLM) -> str:
    """How tokens are chosen where there may be an assistant: "assisted", or the configuration's mode.

    Raises:
        GenerationError: if the assistant is no language model with the model's tokens, or cannot help here.
    """
    if assistant is None:
        return config.mode
    if not isinstance(assistant, TFGPTJForCausalLM):
        raise GenerationError(f"assistant_model must be a TFGPTJForCausalLM, got {type(assistant).__name__}")
    if config.mode not in ("greedy", "sample"):
        raise GenerationError(f"assistant_model cannot be combined with {config.mode} search: leave one of them out")
    sizes = (assistant.config.vocab_size, model.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise GenerationError(
            f"assistant_model has {sizes[0]} tokens and the model {sizes[1]}: both must have the same tokenizer"
        )
    return "assisted"


def settings_of(
    assistant: Any, generation_config: GenerationConfig | None, parameters: dict[str, Any]
) -> dict[str, Any]:
    """Parameters with those of the assistant's own configuration, where the caller says nothing else."""
    own = getattr(assistant, "generation_config", None)
    if not isinstance(own, GenerationConfig):
        return parameters
    said = {**(generation_config.to_dict() if isinstance(generation_config, GenerationConfig) else {}), **parameters}
    found = {name: value for name, value in own.to_dict().items() if name in OF_THE_ASSISTANT and name not in said}
    return {**found, **parameters}
