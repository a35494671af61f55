"""Gradient checkpointing: what a layer computes is not kept for the backward pass but computed again there.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops


def recomputed(layer: keras.layers.Layer, function: Callable[[Any], Any], x: Any) -> Any:
    """`function(x)`, of which only `x` is kept for the backward pass.

    Args:
        layer: whose weights and random numbers the function uses; both times it draws the same ones.
        function: of a float tensor; what else it needs must have no gradient, or be weights.
        x: float tensor.

    Returns:
        What the function returns: a tensor, or a tuple of tensors.
    """
    generators = [seeds for part in layer._flatten_layers() for seeds in part._seed_generators]
    drawn = [generator.next() for generator in generators]

    def call(x: Any, drawn: Sequence[Any]) -> Any:
        with keras.StatelessScope(list(zip((seeds.state for seeds in generators), drawn, strict=True))) as scope:
            if scope.original_scope is not None:  # on JAX, where it holds all variables
                scope.state_mapping = {**scope.original_scope.state_mapping, **scope.state_mapping}
            return function(x)

    if keras.backend.backend() == "tensorflow":
        return _recomputed_on_tensorflow(call, x, drawn)
    return keras.remat(lambda x: call(x, drawn))(x)


def _recomputed_on_tensorflow(function: Callable[[Any, Sequence[Any]], Any], x: Any, drawn: Sequence[Any]) -> Any:
    """As `keras.remat`, but without its gradients of frozen weights, and in such a way that XLA really recomputes.

    `tf.recompute_grad`, which that is, puts the gradients of all weights into one operation, so that none can be left
    out; and its way to have the second computation wait for the backward pass is one that XLA sees through.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def call(x: Any) -> Any:
        def gradient(*upstream: Any, variables: Sequence[Any] = ()) -> Any:
            # NaN if the gradient that arrives is NaN, or else 0: a sum with it is not known before, nor as what it was.
            first = ops.reshape(upstream[0], (-1,))[0]
            wait = ops.where(first != first, first, ops.zeros_like(first))
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                again = x + ops.cast(wait, x.dtype)
                trained = [v for v in variables if v.dtype.is_floating]
                tape.watch([again, *trained])
                results = function(again, [seed + ops.cast(wait != wait, seed.dtype) for seed in drawn])
            found = tape.gradient(tf.nest.flatten(results), [again, *trained], list(upstream))
            by_name = dict(zip((v.ref() for v in trained), found[1:], strict=True))
            return found[0], [by_name.get(v.ref()) for v in variables]

        return function(x, drawn), gradient

    return call(x)
