"""The safetensors format, read strictly and written one tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name → dtype, shape, offsets), and the
values, tensor after tensor without holes. Where the format's text and its library differ, the text is followed: a key
may stand in the header only once, and the header begins with `{`.

Source: the format's description, in the README of the safetensors library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tfgptj import limits
from tfgptj.checkpoints.raw_file import IMPOSTORS, RawFile, bytes_of
from tfgptj.checkpoints.tensors import TensorSpec, announced
from tfgptj.errors import CheckpointError, CheckpointFormatError
from tfgptj.files import parse_json, replaced_file

DTYPES: dict[str, np.dtype[Any]] = {
    code: np.dtype(kind)
    for code, kind in {
        "BOOL": np.bool_,
        **{"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64},
        **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
        **{"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64, "C64": np.complex64},
        **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu},
    }.items()
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}


class SafetensorsFile(RawFile):
    """One safetensors file, open for reading, by several threads if need be.

    Args:
        path: the file.

    Raises:
        CheckpointFormatError: if the file is damaged or no safetensors file, saying what is wrong with it.
        CheckpointError: if the file cannot be opened or read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "a safetensors file")

    def _fill(self, name: str, skip: int, out: np.ndarray) -> None:
        self._read_bytes(self._starts[name] + skip, bytes_of(out), f"tensor {name!r}")

    def _read_header(self) -> None:
        size = self._size()
        text = bytearray(self._header_length(size))
        self._read_bytes(_LENGTH_BYTES, memoryview(text), "the header")
        fields = _parse_json(self.path, bytes(text))
        self._metadata = _parse_metadata(self.path, fields.pop(_METADATA, {}))
        entries = {name: _parse_entry(f"{self.path}: tensor {name!r:.200}", name, fields[name]) for name in fields}
        data = _LENGTH_BYTES + len(text)  # where the values begin
        expected = data + _check_ranges(self.path, entries)
        if expected != size:
            fault = "cut short" if expected > size else "has bytes after the last tensor"
            raise CheckpointFormatError(f"{self.path}: {fault}: {expected:,} bytes expected, {size:,} found")
        self._specs = {name: spec for name, (spec, _, _) in entries.items()}
        self._starts = {name: data + start for name, (_, start, _) in entries.items()}

    def _header_length(self, size: int) -> int:
        if size == 0:
            raise CheckpointFormatError(f"{self.path}: the file is empty")
        prefix = bytearray(min(size, 32))
        self._read_bytes(0, memoryview(prefix), "the header")
        for magic, description in IMPOSTORS:
            if prefix.startswith(magic) and prefix[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
                raise CheckpointFormatError(f"{self.path}: {description}")
        length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
        if size < _LENGTH_BYTES or not 2 <= length <= limits.MAX_SAFETENSORS_HEADER:
            raise CheckpointFormatError(
                f"{self.path}: not a safetensors file: its header's length is {length:,}, "
                f"not between 2 and {limits.MAX_SAFETENSORS_HEADER:,}"
            )
        if _LENGTH_BYTES + length > size:
            raise CheckpointFormatError(
                f"{self.path}: cut short: the header takes {_LENGTH_BYTES + length:,} bytes, the file has {size:,}"
            )
        return length


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointFormatError(f"{path}: not a safetensors file: its header begins with {text[:8]!r}, not with {{")
    try:
        # What begins with a brace and is valid is an object.
        fields: dict[str, Any] = parse_json(text, limits.MAX_SAFETENSORS_VALUES)
        return fields
    except ValueError as error:
        raise CheckpointFormatError(f"{path}: the header is not valid JSON: {error}") from None


def _parse_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointFormatError(f"{path}: {_METADATA} must map text to text, got {metadata!r:.80}")
    return metadata


def _parse_entry(where: str, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """Spec, start and stop of a tensor; the bytes between agree with shape and dtype."""
    if not isinstance(entry, dict) or not _ENTRY_FIELDS.issubset(entry):
        raise CheckpointFormatError(f"{where}: expected dtype, shape and data_offsets, got {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointFormatError(f"{where}: unknown dtype {dtype!r:.80}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > limits.MAX_DIMENSIONS:
        raise CheckpointFormatError(f"{where}: the shape must be a list of sizes, got {shape!r:.80}")
    if math.prod(max(size, 1) for size in shape) * DTYPES[dtype].itemsize > limits.MAX_TENSOR_BYTES:
        raise CheckpointFormatError(f"{where}: the sizes {shape!r:.80} are too large for any array")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointFormatError(f"{where}: data_offsets must be a start and a stop, got {offsets!r:.80}")
    spec = TensorSpec(name, tuple(shape), DTYPES[dtype])
    span = offsets[1] - offsets[0]
    if spec.nbytes != span:
        raise CheckpointFormatError(
            f"{where}: {spec.description} takes {spec.nbytes:,} bytes, but data_offsets span {span:,}"
        )
    return spec, offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= limits.MAX_TENSOR_BYTES for value in values
    )


def _check_ranges(path: Path, entries: dict[str, tuple[TensorSpec, int, int]]) -> int:
    """The end of the last tensor, after a check that each begins where the one before it ends."""
    end = 0
    for name, (_, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if start != end:
            fault = "overlaps the tensor before it" if start < end else "leaves a hole after the tensor before it"
            raise CheckpointFormatError(f"{path}: tensor {name!r:.200}: {fault}: starts at {start:,}, expected {end:,}")
        end = stop
    return end


def write_safetensors(
    path: str | os.PathLike[str],
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, holding one tensor at a time; an old file of that name is replaced in one step.

    Args:
        path: the file.
        specs: name, shape and dtype of every tensor, in the order in which they come.
        tensors: names and values.
        metadata: free text for the header; None says that names and layout are PyTorch's.

    Raises:
        CheckpointError: if the tensors are not those that `specs` announce.
        OSError: if the file cannot be written.
    """
    header = _header_bytes(path, specs, {"format": "pt"} if metadata is None else metadata)
    with replaced_file(path) as file:
        file.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        for _, array in announced(path, specs, tensors):
            file.write(bytes_of(np.ascontiguousarray(array)))
            del array  # before the next one is made


def _header_bytes(path: str | os.PathLike[str], specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    start = 0
    for spec in specs:
        if spec.dtype not in _CODES:
            raise CheckpointError(f"{path}: tensor {spec.name!r}: safetensors has no dtype {spec.dtype.name}")
        if spec.name in fields or spec.name == _METADATA:
            raise CheckpointError(f"{path}: the name {spec.name!r} is taken")
        offsets = [start, start + spec.nbytes]
        fields[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces up to a multiple of 8, so that the values of every dtype lie aligned in a mapped file.
    return text.ljust(math.ceil(len(text) / _LENGTH_BYTES) * _LENGTH_BYTES)
