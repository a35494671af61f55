"""The parameters of generation: names, defaults, what values each takes, and which of Hugging Face's are not for us."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

from tfgptj import limits
from tfgptj.errors import GenerationError

# What a bias of minus infinity is kept as: JSON has no infinity, and sums of it stay finite.
LOWEST_BIAS = -1e30
HIGHEST_BIAS = 1e6

Check = Callable[[str, Any], None]


class Parameter(NamedTuple):
    """A default, and a check that raises :class:`GenerationError` for values that the parameter does not take."""

    default: Any
    check: Check


def plain(value: Any) -> Any:
    """A value as JSON holds it: Python's numbers for NumPy's, lists for tuples, sets and arrays, pairs for a dict."""
    if isinstance(value, dict):
        return [[plain(key), plain(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value.item() if isinstance(value, numbers.Number) and hasattr(value, "item") else value


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Raise unless a value is an integer between two others.

    Raises:
        GenerationError: naming the parameter and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise GenerationError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        shown = f"{value:,}" if abs(value) < 10**30 else "a far larger number"
        raise GenerationError(f"{name} must be between {low:,} and {high:,}, got {shown}")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise unless a value is a number between two others.

    Raises:
        GenerationError: naming the parameter and the range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise GenerationError(f"{name} must be a number, got {value!r}")
    if math.isnan(value) or not low <= value <= high:
        raise GenerationError(f"{name} must be between {low:g} and {high:g}, got {value!r}")


def whole(default: Any, low: int, high: int, optional: bool = True) -> Parameter:
    """An integer, or None if `optional`."""

    def check(name: str, value: Any) -> None:
        if value is not None or not optional:
            check_whole(name, value, low, high)

    return Parameter(default, check)


def number(default: Any, low: float, high: float, optional: bool = False) -> Parameter:
    """A number, or None if `optional`."""

    def check(name: str, value: Any) -> None:
        if value is not None or not optional:
            check_number(name, value, low, high)

    return Parameter(default, check)


def flag(default: Any, optional: bool = False) -> Parameter:
    """True or False, or None if `optional`."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, bool) and not (optional and value is None):
            raise GenerationError(f"{name} must be True or False, got {value!r}")

    return Parameter(default, check)


def choice(default: Any, *values: Any) -> Parameter:
    """One of a few values."""

    def check(name: str, value: Any) -> None:
        if not any(type(value) is type(allowed) and value == allowed for allowed in values):
            raise GenerationError(f"{name} must be one of {', '.join(map(repr, values))}, got {value!r}")

    return Parameter(default, check)


def token_list(name: str, value: Any) -> None:
    """A list of token ids, or None.

    Raises:
        GenerationError: for anything else.
    """
    if value is None:
        return
    if not isinstance(value, list):
        raise GenerationError(f"{name} must be a list of token ids, got {value!r}")
    for token in value:
        check_whole(name, token, 0, limits.MAX_ID)


def token_or_tokens(name: str, value: Any) -> None:
    """A token id, a list of them, or None.

    Raises:
        GenerationError: for anything else.
    """
    token_list(name, value if value is None or isinstance(value, list) else [value])


def token_lists(name: str, value: Any) -> None:
    """A list of lists of token ids, none of them empty, or None.

    Raises:
        GenerationError: for anything else.
    """
    if value is None:
        return
    if not isinstance(value, list) or not all(isinstance(tokens, list) and tokens for tokens in value):
        raise GenerationError(f"{name} must be a list of lists of token ids, none of them empty, got {value!r}")
    for tokens in value:
        token_list(name, tokens)


def biases(name: str, value: Any) -> None:
    """Pairs of a list of token ids and a number, or None.

    Raises:
        GenerationError: for anything else.
    """
    if value is None:
        return
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise GenerationError(
            f"{name} must be a dict of tuples of token ids and their biases, or a list of such pairs, got {value!r}"
        )
    token_lists(name, [tokens for tokens, _ in value])
    for _, bias in value:
        if bias != -math.inf:
            check_number(name, bias, LOWEST_BIAS, HIGHEST_BIAS)


def decay(name: str, value: Any) -> None:
    """A pair of the new tokens after which a penalty begins and its base, or None.

    Raises:
        GenerationError: for anything else.
    """
    if value is None:
        return
    if not isinstance(value, list) or len(value) != 2:
        raise GenerationError(f"{name} must be a pair of a number of tokens and a factor, got {value!r}")
    check_whole(name, value[0], 0, limits.MAX_POSITIONS)
    check_number(name, value[1], 0.0, 1e6)


def texts(name: str, value: Any) -> None:
    """A string that is not empty, a list of such, or None.

    Raises:
        GenerationError: for anything else.
    """
    for text in value if isinstance(value, list) else () if value is None else (value,):
        if not isinstance(text, str) or not text:
            raise GenerationError(f"{name} must be strings that are not empty, got {value!r}")


