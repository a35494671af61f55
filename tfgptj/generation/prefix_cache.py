"""PrefixCache: what earlier calls read of their texts, for later calls whose prompts begin alike."""

from __future__ import annotations

import hashlib
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from tfgptj import limits
from tfgptj.attention import Cache
from tfgptj.compiled import forward_version
from tfgptj.errors import GenerationError
from tfgptj.generation.parameters import check_whole
from tfgptj.heads import TFGPTJForCausalLM

# Of GPT-J-6B in bfloat16, 0.9 GB: a text as long as the model takes.
MAX_TOKENS = 2048


class Entry(NamedTuple):
    """A text and what the model made of it."""

    ids: np.ndarray  # int32 [n]
    caches: tuple[Cache, ...]  # of one row; its first n slots count


class Reuse(NamedTuple):
    """What one call had of a cache."""

    tokens: int  # of all prompts
    reused: int  # of them, those that were not read again


class PrefixCache:
    """Keys and values of texts, so that a prompt that begins as an earlier text did is read from where it differs.

    Given to `generate`, `stream` or a pipeline as `prefix_cache=`. After a call it keeps the first prompt of the batch
    and its continuation, so that a talk that grows is never read twice; of a beam search, and of a stream that nobody
    read to its end, the prompt alone. A later call takes the text that saves it most and reads the rest of each prompt,
    at least its last token. All rows read equally many columns, so rows that begin with a text in common, such as one
    instruction, all gain; of a batch of differing texts only those that are kept. Results are the same with it and
    without, up to rounding.

    It serves one model at a time: what another one left is dropped, and so is everything when a weight of the model has
    changed since, by training, loading, LoRA or quantization. Several threads may use one.

    Args:
        max_tokens: int, tokens of all texts together; those that were not used for longest give way, and of a text that
            is longer its beginning is kept. A token takes 2 · n_layer · n_embd numbers: of GPT-J-6B, 448 KiB in
            bfloat16.
        check_weights: bool, whether each call looks for changed weights. That reads all weights once, about as long as
            one more token takes, and compares sums over the bits of each row of each of them: it misses only changes
            that leave all these sums as they are, such as numbers that change places within a row. False leaves it to
            you to call `clear()` after each change; otherwise the text is silently wrong.

    Attributes:
        last_call: :class:`Reuse`, or None before the first call.

    Raises:
        GenerationError: for a `max_tokens` that is no positive integer.

    >>> from tfgptj.config import GPTJConfig
    >>> model = TFGPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    >>> cache = PrefixCache()
    >>> ids = model.generate([[1, 2, 3, 4]], prefix_cache=cache, max_new_tokens=2, eos_token_id=None)
    >>> ids = model.generate([[1, 2, 3, 7, 8]], prefix_cache=cache, max_new_tokens=2, eos_token_id=None)
    >>> cache.last_call, len(cache)
    (Reuse(tokens=5, reused=3), 11)
    """

    def __init__(self, max_tokens: int = MAX_TOKENS, check_weights: bool = True) -> None:
        check_whole("max_tokens", max_tokens, 1, limits.MAX_POSITIONS)
        self.max_tokens, self.check_weights = max_tokens, bool(check_weights)
        self.last_call: Reuse | None = None
        self._lock = threading.Lock()
        self._entries: list[Entry] = []  # the one used last is the last
        self._model: weakref.ref[Any] | None = None  # whose keys they are
        self._mark = b""  # and of which weights

    def __len__(self) -> int:
        """Tokens kept."""
        return sum(len(entry.ids) for entry in self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values kept; where compiled shapes are fixed, each text's are rounded up."""
        tensors = [x for entry in self._entries for cache in entry.caches for x in cache]
        return sum(math.prod(x.shape) * _itemsize(x) for x in tensors)

    def clear(self) -> None:
        """Forget all texts."""
        with self._lock:
            self._entries = []

    def mark_of(self, model: TFGPTJForCausalLM) -> bytes:
        """What tells a model's weights from those that it had before."""
        return weights_mark(model) if self.check_weights else b""

    def find(self, model: TFGPTJForCausalLM, mark: bytes, rows: Sequence[np.ndarray]) -> tuple[Entry | None, int]:
        """The text that saves most, and how many of the last tokens of each row must be read nevertheless.

        Args:
            model: the model that is to go on.
            mark: :meth:`mark_of` it.
            rows: token ids of each row, int32 [n] each.
        """
        best, least = None, max(map(len, rows))
        with self._lock:
            self._serve(model, mark)
            for entry in self._entries:
                # The last token of a row is always read: its logits are wanted.
                rest = max(len(row) - min(_common(row, entry.ids), len(row) - 1) for row in rows)
                if rest < least:
                    best, least = entry, rest
            if best is not None:
                self._use(best)
        return best, least

    def keep(
        self, model: TFGPTJForCausalLM, mark: bytes, ids: np.ndarray, copied: Callable[[int], tuple[Cache, ...]]
    ) -> None:
        """Remember a text.

        Args:
            model: the model that read it.
            mark: :meth:`mark_of` it, when it began to.
            ids: int32 [n].
            copied: gives the keys and values of its first tokens, so many.
        """
        ids = ids[: self.max_tokens]
        with self._lock:
            self._serve(model, mark)
            for entry in self._entries:
                if _common(entry.ids, ids) == len(ids):
                    self._use(entry)
                    return
        entry = Entry(ids, copied(len(ids)))
        with self._lock:
            self._serve(model, mark)
            others = [other for other in self._entries if _common(other.ids, ids) < len(other.ids)]
            self._entries = [*others, entry]
            while len(self) > self.max_tokens:
                self._entries = self._entries[1:]

    def _serve(self, model: TFGPTJForCausalLM, mark: bytes) -> None:
        """Drop everything that is not of this model with these weights."""
        if self._model is None or self._model() is not model or self._mark != mark:
            self._entries, self._model, self._mark = [], weakref.ref(model), mark

    def _use(self, entry: Entry) -> None:
        self._entries = [*(other for other in self._entries if other is not entry), entry]


def check_cache(cache: Any) -> None:
    """Raise unless something is a :class:`PrefixCache` or None.

    Raises:
        GenerationError: for anything else.
    """
    if cache is not None and not isinstance(cache, PrefixCache):
        raise GenerationError(f"prefix_cache must be a tfgptj.PrefixCache, got {type(cache).__name__}")


def weights_mark(model: TFGPTJForCausalLM) -> bytes:
    """A digest of sums over the bits of each row of each weight that keys and values depend on.

    Sums of integers wrap around and do not depend on their order, so they are the same on every call, however many
    threads add them; and no change of one number alone leaves them as they are.
    """
    # Adapters that are disabled are still there.
    digest = hashlib.blake2b(f"{forward_version(model.transformer)}".encode())
    for weight in model.transformer.weights:
        size, shape = _itemsize(weight), tuple(weight.shape)
        digest.update(f"{weight.dtype} {shape}".encode())
        # 32 bits at once where they fill a row: narrow numbers are added more slowly.
        word = "int32" if size * shape[-1] % 4 == 0 else f"int{8 * size}"
        sums = ops.sum(ops.cast(ops.view(weight.value, word), "int32"), axis=-1)
        digest.update(np.asarray(ops.convert_to_numpy(sums)).tobytes())
    return digest.digest()


def _itemsize(tensor: Any) -> int:
    """Bytes of a number."""
    return int(np.dtype(keras.backend.standardize_dtype(tensor.dtype)).itemsize)


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    size = min(len(first), len(second))
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if len(differ) else size
