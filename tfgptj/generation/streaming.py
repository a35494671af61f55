"""Text while it is generated: `stream_text` as an iterator, and Hugging Face's streamers for `generate(streamer=…)`."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tfgptj.errors import GenerationError, InputError
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.functions import functions_of, listed
from tfgptj.generation.prefix_cache import PrefixCache
from tfgptj.generation.run import Extras, Run
from tfgptj.generation.stopping import StopText
from tfgptj.generation.strategies import check_streaming, new_run
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.tokenizer import GPTJTokenizer


def stream_text(
    model: TFGPTJForCausalLM,
    tokenizer: GPTJTokenizer,
    prompt: str | list[int],
    generation_config: GenerationConfig | None = None,
    *,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Any = None,
    assistant_model: Any = None,
    prefix_cache: PrefixCache | None = None,
    seed: int | None = None,
    jit_compile: bool | None = None,
    **parameters: Any,
) -> Iterator[str]:
    """Continue a text, piece by piece.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        prompt: the text to continue, or its token ids; an empty one starts from `bos_token_id`.
        generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, assistant_model, prefix_cache,
        seed, jit_compile, **parameters: as for :func:`tfgptj.generation.generate.generate`.

    Returns:
        An iterator over the pieces of the continuation, never with half a character or any part of a stop string,
        without special tokens. They add up to the text that `generate` gives with the same arguments. What is wrong
        with the arguments is raised here, not by the iterator.

    Raises:
        InputError, GenerationError, NonFiniteLogitsError: as `generate`; and when more than one text is asked for.

    >>> from tfgptj.config import GPTJConfig
    >>> tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257)
    >>> model = TFGPTJForCausalLM(GPTJConfig(vocab_size=257, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    >>> text = "".join(stream_text(model, tokenizer, "abc", max_new_tokens=4))
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    functions = functions_of(logits_processor, prefix_allowed_tokens_fn)
    criteria = listed("stopping_criteria", stopping_criteria)
    extras = Extras(functions, criteria, tokenizer=tokenizer, assistant=assistant_model, prefix_cache=prefix_cache)
    run = new_run(model, [ids] if ids else None, None, generation_config, seed, jit_compile, parameters, extras)
    return text_pieces(run, tokenizer)


def text_pieces(run: Run, tokenizer: GPTJTokenizer) -> Iterator[str]:
    """The text of a generation of one row, as it is produced.

    Raises:
        GenerationError: if the generation has more than one row.
    """
    check_streaming(run)
    rows = len(run.prompt.ids)
    if rows != 1:
        raise GenerationError(f"only one text can be streamed, not {rows}: leave num_return_sequences at 1")
    return _pieces(run, tokenizer)


def _pieces(run: Run, tokenizer: GPTJTokenizer) -> Iterator[str]:
    text = StopText(tokenizer, run.config.stops)
    for tokens in run.chunks(1):
        piece = text.put(tokens[0][: end_of_text(tokens[0], run.config.eos_token_ids)])
        if piece:
            yield piece
    rest = text.end()
    if rest:
        yield rest


def text_of(new_tokens: np.ndarray, config: GenerationConfig, tokenizer: GPTJTokenizer) -> str:
    """The text of a generated row, int [n], up to its first end-of-text token or stop string."""
    text = StopText(tokenizer, config.stops)
    return text.put(new_tokens[: end_of_text(new_tokens, config.eos_token_ids)]) + text.end()


def end_of_text(new_tokens: np.ndarray, eos_token_ids: tuple[int, ...]) -> int:
    """Where a generated row, int [n], has its first end-of-text token; n if it has none."""
    ends = np.flatnonzero(np.isin(new_tokens, eos_token_ids))
    return int(ends[0]) if len(ends) else len(new_tokens)


class TextStreamer:
    """Prints text as it is generated; for `generate(streamer=…)`, with one row.

    A subclass that does something else with the text overrides `on_finalized_text`. Text comes as soon as its
    characters are complete; Hugging Face's class of this name holds back whole words.

    Args:
        tokenizer: the model's tokenizer.
        skip_prompt: whether to leave out the prompt.
        skip_special_tokens: whether to leave out special tokens, such as the end-of-text token.
        stop_strings: str or list of str, as given to `generate`: no part of them is printed.

    >>> tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257)
    >>> streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    >>> streamer.put(np.array([tokenizer.encode("abc<|endoftext|>")])); streamer.end()
    abc
    """

    def __init__(
        self,
        tokenizer: GPTJTokenizer,
        skip_prompt: bool = False,
        skip_special_tokens: bool = False,
        stop_strings: str | Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.skip_prompt = tokenizer, skip_prompt
        stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        self._fresh = lambda: StopText(tokenizer, stops, skip_special_tokens)
        self._text, self._at_prompt = self._fresh(), True

    def put(self, value: Any) -> None:
        """Take the prompt, int [1, P], and then each step's token, int [1].

        Raises:
            InputError: for more than one row.
        """
        ids = np.asarray(value)
        at_prompt, self._at_prompt = self._at_prompt, False
        if (ids.ndim > 1 or not at_prompt) and len(ids) > 1:
            raise InputError(f"{type(self).__name__} streams one text, got {len(ids)} rows: generate one at a time")
        if not at_prompt:
            self.on_finalized_text(self._text.put(ids))
        elif not self.skip_prompt:
            self.on_finalized_text(self._text.show(ids))

    def end(self) -> None:
        """Give out the rest; the streamer can then take another generation."""
        rest = self._text.end()
        self._text, self._at_prompt = self._fresh(), True
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text, and a line end after the last."""
        print(text, end="\n" if stream_end else "", flush=True)


class TextIteratorStreamer(TextStreamer):
    """Hands text to another thread as it is generated.

    `generate(streamer=…)` runs in one thread, and a loop over the streamer in another.

    Args:
        tokenizer, skip_prompt, skip_special_tokens, stop_strings: as for :class:`TextStreamer`.
        timeout: seconds to wait for a piece before `queue.Empty` is raised; None waits for ever.

    >>> tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257)
    >>> streamer = TextIteratorStreamer(tokenizer)
    >>> streamer.put(np.array([tokenizer.encode("abc")])); streamer.end()
    >>> list(streamer)
    ['abc']
    """

    def __init__(
        self,
        tokenizer: GPTJTokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        skip_special_tokens: bool = False,
        stop_strings: str | Sequence[str] = (),
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens, stop_strings)
        self.timeout = timeout
        self._pieces: queue.Queue[str | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queue a piece of text for the reader."""
        if text:
            self._pieces.put(text)
        if stream_end:
            self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self._pieces.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece
