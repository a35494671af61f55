"""Protocol buffers written and read by hand, against Google's library and TensorFlow's tensors."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from serving_standin import MESSAGES, as_proto_field

from tfgptj.errors import InputTypeError, ServerError
from tfgptj.serving.wire import NUMBER_OF, ModelSpec, predict_request, predict_response, prediction_log

VALUES = [0, 1, -1, 127, 128, 3.5, 3e4]
ARRAYS = {
    **{str(dtype): np.array(VALUES).astype(dtype) for dtype in NUMBER_OF if dtype != np.uint8},
    "uint8": np.arange(0, 256, 5, np.uint8).reshape(4, 13),
    "strings": np.array([[b"", b"\xff\0"], ["é".encode() * 200, b"x"]], object),
    "scalar": np.array(2.5, np.float32),
    "large": np.array([2**63 - 1, -(2**63)]),
    "nothing": np.zeros([0, 3], np.int32),
    "one": np.array([b"text"], object),
}


def assert_same(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("spec", "version", "label"),
    [(ModelSpec("m", "s"), None, ""), (ModelSpec("m", "s", 300), 300, ""), (ModelSpec("m", "s", label="l"), None, "l")],
)
def test_requests_are_what_google_s_library_reads(spec: ModelSpec, version: int | None, label: str) -> None:
    data = predict_request(spec, ARRAYS)
    request = MESSAGES["PredictRequest"].FromString(data)
    model = request.model_spec
    assert (model.name, model.signature_name, model.version_label) == ("m", "s", label)
    assert (model.version.value if model.HasField("version") else None) == version
    assert_same({name: tf.make_ndarray(proto) for name, proto in request.inputs.items()})
    assert MESSAGES["PredictionLog"].FromString(prediction_log(data)).predict_log.request == request


@pytest.mark.parametrize("as_proto", [as_proto_field, tf.make_tensor_proto])
def test_answers_of_google_s_library_are_read(as_proto: Any) -> None:
    response = MESSAGES["PredictResponse"]()
    response.model_spec.name = "m"
    for name, array in ARRAYS.items():
        response.outputs[name].CopyFrom(as_proto(array))
    assert_same(predict_response(response.SerializeToString()))


def test_every_answer_that_is_cut_off_is_refused() -> None:
    response = MESSAGES["PredictResponse"]()
    for name in ("int32", "strings", "float32"):
        response.outputs[name].CopyFrom(as_proto_field(ARRAYS[name]))
    data = response.SerializeToString(deterministic=True)
    whole = []
    for end in range(1, len(data)):
        try:
            whole.append(len(predict_response(data[:end])))
        except ServerError as error:
            assert "The answer is not a PredictResponse" in str(error)
    assert whole == [1, 2]  # where an output ends


@pytest.mark.parametrize("data", [b"\x0a\xff", b"\x0b", b"\xff" * 20, b"\x08\x01", b"\x0a\x05\x0a\x01a\x12\x00"])
def test_other_bytes_are_refused(data: bytes) -> None:
    if data == b"\x08\x01":  # a number where an output should be
        data = b"\x08\x01\x0a"
    with pytest.raises(ServerError, match="The answer is not a PredictResponse"):
        predict_response(data)


def test_dtypes_without_a_tensor_are_refused() -> None:
    assert np.dtype(ml_dtypes.bfloat16) in NUMBER_OF
    with pytest.raises(InputTypeError, match="x is of dtype complex64, expected strings or one of float32, float64"):
        predict_request(ModelSpec("m", "s"), {"x": np.zeros(1, np.complex64)})
