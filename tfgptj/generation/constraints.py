"""Processors that forbid tokens, or leave only a few.

Source: transformers, logits_process.py; each function gives the same scores as the processor of that name, where a row
has no padding: padding is no text here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from tfgptj.generation import tokens
from tfgptj.generation.tokens import FORBIDDEN, Context


def no_repeat_ngram(logits: Any, context: Context, size: Any) -> Any:
    """Forbid what would complete a run of `size` tokens, int32 scalar, that the text has already."""
    return _without_runs(logits, context, tokens.text(context), size)


def encoder_no_repeat_ngram(logits: Any, context: Context, size: Any) -> Any:
    """Forbid what would complete a run of `size` tokens, int32 scalar, that the prompt has."""
    return _without_runs(logits, context, tokens.prompt(context), size)


def _without_runs(logits: Any, context: Context, where: Any, size: Any) -> Any:
    """Forbid tokens at slots `where`, bool [B, S], that follow the same `size - 1` tokens as the next token will."""

    def narrowed(distance: Any, found: Any) -> Any:
        return ops.logical_and(found, tokens.before(context.ids, distance) == tokens.back(context, distance))

    inside = ops.logical_and(tokens.before(where, size - 1), tokens.slots(context) >= size - 1)
    found = ops.fori_loop(ops.ones_like(size), size, narrowed, ops.logical_and(where, inside))
    return ops.where(tokens.counts(found, context, logits.shape[-1]) > 0, FORBIDDEN, logits)


def min_length(logits: Any, context: Context, length: Any) -> Any:
    """Forbid the end-of-text tokens while a row, prompt included, is shorter than `length`, int32 scalar."""
    return _no_end(logits, context, context.length[:, None] < length)


def min_new_tokens(logits: Any, context: Context, count: Any) -> Any:
    """Forbid the end-of-text tokens before `count` new tokens, int32 scalar."""
    return _no_end(logits, context, context.step < count)


def _no_end(logits: Any, context: Context, when: Any) -> Any:
    ends = tokens.among(context.eos, logits.shape[-1])
    return ops.where(ops.logical_and(when, ends), FORBIDDEN, logits)


def forced_bos(logits: Any, context: Context, token: Any) -> Any:
    """Leave only one token, int32 [1], after a text of one token."""
    return _only(logits, token, context.length[:, None] == 1)


def forced_eos(logits: Any, context: Context, ends: Any) -> Any:
    """Leave only these tokens, int32 [K], as the last that a row may have."""
    return _only(logits, ends, context.step == ops.reshape(context.limit, (-1, 1)) - 1)


def _only(logits: Any, ids: Any, when: Any) -> Any:
    alone = ops.where(tokens.among(ids, logits.shape[-1]), 0.0, FORBIDDEN)  # [1, V]
    return ops.where(when, alone, logits)


def remove_invalid_values(logits: Any, context: Context) -> Any:
    """Zero for NaN, the largest number for infinity; minus infinity is forbidden."""
    logits = ops.where(ops.isnan(logits), 0.0, logits)
    logits = ops.where(logits == float("inf"), float(np.finfo("float32").max), logits)
    return ops.where(logits == float("-inf"), FORBIDDEN, logits)


def suppress(logits: Any, context: Context, ids: Any) -> Any:
    """Forbid tokens, int32 [K]."""
    return ops.where(tokens.among(ids, logits.shape[-1]), FORBIDDEN, logits)


def suppress_at_begin(logits: Any, context: Context, ids: Any, after_forced: bool) -> Any:
    """Forbid tokens, int32 [K], as the first new one.

    Args:
        after_forced: whether a prompt of one token is followed by a forced one, which is not the first then.
    """
    step = context.step
    if after_forced:
        step = step - ops.cast(context.length[:, None] - step == 1, "int32")  # [B, 1]
    begin = ops.logical_and(step == 0, tokens.among(ids, logits.shape[-1]))
    return ops.where(begin, FORBIDDEN, logits)


def vocabulary_limit(logits: Any, context: Context, limit: Any) -> Any:
    """Forbid ids from `limit` on, int32 scalar."""
    return ops.where(ops.arange(logits.shape[-1], dtype="int32")[None] >= limit, FORBIDDEN, logits)
