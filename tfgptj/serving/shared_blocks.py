"""Blocks as calls of one function: a graph has the operators of a block once, however many blocks there are.

The blocks of a model differ in their weights alone. So the function of one is given the weights of another. TensorFlow
puts functions where they are called before it runs a graph; nothing is slower for them, and a file is much smaller.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from tfgptj.attention import Cache
from tfgptj.backbone import STEP
from tfgptj.block import ParallelBlock


class SharedBlocks:
    """The functions of a model's blocks; one for all blocks that are alike."""

    def __init__(self) -> None:
        self._functions: dict[Hashable, tf.types.experimental.PolymorphicFunction] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within it, the steps of :meth:`tfgptj.backbone.TFGPTJModel.step` are calls of these functions."""
        before = STEP.set(self._step)
        try:
            yield
        finally:
            STEP.reset(before)

    def _step(self, block: ParallelBlock, *arguments: Any) -> tuple[Any, Cache]:
        kind = _kind(block)
        if kind not in self._functions:
            self._functions[kind] = tf.function(_function_of(block), autograph=False)
        x, cache = self._functions[kind]([weight.value for weight in block.weights], *arguments)
        return x, cache


def _function_of(block: ParallelBlock) -> Any:
    """The step of a block, as a function of its weights, too."""

    def step(weights: list[Any], *arguments: Any) -> tuple[Any, Cache]:
        scope = keras.StatelessScope()
        # A scope made with them would cast them to the dtypes of their variables: they may have been cast before.
        scope.state_mapping.update({id(own): weight for own, weight in zip(block.weights, weights, strict=True)})
        with scope:
            return block.step(*arguments)

    return step


def _kind(block: ParallelBlock) -> Hashable:
    """What shapes the graph of a block."""
    layers = [layer for layer in block._flatten_layers() if layer.weights]
    adapters = ("lora_enabled", "lora_rank", "lora_alpha")
    return (
        tuple((tuple(weight.shape), weight.dtype) for weight in block.weights),
        tuple((layer.dtype_policy.name, *(getattr(layer, name, None) for name in adapters)) for layer in layers),
    )
