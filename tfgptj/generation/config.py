"""GenerationConfig: how text is generated, with Hugging Face's parameter names."""

from __future__ import annotations

import difflib
import math
import numbers
import os
from pathlib import Path
from typing import Any

from tfgptj import limits
from tfgptj.config import GPTJConfig, read_json
from tfgptj.errors import GenerationError
from tfgptj.files import write_json

# New tokens when nobody says how many.
DEFAULT_NEW_TOKENS = 20

DEFAULTS: dict[str, Any] = {
    "max_new_tokens": None,
    "max_length": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "num_return_sequences": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "penalty_alpha": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

# Hugging Face's other parameters with the value that turns each off. A file may hold them; any other value is refused.
UNSUPPORTED: dict[str, Any] = {
    "assistant_confidence_threshold": 0.4,
    "assistant_early_exit": None,
    "assistant_lookbehind": 10,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "cache_config": None,
    "cache_implementation": None,
    "compile_config": None,
    "constraints": None,
    "custom_generate": None,
    "decoder_start_token_id": None,
    "disable_compile": False,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_decoder_ids": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "is_assistant": False,
    "low_memory": None,
    "max_matching_ngram_size": None,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": None,
    "min_p": None,
    "no_repeat_ngram_size": 0,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": None,
    "output_scores": False,
    "prefill_chunk_size": None,
    "prompt_lookup_num_tokens": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "target_lookbehind": 10,
    "token_healing": False,
    "typical_p": 1.0,
    "use_cache": True,
    "watermarking_config": None,
}

METADATA = ("_from_model_config", "transformers_version", "generation_kwargs")


class GenerationConfig:
    """Parameters of :meth:`TFGPTJForCausalLM.generate`.

    Args:
        max_new_tokens: int, tokens to add at most; it wins over `max_length`.
        max_length: int, tokens of prompt and continuation together at most. With neither, 20 tokens are added.
        do_sample: bool, draw tokens instead of always taking the likeliest.
        temperature: number >= 0, divides the logits; 0 means no sampling at all.
        top_k: int or None, draw only among the k likeliest tokens (ties with the k-th stay); 0 and None switch it off.
        top_p: number in (0, 1], draw only among the likeliest tokens that make up this share of the probability.
        num_return_sequences: int, continuations per prompt; more than one needs `do_sample`, or as many beams.
        num_beams: int, how many continuations of a prompt are followed at once; the likeliest as a whole wins. With
            `do_sample` they are drawn.
        num_beam_groups: int, into how many groups the beams are divided; each avoids the tokens of those before it.
        diversity_penalty: number >= 0, taken from a token's log-probability for each beam of an earlier group that
            chose it in the same step.
        length_penalty: number in [-5, 5], beams are compared by log-probability / length ** length_penalty: above 0
            longer texts gain, below 0 shorter ones.
        early_stopping: when beams stop. True: as soon as there are `num_beams` finished texts; False: when a better one
            is not likely; "never": when a better one is not possible.
        penalty_alpha: number in [0, 1] or None, contrastive search among the `top_k` likeliest tokens: how much it
            counts that a token's hidden state is unlike those before it.
        bos_token_id: int, what an empty prompt starts with.
        eos_token_id: int or list of int, tokens that end a row.
        pad_token_id: int, fills finished rows; the first `eos_token_id` when not given.

    Raises:
        GenerationError: for an unknown or not supported parameter, or a value out of range.

    >>> GenerationConfig(do_sample=True, temperature=1).to_dict()
    {'do_sample': True, 'temperature': 1}
    """

    def __init__(self, /, **parameters: Any) -> None:
        self._given: dict[str, Any] = {}
        self.update(**parameters)

    def update(self, /, **parameters: Any) -> None:
        """Set parameters, all or none of them."""
        for name, value in parameters.items():
            _check_name(name, value)
        given = {**self._given, **{name: _plain(value) for name, value in parameters.items() if name in DEFAULTS}}
        _check_values({**DEFAULTS, **given})
        self._given = given

    def __getattr__(self, name: str) -> Any:
        if name in DEFAULTS:
            return self.__dict__["_given"].get(name, DEFAULTS[name])
        raise AttributeError(f"GenerationConfig has no parameter {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self.update(**{name: value})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self._given == other._given

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{name}={value!r}' for name, value in self._given.items())})"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text tokens as a tuple: empty, one or many."""
        tokens = self.eos_token_id
        return () if tokens is None else tuple(tokens) if isinstance(tokens, (list, tuple)) else (tokens,)

    def to_dict(self) -> dict[str, Any]:
        """The parameters that were set."""
        return dict(self._given)

    def merged(self, *others: GenerationConfig | dict[str, Any] | None) -> GenerationConfig:
        """A new configuration in which later ones win over earlier ones; `max_new_tokens` and `max_length`, being two
        ways to say one thing, replace each other."""
        result = dict(self._given)
        for other in others:
            given = other._given if isinstance(other, GenerationConfig) else other or {}
            if given.get("max_new_tokens") is not None or given.get("max_length") is not None:
                result.pop("max_new_tokens", None)
                result.pop("max_length", None)
            result.update(given)
        return GenerationConfig(**result)

    @classmethod
    def from_model_config(cls, config: GPTJConfig) -> GenerationConfig:
        """The special tokens of a model's configuration."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        given = {name: getattr(config, name) for name in names}
        return cls(**{name: token for name, token in given.items() if token not in (None, -1)})  # -1: no such token

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> GenerationConfig:
        """Read a `generation_config.json`.

        Raises:
            GenerationError: naming the file and what is wrong in it.
        """
        try:
            return cls(**read_json(path))
        except GenerationError as error:
            raise GenerationError(f"{path}: {error}") from None

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **hub_options: Any) -> GenerationConfig:
        """The generation configuration of a directory, a packaged model or a Hub repository."""
        from tfgptj.checkpoints.directory import companion
        from tfgptj.checkpoints.hub import resolve_directory

        directory = resolve_directory(name_or_path, files="generation", **hub_options)
        return cls.from_json_file(companion(directory, "generation_config.json"))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `generation_config.json` into a directory, which is created if need be."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_json(Path(directory) / "generation_config.json", self.to_dict())

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Save `generation_config.json` and upload it: see :func:`tfgptj.checkpoints.push.push_to_hub`."""
        from tfgptj.checkpoints.push import push_to_hub

        return push_to_hub(self, repo_id, **options)


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, so that JSON can hold them."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, numbers.Number) and hasattr(value, "item") else value


def _check_name(name: str, value: Any) -> None:
    if name in DEFAULTS or name in METADATA:
        return
    if name in UNSUPPORTED:
        neutral = UNSUPPORTED[name]
        if value is None or (isinstance(value, (bool, int, float, str)) and value == neutral):
            return
        raise GenerationError(f"{name}={value!r} is not supported by tfgptj; leave it at {UNSUPPORTED[name]!r}")
    close = difflib.get_close_matches(name, [*DEFAULTS, *UNSUPPORTED], n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(DEFAULTS)}"
    raise GenerationError(f"unknown generation parameter {name!r}; {hint}")


def _check_values(values: dict[str, Any]) -> None:
    _check_int("max_new_tokens", values["max_new_tokens"], 1, limits.MAX_POSITIONS)
    _check_int("max_length", values["max_length"], 1, limits.MAX_POSITIONS)
    if not isinstance(values["do_sample"], bool):
        raise GenerationError(f"do_sample must be True or False, got {values['do_sample']!r}")
    _check_number("temperature", values["temperature"], 0.0, 1e6)
    _check_int("top_k", values["top_k"], 0, limits.MAX_VOCAB)
    _check_number("top_p", values["top_p"], 0.0, 1.0)
    if values["top_p"] == 0:
        raise GenerationError("top_p must be above 0, got 0: no token would be left; use do_sample=False")
    if values["num_return_sequences"] is None:
        raise GenerationError("num_return_sequences must be an integer, got None")
    _check_int("num_return_sequences", values["num_return_sequences"], 1, 2**16)
    _check_search(values)
    eos = values["eos_token_id"]
    for token in eos if isinstance(eos, (list, tuple)) else () if eos is None else (eos,):
        if token is None:
            raise GenerationError("eos_token_id must be an integer, got None")
        _check_int("eos_token_id", token, 0, limits.MAX_ID)
    _check_int("bos_token_id", values["bos_token_id"], 0, limits.MAX_ID)
    _check_int("pad_token_id", values["pad_token_id"], 0, limits.MAX_ID)


def _check_search(values: dict[str, Any]) -> None:
    for name in ("num_beams", "num_beam_groups"):
        if values[name] is None:
            raise GenerationError(f"{name} must be an integer, got None")
        _check_int(name, values[name], 1, 2**10)
    _check_number("diversity_penalty", values["diversity_penalty"], 0.0, 1e6)
    _check_number("length_penalty", values["length_penalty"], -5.0, 5.0)  # float32 holds what any length makes of it
    if not isinstance(values["early_stopping"], bool) and values["early_stopping"] != "never":
        raise GenerationError(f"early_stopping must be True, False or 'never', got {values['early_stopping']!r}")
    if values["penalty_alpha"] is not None:
        _check_number("penalty_alpha", values["penalty_alpha"], 0.0, 1.0)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise GenerationError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        shown = f"{value:,}" if abs(value) < 10**30 else "a far larger number"
        raise GenerationError(f"{name} must be between {low:,} and {high:,}, got {shown}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise GenerationError(f"{name} must be a number, got {value!r}")
    if math.isnan(value) or not low <= value <= high:
        raise GenerationError(f"{name} must be between {low:g} and {high:g}, got {value!r}")
