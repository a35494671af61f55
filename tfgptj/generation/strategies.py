"""Which module generates as a configuration asks, and what cannot be combined with it."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tfgptj.errors import GenerationError
from tfgptj.generation import beams, contrastive, loop
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.functions import Functions

STRATEGIES = {
    **{"greedy": loop, "sample": loop, "contrastive": contrastive},
    **dict.fromkeys(("beam", "beam_sample", "group_beam"), beams),
}


def strategy_of(config: GenerationConfig) -> tuple[ModuleType, Any]:
    """The module with `prefill` and `decode`, and what the configuration fixes in their graphs.

    Raises:
        GenerationError: for a mode that there is not.
    """
    if config.mode not in STRATEGIES:
        raise GenerationError(f"{config.mode} search is not supported by tfgptj: {config!r}")
    module = STRATEGIES[config.mode]
    fixed = {beams: beams.rules_of, contrastive: contrastive.candidates_of}.get(module)
    return module, None if fixed is None else fixed(config)


def check_combined(
    strategy: ModuleType, config: GenerationConfig, functions: Functions, criteria: Sequence[Any]
) -> None:
    """Raise for what a search cannot be combined with.

    Raises:
        GenerationError: naming both.
    """
    if strategy is loop:
        return
    returned = ["output_hidden_states", "output_attentions"]
    asked = {
        "guidance_scale": config.guidance_scale not in (None, 1),
        "prefix_allowed_tokens_fn": functions.prefix_allowed_tokens is not None,
        "logits_processor": bool(functions.processors),
    }
    if strategy is beams:
        asked |= {"stop_strings": bool(config.stops), "max_time": config.max_time is not None}
        asked["stopping_criteria"] = bool(criteria)
    else:
        returned += ["output_scores", "output_logits"]
    asked |= {name: bool(config.return_dict_in_generate and getattr(config, name)) for name in returned}
    for name in (name for name, wanted in asked.items() if wanted):
        search = "num_beams > 1" if strategy is beams else "contrastive search (penalty_alpha)"
        raise GenerationError(f"{name} cannot be combined with {search} yet")
