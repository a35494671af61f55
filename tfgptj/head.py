"""GPTJHead: what the models with a head share: labels, the loss, and the training step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

from tfgptj.backbone import TFGPTJModel, with_extras
from tfgptj.base import GPTJBase
from tfgptj.compiled import set_whole
from tfgptj.errors import InputError, InputTypeError
from tfgptj.inputs import split_labels
from tfgptj.micro_batches import FEATURES, micro_batched_step, whole_step
from tfgptj.replicas import as_share, sum_over_replicas


class _Step(threading.local):
    """What is going on in a training step; a strategy's replicas trace theirs in a thread each."""

    features = False  # the model is to give hidden states, not logits
    counted: Any = None  # in a part of a batch: the labels of the whole that count


class GPTJHead(GPTJBase):
    """A model with a head and a loss of its own.

    `compile()` without a loss takes the head's. Labels come as `y`, or as `labels` (`start_positions` and
    `end_positions`) in the dict of inputs. A loss given to `compile` is used as in every Keras model.
    """

    transformer: TFGPTJModel
    micro_batches = 1

    def _compose(self, transformer: TFGPTJModel, kwargs: dict[str, Any], **results: Any) -> None:
        """Finish the functional model: the transformer's inputs, these results, and the extras asked for."""
        extras = transformer.output if isinstance(transformer.output, dict) else {}
        outputs = with_extras(
            transformer.config,
            hidden_states=extras.get("hidden_states"),
            attentions=extras.get("attentions"),
            **results,
        )
        super().__init__(inputs=transformer.input, outputs=outputs, **kwargs)
        self.config = transformer.config
        self.dtype_policy = transformer.dtype_policy
        self.transformer = transformer
        set_whole(transformer, self)

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        *,
        micro_batches: int = 1,
        **options: Any,
    ) -> None:
        """Keras's `compile`, with one more argument.

        Args:
            optimizer, loss, loss_weights, metrics, weighted_metrics: Keras's; no loss takes the head's own.
            micro_batches: parts of a batch whose gradients are computed one after the other and added up: a step in
                the memory of one part, with the loss and the gradients of the whole batch.
            **options: Keras's.

        Raises:
            InputError: if an argument is out of range, or given beside a loss that it does not apply to.
            InputTypeError: if an argument is of a wrong type.
        """
        if isinstance(micro_batches, bool) or not isinstance(micro_batches, int):
            raise InputTypeError(f"micro_batches must be an integer, got {micro_batches!r:.200}")
        if micro_batches < 1:
            raise InputError(f"micro_batches must be at least 1, got {micro_batches}")
        if micro_batches > 1 and loss is not None:
            raise InputError(
                "micro_batches needs the head's own loss, whose parts add up: leave the loss out, or give the "
                "optimizer gradient_accumulation_steps instead"
            )
        self.loss = self._compile_loss = self._compile_metrics = None  # Keras keeps an earlier call's
        super().compile(optimizer, loss, loss_weights, metrics, weighted_metrics, **options)
        self.micro_batches = micro_batches

    def get_compile_config(self) -> dict[str, Any]:
        config = super().get_compile_config()
        return {**config, "micro_batches": self.micro_batches} if config else config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def make_train_function(self, force: bool = False) -> Any:
        """Keras's; a step that made the optimizer's variables would be traced twice by TensorFlow, and kept twice."""
        if keras.backend.backend() == "tensorflow" and self.trainable_weights and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)
        return super().make_train_function(force)

    def train_step(self, *args: Any) -> Any:
        """Keras's, of `micro_batches` parts; without logits where they are not needed."""
        with self._features_only():
            if self.micro_batches > 1:
                return micro_batched_step(self, *args)
            if keras.backend.backend() == "tensorflow" and self.trainable_weights:
                return whole_step(self, *args)
            return super().train_step(*args)

    def test_step(self, *args: Any) -> Any:
        """Keras's; without logits where they are not needed."""
        with self._features_only():
            return super().test_step(*args)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None, **kwargs: Any) -> Any:
        if not self._step.features:
            return super().call(inputs, training=training, mask=mask, **kwargs)
        outputs = self.transformer(split_labels(inputs)[0], training=training)
        return {FEATURES: outputs[FEATURES] if isinstance(outputs, dict) else outputs}

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        y = self.labels_of(x, y)
        if self.loss is not None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        part_of = self._step.counted
        counted = sum_over_replicas(self.count_labels(y, x)) if part_of is None else part_of
        if isinstance(y_pred, dict) and set(y_pred) == {FEATURES}:
            loss = self.loss_of_features(y, y_pred[FEATURES], sample_weight, counted, training)
        else:
            loss = self.head_loss(y, y_pred, sample_weight, counted)
        for extra in self.losses:
            loss = loss + self._aggregate_additional_loss(extra) / (1 if part_of is None else self.micro_batches)
        return as_share(loss) if part_of is None else loss

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if not isinstance(y_pred, dict) or set(y_pred) != {FEATURES}:
            return super().compute_metrics(x, self.labels_of(x, y), y_pred, sample_weight)
        return self.get_metrics_result()  # the loss has updated them

    def head_loss(self, labels: Any, outputs: Any, sample_weight: Any = None, counted: Any = None) -> Any:
        """The head's own loss, a float32 scalar: a mean over what counts in these labels, or over so many."""
        raise InputError(f"{type(self).__name__} has no loss of its own")

    def loss_of_features(self, labels: Any, features: Any, sample_weight: Any, counted: Any, training: bool) -> Any:
        """The head's own loss, of the last hidden states; asked for where `needs_no_logits`."""
        raise InputError(f"{type(self).__name__} has no loss of hidden states")

    def count_labels(self, y: Any, x: Any) -> Any:
        """What the head's own loss divides by for these labels, float32."""
        raise InputError(f"{type(self).__name__} has no loss of its own")

    def labels_of(self, x: Any, y: Any) -> Any:
        """The labels: `y`, or those among the inputs."""
        if y is not None:
            return y
        labels = split_labels(x)[1]
        if not labels:
            raise InputError("no labels: give them as y, or in the inputs' dict as labels (or start_/end_positions)")
        return labels.get("labels", labels)

    @property
    def needs_no_logits(self) -> bool:
        """Whether loss and metrics can be had of the hidden states."""
        return False

    @property
    def reads_outputs(self) -> bool:
        """Whether the model's outputs are wanted for metrics, beside the loss."""
        own = type(self).compute_metrics is GPTJHead.compute_metrics and self._compile_metrics is None
        return not (own or self.needs_no_logits)

    def without_labels(self, y: Any, sample_weight: Any, kept: Any) -> tuple[Any, Any]:
        """Labels and weights of which only the rows kept, bool [B], count."""
        kept = ops.cast(kept, "float32")
        if sample_weight is None:
            return y, kept
        return y, sample_weight * ops.reshape(kept, (-1, *[1] * (len(sample_weight.shape) - 1)))

    @contextmanager
    def in_part(self, counted: Any) -> Iterator[None]:
        """Compute the loss of a part of a batch in which so many labels count."""
        self._step.counted = counted
        try:
            yield
        finally:
            self._step.counted = None

    @contextmanager
    def _features_only(self) -> Iterator[None]:
        self._step.features = self.needs_no_logits
        try:
            yield
        finally:
            self._step.features = False

    @property
    def _step(self) -> _Step:
        # Not as an attribute: Keras would track it.
        step: _Step = self.__dict__.setdefault("_step_state", _Step())
        return step
