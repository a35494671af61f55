"""Sums over the replicas of a `tf.distribute` strategy; without one, what is given."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


def sum_over_replicas(value: Any) -> Any:
    """A tensor, or a list of them, summed over all replicas, without gradient.

    Call it where every replica comes by, outside of loops.
    """
    if keras.backend.backend() != "tensorflow":
        return value
    import tensorflow as tf

    if tf.distribute.in_cross_replica_context() or tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return value
    stopped = tf.nest.map_structure(tf.stop_gradient, value)
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, stopped)


def as_share(share: Any) -> Any:
    """A replica's share of a loss, with the value that Keras expects: the whole loss by the number of replicas.

    Keras shows a replica's loss times their number, and adds up the gradients of all. So the gradient is the share's.
    """
    whole = sum_over_replicas(share)
    if whole is share:
        return share
    import tensorflow as tf

    value = whole / ops.cast(tf.distribute.get_strategy().num_replicas_in_sync, share.dtype)
    return share + ops.stop_gradient(value - share)


def unscaled(loss: Any) -> Any:
    """A replica's loss as Keras shows it: times the number of replicas."""
    import tensorflow as tf

    return loss * ops.cast(tf.distribute.get_strategy().num_replicas_in_sync, loss.dtype)
