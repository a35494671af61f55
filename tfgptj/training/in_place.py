"""Updates of weights by TensorFlow's own kernels, which change weights and moments where they are.

What `keras.ops` makes of the same formulas holds several matrices of the weight's size at a time, and many of them at
once where updates run side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


def one_by_one(strategy: Any, pairs: Iterable[tuple[Any, Any]], update: Callable[[Any, Any], Any]) -> None:
    """Change weights one after the other, from the last to the first: the order in which their gradients come.

    Args:
        strategy: the `tf.distribute` strategy whose weights they are.
        pairs: gradients and weights.
        update: a function of a gradient and a device's weight that returns its last operation.
    """
    import tensorflow as tf

    before: list[Any] = []
    for gradient, variable in reversed([*pairs]):
        after: list[Any] = []

        def change(variable: Any, gradient: Any, after: list[Any] = after) -> None:
            after.append(update(gradient, variable))

        with tf.control_dependencies(before):
            strategy.extended.update(variable, change, args=(gradient,), group=False)
        before = [operation for operation in after if operation is not None]  # there is none outside of a graph


def assign(variable: Any, value: Any) -> Any:
    """Give a weight values; returns the operation."""
    return variable.assign(value, read_value=False)


def adam_step(
    weight: Any,
    moments: tuple[Any, Any],
    gradient: Any,
    step: Any,
    rate: Any,
    betas: tuple[float, float],
    epsilon: float,
    decay: Any = None,
) -> Any:
    """One step of AdamW as PyTorch has it; returns its last operation.

    Args:
        weight: `tf.Variable`.
        moments: the slots of the first and the second moment, of the weight's dtype, as all that follows.
        gradient: float, of the weight's shape.
        step: float scalar, counted from 1.
        rate: float scalar, the learning rate.
        betas: how much of the moments stays.
        epsilon: added to the root of the second moment after the bias correction.
        decay: float scalar, share of the weight that is taken away before; None for none.
    """
    import tensorflow as tf

    if decay is not None:
        weight.assign(weight * (1 - decay), read_value=False)
    # The kernel takes 1 - beta of the rounded beta, so that is the one to correct for; and its own correction, given
    # the powers, would lose digits.
    rounded = [float(np.asarray(beta, weight.dtype.as_numpy_dtype)) for beta in betas]
    first, second = (-tf.math.expm1(step * math.log(beta)) if beta else 1.0 for beta in rounded)
    root = tf.sqrt(second * tf.ones_like(step))
    return tf.raw_ops.ResourceApplyAdam(
        var=weight.handle,
        m=moments[0].handle,
        v=moments[1].handle,
        beta1_power=tf.zeros_like(step),
        beta2_power=tf.zeros_like(step),
        lr=rate * root / first,
        beta1=tf.constant(betas[0], step.dtype),
        beta2=tf.constant(betas[1], step.dtype),
        epsilon=epsilon * root,
        grad=gradient,
        use_locking=False,
    )


def follow(master: Any, weight: Any) -> Any:
    """Give a float32 master, and return it, the numbers of its narrow weight that are new: seldom any are."""
    import tensorflow as tf

    def is_new() -> Any:
        # Compared bit by bit: of floats, XLA may leave out that the one is rounded.
        rounded, stored = (tf.bitcast(x, tf.int16) for x in (tf.cast(master, weight.dtype), weight))
        return rounded != stored

    def take_up() -> Any:
        master.assign(tf.where(is_new(), tf.cast(weight, "float32"), master), read_value=False)
        return True

    tf.cond(tf.reduce_any(is_new()), take_up, lambda: True)
    return master
