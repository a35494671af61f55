"""What is done to the logits before a token is chosen: built from a configuration, in PyTorch's order.

A chain has two parts: the names of its processors, with what shapes their graphs, and the numbers that they compute
with. Runs that differ in numbers alone share one compiled program.

Source: the order of `_get_logits_processor` in transformers' generation/utils.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tfgptj.generation import processors
from tfgptj.generation.config import GenerationConfig

Names: TypeAlias = tuple[tuple[str, tuple[Any, ...]], ...]  # of functions in `processors`, with their static arguments
Numbers: TypeAlias = tuple[tuple[Any, ...], ...]  # their tensors, in the same order


class Context(NamedTuple):
    """The tokens so far. A row's own are those where `real` is true; they follow each other up to `slot`."""

    ids: Any  # int32 [B, S]
    real: Any  # bool [B, S]
    slot: Any  # int32 scalar, where the next token goes
    length: Any  # int32 [B], tokens of each row, prompt included
    step: Any  # int32 scalar, new tokens
    limit: Any  # int32 scalar, new tokens that a row may have
    eos: Any  # int32 [E], the tokens that end a row
    taken: Any = None  # int32 [B, n], what earlier groups of beams chose in this step; None for the first


def build_chain(config: GenerationConfig) -> tuple[Names, Numbers]:
    """The processors that a configuration asks for.

    Returns:
        The names with their static arguments, and the numbers as NumPy arrays, float32 or int32.
    """
    chain: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = []
    if config.num_beam_groups > 1:
        chain.append(("diversity", (), (np.float32(config.diversity_penalty),)))
    if config.do_sample and config.temperature != 0:
        # Below this a logit divided by it could be under what is forbidden.
        chain.append(("temperature", (), (np.float32(max(config.temperature, 1e-20)),)))
        if config.top_k:
            chain.append(("top_k", (config.top_k,), ()))
        if config.top_p < 1:
            chain.append(("top_p", (), (np.float32(config.top_p),)))
    return tuple(link[:2] for link in chain), tuple(link[2] for link in chain)


def process(names: Names, numbers: Numbers, logits: Any, context: Context) -> Any:
    """Apply a chain to the logits [B, V]."""
    for (name, static), tensors in zip(names, numbers, strict=True):
        logits = _FUNCTIONS[name](logits, context, *static, *tensors)
    return logits


_FUNCTIONS = {
    "diversity": processors.diversity,
    "temperature": processors.temperature,
    "top_k": processors.top_k,
    "top_p": processors.top_p,
}
