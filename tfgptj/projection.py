"""Projection: the dense layer that GPT-J's projections are, and what becomes of it with LoRA."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj.errors import InputError
from tfgptj.fused import Product
from tfgptj.products import project

# What Keras keeps of a kernel, the latter two where it is quantized; and of adapters.
_PARTS = ("_kernel", "kernel_scale", "kernel_zero")
_ADAPTERS = ("lora_kernel_a", "lora_kernel_b")


@keras.saving.register_keras_serializable(package="tfgptj")
class Projection(keras.layers.Dense):
    """A dense layer without activation, whose kernel is [out, in]: see :mod:`tfgptj.products`.

    Its LoRA costs two thin products: x W + (alpha / rank) (x A) B. Keras's own `Dense` adds A B to W at each call. That
    makes a second kernel for every generated token, and in training a gradient as large as the kernel.

    Flags and quantization are Keras's; a quantized kernel is [in, out], as Keras has it. Adapters may have dropout, and
    saving with Keras keeps kernel and adapters apart, so that training can go on from there. Initialisers see the shape
    [out, in].

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

    >>> layer = Projection(3)
    >>> layer.build((None, 4))
    >>> layer.enable_lora(2, lora_alpha=4)
    >>> [variable.name for variable in layer.trainable_variables]
    ['bias', 'lora_kernel_a', 'lora_kernel_b']
    """

    lora_rank: Any  # None without adapters; this and the next are Keras's
    lora_alpha: Any
    lora_dropout = 0.0

    def build(self, input_shape: Any) -> None:
        if self.quantization_mode is not None:
            super().build(input_shape)
            return
        self._add_kernel((self.units, input_shape[-1]))
        self.bias = None
        if self.use_bias:
            options = {"regularizer": self.bias_regularizer, "constraint": self.bias_constraint}
            self.bias = self.add_weight((self.units,), self.bias_initializer, name="bias", **options)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: input_shape[-1]})
        self.built = True
        if self.lora_rank:
            self.enable_lora(self.lora_rank, self.lora_alpha)

    def _add_kernel(self, shape: tuple[int, int]) -> None:
        self._kernel = self.add_weight(
            name="kernel",
            shape=shape,
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )

    @property
    def base_kernel(self) -> Any:
        """The variable of the kernel, whatever stands beside it."""
        return self._kernel

    @property
    def kernel(self) -> Any:
        """The kernel, float [out, in]; with LoRA enabled kernel and adapters in one, rounded to the kernel's dtype.

        The product and the sum are computed in float32, whatever the dtype policy. Quantized it is [in, out].
        """
        if self.quantization_mode is not None:
            return super().kernel
        if not self.built:
            raise AttributeError(f"{self.name} has no kernel before it is built")
        if not self.lora_enabled:
            return self._kernel
        delta = ops.transpose(ops.matmul(self.lora_kernel_a, self.lora_kernel_b) * self._scale)
        return ops.cast(ops.add(ops.cast(self._kernel, delta.dtype), delta), self._kernel.dtype)

    @property
    def merged(self) -> bool:
        """Whether the adapters are part of the kernel for the time being."""
        return "_replaced" in self.__dict__

    @property
    def _scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        a_initializer: Any = "he_uniform",
        b_initializer: Any = "zeros",
        dropout: float = 0.0,
    ) -> None:
        """Give the layer adapters, as Keras's `Dense.enable_lora` does.

        Args:
            rank: columns of A and rows of B.
            lora_alpha: what A B is multiplied by, times the rank; None is the rank.
            a_initializer, b_initializer: Keras initialisers; either must be zeros.
            dropout: share of what A sees that is dropped in training.
        """
        if self.quantization_mode is None:
            self._add_adapters(rank, a_initializer, b_initializer)
            self.lora_enabled, self.lora_rank = True, rank
            self.lora_alpha = rank if lora_alpha is None else lora_alpha
        else:
            super().enable_lora(rank, lora_alpha, a_initializer, b_initializer)
        if dropout:
            self._tracker.unlock()
            self.lora_seed = keras.random.SeedGenerator()
            self._tracker.lock()
        self.lora_dropout = dropout

    def _add_adapters(self, rank: int, a_initializer: Any, b_initializer: Any) -> None:
        """A [in, rank] and B [rank, out], float32 so that nothing is lost in training; the kernel trains no more."""
        if self.lora_enabled or not self.built:
            raise InputError(f"{self.name} {'has LoRA already' if self.lora_enabled else 'must be built before LoRA'}")
        outputs, inputs = self._kernel.shape
        shapes = ((inputs, rank), (rank, outputs))
        self._tracker.unlock()
        for name, shape, initializer in zip(_ADAPTERS, shapes, (a_initializer, b_initializer), strict=True):
            variable = self.add_weight(
                name=name,
                shape=shape,
                initializer=keras.initializers.get(initializer),
                dtype="float32",
                regularizer=self.kernel_regularizer,
            )
            setattr(self, name, variable)
        self._kernel.trainable = False
        self._tracker.lock()

    def remove_lora(self) -> None:
        """Take the adapters away; what is merged of them stays in the kernel."""
        self.lora_enabled, self.lora_rank, self.lora_alpha = False, None, None
        self.__dict__.pop("_replaced", None)
        for name in _ADAPTERS:
            self._untrack_variable(getattr(self, name))
            # Keras's own, in `Layer`, collects garbage each time: a minute for the layers of a large model.
            super(keras.layers.Layer, self).__delattr__(name)
        if self.lora_dropout:
            self._tracker.unlock()
            self._tracker.untrack(self.lora_seed)
            self._tracker.lock()
            del self.lora_seed
        self.lora_dropout = 0.0

    def merge(self) -> None:
        """Add the adapters to the kernel and disable them; a quantized kernel is quantized anew, with other scales."""
        merged = self._get_kernel_with_merged_lora()
        values = {name: value for name, value in zip(_PARTS, merged, strict=True) if value is not None}
        # Not as an attribute: Keras and TensorFlow would look for variables in it.
        self.__dict__["_replaced"] = {name: _copy(getattr(self, name)) for name in values}
        for name, value in values.items():
            getattr(self, name).assign(value)
        self.lora_enabled = False

    def unmerge(self) -> None:
        """Give the kernel back the bits that it had before :meth:`merge`, and enable the adapters."""
        for name, value in self.__dict__.pop("_replaced", {}).items():
            getattr(self, name).assign(value)
        self.lora_enabled = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        self._check_training(training)
        x = project(inputs, ops.convert_to_tensor(self._kernel), training)
        if self.lora_enabled:
            x = ops.add(x, self._adapt(self._drop(inputs, training)))
        return x if self.bias is None else ops.add(x, self.bias)

    def products(self, x: Any, training: bool) -> list[Product]:
        """What outputs for inputs [N, D] are the sum of, beside the bias; not of a quantized layer."""
        self._check_training(training)
        base = Product(x, self._kernel, transposed=True, trained=self._kernel.trainable)
        return [base, Product(self._thin(self._drop(x, training)), self.lora_kernel_b)] if self.lora_enabled else [base]

    def quantized_call(self, inputs: Any, training: bool | None = None) -> Any:
        """As Keras's, with dropout of what the adapters see."""
        self._check_training(training)
        x = super().quantized_call(inputs, training=training)
        if self.lora_enabled and self.lora_dropout and training:
            # Keras has added what all of the inputs give.
            x = ops.add(x, self._adapt(ops.subtract(self._drop(inputs, training), inputs)))
        return x

    def quantize(self, mode: str | None = None, type_check: bool = True, config: Any = None) -> None:
        """As Keras's `Dense.quantize`, which refuses subclasses: this one computes as `Dense` does when quantized."""
        if self.quantization_mode is None:
            turned = ops.transpose(self._kernel)  # Keras's quantizers and products want [in, out]
            del self._kernel
            self._add_kernel(tuple(turned.shape))
            self._kernel.assign(turned)
        super().quantize(mode, type_check=False, config=config)

    def save_own_variables(self, store: Any) -> None:
        """Kernel and adapters beside each other, where Keras writes them merged; after a merge the kernel alone."""
        if not self.lora_enabled:
            super().save_own_variables(store)
        else:
            self.lora_enabled = False  # for Keras, which would merge
            try:
                super().save_own_variables(store)
            finally:
                self.lora_enabled = True
            for name in _ADAPTERS:
                store[name] = getattr(self, name)

    def load_own_variables(self, store: Any) -> None:
        """What :meth:`save_own_variables` wrote. From a layer without adapters comes the kernel, and B becomes zero."""
        if self.lora_rank and not self.lora_enabled:
            raise InputError(f"{self.path}: its adapters are merged or disabled; unmerge or enable them before loading")
        previous = _copy(self.lora_kernel_a) if self.lora_rank else None
        super().load_own_variables(store)  # makes both zero, and such adapters would never learn
        if self.lora_rank and _ADAPTERS[0] in store:
            for name in _ADAPTERS:
                getattr(self, name).assign(store[name])
        elif self.lora_rank:
            self.lora_kernel_a.assign(previous)

    def _check_training(self, training: bool | None) -> None:
        if training and self.lora_rank and not self.lora_enabled:
            raise InputError(
                f"{self.path}: its adapters are merged or disabled; unmerge or enable them before training"
            )

    def _adapt(self, x: Any) -> Any:
        """(alpha / rank) (x A) B in the compute dtype."""
        return ops.matmul(self._thin(x), ops.cast(self.lora_kernel_b, self.compute_dtype))

    def _thin(self, x: Any) -> Any:
        return ops.matmul(x, ops.cast(self.lora_kernel_a, self.compute_dtype)) * self._scale

    def _drop(self, x: Any, training: bool | None) -> Any:
        if not self.lora_dropout or not training:
            return x
        return keras.random.dropout(x, self.lora_dropout, seed=self.lora_seed)


def _copy(variable: keras.Variable) -> np.ndarray:
    return np.array(ops.convert_to_numpy(ops.convert_to_tensor(variable)))
