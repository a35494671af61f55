"""Which kind of run generates as a configuration asks."""

from __future__ import annotations

from typing import Any

from tfgptj.errors import GenerationError
from tfgptj.generation.beam_run import BeamRun
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.contrastive_run import ContrastiveRun
from tfgptj.generation.run import Extras, Run, resolve_config
from tfgptj.generation.speculative_run import SpeculativeRun, mode_with, settings_of
from tfgptj.heads import TFGPTJForCausalLM

RUNS: dict[str, type[Run]] = {
    **{"greedy": Run, "sample": Run, "contrastive": ContrastiveRun},
    **dict.fromkeys(("beam", "beam_sample", "group_beam"), BeamRun),
    **dict.fromkeys(("prompt_lookup", "assisted"), SpeculativeRun),
}


def new_run(
    model: TFGPTJForCausalLM,
    input_ids: Any,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
    jit_compile: bool | None = None,
    parameters: dict[str, Any] | None = None,
    extras: Extras = Extras(),
) -> Run:
    """A generation that is checked and ready to start.

    Args:
        parameters: keyword arguments of the configuration.
        extras: what else `generate` was given.
        model, input_ids, attention_mask, generation_config, seed, jit_compile:
            see :func:`tfgptj.generation.generate.generate`.

    Raises:
        InputError, GenerationError: for what `generate` cannot do.
    """
    assistant = extras.assistant
    config = resolve_config(model, generation_config, settings_of(assistant, generation_config, parameters or {}))
    return RUNS[mode_with(assistant, config, model)](
        model, input_ids, attention_mask, config, seed, jit_compile, extras
    )


def check_streaming(run: Run) -> None:
    """Refuse a search where text is wanted as it comes.

    Raises:
        GenerationError: if tokens are not final as they come.
    """
    if not run.streams:
        raise GenerationError(f"num_beams={run.config.num_beams} cannot be streamed: the best text is known at the end")
