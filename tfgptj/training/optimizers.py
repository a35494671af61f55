"""Optimizers whose state is float32 whatever the weights are: AdamW and Adafactor.

Keras's own keep their state in the weights' dtype and compute in it. In bfloat16 that does not train: 0.999, which Adam
remembers its second moment by, is 1 there, and a sum does not change when what is added is 500 times smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from tfgptj.errors import InputError
from tfgptj.replicas import sum_over_replicas
from tfgptj.training.in_place import adam_step, assign, follow, one_by_one

_NARROW = ("bfloat16", "float16")
_ON_TENSORFLOW = keras.backend.backend() == "tensorflow"


class WideState(keras.optimizers.Optimizer):
    """What both optimizers have beside the class of Keras that follows it: wide slots, and masters of narrow weights.

    A class makes its slots in `build`, and tells in `change` what to subtract from a weight.
    """

    change: Callable[[int, Any, Any, Any], Any]  # of index, gradient, weight and learning rate, in the wide dtype

    def add_variable(self, shape: Any, initializer: Any = "zeros", dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Keras's, but never narrow."""
        return super().add_variable(shape, initializer, None if dtype is None else _wide(dtype), *args, **kwargs)

    def add_masters(self, variables: Any) -> None:
        """Make a float32 copy of each narrow weight, to be filled at the first step."""
        narrow = [variable.path for variable in variables if _dtype(variable) in _NARROW]
        if self.use_ema and narrow:
            raise InputError(
                f"use_ema keeps averages in place of the weights, and {narrow[0]} would round them: train with float32 "
                "weights, as in mixed_bfloat16"
            )
        self._decays = [len(v.shape) > 1 and (self.decay_embeddings or v.name != "embeddings") for v in variables]
        self._masters = [
            self.add_variable_from_reference(variable, "master")
            if self.float32_master and _dtype(variable) in _NARROW
            else None
            for variable in variables
        ]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> Any:
        """Change one weight and its state; on TensorFlow returns the last operation."""
        index, dtype = self._get_variable_index(variable), _dtype(variable)
        rate, master = ops.cast(learning_rate, _wide(dtype)), self._masters[index]
        weight = _followed(variable, master) if dtype in _NARROW else ops.convert_to_tensor(variable)
        change = self.change(index, gradient, weight, rate)
        if self.is_decaying(index, variable):
            weight = weight - weight * (rate * self.weight_decay)
        weight = weight - change
        if master is not None:
            self.assign(master, weight)
        return self._store(variable, ops.cast(weight, dtype))

    def is_decaying(self, index: int, variable: Any) -> bool:
        """Whether each step takes away a share of a weight."""
        return bool(self.weight_decay and self._decays[index] and self._use_weight_decay(variable))

    def get_config(self) -> dict[str, Any]:
        own = {"decay_embeddings": self.decay_embeddings, "float32_master": self.float32_master}
        return {**super().get_config(), **own}

    def _backend_apply_gradients(self, gradients: Any, variables: Any) -> None:
        pairs = zip(gradients, variables, strict=True)
        wide = [_dense(g, _wide(_dtype(v))) for g, v in pairs]
        super()._backend_apply_gradients(sum_over_replicas(wide), variables)

    def _all_reduce_sum_gradients(self, pairs: Any) -> Any:
        """The pairs: gradients are summed already. Keras does so here, where they have been clipped."""
        return pairs

    def _distributed_tf_update_step(self, strategy: Any, pairs: Any, learning_rate: Any) -> None:
        one_by_one(strategy, pairs, lambda gradient, weight: self.update_step(gradient, weight, learning_rate))

    def _store(self, variable: Any, value: Any) -> Any:
        return assign(variable, value) if _ON_TENSORFLOW else self.assign(variable, value)

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: it is part of the update, where weights are wide."""


@keras.saving.register_keras_serializable(package="tfgptj")
class AdamW(WideState, keras.optimizers.AdamW):
    """PyTorch's AdamW, for weights of any dtype; biases and layer norms do not decay.

    Weights in bfloat16 or float16 have their moments in float32 and, with `float32_master`, a float32 copy, which sums
    up what is too small to change them. The copy follows them when they are loaded or assigned to.

    Args:
        learning_rate: float, or a schedule: see :func:`tfgptj.training.schedules.learning_rate_schedule`.
        weight_decay: share of a weight that each step takes away, times the learning rate.
        beta_1, beta_2: how much of the moments stays at each step.
        epsilon: float, added after the bias correction as PyTorch does; Keras adds it before.
        decay_embeddings: whether embeddings decay, too.
        float32_master: keep the float32 copy.
        **kwargs: of `keras.optimizers.Optimizer`. `global_clipnorm` clips all gradients by their norm as one vector,
            also under a `tf.distribute` strategy, where Keras's optimizers clip each replica's part of the sum.

    Raises:
        InputError: for `amsgrad`, or at the first step for `use_ema` with weights that are not float32.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"; torch.optim.AdamW.

    >>> AdamW(1e-4, weight_decay=0.1, global_clipnorm=1.0).weight_decay
    0.1
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        weight_decay: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        *,
        decay_embeddings: bool = True,
        float32_master: bool = True,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("amsgrad"):
            raise InputError("amsgrad is Keras's: take keras.optimizers.AdamW for it")
        super().__init__(learning_rate, weight_decay, beta_1, beta_2, epsilon, **kwargs)
        self.decay_embeddings, self.float32_master = decay_embeddings, float32_master

    def build(self, variables: Any) -> None:
        if not self.built:
            super().build(variables)
            self.add_masters(variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> Any:
        """Change one weight and its state, in place on TensorFlow."""
        index, dtype = self._get_variable_index(variable), _dtype(variable)
        master = self._masters[index]
        if not _ON_TENSORFLOW or (dtype in _NARROW and master is None):
            return super().update_step(gradient, variable, learning_rate)
        rate, step = (ops.cast(x, _wide(dtype)) for x in (learning_rate, self.iterations + 1))
        done = adam_step(
            variable if master is None else follow(master.value, variable),
            (self._momentums[index], self._velocities[index]),
            gradient,
            step,
            rate,
            (self.beta_1, self.beta_2),
            self.epsilon,
            rate * self.weight_decay if self.is_decaying(index, variable) else None,
        )
        return done if master is None else assign(variable, ops.cast(master, dtype))

    def change(self, index: int, gradient: Any, weight: Any, learning_rate: Any) -> Any:
        """What to subtract from a weight; the slots change here."""
        step = ops.cast(self.iterations + 1, weight.dtype)
        moments = []
        for slots, new, beta in (
            (self._momentums, gradient, self.beta_1),
            (self._velocities, ops.square(gradient), self.beta_2),
        ):
            old = ops.convert_to_tensor(slots[index])
            moment = old + (new - old) * (1 - beta)
            self.assign(slots[index], moment)
            # 1 - beta ** step, of which float32 would lose the digits
            moments.append(moment / -ops.expm1(step * math.log(beta)) if beta else moment)
        return learning_rate * moments[0] / (ops.sqrt(moments[1]) + self.epsilon)


@keras.saving.register_keras_serializable(package="tfgptj")
class Adafactor(WideState, keras.optimizers.Adafactor):
    """Adafactor, whose state of a matrix is one number for each row and each column; biases and norms do not decay.

    Keras's own class keeps a second moment as large as the weights all the same. Otherwise this one computes what that
    one and `torch.optim.Adafactor` do: the rate is relative to the size of each weight.

    Args:
        learning_rate: float, or a schedule.
        weight_decay: share of a weight that each step takes away, times the learning rate; None for none.
        decay_embeddings, float32_master: as for :class:`AdamW`. Without master weights, training takes hardly more
            memory than weights and gradients, and updates below the weights' precision are lost.
        **kwargs: of `keras.optimizers.Adafactor`.

    Raises:
        InputError: at the first step for `use_ema` with weights that are not float32.

    Source: Shazeer & Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost".

    >>> Adafactor(1e-2).get_config()["float32_master"]
    True
    """

    def __init__(
        self,
        learning_rate: Any = 1e-2,
        weight_decay: float | None = None,
        *,
        decay_embeddings: bool = True,
        float32_master: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **kwargs)
        self.decay_embeddings, self.float32_master = decay_embeddings, float32_master

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super(keras.optimizers.Adafactor, self).build(variables)  # past Keras's, which makes a whole second moment
        self._squares = [self._add_squares(variable) for variable in variables]
        self.add_masters(variables)

    def _add_squares(self, variable: Any) -> tuple[Any, ...]:
        """Mean squares of rows and columns, or of each number of a vector."""
        shape = tuple(variable.shape)
        shapes = (shape[:-1], shape[:-2] + shape[-1:]) if len(shape) > 1 else (shape,)
        return tuple(self.add_variable(s, dtype=_wide(_dtype(variable)), name="square") for s in shapes)

    def change(self, index: int, gradient: Any, weight: Any, learning_rate: Any) -> Any:
        """What to subtract from a weight; the slots change here."""
        step = ops.cast(self.iterations + 1, weight.dtype)
        keep = 1 - ops.power(step, self.beta_2_decay)
        fresh = ops.square(gradient) + self.epsilon_1
        is_vector, squares = len(weight.shape) < 2, []
        for slot, axis in zip(self._squares[index], (-1, -2), strict=False):
            new = fresh if is_vector else ops.mean(fresh, axis=axis)
            squares.append(keep * ops.convert_to_tensor(slot) + (1 - keep) * new)
            self.assign(slot, squares[-1])
        if is_vector:
            update = gradient * ops.rsqrt(squares[0])
        else:
            rows = squares[0] / ops.mean(squares[0], axis=-1, keepdims=True)
            update = gradient * ops.rsqrt(rows)[..., None] * ops.rsqrt(squares[1])[..., None, :]
        update = update / ops.maximum(1.0, _rms(update) / self.clip_threshold)
        return ops.maximum(self.epsilon_2, _rms(weight)) * ops.minimum(learning_rate, ops.rsqrt(step)) * update


def _followed(variable: Any, master: Any) -> Any:
    """The float32 values of a narrow weight: its master's, but for numbers that are new since the last step."""
    weight = ops.cast(variable, "float32")
    if master is None:
        return weight
    # Compared bit by bit: of floats, XLA may leave out that the one is rounded.
    exact = ops.convert_to_tensor(master)
    rounded, stored = (ops.view(ops.cast(x, _dtype(variable)), "int16") for x in (exact, variable))
    return ops.where(rounded == stored, exact, weight)


def _dense(gradient: Any, dtype: str) -> Any:
    """A gradient as one tensor: TensorFlow has a row for each time that an embedding's row was taken.

    The norm of these is not that of their sum, and clipping would go by it.
    """
    if not hasattr(gradient, "dense_shape"):
        return ops.cast(gradient, dtype)
    return ops.scatter(gradient.indices[:, None], ops.cast(gradient.values, dtype), gradient.dense_shape)


def _rms(x: Any) -> Any:
    return ops.sqrt(ops.mean(ops.square(x)))


def _dtype(x: Any) -> str:
    name: str = keras.backend.standardize_dtype(x.dtype)
    return name


def _wide(dtype: Any) -> str:
    name: str = keras.backend.standardize_dtype(dtype)
    return "float32" if name in _NARROW else name
