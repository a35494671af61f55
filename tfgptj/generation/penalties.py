"""Processors that make tokens likelier or less likely.

Source: transformers, logits_process.py; each function gives the same scores as the processor of that name, where a row
has no padding: padding is no text here.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from tfgptj.generation import tokens
from tfgptj.generation.tokens import FORBIDDEN, Context, keep_forbidden


def guidance(logits: Any, context: Context, scale: Any) -> Any:
    """Go from what the negative prompts give towards, or beyond, what the prompts give.

    Args:
        logits: float32 [2 B, V], the rows of the prompts and then those of the negative prompts.
        scale: float32 scalar, 1 for the prompts' own.

    Returns:
        float32 [B, V], log-probabilities up to a constant.
    """
    logits = ops.log_softmax(logits, axis=-1)
    wanted, unwanted = ops.split(logits, 2, axis=0)
    return scale * (wanted - unwanted) + unwanted


def sequence_bias(logits: Any, context: Context, sequences: Any, lengths: Any, bias: Any) -> Any:
    """Add a bias to the last token of each sequence where the others stand before it.

    Args:
        sequences: int32 [K, L], filled up with -1, which is no token, on the left.
        lengths: int32 [K], the tokens of each.
        bias: float32 [K].
    """
    logits = logits + tokens.tally(*_completed(context, sequences, lengths, bias), logits.shape[-1])
    return ops.maximum(logits, 4 * FORBIDDEN)  # however many biases come together


def _completed(context: Context, sequences: Any, lengths: Any, bias: Any) -> tuple[Any, Any]:
    """The last token of each sequence, int32 [B, K], and its bias where the sequence would now be completed."""
    others = sequences[:, :-1]  # [K, L - 1]
    recent = tokens.newest(context, ops.shape(sequences)[1] - 1)  # [B, L - 1]
    alike = ops.logical_or(recent[:, None, :] == others[None], others[None] < 0)  # [B, K, L - 1]
    whole = ops.logical_and(context.length[:, None] >= lengths[None] - 1, ops.all(alike, axis=-1))  # [B, K]
    last = ops.broadcast_to(sequences[None, :, -1], ops.shape(whole))
    return last, ops.where(whole, bias[None], 0.0)


def diversity(logits: Any, context: Context, penalty: Any) -> Any:
    """Take off a penalty for each beam of an earlier group that chose a token in this step."""
    if context.taken is None:
        return logits
    times = tokens.tally(context.taken, ops.ones_like(context.taken, dtype="float32"), logits.shape[-1])
    return logits - penalty * times


def encoder_repetition_penalty(logits: Any, context: Context, penalty: Any) -> Any:
    """Make the tokens of the prompt likelier, above 1, or less likely."""
    return _repeated(logits, tokens.counts(tokens.prompt(context), context, logits.shape[-1]) > 0, 1 / penalty)


def repetition_penalty(logits: Any, context: Context, penalty: Any) -> Any:
    """Make all tokens so far less likely, above 1, or likelier."""
    return _repeated(logits, tokens.counts(tokens.text(context), context, logits.shape[-1]) > 0, penalty)


def _repeated(logits: Any, seen: Any, penalty: Any) -> Any:
    changed = ops.where(logits < 0, logits * penalty, logits / penalty)
    return keep_forbidden(logits, ops.where(seen, changed, logits))


def frequency_and_presence_penalty(logits: Any, context: Context, frequency: Any, presence: Any) -> Any:
    """Take off a penalty for each time that a token was produced, and one if it ever was."""
    times = tokens.counts(tokens.added(context), context, logits.shape[-1])
    return logits - frequency * times - presence * ops.cast(times > 0, "float32")


def exponential_decay_length_penalty(logits: Any, context: Context, start: Any, factor: Any) -> Any:
    """Raise the end-of-text tokens, after `start` new tokens, by a power of `factor`."""
    since = ops.cast(context.step - start, "float32")
    growth = ops.minimum(ops.power(factor, ops.maximum(since, 0.0)), -FORBIDDEN) - 1  # 0 up to the start
    raised = ops.minimum(logits + ops.abs(logits) * growth, -FORBIDDEN)
    return keep_forbidden(logits, ops.where(tokens.among(context.eos, logits.shape[-1]), raised, logits))
