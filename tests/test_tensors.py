"""What all weight files share: the look at values that no format checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tfgptj.checkpoints.tensors import FLOAT_DTYPES, Health, HealthCheck, health

pytestmark = pytest.mark.core

TINIEST = {"float64": 5e-324, "float32": 1e-45, "float16": 6e-8, "bfloat16": 1e-40}


def with_one(dtype: str, value: float, size: int = 300_000) -> np.ndarray:
    """Zeros, more than are looked at in one go, and one other value far behind."""
    array = np.zeros(size, np.float64).astype(FLOAT_DTYPES[dtype])
    array[-7] = value
    return array


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.nan, Health(finite=False, zero=False)),
        (-np.nan, Health(finite=False, zero=False)),
        (np.inf, Health(finite=False, zero=False)),
        (-np.inf, Health(finite=False, zero=False)),
        (-0.0, Health(finite=True, zero=True)),
        (3.5, Health(finite=True, zero=False)),
        (-3.5, Health(finite=True, zero=False)),
        ("tiniest", Health(finite=True, zero=False)),
        ("largest", Health(finite=True, zero=False)),
    ],
)
def test_one_value_among_zeros(dtype: str, value: Any, expected: Health) -> None:
    import ml_dtypes

    named = {"tiniest": -TINIEST[dtype], "largest": float(ml_dtypes.finfo(FLOAT_DTYPES[dtype]).max)}
    assert health([with_one(dtype, named.get(value, value))]) == expected


def test_all_blocks_count_whatever_their_shape() -> None:
    blocks = [np.ones((2, 3), np.float32), np.float32(np.nan).reshape(()), np.zeros((0, 4), np.float32)]
    assert not health(blocks).finite
    assert not health(reversed(blocks)).finite
    assert health([]) == Health(finite=True, zero=True)
    assert health([np.ones((4, 6), np.float32)[:, ::2], -np.ones((3, 3), np.float32).T]) == Health(True, False)


def test_blocks_are_passed_on_as_they_are() -> None:
    check, blocks = HealthCheck(), [np.ones(2, np.float16), np.full(2, np.inf, np.float16)]
    seen = []
    for block in check.watch(blocks):
        seen.append((block, check.health.finite))
    assert [(block is given, finite) for (block, finite), given in zip(seen, blocks, strict=True)] == [
        (True, True),
        (True, False),
    ]


def test_every_pattern_of_16_bits() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype in ("float16", "bfloat16"):
        values = patterns.view(FLOAT_DTYPES[dtype])
        expected = np.isfinite(values.astype(np.float32))
        for sign in (slice(0, 2**15), slice(2**15, 2**16)):  # infinity is the first that is not finite
            finite = expected[sign]
            assert health([values[sign][finite]]).finite
            assert not any(health([values[sign][i : i + 1]]).finite for i in np.flatnonzero(~finite))
