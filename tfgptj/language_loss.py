"""LanguageLoss: the loss of a causal language model, with logits or without."""

from __future__ import annotations

import math
from typing import Any

from keras import ops, tree

from tfgptj.errors import InputError, InputTypeError
from tfgptj.fused import fused_cross_entropy
from tfgptj.inputs import split_labels
from tfgptj.losses import IGNORE_INDEX, Smoothing, causal_lm_loss, count, weights_of_tokens

# What a subclass must not change for the loss to be had without logits.
_METHODS = ("call", "head_loss", "compute_loss", "compute_metrics")


class LanguageLoss:
    """What :class:`tfgptj.head.GPTJHead` asks of a language model.

    Loss and gradient are computed from hidden states, chunk by chunk, and the logits are never whole. It is otherwise,
    and the logits are made, for a loss of the caller's, for metrics that read logits, for `weighted_metrics`, for a
    quantized head, and for a subclass with a `call`, `head_loss`, `compute_loss` or `compute_metrics` of its own.
    """

    smoothing = Smoothing()
    _sum_metrics: Any = ()  # those of `compile` if all can be had without logits; else None

    def compile(
        self: Any,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        micro_batches: int = 1,
        **options: Any,
    ) -> None:
        """Keras's `compile`, with three more arguments.

        Args:
            optimizer, loss, loss_weights, metrics, weighted_metrics: Keras's; no loss takes the head's own. The metrics
                of :mod:`tfgptj.training.metrics` need no logits.
            label_smoothing: share of each label's probability that is spread over the vocabulary.
            z_loss: factor of the squared logarithm of the softmax's denominator; PaLM's is 1e-4.
            micro_batches: parts of a batch whose gradients are computed one after the other and added up: a step in
                the memory of one part, with the loss and the gradients of the whole batch.
            **options: Keras's.

        Raises:
            InputError: if an argument is out of range, or given beside a loss that it does not apply to.
            InputTypeError: if an argument is of a wrong type.
        """
        for name, value, least_above in (("label_smoothing", label_smoothing, 1), ("z_loss", z_loss, math.inf)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputTypeError(f"{name} must be a number, got {value!r:.200}")
            if not 0 <= value < least_above:
                raise InputError(f"{name} must be at least 0 and less than {least_above}, got {value}")
            if value and loss is not None:
                raise InputError(f"{name} belongs to the head's own loss: leave it or the loss out")
        super().compile(  # type: ignore[misc]
            optimizer, loss, loss_weights, metrics, weighted_metrics, micro_batches=micro_batches, **options
        )
        self.smoothing = Smoothing(label_smoothing, z_loss)
        given = tree.flatten(metrics or [])
        readable = all(hasattr(metric, "update_sums") for metric in given) and weighted_metrics is None
        if given and isinstance(self.output, dict):  # Keras must find out to which output they belong
            readable = False
        self.__dict__["_sum_metrics"] = given if readable else None
        if self._sum_metrics:  # Keras would ask the first batch, and under a strategy fails for integers
            self._compile_metrics.build(None, None)

    def get_compile_config(self: Any) -> dict[str, Any]:
        config = super().get_compile_config()  # type: ignore[misc]
        return {**config, **self.smoothing._asdict()} if config else config

    @property
    def needs_no_logits(self: Any) -> bool:
        """Whether loss and metrics can be had of the hidden states."""
        own = all(getattr(type(self), name).__module__.startswith("tfgptj.") for name in _METHODS)
        return own and self.loss is None and self._sum_metrics is not None and not self.lm_head.is_quantized

    def head_loss(self: Any, labels: Any, outputs: Any, sample_weight: Any = None, counted: Any = None) -> Any:
        """Shifted cross-entropy: see :func:`tfgptj.losses.causal_lm_loss`."""
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs
        return causal_lm_loss(labels, logits, sample_weight, counted, self.smoothing)

    def loss_of_features(
        self: Any, labels: Any, features: Any, sample_weight: Any, counted: Any, training: bool
    ) -> Any:
        """As :meth:`head_loss`, of hidden states [B, T, D]; updates the metrics, which need no logits either."""
        targets = ops.reshape(ops.cast(labels[:, 1:], "int32"), (-1,))  # [N]
        weights = ops.ones_like(targets, dtype="float32")
        if sample_weight is not None:
            weights = ops.reshape(ops.cast(weights_of_tokens(labels, sample_weight)[:, 1:], "float32"), (-1,))
        x = ops.reshape(features[:, :-1], (-1, features.shape[-1]))  # [N, D]
        products, bias = self.lm_head.products(x, training)
        sums = fused_cross_entropy(
            products,
            bias,
            targets,
            weights,
            self.smoothing,
            trained_bias=bias.trainable,
            with_hits=any(metric.needs_hits for metric in self._sum_metrics),
            with_gradients=training,
        )
        known = ops.stop_gradient(sums)
        for metric in self._sum_metrics:
            metric.update_sums(targets, nats=known[1], hits=known[2])
        return sums[0] / ops.maximum(counted, 1.0)

    def count_labels(self: Any, y: Any, x: Any) -> Any:
        """The labels that count and have a token before them."""
        return count(y[:, 1:])

    def labels_of(self: Any, x: Any, y: Any) -> Any:
        """The labels; where there are none, the input ids that can be predicted."""
        inputs, labels = split_labels(x)
        if y is not None or labels or inputs["input_ids"] is None:
            return super().labels_of(x, y)  # type: ignore[misc]
        ids, segments = inputs["input_ids"], inputs["segment_ids"]
        if inputs["attention_mask"] is not None:
            ids = ops.where(ops.cast(inputs["attention_mask"], "bool"), ids, IGNORE_INDEX)
        if segments is not None:  # a segment's first token follows nothing that can be seen
            begins = ops.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
            ids = ops.where(begins, IGNORE_INDEX, ids)
        return ids

    def without_labels(self: Any, y: Any, sample_weight: Any, kept: Any) -> tuple[Any, Any]:
        """Labels of which only the rows kept, bool [B], count, and their weights."""
        return ops.where(kept[:, None], y, IGNORE_INDEX), sample_weight
