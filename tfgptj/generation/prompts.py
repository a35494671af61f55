"""Prompts as generation takes them: checked, aligned, with room for the new tokens, and random numbers for each row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tfgptj.config import GPTJConfig
from tfgptj.errors import GenerationError, InputError
from tfgptj.generation.config import DEFAULT_NEW_TOKENS, GenerationConfig
from tfgptj.inputs import complete_inputs, concrete

# Parameters whose tokens a model must have: elsewhere one that it lacks does nothing.
NAMES_OF_TOKENS = ("sequence_bias", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id")


class Rows(NamedTuple):
    """Token ids int32 [B, P], and bool [B, P], where there are tokens."""

    ids: np.ndarray
    real: np.ndarray

    def repeated(self, times: int) -> Rows:
        """Each row so many times in a row."""
        return Rows(np.repeat(self.ids, times, axis=0), np.repeat(self.real, times, axis=0))

    def of(self, rows: slice) -> Rows:
        """Some rows, without the first columns that none of them uses."""
        padding = int(self.real[rows].any(axis=0).argmax())
        return Rows(self.ids[rows, padding:], self.real[rows, padding:])

    @property
    def longest(self) -> int:
        """Tokens of the row that has most."""
        return int(self.real.sum(axis=1).max())


def read_rows(config: GPTJConfig, ids: Any, mask: Any, name: str = "prompt") -> Rows:
    """Token ids and their mask, checked.

    Args:
        config: of the model.
        ids: int [B, P].
        mask: int or bool [B, P], or None for no padding.
        name: what to call them in messages.

    Raises:
        InputError: for ids out of range, or a row without a token.
        GenerationError: inside a compiled function.
    """
    checked = complete_inputs({"input_ids": ids, "attention_mask": mask}, config)
    values, given = concrete(checked["input_ids"]), checked["attention_mask"]
    if values is None:
        raise GenerationError("generate() cannot be called inside a compiled function: it compiles its own loop")
    real = np.ones(values.shape, bool) if given is None else np.asarray(concrete(given)).astype(bool)
    if not real.any(axis=1).all():
        row = int(np.argmin(real.any(axis=1)))
        raise InputError(f"row {row} of the {name} has no token: its attention_mask is all 0")
    return Rows(values, real)


def negative_rows(config: GPTJConfig, ids: Any, mask: Any, prompt: Rows) -> Rows:
    """The negative prompts of guidance, one for each prompt.

    Args:
        config: of the model.
        ids: int [B, P2] or [1, P2] for all rows, or None for the last token of each prompt.
        mask: as for :func:`read_rows`.
        prompt: the prompts.

    Raises:
        InputError: as :func:`read_rows`, and for another number of rows.
    """
    if ids is None:
        if mask is not None:
            raise InputError("negative_prompt_attention_mask was given without negative_prompt_ids")
        last = align_right(prompt).ids[:, -1:]
        return Rows(last, np.ones(last.shape, bool))
    negative, count = read_rows(config, ids, mask, "negative prompt"), len(prompt.ids)
    if len(negative.ids) not in (1, count):
        raise InputError(f"there are {len(negative.ids)} negative prompts for {count} prompts: give as many, or one")
    return negative.repeated(count) if len(negative.ids) == 1 else negative


def align_right(rows: Rows) -> Rows:
    """The real tokens of each row moved to its end, without columns that no row needs.

    >>> align_right(Rows(np.array([[5, 6, 0, 0], [0, 7, 8, 9]]), np.array([[1, 1, 0, 0], [0, 1, 1, 1]], bool))).ids
    array([[0, 5, 6],
           [7, 8, 9]])
    """
    order = np.argsort(rows.real, axis=1, kind="stable")[:, -rows.longest :]
    return Rows(np.take_along_axis(rows.ids, order, axis=1), np.take_along_axis(rows.real, order, axis=1))


def stacked(first: Rows, second: Rows) -> Rows:
    """Rows under other rows, aligned to the right."""
    width = max(first.ids.shape[1], second.ids.shape[1])
    padded = [[np.pad(x, ((0, 0), (width - x.shape[1], 0))) for x in rows] for rows in (first, second)]
    return Rows(np.concatenate([padded[0][0], padded[1][0]]), np.concatenate([padded[0][1], padded[1][1]]))


def bucket(length: int) -> int:
    """Round a length up to 16, 24, 32, 48, 64, 96, …: under a third of waste, few sizes to compile for."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def room_after(prompt: Rows, limit: int, config: GenerationConfig) -> int:
    """New tokens at most.

    Args:
        prompt: all rows, those of negative prompts too.
        limit: the model's positions.
        config: the parameters.

    Raises:
        GenerationError: if `max_length` leaves no room.
        InputError: if prompt and continuation are longer than the model's positions.
    """
    longest = prompt.longest
    if config.max_new_tokens is not None:
        room = config.max_new_tokens
    elif config.max_length is not None:
        room = config.max_length - prompt.ids.shape[1]
        if room < 1:
            raise GenerationError(
                f"max_length={config.max_length} leaves no room after a prompt of {prompt.ids.shape[1]} tokens; "
                "set max_new_tokens instead"
            )
    else:
        room = max(1, min(DEFAULT_NEW_TOKENS, limit - longest))
    if longest + room > limit:
        raise InputError(
            f"a prompt of {longest} tokens and {room} new ones are {longest + room}, over n_positions={limit}: "
            f"shorten the prompt or set max_new_tokens to at most {max(limit - longest, 0)}"
        )
    return room


def check_tokens(config: GenerationConfig, vocab_size: int) -> None:
    """Raise where a parameter names a token that the model does not have.

    Raises:
        GenerationError: naming the parameter and the token.
    """
    for name in NAMES_OF_TOKENS:
        value = getattr(config, name)
        lists = [ids for ids, _ in value] if name == "sequence_bias" and value else value
        for token in _flat(lists):
            if token >= vocab_size:
                raise GenerationError(f"{name} has the token {token}, and the model has only {vocab_size}")


def _flat(value: Any) -> Iterable[int]:
    if value is None:
        return ()
    return [value] if isinstance(value, int) else [token for item in value for token in _flat(item)]


def random_rows(seed: int | None, rows: int, steps: int) -> np.ndarray:
    """Random numbers float32 [B, M]: a stream of its own for each row, so that no row depends on its neighbours."""
    root = np.random.SeedSequence(None if seed is None else int(seed))
    return np.stack([np.random.default_rng(child).random(steps, dtype="float32") for child in root.spawn(rows)])


def check_seed(seed: Any) -> None:
    """Raise unless a seed is None or an integer of at least 0.

    Raises:
        GenerationError: for anything else.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
        raise GenerationError(f"seed must be an integer of at least 0, got {seed!r}")
