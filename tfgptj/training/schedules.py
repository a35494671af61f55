"""Learning rates over a training run: a warm-up, and what follows it.

Source: transformers, optimization.py, `get_linear_schedule_with_warmup` and its relatives; Keras's own schedules where
there are such.
"""

from __future__ import annotations

from typing import Any, Literal

import keras
from keras import ops

from tfgptj.errors import InputError

Kind = Literal["constant", "linear", "cosine"]


@keras.saving.register_keras_serializable(package="tfgptj")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that rises from 0 in a straight line, and then follows another schedule from its beginning.

    Args:
        schedule: a Keras schedule, or a number.
        warmup_steps: steps until the schedule begins.

    >>> rates = WarmUp(0.1, warmup_steps=2)
    >>> [round(float(rates(step)), 3) for step in range(4)]
    [0.0, 0.05, 0.1, 0.1]
    """

    def __init__(self, schedule: Any, warmup_steps: int) -> None:
        self.schedule, self.warmup_steps = schedule, warmup_steps

    def __call__(self, step: Any) -> Any:
        """The rate of a step, float32; steps count from 0."""
        step = ops.cast(step, "float32")
        rising = ops.minimum(step / self.warmup_steps, 1.0) * self._rate(ops.zeros_like(step))
        return ops.where(step < self.warmup_steps, rising, self._rate(ops.maximum(step - self.warmup_steps, 0.0)))

    def _rate(self, step: Any) -> Any:
        return self.schedule(step) if callable(self.schedule) else ops.full_like(step, self.schedule)

    def get_config(self) -> dict[str, Any]:
        return {"schedule": keras.saving.serialize_keras_object(self.schedule), "warmup_steps": self.warmup_steps}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WarmUp:
        return cls(keras.saving.deserialize_keras_object(config["schedule"]), config["warmup_steps"])


def learning_rate_schedule(
    kind: Kind, learning_rate: float, *, warmup_steps: int = 0, total_steps: int | None = None, final: float = 0.0
) -> Any:
    """The rates that transformers' `Trainer` knows by the same names; give the result to an optimizer.

    Args:
        kind: what follows the warm-up: "constant", or down to `final` in a straight line ("linear") or along half a
            wave ("cosine").
        learning_rate: the highest rate.
        warmup_steps: steps from 0 up to there.
        total_steps: steps of the whole run, warm-up included; only "constant" needs none.
        final: the rate at the end and after it.

    Returns:
        A Keras schedule; for a constant rate without warm-up the number itself.

    Raises:
        InputError: if the kind is unknown, or a number makes no sense.

    >>> rates = learning_rate_schedule("linear", 0.1, warmup_steps=2, total_steps=6)
    >>> [round(float(rates(step)), 3) for step in range(7)]
    [0.0, 0.05, 0.1, 0.075, 0.05, 0.025, 0.0]
    """
    if kind not in ("constant", "linear", "cosine"):
        raise InputError(f"kind must be 'constant', 'linear' or 'cosine', got {kind!r:.200}")
    if warmup_steps < 0 or not 0 <= final <= learning_rate:
        raise InputError(
            f"warmup_steps must be 0 or more and final between 0 and learning_rate={learning_rate}, "
            f"got warmup_steps={warmup_steps} and final={final}"
        )
    if kind == "constant":
        return WarmUp(learning_rate, warmup_steps) if warmup_steps else learning_rate
    if total_steps is None or total_steps <= warmup_steps:
        raise InputError(f"{kind!r} needs total_steps, more than warmup_steps={warmup_steps}, got {total_steps}")
    steps = total_steps - warmup_steps
    if kind == "linear":
        rates = keras.optimizers.schedules.PolynomialDecay(learning_rate, steps, end_learning_rate=final)
    else:
        rates = keras.optimizers.schedules.CosineDecay(learning_rate, steps, alpha=final / learning_rate)
    return WarmUp(rates, warmup_steps) if warmup_steps else rates
