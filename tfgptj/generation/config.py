"""GenerationConfig: how text is generated, with Hugging Face's parameter names."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from tfgptj.config import GPTJConfig, read_json
from tfgptj.errors import GenerationError
from tfgptj.files import write_json
from tfgptj.generation.parameters import ARGUMENTS, DEFAULTS, IGNORED, LOWEST_BIAS, PARAMETERS, UNSUPPORTED, plain

# New tokens when nobody says how many.
DEFAULT_NEW_TOKENS = 20


class GenerationConfig:
    """Parameters of :meth:`TFGPTJForCausalLM.generate`, with Hugging Face's names, meanings and defaults.

    Where a parameter stands in several places, the first of these wins: keyword arguments of `generate`, the
    `generation_config` given to it, the model's `generation_config` (from its `generation_config.json`), the special
    tokens of the model's `config`, the defaults. Numbers may be of any kind, NumPy's too. What only sampling or only
    beams read has no effect without them.

    How long:
        max_new_tokens: int, tokens to add at most; it wins over `max_length`.
        max_length: int, tokens of prompt and continuation together at most. With neither, 20 tokens are added.
        min_new_tokens: int, no end-of-text token before so many new ones.
        min_length: int, the same counted with the prompt.
        eos_token_id: int or list of int, tokens that end a row.
        stop_strings: str or list of str, texts that end a row, or one text of a search with beams, which goes on;
            `generate` needs `tokenizer=` for them. Its result has the tokens of the stop string, a pipeline's text
            ends before it.
        max_time: number, seconds after which no further token is begun; beams end with the best texts so far.

    How tokens are chosen (see `mode`):
        do_sample: bool, draw tokens instead of always taking the likeliest.
        num_return_sequences: int, continuations per prompt: without beams they need `do_sample`.
        num_beams, length_penalty, early_stopping: beam search; with `do_sample` the beams are drawn.
        num_beam_groups, diversity_penalty: groups of beams that shun each other's tokens.
        penalty_alpha: number, with `top_k` > 1 and no `do_sample`, contrastive search.
        prompt_lookup_num_tokens: int, draft so many tokens at most, those that followed the newest ones where they
            stood before. Drafts save steps of the model and change no token.
        max_matching_ngram_size: int, how many of the newest tokens are looked for, and then one less and so on; 2 when
            not given.
        num_assistant_tokens: int, tokens that an `assistant_model` drafts.
        num_assistant_tokens_schedule: "constant"; or "heuristic" or "heuristic_transient", two more after drafts that
            were all right, up to 16 or twice as many, otherwise one less. Nothing is kept for the next call.
        assistant_confidence_threshold: number in [0, 1], the assistant stops after a token with less probability.

    What the distribution is made into when tokens are drawn:
        temperature: number >= 0, divides the logits; 0 means no sampling at all.
        top_k: int or None, only the k likeliest tokens (ties with the k-th stay); 0 and None switch it off.
        top_p: number in [0, 1], only the likeliest tokens that make up this share of the probability; at least one.
        min_p: number in [0, 1], only tokens with this share of the likeliest one's probability.
        typical_p: number in (0, 1], only the tokens nearest to the expected information, up to this probability.
        epsilon_cutoff, eta_cutoff: number in [0, 1), only tokens over this probability; eta lowers it where the
            distribution is flat.

    What is favoured, and what is forbidden, in the order in which it is done:
        guidance_scale: number, how far to go from what `negative_prompt_ids` would give to what the prompt gives; with
            beams each has its own text after the negative prompt.
        sequence_bias: dict of tuples of ids to numbers, or list of such pairs, added to the last id's logit where the
            others stand before it; -inf forbids.
        encoder_repetition_penalty: number, above 1 favours tokens of the prompt.
        repetition_penalty: number, above 1 shuns tokens of the text so far, prompt included.
        frequency_penalty, presence_penalty: numbers taken off a new token's logit for each time, and once if ever.
        no_repeat_ngram_size, encoder_no_repeat_ngram_size: int, no so many tokens twice; none of the prompt's again.
        bad_words_ids: list of lists of ids that must not come.
        forced_bos_token_id: int, the token after a prompt of one.
        forced_eos_token_id: int or list of int, the last token that may be.
        remove_invalid_values: bool, go on when logits are NaN or infinite.
        exponential_decay_length_penalty: (int, number), from so many new tokens on the end becomes likelier by this
            factor to the power of the tokens since.
        suppress_tokens, begin_suppress_tokens: list of int, forbidden always, or as the first new token.
        vocabulary_limit: int, forbid ids from this one on: 50257 for GPT-J, whose embedding has rows without a token.
        renormalize_logits: bool, make log-probabilities of the scores at the end.

    What is returned:
        return_dict_in_generate, output_scores, output_logits, output_hidden_states, output_attentions: see `generate`.

    How the work is done:
        prefill_chunk_size: int, columns of the prompt to read at once. A prompt that is longer takes less memory then,
            and Ctrl-C is heard between the pieces; the text is the same. None reads it in one piece.

    Special tokens:
        bos_token_id: int, what an empty prompt starts with.
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
        given = {name: plain(value) for name, value in parameters.items() if name in PARAMETERS}
        for name, value in given.items():
            PARAMETERS[name].check(name, value)
        if given.get("sequence_bias"):
            given["sequence_bias"] = [[tokens, max(bias, LOWEST_BIAS)] for tokens, bias in given["sequence_bias"]]
        self._given = {**self._given, **given}

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
        return () if tokens is None else tuple(tokens) if isinstance(tokens, list) else (tokens,)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple: empty, one or many."""
        strings = self.stop_strings
        return () if strings is None else tuple(strings) if isinstance(strings, list) else (strings,)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.do_sample and self.temperature != 0

    @property
    def mode(self) -> str:
        """How tokens are chosen.

        "greedy", "sample", "beam", "beam_sample", "group_beam", "contrastive" or "prompt_lookup", by Hugging Face's
        rules. An `assistant_model`, which is no parameter, makes "assisted" of the first two.
        """
        if self.num_beams > 1:
            if self.num_beam_groups > 1:
                return "group_beam"
            return "beam_sample" if self.samples else "beam"
        if not self.samples and self.penalty_alpha and (self.top_k or 0) > 1:
            return "contrastive"
        if self.prompt_lookup_num_tokens is not None:
            return "prompt_lookup"
        return "sample" if self.samples else "greedy"

    def check_together(self) -> None:
        """Raise where parameters contradict each other.

        Raises:
            GenerationError: naming them.
        """
        several, beams, groups = self.num_return_sequences, self.num_beams, self.num_beam_groups
        if beams > 1 and several > beams:
            raise GenerationError(f"num_return_sequences={several} is more than num_beams={beams}")
        if several > 1 and beams == 1 and not self.do_sample:
            raise GenerationError(
                "num_return_sequences > 1 needs do_sample=True or num_beams > 1: otherwise all would be the same"
            )
        if groups > 1 and (beams == 1 or beams % groups):
            raise GenerationError(f"num_beams={beams} cannot be split into num_beam_groups={groups} of equal size")
        if groups > 1 and self.samples:
            raise GenerationError("num_beam_groups > 1 cannot be combined with do_sample=True")
        if groups > 1 and not self.diversity_penalty:
            raise GenerationError("num_beam_groups > 1 needs a diversity_penalty above 0: the groups would be the same")
        if groups == 1 and self.diversity_penalty:
            raise GenerationError("diversity_penalty acts between groups of beams: set num_beam_groups")
        if self.prompt_lookup_num_tokens is not None and self.mode != "prompt_lookup":
            raise GenerationError(f"prompt_lookup_num_tokens cannot be combined with {self.mode} search")
        if self.exponential_decay_length_penalty is not None and not self.eos_token_ids:
            raise GenerationError("exponential_decay_length_penalty needs an eos_token_id, whose score it raises")

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


def _check_name(name: str, value: Any) -> None:
    if name in PARAMETERS or name in IGNORED:
        return
    if name in UNSUPPORTED:
        neutral = UNSUPPORTED[name]
        if value is None or (isinstance(value, (bool, int, float, str)) and value == neutral):
            return
        raise GenerationError(f"{name}={value!r} is not supported by tfgptj; leave it at {neutral!r}")
    if name in ARGUMENTS:
        raise GenerationError(f"{name} is an argument of generate, not a parameter of its configuration")
    close = difflib.get_close_matches(name, [*PARAMETERS, *UNSUPPORTED, *IGNORED, *ARGUMENTS], n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(PARAMETERS)}"
    raise GenerationError(f"unknown generation parameter {name!r}; {hint}")
