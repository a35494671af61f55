"""The product with a matrix [out, in], against NumPy, in every form that it takes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from conftest import numbers
from keras import ops

from tfgptj.products import leading, project

TENSORFLOW = keras.backend.backend() == "tensorflow"
MATRIX = np.random.default_rng(0).standard_normal((7, 5)).astype("float32")
SHAPES = [(1, 1, 5), (1, 5), (3, 1, 5), (2, 3, 5), (1, 300, 5), (2, 200, 5), (4, 5)]  # rows: one, some, many


def features(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


@pytest.mark.core
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_numpys(shape: tuple[int, ...], training: bool) -> None:
    x = features(shape)
    found = numbers(project(ops.convert_to_tensor(x), ops.convert_to_tensor(MATRIX), training))
    assert found.shape == (*shape[:-1], 7)
    np.testing.assert_allclose(found, x @ MATRIX.T, rtol=1e-5, atol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_stay(dtype: str) -> None:
    x = features((2, 3, 5))
    y = project(ops.cast(x, dtype), ops.cast(MATRIX, dtype))
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    np.testing.assert_allclose(numbers(ops.cast(y, "float32")), x @ MATRIX.T, rtol=0, atol=0.1)


@pytest.mark.skipif(not TENSORFLOW, reason="graphs of TensorFlow")
def test_one_graph_takes_any_number_of_rows() -> None:
    import tensorflow as tf

    traces = []

    @tf.function(input_signature=[tf.TensorSpec((None, None, 5), tf.float32)])
    def product(x: Any) -> Any:
        traces.append(x)
        return project(x, tf.constant(MATRIX))

    for shape in SHAPES:
        if len(shape) == 3:
            x = features(shape)
            np.testing.assert_allclose(product(x).numpy(), x @ MATRIX.T, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1
    assert tuple(traces[0].shape) == (None, None, 5)


@pytest.mark.skipif(not TENSORFLOW, reason="graphs of TensorFlow")
@pytest.mark.parametrize(
    ("shape", "expected"), [((None, 1, 5), (-1, 1)), ((2, None, 5), (2, -1)), ((None, 5), (-1,)), ((2, 3, 5), (2, 3))]
)
def test_shapes_are_computed_only_where_two_dimensions_are_unknown(shape: Any, expected: Any) -> None:
    import tensorflow as tf

    seen = []

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32)])
    def look(x: Any) -> Any:
        seen.append(leading(x))
        return x

    look.get_concrete_function()
    assert seen == [expected]
