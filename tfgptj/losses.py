"""The loss of each head, averaged over what counts; nothing counts gives 0, not NaN.

Source: transformers, loss_utils.py and modeling_gptj.py.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfgptj.errors import InputError, InputTypeError

IGNORE_INDEX = -100  # PyTorch's mark for labels that do not count


def causal_lm_loss(labels: Any, logits: Any, sample_weight: Any = None) -> Any:
    """Cross-entropy of each token given those before it, in nats per token.

    Args:
        labels: int [B, T], the input ids themselves (the shift by one happens here); -100 does not count.
        logits: float [B, T, V].
        sample_weight: float [B] or [B, T], or None.

    Returns:
        float32 scalar.

    >>> import numpy as np
    >>> round(float(causal_lm_loss(np.array([[0, 1, -100]]), np.zeros((1, 3, 4), "float32"))), 4)
    1.3863
    """
    if sample_weight is not None:
        sample_weight = ops.reshape(sample_weight, (ops.shape(labels)[0], -1))  # [B, 1 or T]; fit() may forget its rank
        sample_weight = ops.broadcast_to(sample_weight, ops.shape(labels))[:, 1:]  # [B, T - 1]
    return cross_entropy(labels[:, 1:], logits[:, :-1], sample_weight)


def cross_entropy(labels: Any, logits: Any, sample_weight: Any = None) -> Any:
    """Mean cross-entropy over the labels that count.

    Args:
        labels: int [...]; -100 does not count.
        logits: float [..., V].
        sample_weight: float, broadcastable to the labels, or None. It weighs the terms, not their number.

    Returns:
        float32 scalar; 0 when no label counts.
    """
    labels = ops.cast(labels, "int32")
    counts = ops.cast(labels != IGNORE_INDEX, "float32")
    losses = ops.sparse_categorical_crossentropy(
        ops.where(labels != IGNORE_INDEX, labels, 0), ops.cast(logits, "float32"), from_logits=True
    )
    weights = counts if sample_weight is None else counts * ops.cast(sample_weight, "float32")
    return ops.sum(losses * weights) / ops.maximum(ops.sum(counts), 1.0)


def classification_loss(labels: Any, logits: Any, problem_type: str | None = None, sample_weight: Any = None) -> Any:
    """The classifier's loss: squared error, cross-entropy, or binary cross-entropy per label.

    Args:
        labels: float [B] or [B, C] for regression, int [B] for single-label, float [B, C] for multi-label.
        logits: float [B, C].
        problem_type: one of :data:`tfgptj.config.PROBLEM_TYPES`; None infers it: one output means regression, several
            with integer labels single-label, with floats multi-label.
        sample_weight: float [B], or None.

    Returns:
        float32 scalar.
    """
    labels, logits = ops.convert_to_tensor(labels), ops.cast(logits, "float32")
    problem_type = problem_type or infer_problem_type(labels, logits.shape[-1])
    if problem_type == "single_label_classification":
        return cross_entropy(ops.reshape(labels, (-1,)), logits, sample_weight)
    labels = ops.reshape(ops.cast(labels, "float32"), ops.shape(logits))
    binary = ops.softplus(logits) - logits * labels  # cross-entropy of independent labels, from logits
    losses = ops.mean(ops.square(logits - labels) if problem_type == "regression" else binary, axis=-1)  # [B]
    return ops.mean(losses if sample_weight is None else losses * ops.cast(sample_weight, "float32"))


def infer_problem_type(labels: Any, num_labels: int) -> str:
    """The classifier's problem, from its number of outputs and the labels' dtype."""
    if num_labels == 1:
        return "regression"
    integers = keras.backend.standardize_dtype(labels.dtype).startswith(("int", "uint"))
    return "single_label_classification" if integers else "multi_label_classification"


def question_answering_loss(positions: Any, logits: dict[str, Any], sample_weight: Any = None) -> Any:
    """Mean of the cross-entropies of the answer's first and last token.

    Args:
        positions: dict of `start_positions` and `end_positions`, int [B] each, or a pair of them. Positions outside the
            text (answers that were cut off) do not count.
        logits: dict of `start_logits` and `end_logits`, float [B, T] each.
        sample_weight: float [B], or None.

    Returns:
        float32 scalar.

    Raises:
        InputError, InputTypeError: if the positions are neither.
    """
    if isinstance(positions, dict):
        missing = [name for name in ("start_positions", "end_positions") if name not in positions]
        if missing:
            raise InputError(f"question answering needs start_positions and end_positions; {missing[0]} is missing")
        positions = positions["start_positions"], positions["end_positions"]
    if not isinstance(positions, (tuple, list)) or len(positions) != 2:
        raise InputTypeError("question answering needs labels as a dict or pair of start_positions and end_positions")
    return 0.5 * sum(
        _position_loss(position, logits[name], sample_weight)
        for position, name in zip(positions, ("start_logits", "end_logits"), strict=True)
    )


def _position_loss(positions: Any, logits: Any, sample_weight: Any) -> Any:
    positions = ops.reshape(ops.cast(positions, "int32"), (-1,))  # [B]
    positions = ops.maximum(positions, 0)  # PyTorch clamps below and ignores above
    inside = positions < ops.shape(logits)[1]
    return cross_entropy(ops.where(inside, positions, IGNORE_INDEX), logits, sample_weight)


class PerReplica(keras.losses.Loss):
    """Hands a loss that is already a mean, float32 scalar, to Keras as if it were one of Keras's own.

    Keras divides those by the number of replicas of a `tf.distribute` strategy, because it adds up the gradients.
    """

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return ops.reshape(y_pred, (1,))  # of a scalar Keras takes no mean
