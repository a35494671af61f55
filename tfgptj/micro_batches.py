"""A training step in several parts: the gradients of a large batch in the memory of a small one.

The batch is split into parts of one size. Forward and backward pass of one part end before those of the next begin,
and the loss is divided by what counts in the whole batch, so that the gradients add up to those of one large step. The
optimizer sees one gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
from keras import ops, tree

from tfgptj.inputs import split_labels
from tfgptj.replicas import sum_over_replicas, unscaled

FEATURES = "last_hidden_state"  # the only key of what a model gives in a step that needs no logits
NO_LOGITS = {FEATURES: None}


class Parts(NamedTuple):
    """A batch, whole and in parts."""

    whole: tuple[Any, Any, Any]  # x, y, sample_weight
    parts: tuple[Any, Any, Any]  # the same, [parts, m, ...] each
    rows: Any  # of the whole batch
    counted: Any  # labels of the batch that count, in all replicas


def micro_batched_step(model: Any, *args: Any) -> Any:
    """A training step of `model.micro_batches` parts: Keras's `train_step`, arguments and results as the backend's."""
    steps: dict[str, Any] = {"tensorflow": _tensorflow_step, "jax": _jax_step, "torch": _torch_step}
    return steps[keras.backend.backend()](model, *args)


def in_parts(model: Any, data: Any) -> Parts:
    """Split a batch into `model.micro_batches` parts.

    Where they do not divide its rows the last parts are filled up with rows whose labels do not count.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    y = model.labels_of(x, y)
    x = {name: tensor for name, tensor in split_labels(x)[0].items() if tensor is not None}
    whole, parts = (x, y, sample_weight), model.micro_batches
    rows = ops.shape(next(iter(x.values())))[0]
    size = -(-rows // parts)
    filled = whole
    if not isinstance(rows, int) or rows % parts:
        places = ops.arange(parts * size)
        inside = places < rows
        places = ops.where(inside, places, 0)
        x, y, sample_weight = tree.map_structure(lambda t: t if t is None else ops.take(t, places, axis=0), whole)
        filled = x, *model.without_labels(y, sample_weight, inside)
    split = tree.map_structure(lambda t: t if t is None else ops.reshape(t, (parts, size, *t.shape[1:])), filled)
    return Parts(whole, split, rows, sum_over_replicas(model.count_labels(y=whole[1], x=whole[0])))


def _part(parts: Any, i: Any) -> Any:
    return tree.map_structure(lambda t: t if t is None else t[i], parts)


def _joined(outputs: Any, rows: Any) -> Any:
    """Outputs [parts, m, ...] as those of the whole batch."""
    return tree.map_structure(lambda t: ops.reshape(t, (-1, *t.shape[2:]))[:rows], outputs)


def whole_step(model: Any, data: Any) -> Any:
    """Keras's training step on TensorFlow, but that an embedding's gradient is summed for each token before it is used.

    TensorFlow gives it as rows, of which some are for one token; Keras's optimizers square each for itself.
    """
    import tensorflow as tf

    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    weights = model.trainable_weights
    with tf.GradientTape() as tape:
        y_pred = model(x, training=True)
        loss = model.compute_loss(x, y, y_pred, sample_weight, training=True)
        scaled = model.optimizer.scale_loss(loss)
    rows = ops.shape(next(tensor for tensor in tree.flatten(x) if tensor is not None))[0]
    model._loss_tracker.update_state(unscaled(loss), sample_weight=rows)
    gradients = [
        tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in tape.gradient(scaled, weights)
    ]
    model.optimizer.apply_gradients(zip(gradients, weights, strict=True))
    return model.compute_metrics(x, y, y_pred, sample_weight)


def _tensorflow_step(model: Any, data: Any) -> Any:
    import tensorflow as tf

    batch, weights = in_parts(model, data), model.trainable_weights
    collected = tree.flatten(model.output) if model.reads_outputs else []
    absent: list[bool] = []

    def body(i: Any, loss: Any, sums: list[Any], outputs: list[Any]) -> Any:
        x, y, sample_weight = _part(batch.parts, i)
        with model.in_part(batch.counted), tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            share = model.compute_loss(x, y, y_pred, sample_weight, training=True)
            scaled = model.optimizer.scale_loss(share)
        gradients = tape.gradient(scaled, weights)
        absent[:] = [gradient is None for gradient in gradients]
        sums = [_added(total, gradient) for total, gradient in zip(sums, gradients, strict=True)]
        made = zip(outputs, tree.flatten(y_pred), strict=False)
        return i + 1, loss + share, sums, [array.write(i, output) for array, output in made]

    start = [
        tf.constant(0),
        tf.constant(0.0),
        [tf.zeros(v.shape, "float32") for v in weights],
        [tf.TensorArray(tensor.dtype, model.micro_batches) for tensor in collected],
    ]
    # One after the other: otherwise the parts would need the memory of the whole.
    _, loss, sums, outputs = tf.while_loop(lambda i, *_: i < model.micro_batches, body, start, parallel_iterations=1)
    model._loss_tracker.update_state(sum_over_replicas(loss), sample_weight=batch.rows)
    gradients = [
        None if missing else tf.cast(total, v.dtype) for total, v, missing in zip(sums, weights, absent, strict=True)
    ]
    model.optimizer.apply_gradients(zip(gradients, weights, strict=True))
    y_pred = tree.pack_sequence_as(model.output, [array.stack() for array in outputs]) if collected else None
    return _metrics(model, batch, y_pred)


def _added(total: Any, gradient: Any) -> Any:
    """A sum of gradients in float32 with one more, which TensorFlow may give as rows of an embedding."""
    if gradient is None:
        return total
    import tensorflow as tf

    if isinstance(gradient, tf.IndexedSlices):
        return tf.tensor_scatter_nd_add(total, gradient.indices[:, None], tf.cast(gradient.values, "float32"))
    return total + tf.cast(gradient, "float32")


def _jax_step(model: Any, state: Any, data: Any) -> Any:
    import jax

    batch, collect = in_parts(model, data), model.reads_outputs
    weights, others, optimizer_variables, metrics = state
    differentiate = jax.value_and_grad(model.compute_loss_and_updates, has_aux=True)

    def body(carry: Any, part: Any) -> Any:
        loss, sums, others, metrics = carry
        with model.in_part(batch.counted):
            (_, aux), gradients = differentiate(
                weights, others, metrics, *part, training=True, optimizer_variables=optimizer_variables
            )
        share, y_pred, others, metrics = aux
        sums = [total + ops.cast(gradient, "float32") for total, gradient in zip(sums, gradients, strict=True)]
        return (loss + share, sums, others, metrics), y_pred if collect else None

    start = ops.zeros(()), [ops.zeros(w.shape, "float32") for w in weights], others, metrics
    (loss, sums, others, metrics), outputs = jax.lax.scan(body, start, batch.parts)
    gradients = [ops.cast(total, w.dtype) for total, w in zip(sums, weights, strict=True)]
    weights, optimizer_variables = model.optimizer.stateless_apply(optimizer_variables, gradients, weights)
    y_pred = _joined(outputs, batch.rows) if collect else NO_LOGITS
    logs, metrics = model._update_metrics_variables(metrics, loss, *batch.whole[:2], y_pred, batch.whole[2])
    return logs, (weights, others, optimizer_variables, metrics)


def _torch_step(model: Any, data: Any) -> Any:
    import torch

    batch, weights = in_parts(model, data), model.trainable_weights
    model.zero_grad()
    loss, outputs = 0.0, []
    for i in range(model.micro_batches):
        x, y, sample_weight = _part(batch.parts, i)
        with model.in_part(batch.counted):
            y_pred = model(x, training=True)
            share = model.compute_loss(x, y, y_pred, sample_weight, training=True)
        model.optimizer.scale_loss(share).backward()  # adds to what the parts before it gave
        loss = loss + share.detach()
        if model.reads_outputs:
            outputs.append(tree.map_structure(lambda t: t.detach(), y_pred))
    model._loss_tracker.update_state(loss, sample_weight=batch.rows)
    with torch.no_grad():
        model.optimizer.apply([w.value.grad for w in weights], weights)
    return _metrics(model, batch, tree.map_structure(lambda *t: ops.stack(t), *outputs) if outputs else None)


def _metrics(model: Any, batch: Parts, outputs: Any) -> Any:
    x, y, sample_weight = batch.whole
    return model.compute_metrics(x, y, NO_LOGITS if outputs is None else _joined(outputs, batch.rows), sample_weight)
