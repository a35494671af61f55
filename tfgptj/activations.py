"""The activation functions that a GPT-J configuration may name, as Keras layers.

Source: transformers, activations.py (`ACT2FN`). GPT-J itself uses `gelu_new`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from tfgptj.errors import ConfigError
from tfgptj.in_turn import in_turn, pays


def _exact_gelu(x: Any) -> Any:
    return ops.gelu(x, approximate=False)


# (1 + tanh z) / 2 is the sigmoid of 2 z, and 2 z = x (_LINEAR + _CUBIC x^2).
_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715 * _LINEAR

_PARTS = 8  # in which narrow numbers are widened


def _tanh_gelu(x: Any) -> Any:
    if keras.backend.backend() != "tensorflow" or keras.backend.standardize_dtype(x.dtype) != "float32":
        return ops.gelu(x, approximate=True)
    # TensorFlow goes over memory once per operator: 6 times, for tanh 9.
    return x * ops.sigmoid(x * (_LINEAR + _CUBIC * ops.square(x)))


def _laplace(x: Any) -> Any:
    """Cumulative distribution of a normal, fitted to relu2 (MEGA, arXiv 2209.10655)."""
    mean, deviation = 0.707107, 0.282095
    return 0.5 * (1.0 + ops.erf((x - mean) / (deviation * math.sqrt(2.0))))


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": _exact_gelu,
    "gelu_10": lambda x: ops.clip(_exact_gelu(x), -10.0, 10.0),
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": _exact_gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "laplace": _laplace,
    "leaky_relu": lambda x: ops.leaky_relu(x, negative_slope=0.01),
    "linear": lambda x: x,
    "mish": lambda x: x * ops.tanh(ops.softplus(x)),
    "quick_gelu": lambda x: x * ops.sigmoid(1.702 * x),
    "relu": ops.relu,
    "relu2": lambda x: ops.square(ops.relu(x)),
    "relu6": ops.relu6,
    "sigmoid": ops.sigmoid,
    "silu": ops.silu,
    "swish": ops.silu,
    "tanh": ops.tanh,
}


class TanhGELU(keras.layers.Layer):
    """GELU by tanh, as GPT-J has it. Training with TensorFlow keeps its input alone, and takes a third less time."""

    def call(self, x: Any, training: bool | None = None) -> Any:
        if not training or keras.backend.backend() != "tensorflow":
            return _tanh_gelu(x)
        import tensorflow as tf

        return tf.custom_gradient(_tanh_gelu_and_gradient)(x)


def _tanh_gelu_and_gradient(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """In float32 or wider: TensorFlow's bfloat16 operators widen and round each time, which takes longer."""
    wide = keras.backend.result_type(x.dtype, "float32")

    def value(x: Any) -> Any:
        x = ops.cast(x, wide)
        return x * ops.sigmoid(x * (_LINEAR + _CUBIC * ops.square(x)))

    def slope(x: Any, upstream: Any) -> Any:
        x = ops.cast(x, wide)
        square = ops.square(x)
        share = ops.sigmoid(x * (_LINEAR + _CUBIC * square))
        slopes = share * (1.0 + (x - x * share) * (_LINEAR + 3.0 * _CUBIC * square))
        return slopes * ops.cast(upstream, wide)

    return _elementwise(value, x), lambda upstream: _elementwise(slope, x, upstream)


def _elementwise(function: Callable[..., Any], *arrays: Any) -> Any:
    """A function of narrow numbers that widens them: on CPUs of an eighth at a time, which is also faster there."""
    import tensorflow as tf

    like, width = arrays[0], arrays[0].shape[-1]
    if like.dtype.size >= 4 or width % _PARTS or not pays():
        return tf.cast(function(*arrays), like.dtype)
    parts = [tf.reshape(array, (_PARTS, -1)) for array in arrays]
    [result] = in_turn(lambda i: [tf.cast(function(*(part[i] for part in parts)), like.dtype)], parts[:1])
    return tf.reshape(result, tf.shape(like))


class ParametricReLU(keras.layers.Layer):
    """`prelu`: x where positive, slope · x elsewhere, with one learned slope for all features."""

    def build(self, input_shape: Any) -> None:
        self.slope = self.add_weight(name="weight", shape=(1,), initializer=keras.initializers.Constant(0.25))

    def call(self, x: Any) -> Any:
        return ops.where(x > 0, x, self.slope * x)


class XIELU(keras.layers.Layer):
    """`xielu`: quadratic where positive, expm1 elsewhere, each with a learned strength (arXiv 2411.13010)."""

    BETA = 0.5
    EPSILON = -1e-6

    def build(self, input_shape: Any) -> None:
        # Both are stored before the softplus that keeps them positive; 0.8 is their value at the start.
        self.alpha_p = self.add_weight(name="alpha_p", shape=(1,), initializer=_inverse_softplus(0.8))
        self.alpha_n = self.add_weight(name="alpha_n", shape=(1,), initializer=_inverse_softplus(0.8 - self.BETA))

    def call(self, x: Any) -> Any:
        positive = ops.softplus(self.alpha_p) * ops.square(x)
        negative = (self.BETA + ops.softplus(self.alpha_n)) * (ops.expm1(ops.minimum(x, self.EPSILON)) - x)
        return ops.where(x > 0, positive, negative) + self.BETA * x


def _inverse_softplus(value: float) -> keras.initializers.Initializer:
    return keras.initializers.Constant(math.log(math.expm1(value)))


def activation_layer(name: str, dtype: Any = None) -> keras.layers.Layer:
    """The activation of that name as a layer.

    Args:
        name: one of :data:`tfgptj.config.ACTIVATIONS`.
        dtype: Keras dtype policy of the layer.

    Raises:
        ConfigError: if the name is unknown.

    >>> ops.convert_to_numpy(activation_layer("relu2")(ops.array([-3.0, 3.0]))).tolist()
    [0.0, 9.0]
    """
    if name == "prelu":
        return ParametricReLU(dtype=dtype, name="act")
    if name == "xielu":
        return XIELU(dtype=dtype, name="act")
    if name not in FUNCTIONS:
        raise ConfigError(f"unknown activation_function {name!r}")
    if FUNCTIONS[name] is _tanh_gelu:
        return TanhGELU(dtype=dtype, name="act")
    return keras.layers.Activation(FUNCTIONS[name], dtype=dtype, name="act")
