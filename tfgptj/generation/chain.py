"""What is done to the logits before a token is chosen: built from a configuration, in PyTorch's order.

A chain has two parts: the names of its processors, with what shapes their graphs, and the numbers that they compute
with. Runs that differ in numbers alone share one compiled program.

Source: the order of `_get_logits_processor` in transformers' generation/utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from tfgptj.generation import constraints, penalties, processors
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.parameters import LOWEST_BIAS
from tfgptj.generation.tokens import Context as Context

Names: TypeAlias = tuple[tuple[str, tuple[Any, ...]], ...]  # of functions in `FUNCTIONS`, with static arguments
Numbers: TypeAlias = tuple[tuple[Any, ...], ...]  # their tensors, in the same order

# Where the caller's own functions stand in a chain. They run on the host, between two compiled parts of it.
PREFIX, CUSTOM = "prefix_allowed_tokens_fn", "logits_processor"
ON_THE_HOST = (PREFIX, CUSTOM)

FUNCTIONS = {
    "guidance": penalties.guidance,
    "sequence_bias": penalties.sequence_bias,
    "diversity": penalties.diversity,
    "encoder_repetition_penalty": penalties.encoder_repetition_penalty,
    "repetition_penalty": penalties.repetition_penalty,
    "frequency_and_presence_penalty": penalties.frequency_and_presence_penalty,
    "no_repeat_ngram": constraints.no_repeat_ngram,
    "encoder_no_repeat_ngram": constraints.encoder_no_repeat_ngram,
    "min_length": constraints.min_length,
    "min_new_tokens": constraints.min_new_tokens,
    "forced_bos": constraints.forced_bos,
    "forced_eos": constraints.forced_eos,
    "remove_invalid_values": constraints.remove_invalid_values,
    "exponential_decay_length_penalty": penalties.exponential_decay_length_penalty,
    "suppress": constraints.suppress,
    "suppress_at_begin": constraints.suppress_at_begin,
    "vocabulary_limit": constraints.vocabulary_limit,
    "temperature": processors.temperature,
    "top_k": processors.top_k,
    "top_p": processors.top_p,
    "cutoffs": processors.cutoffs,
    "min_p": processors.min_p,
    "typical_p": processors.typical_p,
    "epsilon_cutoff": processors.epsilon_cutoff,
    "eta_cutoff": processors.eta_cutoff,
    "renormalize": processors.renormalize,
}


class Builder:
    """A chain as it grows."""

    def __init__(self) -> None:
        self.names: list[tuple[str, tuple[Any, ...]]] = []
        self.numbers: list[tuple[Any, ...]] = []

    def add(self, name: str, *numbers: Any, static: tuple[Any, ...] = ()) -> None:
        """Append a processor. Python's numbers become float32 or int32 scalars."""
        arrays = [np.asarray(x, "int32" if np.asarray(x).dtype.kind == "i" else "float32") for x in numbers]
        self.names.append((name, static))
        self.numbers.append(tuple(arrays))


def build_chain(config: GenerationConfig, functions: Sequence[str] = ()) -> tuple[Names, Numbers]:
    """The processors that a configuration asks for.

    Args:
        config: the parameters.
        functions: which of :data:`ON_THE_HOST` there are; a chain with them must be cut by :func:`cut_chain`.

    Returns:
        The names with their static arguments, and the numbers as NumPy arrays, float32 or int32.
    """
    chain = Builder()
    _add_penalties(chain, config)
    _add_constraints(chain, config, PREFIX in functions)
    if CUSTOM in functions:
        chain.add(CUSTOM)
    if config.samples:
        _add_warpers(chain, config)
    if config.renormalize_logits:
        chain.add("renormalize")
    return tuple(chain.names), tuple(chain.numbers)


def cut_chain(names: Names, numbers: Numbers) -> list[tuple[Names, Numbers]]:
    """A chain in parts: each of the caller's functions alone, and what can be compiled between them."""
    parts: list[tuple[Names, Numbers]] = []
    start = 0
    for index in [i for i, (name, _) in enumerate(names) if name in ON_THE_HOST] + [len(names)]:
        parts += [(names[start:index], numbers[start:index]), (names[index : index + 1], numbers[index : index + 1])]
        start = index + 1
    return [part for part in parts if part[0]]


def process(names: Names, numbers: Numbers, logits: Any, context: Context) -> Any:
    """Apply a chain to the logits [B, V]."""
    for (name, static), tensors in zip(names, numbers, strict=True):
        logits = FUNCTIONS[name](logits, context, *tensors, *static)  # type: ignore[operator]
    return logits


