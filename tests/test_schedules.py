"""Learning rates: those of transformers, step by step."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from conftest import FIXTURES

from tfgptj.errors import InputError
from tfgptj.training.schedules import WarmUp, learning_rate_schedule

pytestmark = pytest.mark.core

SETTINGS: dict[str, dict[str, Any]] = {
    "constant": {"warmup_steps": 4},
    "linear": {"warmup_steps": 4, "total_steps": 20},
    "cosine": {"warmup_steps": 4, "total_steps": 20},
}


def rates(schedule: Any, steps: int = 25) -> np.ndarray:
    return np.array([float(schedule(step)) for step in range(steps)])


@pytest.mark.parametrize("kind", SETTINGS)
def test_rates_are_those_of_transformers(kind: Any) -> None:
    schedule = learning_rate_schedule(kind, 0.3, **SETTINGS[kind])
    with np.load(FIXTURES / "optimizer_goldens.npz") as goldens:
        # After the end, a cosine of transformers rises again.
        np.testing.assert_allclose(rates(schedule, 21), goldens[f"schedules/{kind}"][:21], atol=1e-7)
    assert rates(schedule)[21:].tolist() == [rates(schedule)[20]] * 4
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
    np.testing.assert_array_equal(rates(again), rates(schedule))


def test_without_a_warm_up_the_schedules_are_keras_s() -> None:
    assert learning_rate_schedule("constant", 0.3) == 0.3
    for kind in ("linear", "cosine"):
        schedule = learning_rate_schedule(kind, 0.3, total_steps=10, final=0.1)  # type: ignore[arg-type]
        assert not isinstance(schedule, WarmUp)
        np.testing.assert_allclose(rates(schedule, 12)[[0, 5, 10, 11]], [0.3, 0.2, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "square"}, "kind must be 'constant', 'linear' or 'cosine', got 'square'"),
        ({"kind": "constant", "warmup_steps": -1}, "warmup_steps must be 0 or more .* got warmup_steps=-1"),
        ({"kind": "cosine", "total_steps": 5, "final": 0.4}, "final between 0 and learning_rate=0.3, .* final=0.4"),
        ({"kind": "linear"}, "'linear' needs total_steps, more than warmup_steps=0, got None"),
        ({"kind": "cosine", "warmup_steps": 5, "total_steps": 5}, "more than warmup_steps=5, got 5"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        learning_rate_schedule(learning_rate=0.3, **settings)
