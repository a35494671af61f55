"""The loss of each head, averaged over what counts; nothing counts gives 0, not NaN.

Source: transformers, loss_utils.py and modeling_gptj.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
from keras import ops

from tfgptj.config import GPTJConfig
from tfgptj.errors import InputError, InputTypeError

IGNORE_INDEX = -100  # PyTorch's mark for labels that do not count


class Smoothing(NamedTuple):
    """What is added to a token's cross-entropy.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7; Chowdhery et al. 2022, "PaLM".
    """

    label_smoothing: float = 0.0  # share of the label's probability that is spread over the vocabulary
    z_loss: float = 0.0  # factor of the squared logarithm of the softmax's denominator

    def applied(self, nats: Any, log_total: Any, logits: Any) -> Any:
        """Each token's loss [...], of its cross-entropy, the logarithm of the denominator [...] and logits [..., V]."""
        losses = nats
        if self.label_smoothing:
            spread = log_total - ops.mean(logits, axis=-1)  # the mean cross-entropy of all tokens of the vocabulary
            losses = (1 - self.label_smoothing) * nats + self.label_smoothing * spread
        return losses + self.z_loss * ops.square(log_total) if self.z_loss else losses


def causal_lm_loss(
    labels: Any, logits: Any, sample_weight: Any = None, counted: Any = None, smoothing: Smoothing = Smoothing()
) -> Any:
    """Cross-entropy of each token given those before it, in nats per token.

    Args:
        labels: int [B, T], the input ids themselves (the shift by one happens here); -100 does not count.
        logits: float [B, T, V].
        sample_weight: float [B] or [B, T], or None.
        counted: as for :func:`cross_entropy`.
        smoothing: label smoothing and z-loss.

    Returns:
        float32 scalar.

    >>> import numpy as np
    >>> round(float(causal_lm_loss(np.array([[0, 1, -100]]), np.zeros((1, 3, 4), "float32"))), 4)
    1.3863
    """
    if sample_weight is not None:
        sample_weight = weights_of_tokens(labels, sample_weight)[:, 1:]
    return cross_entropy(labels[:, 1:], logits[:, :-1], sample_weight, counted, smoothing)


def weights_of_tokens(labels: Any, sample_weight: Any) -> Any:
    """Weights per row or per token as weights per token, [B, T]."""
    sample_weight = ops.reshape(sample_weight, (ops.shape(labels)[0], -1))  # [B, 1 or T]; fit() may forget its rank
    return ops.broadcast_to(sample_weight, ops.shape(labels))


def cross_entropy(
    labels: Any, logits: Any, sample_weight: Any = None, counted: Any = None, smoothing: Smoothing = Smoothing()
) -> Any:
    """Mean cross-entropy over the labels that count.

    Args:
        labels: int [...]; -100 does not count.
        logits: float [..., V].
        sample_weight: float, broadcastable to the labels, or None. It weighs the terms, not their number.
        counted: number to divide the sum by, where these labels are only some of a batch's; None is theirs.
        smoothing: label smoothing and z-loss.

    Returns:
        float32 scalar; 0 when no label counts.
    """
    labels, logits = ops.cast(labels, "int32"), ops.cast(logits, "float32")
    losses = ops.sparse_categorical_crossentropy(ops.where(labels != IGNORE_INDEX, labels, 0), logits, from_logits=True)
    if any(smoothing):
        losses = smoothing.applied(losses, ops.logsumexp(logits, axis=-1), logits)
    weights = ops.cast(labels != IGNORE_INDEX, "float32")
    if sample_weight is not None:
        weights = weights * ops.cast(sample_weight, "float32")
    return ops.sum(losses * weights) / ops.maximum(count(labels) if counted is None else counted, 1.0)


def count(labels: Any) -> Any:
    """The number of labels that count, float32."""
    return ops.sum(ops.cast(ops.cast(labels, "int32") != IGNORE_INDEX, "float32"))


