"""The few protocol buffers that TensorFlow Serving takes and gives, written and read without their library.

`PredictRequest` and `PredictResponse` are not among TensorFlow's own; with them here, a client needs NumPy alone.

Source: protobuf.dev, "Encoding"; tensorflow/core/framework/tensor.proto; tensorflow_serving/apis/predict.proto,
model.proto and prediction_log.proto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tfgptj.errors import InputTypeError, ServerError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
STRING = 7  # DT_STRING, whose elements are fields of their own

# `DataType` numbers; and the field of a TensorProto that holds elements, where they are not in `tensor_content`.
DTYPES = {
    1: (np.dtype("float32"), 5),
    2: (np.dtype("float64"), 6),
    3: (np.dtype("int32"), 7),
    4: (np.dtype("uint8"), 7),
    9: (np.dtype("int64"), 10),
    10: (np.dtype("bool"), 11),
    14: (np.dtype(ml_dtypes.bfloat16), 13),
    19: (np.dtype("float16"), 13),
}
NUMBER_OF = {dtype: number for number, (dtype, _) in DTYPES.items()}
CONTENT, STRINGS = 4, 8


class ModelSpec(NamedTuple):
    """Which model of a server is asked, in which version, or in that with which label, and for what."""

    name: str
    signature: str
    version: int | None = None
    label: str | None = None


def prediction_log(request: bytes) -> bytes:
    """A `PredictionLog` of a `PredictRequest`, which a server replays when it loads a model."""
    return _field(6, _field(1, request))


def predict_request(spec: ModelSpec, inputs: Mapping[str, np.ndarray]) -> bytes:
    """A `PredictRequest`.

    Args:
        spec: what is asked.
        inputs: arrays of numbers, or of `bytes` with dtype object.

    Raises:
        InputTypeError: if there is no tensor of an array's dtype.
    """
    version = _field(2, _number(1, spec.version)) if spec.version is not None else b""
    label = _field(4, spec.label.encode()) if spec.label is not None else b""
    model = _field(1, spec.name.encode()) + version + _field(3, spec.signature.encode()) + label
    entries = [_field(1, name.encode()) + _field(2, _tensor(name, array)) for name, array in inputs.items()]
    return _field(1, model) + b"".join(_field(2, entry) for entry in entries)


def predict_response(data: bytes) -> dict[str, np.ndarray]:
    """The outputs of a `PredictResponse`: arrays of numbers, or of `bytes` with dtype object.

    Raises:
        ServerError: if the bytes are no such message.
    """
    outputs = {}
    try:
        for number, entry in _fields(data):
            if number == 1:
                parts = dict(_fields(entry))
                outputs[bytes(parts[1]).decode()] = _array(parts[2])
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise ServerError(f"The answer is not a PredictResponse: {error!r:.200}") from error
    return outputs


def _tensor(name: str, array: np.ndarray) -> bytes:
    shape = b"".join(_field(2, _number(1, size)) for size in array.shape)
    if array.dtype == object:
        number, content = STRING, b"".join(_field(STRINGS, text) for text in array.ravel())
    elif array.dtype in NUMBER_OF:
        number, content = NUMBER_OF[array.dtype], _field(CONTENT, array.astype(array.dtype.newbyteorder("<")).tobytes())
    else:
        raise InputTypeError(
            f"{name} is of dtype {array.dtype}, expected strings or one of {', '.join(map(str, NUMBER_OF))}."
        )
    return _number(1, number) + _field(2, shape) + content


def _array(data: memoryview) -> np.ndarray:
    number, shape = 0, []
    content: memoryview | None = None
    strings: list[bytes] = []
    values: list[Any] = []
    for field, value in _fields(data):
        if field == 1:
            number = int(value)
        elif field == 2:
            shape = [_size(dim) for where, dim in _fields(value) if where == 2]
        elif field == CONTENT:
            content = value
        elif field == STRINGS:
            strings.append(bytes(value))
        else:
            values.append(value)
    if number == STRING:
        return np.array([*strings, None], object)[:-1].reshape(shape)
    dtype, _ = DTYPES[number]
    found = np.frombuffer(content, dtype) if content is not None else _unpacked(values, dtype)
    return found.reshape(shape)


def _size(dim: memoryview) -> int:
    return int(dict(_fields(dim)).get(1, 0))


def _unpacked(values: list[Any], dtype: np.dtype) -> np.ndarray:
    """Elements that stand in a field of their kind: floats as they are, all others as numbers of varying length."""
    if dtype in (np.float32, np.float64):
        return np.concatenate([np.frombuffer(value, dtype.newbyteorder("<")) for value in values])
    parts = [np.array([value], np.uint64) if isinstance(value, int) else _varints(value) for value in values]
    bits = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    return bits.astype(np.uint16).view(dtype) if dtype.itemsize == 2 else bits.astype(dtype)


def _varints(data: memoryview) -> np.ndarray:
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if not raw.size or ends[-1] != raw.size - 1 or lengths.max() > 10:
        raise ValueError("numbers are cut off")
    place = np.arange(raw.size) - np.repeat(starts, lengths)
    return np.bitwise_or.reduceat((raw & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64), starts)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | BYTES) + _varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3 | VARINT) + _varint(value)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, Any]]:
    """The fields of a message: their numbers and contents, of which each is an int or a memoryview."""
    view, place = memoryview(data), 0
    while place < len(view):
        key, place = _read_varint(view, place)
        kind = key & 7
        if kind == VARINT:
            value, place = _read_varint(view, place)
            yield key >> 3, value
            continue
        size = {FIXED32: 4, FIXED64: 8}.get(kind)
        if kind == BYTES:
            size, place = _read_varint(view, place)
        if size is None or size > len(view) - place:
            raise ValueError(f"a field is cut off, or of the kind {kind}")
        yield key >> 3, view[place : place + size]
        place += size


def _read_varint(view: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