def _add_penalties(chain: Builder, config: GenerationConfig) -> None:
    if config.guidance_scale not in (None, 1):
        chain.add("guidance", config.guidance_scale)
    if config.sequence_bias:
        chain.add("sequence_bias", *_sequences(config.sequence_bias))
    if config.num_beam_groups > 1:
        chain.add("diversity", float(config.diversity_penalty))
    if config.encoder_repetition_penalty != 1:
        chain.add("encoder_repetition_penalty", float(config.encoder_repetition_penalty))
    if config.repetition_penalty != 1:
        chain.add("repetition_penalty", float(config.repetition_penalty))
    if config.frequency_penalty or config.presence_penalty:
        chain.add("frequency_and_presence_penalty", float(config.frequency_penalty), float(config.presence_penalty))


def _add_constraints(chain: Builder, config: GenerationConfig, prefix: bool) -> None:
    ends = config.eos_token_ids
    if config.no_repeat_ngram_size:
        chain.add("no_repeat_ngram", config.no_repeat_ngram_size)
    if config.encoder_no_repeat_ngram_size:
        chain.add("encoder_no_repeat_ngram", config.encoder_no_repeat_ngram_size)
    words = [word for word in config.bad_words_ids or () if len(word) > 1 or word[0] not in ends]
    if words:
        chain.add("sequence_bias", *_sequences([(word, LOWEST_BIAS) for word in words]))
    if config.min_length and ends:
        chain.add("min_length", config.min_length)
    if config.min_new_tokens and ends:
        chain.add("min_new_tokens", config.min_new_tokens)
    if prefix:
        chain.add(PREFIX)
    if config.forced_bos_token_id is not None:
        chain.add("forced_bos", _ids([config.forced_bos_token_id]))
    if config.forced_eos_token_id is not None:
        chain.add("forced_eos", _ids(np.atleast_1d(config.forced_eos_token_id)))
    if config.remove_invalid_values:
        chain.add("remove_invalid_values")
    if config.exponential_decay_length_penalty is not None:
        start, factor = config.exponential_decay_length_penalty
        chain.add("exponential_decay_length_penalty", start, float(factor))
    if config.suppress_tokens:
        chain.add("suppress", _ids(config.suppress_tokens))
    if config.begin_suppress_tokens:
        forced = config.forced_bos_token_id is not None
        chain.add("suppress_at_begin", _ids(config.begin_suppress_tokens), static=(forced,))
    if config.vocabulary_limit is not None:
        chain.add("vocabulary_limit", config.vocabulary_limit)


def _add_warpers(chain: Builder, config: GenerationConfig) -> None:
    # Beams go on with one token more than may end the text.
    keep = max(len(config.eos_token_ids), 1) + 1 if config.num_beams > 1 else 1
    if config.temperature != 1:
        lowest = 1e-30 if config.num_beams == 1 else 1e-20  # in float32 a number below 1e-38 is 0
        chain.add("temperature", max(float(config.temperature), lowest), static=(config.num_beams > 1,))
    if config.top_k:
        chain.add("top_k", static=(max(config.top_k, keep),))
    shares = {"top_p": config.top_p < 1, "min_p": config.min_p is not None, "typical_p": config.typical_p < 1}
    shares |= {name: 0 < getattr(config, name) < 1 for name in ("epsilon_cutoff", "eta_cutoff")}
    for name in (name for name, wanted in shares.items() if wanted):
        chain.add(name, float(getattr(config, name)), static=(keep,))


def _ids(ids: Any) -> np.ndarray:
    """Token ids, int32 [K]; K is rounded up with -1, which is no token, so that few sizes are compiled for."""
    return np.asarray([*ids, *[-1] * (_size(len(ids)) - len(ids))], "int32")


def _sequences(pairs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of ids with their biases, as :func:`tfgptj.generation.penalties.sequence_bias` takes them."""
    count, width = _size(len(pairs)), _size(max(len(ids) for ids, _ in pairs))
    sequences, lengths, bias = np.full((count, width), -1, "int32"), np.zeros(count, "int32"), np.zeros(count)
    for row, (ids, value) in enumerate(pairs):
        sequences[row, width - len(ids) :] = ids
        lengths[row], bias[row] = len(ids), value
    return sequences, lengths, bias


def _size(count: int) -> int:
    """A power of two, and at least 4."""
    return max(4, 1 << (count - 1).bit_length())
