"""From logits to the next token: temperature, top-k, top-p, and the draw.

Source: transformers, logits_process.py; each function gives the same logits as the warper of that name.
"""

from __future__ import annotations

from typing import Any

from keras import ops

# Logit of a forbidden token. exp() of it is 0 in float32 beside any real logit, and it cannot turn into NaN.
FORBIDDEN = -1e30


def diversity(logits: Any, context: Any, penalty: Any) -> Any:
    """Lower the logits [B, V] of what earlier groups of beams chose in this step, once for each beam that did.

    Source: `HammingDiversityLogitsProcessor`.
    """
    if context.taken is None:
        return logits
    tokens = ops.arange(logits.shape[-1], dtype="int32")
    times = ops.sum(ops.cast(context.taken[:, :, None] == tokens, "float32"), axis=1)  # [B, V]
    return logits - penalty * times


def temperature(logits: Any, context: Any, value: Any) -> Any:
    """Divide the logits [B, V]: below 1 sharper, above 1 flatter."""
    # Beams are compared with each other, so nothing is added to a row's logits.
    return ops.maximum(logits / value, FORBIDDEN)


def top_k(logits: Any, context: Any, k: int) -> Any:
    """Forbid all but the k likeliest tokens; ties with the k-th stay."""
    if k >= logits.shape[-1]:
        return logits
    kth = ops.top_k(logits, k, sorted=True)[0][:, -1:]  # [B, 1]
    return ops.where(logits < kth, FORBIDDEN, logits)


def top_p(logits: Any, context: Any, share: Any) -> Any:
    """Forbid all but the likeliest tokens that together have this share of the probability.

    The token that crosses the share stays, and so do ties with it.
    """
    descending = ops.flip(ops.sort(logits, axis=-1), axis=-1)  # [B, V]
    probabilities = ops.softmax(descending, axis=-1)
    before = ops.cumsum(probabilities, axis=-1) - probabilities  # probability of all likelier tokens
    last = ops.min(ops.where(before < share, descending, descending[:, :1]), axis=-1, keepdims=True)  # [B, 1]
    return ops.where(logits < last, FORBIDDEN, logits)


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
    return ops.cast(ops.argmax(logits, axis=-1), "int32")
