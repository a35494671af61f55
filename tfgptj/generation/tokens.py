"""What processors ask of the tokens so far: how often each came, what came last, which slots hold text."""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

# Logit of a forbidden token. exp() of it is 0 in float32 beside any real logit, and it cannot turn into NaN.
FORBIDDEN = -1e30


class Context(NamedTuple):
    """The tokens so far. A row's own are those where `real` is true; they follow each other up to `slot`."""

    ids: Any  # int32 [B, S]
    real: Any  # bool [B, S]
    slot: Any  # int32 scalar, where the next token goes
    length: Any  # int32 [B], tokens of each row, prompt included
    step: Any  # int32 scalar, new tokens
    limit: Any  # int32 scalar, or [B], new tokens that a row may have
    eos: Any  # int32 [E], the tokens that end a row
    taken: Any = None  # int32 [B, n], what earlier groups of beams chose in this step; None for the first


def is_forbidden(logits: Any) -> Any:
    """Where tokens are forbidden, bool [B, V]: sums with a forbidden logit stay near it."""
    return logits <= FORBIDDEN / 2


def keep_forbidden(before: Any, after: Any) -> Any:
    """New logits [B, V], in which what was forbidden stays so, however it was scaled."""
    return ops.where(is_forbidden(before), FORBIDDEN, after)


def tally(ids: Any, weights: Any, size: int) -> Any:
    """The weights of each token, summed.

    Args:
        ids: int32 [B, K]; those outside 0…V-1 do not count.
        weights: float32 [B, K].
        size: the vocabulary (V).

    Returns:
        float32 [B, V].
    """
    rows = ops.shape(ids)[0]
    inside = ops.logical_and(ids >= 0, ids < size)
    places = ops.arange(rows, dtype="int32")[:, None] * size + ops.where(inside, ids, 0)  # [B, K]
    weights = ops.where(inside, weights, 0.0)
    sums = ops.segment_sum(ops.reshape(weights, (-1,)), ops.reshape(places, (-1,)), num_segments=rows * size)
    return ops.reshape(sums, (rows, size))


def among(ids: Any, size: int) -> Any:
    """Which of V tokens stand in a list int32 [K], bool [1, V]."""
    return tally(ids[None], ops.ones_like(ids[None], dtype="float32"), size) > 0


def counts(where: Any, context: Context, size: int) -> Any:
    """How often each token stands in some slots, bool [B, S]: float32 [B, V]."""
    return tally(context.ids, ops.cast(where, "float32"), size)


def slots(context: Context) -> Any:
    """The number of each slot, int32 [1, S]."""
    return ops.arange(ops.shape(context.ids)[1], dtype="int32")[None]


def text(context: Context) -> Any:
    """The slots of all of a row's tokens, bool [B, S]."""
    return ops.logical_and(context.real, slots(context) < context.slot)


def prompt(context: Context) -> Any:
    """The slots of a row's prompt, bool [B, S]."""
    return ops.logical_and(context.real, slots(context) < context.slot - context.step)


def added(context: Context) -> Any:
    """The slots of a row's new tokens, bool [B, S]."""
    return ops.logical_and(text(context), slots(context) >= context.slot - context.step)


def newest(context: Context, count: Any) -> Any:
    """The last `count` tokens of each row, int32 [B, count], the newest last; any number where there are fewer."""
    places = context.slot - count + ops.arange(count, dtype="int32")
    return ops.take(context.ids, ops.maximum(places, 0), axis=1)


def back(context: Context, distance: Any) -> Any:
    """The token so far back from the next one, int32 [B, 1]."""
    return ops.take(context.ids, ops.expand_dims(ops.maximum(context.slot - distance, 0), 0), axis=1)


def before(values: Any, distance: Any) -> Any:
    """What stands so many slots earlier, for each slot of [B, S]; the first value where there is no such slot."""
    places = ops.arange(ops.shape(values)[1], dtype="int32") - distance
    return ops.take(values, ops.maximum(places, 0), axis=1)
