"""Text generation: prompts in, their continuations out."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tfgptj import batching
from tfgptj.checkpoints.directory import is_converted
from tfgptj.errors import GenerationError, InputError
from tfgptj.generation.config import DEFAULT_NEW_TOKENS, GenerationConfig
from tfgptj.generation.functions import functions_of, listed
from tfgptj.generation.parameters import IGNORED, PARAMETERS, UNSUPPORTED
from tfgptj.generation.run import CHUNK, Extras, Run, resolve_config
from tfgptj.generation.strategies import new_run
from tfgptj.generation.streaming import text_of, text_pieces
from tfgptj.generative import Generative
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.pipelines.base import PACKAGED_MODEL, Pipeline, padded
from tfgptj.tokenizer import CLEAN_UPS


class Prompt(NamedTuple):
    """A text to continue, and what the model is given of it."""

    place: int  # among the prompts of a call
    text: str
    ids: list[int]
    new_tokens: int  # at most


class TextGenerationPipeline(Pipeline):
    """Continues texts. Made by `pipeline("text-generation")`.

    Every option can be given to the pipeline or to a call; see `__call__`. Generation parameters that are given to
    neither come from the model's `generation_config`.

    >>> from tfgptj.config import GPTJConfig
    >>> from tfgptj.tokenizer import GPTJTokenizer
    >>> model = TFGPTJForCausalLM(GPTJConfig(vocab_size=257, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    >>> generate = TextGenerationPipeline(model, GPTJTokenizer.train(["abc"], vocab_size=257), max_new_tokens=3)
    >>> [len(results) for results in generate(["To be", "or"], do_sample=True, num_return_sequences=2)]
    [2, 2]
    >>> "".join(generate.stream("To be")) == generate("To be", return_full_text=False)[0]["generated_text"]
    True
    """

    task = "text-generation"
    model_class = TFGPTJForCausalLM
    accepted = Generative
    packaged_model = PACKAGED_MODEL
    own_options: ClassVar[Mapping[str, Any]] = {
        "return_full_text": None,
        "return_tensors": False,
        "prefix": "",
        "batch_size": 8,
        "clean_up_tokenization_spaces": False,
        "handle_long_generation": None,
        "generation_config": None,
        "logits_processor": None,
        "stopping_criteria": None,
        "prefix_allowed_tokens_fn": None,
        "assistant_model": None,
        "prefix_cache": None,
        "seed": None,
        "jit_compile": None,
    }

    def __call__(self, text_inputs: str | list[str], **options: Any) -> Any:
        """Continue one text, or each of several.

        Args:
            text_inputs: a prompt or a list of prompts; an empty one starts from `bos_token_id`.
            return_full_text: bool, whether results begin with the prompt; True by default.
            return_tensors: bool, whether to return token ids instead of text.
            prefix: str, put in front of each prompt, and not part of the results.
            batch_size: int, prompts that the model continues at once. Up to rounding, results do not depend on it.
            clean_up_tokenization_spaces: bool, whether to remove spaces before punctuation from the continuation.
                Hugging Face's pipeline does that by default, though it changes what the model wrote.
            handle_long_generation: "hole" cuts the left of a prompt so that the new tokens fit; None cuts nothing.
            generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, assistant_model,
                prefix_cache, seed, jit_compile, and all generation parameters: as for `generate`. A stop string is not
                part of the text.

        Returns:
            For one prompt a list of `num_return_sequences` dicts `{"generated_text": str}`, for a list of prompts a
            list of such lists. With `return_tensors` the dicts are `{"generated_token_ids": list of int}`, the
            prompt's included, without padding.

        Raises:
            InputError: for prompts that do not fit into the model, and for options that contradict each other.
            InputTypeError: for prompts that are no strings.
            GenerationError: for generation parameters that are unknown or out of range.
        """
        settings = self.settings(options)
        texts = batching.texts_of(text_inputs)
        results: list[list[dict[str, Any]]] = [[] for _ in texts]
        for prompts, run in self._runs(texts, settings, settings["batch_size"]):
            for _ in run.chunks(CHUNK):
                pass
            rows = np.split(np.arange(len(run.new)), len(prompts))  # [num_return_sequences] each
            for prompt, sequences in zip(prompts, rows, strict=True):
                results[prompt.place] = [self._result(prompt, run, row, settings) for row in sequences]
        return results[0] if isinstance(text_inputs, str) else results

    def stream(self, text_inputs: str | list[str], **options: Any) -> Any:
        """Continue a text piece by piece.

        Args:
            text_inputs, **options: as for a call. The prompt itself comes only with `return_full_text=True`;
                `return_tensors` and `clean_up_tokenization_spaces` cannot be streamed.

        Returns:
            An iterator over pieces of text, which add up to what a call gives with the same options; for a list of
            prompts a list of such iterators.
        """
        settings = self.settings(options)
        for name in ("return_tensors", "clean_up_tokenization_spaces"):
            if settings[name]:
                raise InputError(f"{name} cannot be streamed: it needs the whole text")
        streams: dict[int, Iterator[str]] = {}
        for [prompt], run in self._runs(batching.texts_of(text_inputs), settings, 1):
            pieces = text_pieces(run, self.tokenizer)
            streams[prompt.place] = chain([prompt.text], pieces) if settings["return_full_text"] else pieces
        return streams[0] if isinstance(text_inputs, str) else [streams[index] for index in sorted(streams)]

    @classmethod
    def load_model(cls, name: str | os.PathLike[str], loading: dict[str, Any]) -> Any:
        """Load a language model, one that was converted for LiteRT too.

        Raises:
            InputError: for options that a converted model has not.
        """
        if not is_converted(name):
            return super().load_model(name, loading)
        if loading:
            raise InputError(f"{', '.join(loading)} would have no effect: {name} holds a LiteRT model")
        from tfgptj.litert.model import LiteRTGPTJForCausalLM

        return LiteRTGPTJForCausalLM.from_pretrained(name)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        own, parameters = _split(options)
        super().check_options(own)
        for name in parameters:
            meant = difflib.get_close_matches(name, [*cls.own_options, *PARAMETERS, *UNSUPPORTED, *IGNORED], n=1)
            if not meant or meant[0] in cls.own_options:
                raise InputError(f"{cls.task} has no option {name!r}; {cls.hint(name)}")
        GenerationConfig(**parameters)
        if own.get("handle_long_generation") not in (None, "hole"):
            raise InputError(f"handle_long_generation must be None or 'hole', got {own['handle_long_generation']!r}")

    @classmethod
    def hint(cls, name: str) -> str:
        return f"{super().hint(name)}; besides these it takes the parameters of generate: {', '.join(PARAMETERS)}"

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of one call, with the generation parameters together under "parameters"."""
        settings = super().settings(options)
        if settings["return_tensors"] and settings["return_full_text"] is not None:
            raise InputError("return_full_text says what text to return, and with return_tensors=True there is none")
        parameters = GenerationConfig(**_split(self.options)[1]).merged(_split(options)[1])
        return {**settings, "parameters": parameters.to_dict()}

    def _runs(self, texts: list[str], settings: dict[str, Any], batch_size: int) -> Iterator[tuple[list[Prompt], Run]]:
        """Generations that are checked and ready to start, with the prompts of each."""
        groups: dict[int, list[Prompt]] = {}
        for prompt in self._prompts(texts, settings):
            # Only prompts with equally many new tokens can share a batch: none must get fewer for its neighbours' sake.
            groups.setdefault(prompt.new_tokens, []).append(prompt)
        whole = [(group, self._run(group, settings)) for group in groups.values()]
        return (
            (group[start : start + batch_size], _part(run, start, batch_size, len(group)))
            for group, run in whole
            for start in range(0, len(group), batch_size)
        )

    def _run(self, prompts: list[Prompt], settings: dict[str, Any]) -> Run:
        ids, mask = padded([prompt.ids for prompt in prompts], "left")
        parameters = {**settings["parameters"], "max_new_tokens": prompts[0].new_tokens}
        parameters["return_dict_in_generate"] = False  # a pipeline returns texts
        given, seed, jit = (settings[name] for name in ("generation_config", "seed", "jit_compile"))
        functions = functions_of(settings["logits_processor"], settings["prefix_allowed_tokens_fn"])
        criteria = listed("stopping_criteria", settings["stopping_criteria"])
        helpers = {"assistant": settings["assistant_model"], "prefix_cache": settings["prefix_cache"]}
        extras = Extras(functions, criteria, tokenizer=self.tokenizer, **helpers)
        return new_run(self.model, ids, mask, given, seed, jit, parameters, extras)

    def _prompts(self, texts: list[str], settings: dict[str, Any]) -> Iterator[Prompt]:
        config = resolve_config(self.model, settings["generation_config"], settings["parameters"])
        rows = self.tokenizer([settings["prefix"] + text for text in texts])["input_ids"]
        for index, (text, ids) in enumerate(zip(texts, rows, strict=True)):
            if not ids and config.bos_token_id is None:
                raise GenerationError(f"prompt {index} is empty, and there is no bos_token_id to start from")
            yield self._fitting(Prompt(index, text, ids or [config.bos_token_id], 0), config, settings)

    def _fitting(self, prompt: Prompt, config: GenerationConfig, settings: dict[str, Any]) -> Prompt:
        """A prompt with its number of new tokens, cut so that both fit into the model."""
        limit, length = self.model.config.n_positions, len(prompt.ids)
        may_cut = settings["handle_long_generation"] == "hole"
        if config.max_new_tokens is not None:
            new = config.max_new_tokens
        elif config.max_length is not None:
            new = config.max_length - length
        else:
            new = min(DEFAULT_NEW_TOKENS, limit - 1 if may_cut else max(limit - length, 1))
        if new < 1:
            raise GenerationError(
                f"max_length={config.max_length} leaves no room after prompt {prompt.place} with its {length} tokens; "
                "set max_new_tokens instead"
            )
        if length + new > limit and not may_cut:
            raise InputError(
                f"prompt {prompt.place} has {length} tokens and is to get {new} more, over n_positions={limit}: "
                "shorten it, set max_new_tokens lower, or let handle_long_generation='hole' cut its left"
            )
        if new >= limit:
            raise InputError(f"{new} new tokens leave no room for a prompt: n_positions is {limit}")
        return prompt._replace(ids=prompt.ids[max(length + new - limit, 0) :], new_tokens=new)

    def _result(self, prompt: Prompt, run: Run, row: int, settings: dict[str, Any]) -> dict[str, Any]:
        new = run.tokens(row)
        if settings["return_tensors"]:
            return {"generated_token_ids": [*prompt.ids, *new.tolist()]}
        text = text_of(new, run.config, self.tokenizer)
        if settings["clean_up_tokenization_spaces"]:
            for spaced, clean in CLEAN_UPS:
                text = text.replace(spaced, clean)
        return {"generated_text": text if settings["return_full_text"] is False else prompt.text + text}


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the pipeline, and generation parameters."""
    names = TextGenerationPipeline.own_options
    own = {name: value for name, value in options.items() if name in names}
    return own, {name: value for name, value in options.items() if name not in names}


def _part(run: Run, start: int, count: int, prompts: int) -> Run:
    """Some prompts of a generation that has not begun."""
    repeats = len(run.prompt.ids) // prompts
    return run.part(slice(start * repeats, (start + count) * repeats))
