"""How a prompt is read: whole, or in pieces, behind what a prefix cache has of it.

Pieces are called one after the other by the host, so that Ctrl-C is heard between them. The last is read by the program
that chooses the first new token; all have one width, so there is one program more, and one for each size where shapes
are fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from tfgptj.attention import Cache
from tfgptj.errors import GenerationError
from tfgptj.generation import caches, loop
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.prefix_cache import Entry, Reuse
from tfgptj.heads import TFGPTJForCausalLM

Compile = Callable[..., Callable[..., Any]]  # a function's name and the module that has it


class Reading(NamedTuple):
    """What is to be read of a prompt."""

    starts: tuple[int, ...]  # columns that a piece begins at
    width: int  # columns of each piece
    prompt: int  # columns of the prompt (P)
    entry: Entry | None  # what the columns before are taken from
    hidden: bool = False  # whether the hidden states of all columns are wanted

    @property
    def whole(self) -> bool:
        """Whether the prompt is read at once, by itself."""
        return self.entry is None and len(self.starts) == 1

    def reuse(self, lengths: np.ndarray) -> Reuse:
        """What that saves, of rows with so many tokens, int [B]."""
        reused = np.maximum(self.starts[0] - (self.prompt - lengths), 0)
        return Reuse(int(lengths.sum()), 0 if self.entry is None else int(reused.sum()))


def reading_of(
    columns: int, prompt: int, piece: int | None, size: Callable[[int], int], entry: Entry | None, hidden: bool
) -> Reading:
    """How the last columns of a prompt are read.

    Args:
        columns: how many of them.
        prompt: how many there are (P).
        piece: columns to read at once, or None for all.
        size: rounds numbers of columns up to the few that programs are compiled for.
        entry, hidden: as in :class:`Reading`.

    >>> reading_of(10, 12, 4, lambda length: length, None, False).starts
    (0, 4, 8)
    """
    width = min(size(columns), prompt, piece or prompt)
    entry = entry if width < prompt else None  # what is rounded up to everything saves nothing
    count = -(-columns // width)
    # The first may reach into columns that were read before, which changes nothing: all have one width.
    return Reading(tuple(max(prompt - width * left, 0) for left in range(count, 0, -1)), width, prompt, entry, hidden)


def read_ahead(
    model: TFGPTJForCausalLM, compiled: Compile, reading: Reading, ids: Any, real: Any
) -> loop.Past | tuple[()]:
    """Read all pieces but the last; () if the prompt is to be read at once.

    Args:
        model: the language model.
        compiled: gives programs.
        reading: what is to be read.
        ids, real: as for :func:`tfgptj.generation.loop.prefill`.
    """
    if reading.whole:
        return ()
    rows, slots = ids.shape
    hidden: Any = ()
    if reading.hidden:
        hidden = ops.zeros((rows, reading.prompt, model.config.n_embd), dtype=model.compute_dtype)
    past = loop.Past(_earlier(model, compiled, reading.entry, real), (), hidden)
    for start in reading.starts:
        past = past._replace(ids=ids[:, start : start + reading.width])
        if start != reading.starts[-1]:
            slot = ops.convert_to_tensor(start, dtype="int32")
            found, hidden, after = compiled("read_piece", loop)(reading.hidden, past, real, slot)
            past = past._replace(caches=found, hidden=hidden)
            int(after)  # waits, where calls return before they are done: Ctrl-C is heard, and pieces do not queue up
    return past


def _earlier(model: TFGPTJForCausalLM, compiled: Compile, entry: Entry | None, real: Any) -> tuple[Cache, ...]:
    """Caches with all slots, in which each row's first tokens have those of an entry."""
    rows, slots = real.shape
    if entry is None:
        return caches.empty_caches(model, rows, slots)
    padding = np.asarray(ops.convert_to_numpy(real)).argmax(axis=1)
    # Slots beyond the entry get what is overwritten before anything looks at it.
    index = np.clip(np.arange(slots) - padding[:, None], 0, len(entry.ids) - 1).astype("int32")
    return tuple(compiled("moved", caches)(None, entry.caches, ops.convert_to_tensor(index)))


def check_reading(config: GenerationConfig, cached: bool, hidden: bool) -> None:
    """Raise for what a prompt that is not read at once cannot give.

    Args:
        config: the parameters.
        cached: whether there is a prefix cache.
        hidden: whether the search needs all hidden states of the prompt.

    Raises:
        GenerationError: naming both.
    """
    if cached and hidden:
        raise GenerationError(
            "prefix_cache cannot be combined with contrastive search (penalty_alpha), which compares with the hidden "
            "states of the whole prompt"
        )
    ways = {"prefix_cache": cached, "prefill_chunk_size": config.prefill_chunk_size is not None}
    for name in ("output_hidden_states", "output_attentions"):
        if config.return_dict_in_generate and getattr(config, name):
            for way in (way for way, given in ways.items() if given):
                raise GenerationError(f"{name} cannot be combined with {way}: they are kept of a prompt read at once")
