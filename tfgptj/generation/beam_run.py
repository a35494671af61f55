"""Beams on the host's side."""

from __future__ import annotations

import dataclasses

import numpy as np

from tfgptj.generation import beam_stepping, beams, memory, stepping
from tfgptj.generation.compiling import to_numpy
from tfgptj.generation.hypotheses import Rules
from tfgptj.generation.results import GenerationOutput
from tfgptj.generation.run import Run
from tfgptj.generation.stopping import BranchEnds


class BeamRun(Run):
    """A generation with beams: see :mod:`tfgptj.generation.beams`."""

    functions = beams
    steps = beam_stepping
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

    def _slots(self, room: int) -> int:
        return room * self.search.beams  # they share the prompt

    def _beside(self, rows: int, prompt: int, room: int) -> int:
        rules = self.search
        kept = 1 + rules.candidates // rules.size
        return memory.beam_memory(self.model.config, rows, rules.beams, prompt, room, kept)

    def _new_ends(self) -> BranchEnds:
        return BranchEnds(self.prompt.ids, self.config, self.extras.tokenizer, self.extras.criteria)

    def _needs_steps(self) -> bool:
        return super()._needs_steps() or self.ends.step_by_step or self.ends.beyond_the_loop

    def _new_stepper(self) -> stepping.Stepper:
        assert isinstance(self.ends, BranchEnds)  # _new_ends made it
        return beam_stepping.BeamStepper(self.ends, *self._of_steps())

    def _is_cut_off(self) -> bool:
        return False  # a step that comes too late closes the search

    def _take(self, done: int) -> None:
        assert self.state is not None  # _advance made it
        found = self.found()
        self.new = found.tokens
        if to_numpy(self.state.finished).all():
            self.ends.lengths = (found.beam_indices >= 0).sum(axis=1)
