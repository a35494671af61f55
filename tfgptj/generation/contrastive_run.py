"""Contrastive search on the host's side."""

from __future__ import annotations

from tfgptj.errors import GenerationError
from tfgptj.generation import contrastive, stepping
from tfgptj.generation.run import Run


class ContrastiveRun(Run):
    """A generation by contrastive search: see :mod:`tfgptj.generation.contrastive`."""

    functions = contrastive
    needs_hidden = True

    @property
    def search(self) -> int:
        return contrastive.candidates_of(self.config)

    @property
    def weight(self) -> float:
        return float(self.config.penalty_alpha)

    def _check_combined(self) -> None:
        config, functions = self.config, self.extras.functions
        returned = ("output_hidden_states", "output_attentions", "output_scores", "output_logits")
        asked = {
            "guidance_scale": config.guidance_scale not in (None, 1),
            "prefix_allowed_tokens_fn": functions.prefix_allowed_tokens is not None,
            "logits_processor": bool(functions.processors),
            **{name: bool(config.return_dict_in_generate and getattr(config, name)) for name in returned},
        }
        for name in (name for name, wanted in asked.items() if wanted):
            raise GenerationError(f"{name} cannot be combined with contrastive search (penalty_alpha) yet")

    def _new_stepper(self) -> stepping.Stepper | None:
        return None
