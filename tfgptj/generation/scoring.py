"""How likely a model finds texts: log-probabilities of their tokens, and perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from tfgptj import batching
from tfgptj.errors import InputError
from tfgptj.generation.compiling import Compiled
from tfgptj.generation.loop import read_whole
from tfgptj.generation.prompts import Rows, align_right, bucket, read_rows
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.tokenizer import GPTJTokenizer

# Positions whose logits are in memory at once: at GPT-J's vocabulary 26 MB for each row.
POSITIONS = 128


@dataclass(frozen=True)
class Scores:
    """What :func:`score` found; rows are in the order of the texts.

    Attributes:
        token_ids: for each text int32 [n], its tokens.
        log_probabilities: for each text float32 [n - 1], of each token after the first, given those before it.
        total: float64 [B], their sums.
        perplexity: float64 [B], exp of minus their means; 1 at best.
    """

    token_ids: tuple[np.ndarray, ...]
    log_probabilities: tuple[np.ndarray, ...]
    total: np.ndarray
    perplexity: np.ndarray


def score(
    model: TFGPTJForCausalLM,
    texts: Any,
    attention_mask: Any = None,
    *,
    tokenizer: GPTJTokenizer | None = None,
    batch_size: int = 8,
) -> Scores:
    """The log-probability of each token of texts.

    Args:
        texts: a text or a list of texts, which need a `tokenizer`; or token ids, int [B, T].
        attention_mask: int or bool [B, T], with ids: 1 for real tokens. Padding does not count, on whichever side.
        tokenizer: the model's.
        batch_size: texts at once.

    Returns:
        :class:`Scores`. The first token of a text has no probability: put `bos_token_id` before it to count it too.

    Raises:
        InputError: for texts without a tokenizer, of fewer than two tokens or more than `n_positions`.

    >>> from tfgptj.config import GPTJConfig
    >>> model = TFGPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    >>> [len(row) for row in score(model, [[1, 2, 3], [4, 5, 0]], [[1, 1, 1], [1, 1, 0]]).log_probabilities]
    [2, 1]
    """
    rows = _rows(model, texts, attention_mask, tokenizer)
    lengths = rows.real.sum(axis=1)
    if lengths.min() < 2:
        row = int(lengths.argmin())
        raise InputError(f"text {row} has {lengths[row]} token: only tokens after others have a probability")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    found: list[np.ndarray] = []
    for start in range(0, len(rows.ids), batch_size):
        some = rows.of(slice(start, start + batch_size))
        values = _log_probabilities(model, align_right(some))  # [B, P - 1]
        found += [row[-count:] for row, count in zip(values, some.real.sum(axis=1) - 1, strict=True)]
    return Scores(
        token_ids=tuple(ids[real] for ids, real in zip(*rows, strict=True)),
        log_probabilities=tuple(found),
        total=np.array([row.sum(dtype="float64") for row in found]),
        perplexity=np.array([np.exp(-row.mean(dtype="float64")) for row in found]),
    )


def _rows(model: TFGPTJForCausalLM, texts: Any, mask: Any, tokenizer: GPTJTokenizer | None) -> Rows:
    texts = [texts] if isinstance(texts, str) else texts
    if isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts):
        if tokenizer is None:
            raise InputError("texts need the model's tokenizer: give tokenizer=, or token ids")
        ids = tokenizer(list(texts))["input_ids"]
        if not all(ids):
            raise InputError(f"text {[bool(row) for row in ids].index(False)} is empty")
        texts, mask = batching.pad(ids, max(map(len, ids)), 0, "left")
    return read_rows(model.config, texts, mask, "texts")


def _log_probabilities(model: TFGPTJForCausalLM, rows: Rows) -> np.ndarray:
    """Of each token but the first of each row, float32 [B, P - 1]."""
    programs = model.__dict__.setdefault("_generation_programs", {})
    reader = programs.setdefault(("read", False), Compiled(model, _read, False))
    judging = programs.setdefault(("judge", False), Compiled(model, judge, False))
    width = rows.ids.shape[1]
    padding = ((0, 0), (bucket(width) - width, 0))
    ids = np.pad(rows.ids, padding)
    hidden = reader(None, *(ops.convert_to_tensor(x) for x in (ids, np.pad(rows.real, padding))))
    parts = []
    for start in range(0, ids.shape[1] - 1, POSITIONS):
        targets = ops.convert_to_tensor(ids[:, start + 1 : start + POSITIONS + 1])
        states = hidden[:, start : start + targets.shape[1]]
        parts.append(np.asarray(ops.convert_to_numpy(judging(None, states, targets))))
    return np.concatenate(parts, axis=1)[:, 1 - width :]


def _read(model: TFGPTJForCausalLM, static: None, ids: Any, real: Any) -> Any:
    """The last hidden states, float [B, P, D]."""
    return read_whole(model.transformer, ids, real)[0]


def judge(model: TFGPTJForCausalLM, static: None, hidden: Any, targets: Any) -> Any:
    """The log-probability of each target, int32 [B, T], after these hidden states [B, T, D]: float32 [B, T]."""
    logits = ops.log_softmax(model.lm_head(hidden), axis=-1)
    return ops.squeeze(ops.take_along_axis(logits, targets[..., None], axis=-1), axis=-1)
