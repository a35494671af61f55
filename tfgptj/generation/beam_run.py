"""Beams on the host's side."""

from __future__ import annotations

import dataclasses

import numpy as np

from tfgptj.errors import GenerationError
from tfgptj.generation import beams, stepping
from tfgptj.generation.hypotheses import Rules
from tfgptj.generation.results import GenerationOutput
from tfgptj.generation.run import Run, to_numpy


class BeamRun(Run):
    """A generation with beams: see :mod:`tfgptj.generation.beams`."""

    functions = beams
    streams = False

    @property
    def search(self) -> Rules:
        return beams.rules_of(self.config)

    @property
    def weight(self) -> float:
        return float(self.config.length_penalty)

    @property
    def draws(self) -> int:
        return self.search.draws

    @property
    def repeats(self) -> int:
        return 1

    def result(self) -> np.ndarray | GenerationOutput:
        output = super().result()
        if isinstance(output, np.ndarray):
            return output
        found = self.found()
        return dataclasses.replace(output, sequences_scores=found.scores, beam_indices=found.beam_indices)

    def found(self) -> beams.Result:
        """The best texts so far, which are what they come to once all are closed."""
        assert self.state is not None  # chunks() ran
        return beams.result_of(self.config, *(to_numpy(table) for table in self.state.search.found))

    def _slots_read(self) -> int:
        assert self.state is not None  # chunks() ran
        return int(self.state.slot) - int(self.state.step)  # the prompt's: those after them are the beams' own

    def _slots(self, prompt: int, room: int) -> int:
        return room * self.config.num_beams  # they share the prompt

    def _check_combined(self) -> None:
        config, functions = self.config, self.extras.functions
        returned = ("output_hidden_states", "output_attentions")
        asked = {
            "guidance_scale": config.guidance_scale not in (None, 1),
            "prefix_allowed_tokens_fn": functions.prefix_allowed_tokens is not None,
            "logits_processor": bool(functions.processors),
            "stop_strings": bool(config.stops),
            "max_time": config.max_time is not None,
            "stopping_criteria": bool(self.extras.criteria),
            **{name: bool(config.return_dict_in_generate and getattr(config, name)) for name in returned},
        }
        for name in (name for name, wanted in asked.items() if wanted):
            raise GenerationError(f"{name} cannot be combined with num_beams > 1 yet")

    def _new_stepper(self) -> stepping.Stepper | None:
        return None

    def _take(self, done: int) -> None:
        assert self.state is not None  # _advance made it
        if self.records.wanted:
            search = self.state.search
            self.records.add(search.step_logits, search.step_scores, (), int(self.state.slot), int(self.state.step))
        found = self.found()
        self.new = found.tokens
        if to_numpy(self.state.finished).all():
            self.ends.lengths = (found.beam_indices >= 0).sum(axis=1)
