"""Contrastive search on the host's side."""

from __future__ import annotations

from tfgptj.generation import contrastive, contrastive_stepping, memory, stepping
from tfgptj.generation.run import Run


class ContrastiveRun(Run):
    """A generation by contrastive search: see :mod:`tfgptj.generation.contrastive`."""

    functions = contrastive
    steps = contrastive_stepping
    needs_hidden = True

    @property
    def search(self) -> int:
        return contrastive.candidates_of(self.config, self.model.config.vocab_size)

    @property
    def weight(self) -> float:
        return float(self.config.penalty_alpha)

    def _slots(self, room: int) -> int:
        return room + self.search - 1

    def _beside(self, rows: int, prompt: int, room: int) -> int:
        return memory.contrastive_memory(self.model.config, rows, self.search, prompt + self._slots(room))

    def _new_stepper(self) -> stepping.Stepper:
        return contrastive_stepping.ContrastiveStepper(*self._of_steps())
