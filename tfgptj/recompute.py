"""Gradient checkpointing: what a layer computes is not kept for the backward pass but computed again there.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras


def recomputed(layer: keras.layers.Layer, function: Callable[[Any], Any], x: Any) -> Any:
    """`function(x)`, of which only `x` is kept for the backward pass.

    Args:
        layer: whose weights and random numbers the function uses; it draws the same numbers both times.
        function: of a float tensor; what else it needs must have no gradient, or be weights.
        x: float tensor.

    Returns:
        What the function returns: a tensor, or a tuple of tensors.
    """
    generators = [seeds for part in layer._flatten_layers() for seeds in part._seed_generators]
    drawn = [(seeds.state, seeds.next()) for seeds in generators]

    def seeded(x: Any) -> Any:
        with keras.StatelessScope(drawn) as scope:
            if scope.original_scope is not None:  # on JAX, where it holds all variables
                scope.state_mapping = {**scope.original_scope.state_mapping, **scope.state_mapping}
            return function(x)

    # TensorFlow takes neither keywords here nor tensors that have no gradient.
    return keras.remat(seeded)(x)