LENGTH = whole(None, 1, limits.MAX_POSITIONS)
TOKEN = whole(None, 0, limits.MAX_ID)
PENALTY = number(1.0, 1e-3, 1e3)

PARAMETERS: dict[str, Parameter] = {
    # How long
    "max_new_tokens": LENGTH,
    "max_length": LENGTH,
    "min_new_tokens": whole(None, 0, limits.MAX_POSITIONS),
    "min_length": whole(0, 0, limits.MAX_POSITIONS),
    "max_time": number(None, 0.0, 1e9, optional=True),
    "stop_strings": Parameter(None, texts),
    # How tokens are chosen
    "do_sample": flag(False),
    "num_beams": whole(1, 1, 2**10, optional=False),
    "num_beam_groups": whole(1, 1, 2**10, optional=False),
    "diversity_penalty": number(0.0, 0.0, 1e6),
    "length_penalty": number(1.0, -5.0, 5.0),
    "early_stopping": choice(False, False, True, "never"),
    "penalty_alpha": number(None, 0.0, 1.0, optional=True),
    "prompt_lookup_num_tokens": whole(None, 1, limits.MAX_POSITIONS),
    "max_matching_ngram_size": whole(None, 1, limits.MAX_POSITIONS),
    "num_assistant_tokens": whole(20, 1, limits.MAX_POSITIONS, optional=False),
    "num_assistant_tokens_schedule": choice("constant", "constant", "heuristic", "heuristic_transient"),
    "assistant_confidence_threshold": number(0.4, 0.0, 1.0, optional=True),
    "num_return_sequences": whole(1, 1, 2**16, optional=False),
    # What the distribution is made into when tokens are drawn
    "temperature": number(1.0, 0.0, 1e6),
    "top_k": whole(50, 0, limits.MAX_VOCAB),
    "top_p": number(1.0, 0.0, 1.0),
    "min_p": number(None, 0.0, 1.0, optional=True),
    "typical_p": number(1.0, 1e-6, 1.0),
    "epsilon_cutoff": number(0.0, 0.0, 1.0),
    "eta_cutoff": number(0.0, 0.0, 1.0),
    # What is favoured, and what is forbidden
    "guidance_scale": number(None, 0.0, 1e3, optional=True),
    "sequence_bias": Parameter(None, biases),
    "encoder_repetition_penalty": PENALTY,
    "repetition_penalty": PENALTY,
    "frequency_penalty": number(0.0, -1e3, 1e3),
    "presence_penalty": number(0.0, -1e3, 1e3),
    "no_repeat_ngram_size": whole(0, 0, limits.MAX_POSITIONS),
    "encoder_no_repeat_ngram_size": whole(0, 0, limits.MAX_POSITIONS),
    "bad_words_ids": Parameter(None, token_lists),
    "forced_bos_token_id": TOKEN,
    "forced_eos_token_id": Parameter(None, token_or_tokens),
    "remove_invalid_values": flag(False),
    "exponential_decay_length_penalty": Parameter(None, decay),
    "suppress_tokens": Parameter(None, token_list),
    "begin_suppress_tokens": Parameter(None, token_list),
    "vocabulary_limit": whole(None, 1, limits.MAX_VOCAB),
    "renormalize_logits": flag(False),
    # What is returned
    "return_dict_in_generate": flag(False),
    "output_scores": flag(False),
    "output_logits": flag(None, optional=True),
    "output_hidden_states": flag(False),
    "output_attentions": flag(False),
    # Special tokens
    "bos_token_id": TOKEN,
    "eos_token_id": Parameter(None, token_or_tokens),
    "pad_token_id": TOKEN,
    # How the work is done
    "prefill_chunk_size": whole(None, 1, limits.MAX_POSITIONS),
}

DEFAULTS: dict[str, Any] = {name: parameter.default for name, parameter in PARAMETERS.items()}

# Hugging Face's parameters that tfgptj cannot follow, with the value that turns each off; any other value is refused.
UNSUPPORTED: dict[str, Any] = {
    "assistant_early_exit": None,
    "assistant_lookbehind": 10,
    "constraints": None,
    "custom_generate": None,
    "decoder_start_token_id": None,
    "dola_layers": None,
    "force_words_ids": None,
    "forced_decoder_ids": None,
    "is_assistant": False,
    "target_lookbehind": 10,
    "token_healing": False,
    "watermarking_config": None,
}

# Hugging Face's parameters that change no token, and what files say about themselves: taken and passed over, because
# there is always a cache, of one kind, and generation is always compiled.
IGNORED = (
    *("use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "low_memory"),
    *("compile_config", "disable_compile"),
    *("_from_model_config", "_commit_hash", "transformers_version", "generation_kwargs"),
)

# Arguments of `generate` that are no parameters of a configuration.
ARGUMENTS = (
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "assistant_model", "tokenizer"),
    *("negative_prompt_ids", "negative_prompt_attention_mask", "prefix_cache", "seed", "jit_compile"),
)