def classification_loss(
    labels: Any, logits: Any, problem_type: str | None = None, sample_weight: Any = None, counted: Any = None
) -> Any:
    """The classifier's loss: squared error, cross-entropy, or binary cross-entropy per label.

    Args:
        labels: float [B] or [B, C] for regression, int [B] for single-label, float [B, C] for multi-label.
        logits: float [B, C].
        problem_type: one of :data:`tfgptj.config.PROBLEM_TYPES`; None infers it: one output means regression, several
            with integer labels single-label, with floats multi-label.
        sample_weight: float [B], or None.
        counted: as for :func:`cross_entropy`; rows but for single labels.

    Returns:
        float32 scalar.
    """
    labels, logits = ops.convert_to_tensor(labels), ops.cast(logits, "float32")
    problem_type = problem_type or infer_problem_type(labels, logits.shape[-1])
    if problem_type == "single_label_classification":
        return cross_entropy(ops.reshape(labels, (-1,)), logits, sample_weight, counted)
    labels = ops.reshape(ops.cast(labels, "float32"), ops.shape(logits))
    binary = ops.softplus(logits) - logits * labels  # cross-entropy of independent labels, from logits
    losses = ops.mean(ops.square(logits - labels) if problem_type == "regression" else binary, axis=-1)  # [B]
    losses = losses if sample_weight is None else losses * ops.cast(sample_weight, "float32")
    return ops.mean(losses) if counted is None else ops.sum(losses) / ops.maximum(counted, 1.0)


def default_function(config: GPTJConfig) -> str:
    """What turns the logits of a classifier into scores: the inverse of its loss's link."""
    if config.problem_type == "regression":
        return "none"
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return "sigmoid"
    return "softmax"


def classification_count(labels: Any, num_labels: int, problem_type: str | None = None) -> Any:
    """What :func:`classification_loss` divides by: single labels that count, or else rows."""
    labels = ops.convert_to_tensor(labels)
    if (problem_type or infer_problem_type(labels, num_labels)) == "single_label_classification":
        return count(labels)
    return ops.cast(ops.shape(labels)[0], "float32")


def infer_problem_type(labels: Any, num_labels: int) -> str:
    """The classifier's problem, from its number of outputs and the labels' dtype."""
    if num_labels == 1:
        return "regression"
    integers = keras.backend.standardize_dtype(labels.dtype).startswith(("int", "uint"))
    return "single_label_classification" if integers else "multi_label_classification"


def question_answering_loss(
    positions: Any, logits: dict[str, Any], sample_weight: Any = None, counted: Any = None
) -> Any:
    """Mean of the cross-entropies of the answer's first and last token.

    Args:
        positions: dict of `start_positions` and `end_positions`, int [B] each, or a pair of them. Positions outside the
            text (answers that were cut off) do not count.
        logits: dict of `start_logits` and `end_logits`, float [B, T] each.
        sample_weight: float [B], or None.
        counted: float32 [2], as for :func:`cross_entropy`: of the first and of the last tokens.

    Returns:
        float32 scalar.

    Raises:
        InputError, InputTypeError: if the positions are neither.
    """
    pair = positions_in_text(positions, ops.shape(logits["start_logits"])[1])
    names = ("start_logits", "end_logits")
    counts = (None, None) if counted is None else (counted[0], counted[1])
    return 0.5 * sum(
        cross_entropy(labels, logits[name], sample_weight, number)
        for labels, name, number in zip(pair, names, counts, strict=True)
    )


def positions_in_text(positions: Any, length: Any) -> list[Any]:
    """First and last tokens as labels, int32 [B] each: -100 where they lie beyond the text."""
    if isinstance(positions, dict):
        missing = [name for name in ("start_positions", "end_positions") if name not in positions]
        if missing:
            raise InputError(f"question answering needs start_positions and end_positions; {missing[0]} is missing")
        positions = positions["start_positions"], positions["end_positions"]
    if not isinstance(positions, (tuple, list)) or len(positions) != 2:
        raise InputTypeError("question answering needs labels as a dict or pair of start_positions and end_positions")
    # PyTorch clamps below and ignores above.
    pair = [ops.maximum(ops.reshape(ops.cast(position, "int32"), (-1,)), 0) for position in positions]
    return [ops.where(labels < length, labels, IGNORE_INDEX) for labels in pair]
