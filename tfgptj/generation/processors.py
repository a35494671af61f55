"""From logits to the next token: what sampling makes of the distribution, and the draw.

Source: transformers, logits_process.py; each function gives the same logits as the warper of that name. Those with a
`keep` leave at least so many tokens, the likeliest: beams need more than one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from tfgptj.generation.compiling import library_of
from tfgptj.generation.tokens import FORBIDDEN as FORBIDDEN
from tfgptj.generation.tokens import is_forbidden, keep_forbidden


def temperature(logits: Any, context: Any, value: Any, compared: bool = False) -> Any:
    """Divide the logits [B, V]: below 1 sharper, above 1 flatter.

    Args:
        value: float32 scalar, or [B, 1], above 0.
        compared: whether rows are compared with each other, as beams are: then nothing is added to any.
    """
    if compared:
        highest = 1e-6 * -FORBIDDEN  # sums over a whole text stay above what is forbidden
        return keep_forbidden(logits, ops.clip(logits / value, -highest, highest))
    # So cold that a logit could overflow, they are divided with the likeliest at 0.
    top = ops.where(value < 1e-3, ops.max(logits, axis=-1, keepdims=True), 0.0)
    return keep_forbidden(logits, (logits - top) / value)


def top_k(logits: Any, context: Any, k: int) -> Any:
    """Forbid all but the k likeliest tokens; ties with the k-th stay."""
    if k >= logits.shape[-1]:
        return logits
    return ops.where(logits < _kth(logits, k), FORBIDDEN, logits)


def top_p(logits: Any, context: Any, share: Any, keep: int = 1) -> Any:
    """Forbid all but the likeliest tokens that together have this share of the probability.

    The token that crosses the share stays, and so do ties with it.
    """
    descending = ops.flip(ops.sort(logits, axis=-1), axis=-1)  # [B, V]
    probabilities = ops.softmax(descending, axis=-1)
    below = ops.cumsum(probabilities, axis=-1) - probabilities < share  # is all that is likelier less than the share?
    last = ops.min(ops.where(below, descending, descending[:, :1]), axis=-1, keepdims=True)  # [B, 1]
    return _without(logits, logits < last, keep)


def cutoffs(logits: Any, context: Any, k: Any, share: Any) -> Any:
    """:func:`top_k`, and then :func:`top_p`, with numbers of each row's own.

    Args:
        k: int32 [B, 1], 0 for no cut.
        share: float32 [B, 1], 1 for no cut.
    """

    def cut() -> Any:
        descending = ops.flip(ops.sort(logits, axis=-1), axis=-1)  # [B, V]
        size = logits.shape[-1]
        kth = ops.take_along_axis(descending, ops.where(k == 0, size, ops.minimum(k, size)) - 1, axis=-1)
        descending = ops.where(descending < kth, FORBIDDEN, descending)
        probabilities = ops.softmax(descending, axis=-1)
        below = ops.cumsum(probabilities, axis=-1) - probabilities < share
        # Rounded sums may come to 1 too early.
        below = ops.logical_or(below, share >= 1)
        last = ops.min(ops.where(below, descending, descending[:, :1]), axis=-1, keepdims=True)  # [B, 1]
        return ops.where(logits < ops.maximum(kth, last), FORBIDDEN, logits)

    wanted = ops.any(ops.logical_or(k > 0, share < 1))  # sorting takes longer than all else here
    return ops.cond(wanted, cut, lambda: logits)


def min_p(logits: Any, context: Any, share: Any, keep: int = 1) -> Any:
    """Forbid tokens that have less than this share of the likeliest one's probability."""
    probabilities = ops.softmax(logits, axis=-1)
    return _without(logits, probabilities < share * ops.max(probabilities, axis=-1, keepdims=True), keep)


def typical_p(logits: Any, context: Any, mass: Any, keep: int = 1) -> Any:
    """Forbid all but the tokens whose information is nearest to the expected, up to this much of the probability."""
    logs = ops.log_softmax(logits, axis=-1)
    probabilities = ops.exp(logs)
    entropy = -ops.sum(ops.where(probabilities > 0, logs * probabilities, 0.0), axis=-1, keepdims=True)
    distance = ops.abs(-logs - entropy)  # [B, V]
    order = ops.argsort(distance, axis=-1)
    nearest = ops.take_along_axis(distance, order, axis=-1)
    reached = ops.cumsum(ops.take_along_axis(probabilities, order, axis=-1), axis=-1)
    last = ops.minimum(ops.sum(ops.cast(reached < mass, "int32"), axis=-1, keepdims=True), logits.shape[-1] - 1)
    farther = distance > ops.take_along_axis(nearest, last, axis=-1)
    if keep > 1:
        farther = ops.logical_and(farther, distance > nearest[:, :keep][:, -1:])
    return ops.where(farther, FORBIDDEN, logits)


def epsilon_cutoff(logits: Any, context: Any, epsilon: Any, keep: int = 1) -> Any:
    """Forbid tokens under a probability."""
    return _without(logits, ops.softmax(logits, axis=-1) < epsilon, keep)


def eta_cutoff(logits: Any, context: Any, epsilon: Any, keep: int = 1) -> Any:
    """Forbid tokens under a probability that is the lower, the flatter the distribution."""
    logs = ops.log_softmax(logits, axis=-1)
    probabilities = ops.exp(logs)
    entropy = -ops.sum(ops.where(probabilities > 0, logs * probabilities, 0.0), axis=-1, keepdims=True)
    eta = ops.minimum(epsilon, ops.sqrt(epsilon) * ops.exp(-entropy))  # [B, 1]
    return _without(logits, probabilities < eta, keep)


def renormalize(logits: Any, context: Any) -> Any:
    """Log-probabilities."""
    return keep_forbidden(logits, ops.log_softmax(logits, axis=-1))


def _without(logits: Any, unlikely: Any, keep: int) -> Any:
    """Forbid tokens, bool [B, V], but never one of the `keep` likeliest; ties stay."""
    return ops.where(ops.logical_and(unlikely, logits < _kth(logits, keep)), FORBIDDEN, logits)


def _kth(logits: Any, k: int) -> Any:
    """The k-th highest logit of each row, [B, 1]."""
    if k == 1:
        return ops.max(logits, axis=-1, keepdims=True)
    return ops.top_k(logits, min(k, logits.shape[-1]), sorted=True)[0][:, -1:]


def any_left(logits: Any) -> Any:
    """Whether a row has a token that is not forbidden, bool [B]."""
    library = library_of(logits)
    return library.logical_not(library.all(is_forbidden(logits), axis=-1))


def draw(logits: Any, uniform: Any) -> Any:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: float32 [B, V].
        uniform: float32 [B], a random number in [0, 1) per row.

    Returns:
        int32 [B].
    """
    probabilities = ops.softmax(logits, axis=-1)  # [B, V]
    cumulative = ops.cumsum(probabilities, axis=-1)  # [B, V]
    # Compiled sums run in parallel: they end at 1 up to rounding, and may step where a token has no probability.
    allowed = probabilities > 0
    total = ops.max(ops.where(allowed, cumulative, 0.0), axis=-1, keepdims=True)  # [B, 1]
    reached = ops.logical_and(allowed, cumulative > uniform[:, None] * total)  # [B, V]
    return ops.cast(ops.argmax(ops.cast(reached, "int32"), axis=-1), "int32")  # the first that is reached


def greedy(logits: Any) -> Any:
    """The likeliest token of each row, int32 [B]."""
    if isinstance(logits, np.ndarray):
        return logits.argmax(axis=-1).astype("int32")
    return ops.cast(ops.argmax(logits, axis=-1), "int32")
