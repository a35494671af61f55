"""What the tests of all weight formats have in common: writing, reading and comparing tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from conftest import GOLDENS
from hypothesis import strategies as st
from malformed import torch_files

from tfgptj.checkpoints import flax_msgpack
from tfgptj.checkpoints.flax_msgpack import FlaxFile, write_flax
from tfgptj.checkpoints.hdf5 import HDF5File, write_hdf5
from tfgptj.checkpoints.raw_file import RawFile
from tfgptj.checkpoints.safetensors import DTYPES, SafetensorsFile, write_safetensors
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorSpec
from tfgptj.checkpoints.torch_zip import TorchZipFile

Tensors = dict[str, np.ndarray]
ONE = np.ones(2, np.float32)


def specs_of(tensors: Tensors) -> list[TensorSpec]:
    return [TensorSpec(name, array.shape, array.dtype) for name, array in tensors.items()]


def read(reader: Callable[[Path], RawFile], path: Path) -> Tensors:
    with reader(path) as file:
        return {name: file.read(name) for name in file.names}


def assert_equal(actual: Tensors, expected: Tensors) -> None:
    """To the last bit, NaN included."""
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes()


def assert_blocks_are_rows(file: RawFile) -> None:
    for name in file.names:
        array, done = file.read(name), 0
        rows = array.reshape(array.shape or (1,))
        for block in file.blocks(name):
            assert len(block)
            assert block.tobytes() == rows[done : done + len(block)].tobytes()
            done += len(block)
        assert done == (len(rows) if array.size else 0)


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """As a user with no rights of root, who may read and write whatever he likes."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


class Format(NamedTuple):
    """How a format is read, and written by the package or, for PyTorch's, by the tests."""

    reader: type[RawFile]
    write: Callable[[Path, Tensors], object]
    file: str  # what a message calls such a file
    dtypes: tuple[str, ...]  # those that it has
    names: Any  # a strategy for lists of names that go together


def _write_bin(path: Path, tensors: Tensors) -> None:
    path.write_bytes(torch_files.file_of(tensors))


def _names(part: Any, parts: int = 1) -> Any:
    joined = st.lists(part, min_size=parts, max_size=parts).map("/".join)
    return st.lists(joined, max_size=5, unique=True)


_ANY = st.text(max_size=8).filter(lambda name: name != "__metadata__")
_FLAX = st.text("ab0é _", min_size=1, max_size=40)
_HDF5 = st.text("abz_.:0é ", min_size=1, max_size=5).filter(lambda text: text.strip("."))
# Files of the formats; `safetensors` and `bin` have dtypes that no weight has, too.
FORMATS = {
    "safetensors": Format(
        SafetensorsFile, lambda path, tensors: write_safetensors(path, specs_of(tensors), tensors.items()),
        "a safetensors file", tuple(dtype.name for dtype in DTYPES.values()), _names(_ANY),
    ),
    "bin": Format(
        TorchZipFile, _write_bin, "a PyTorch file", (*FLOAT_DTYPES, "int64", "int32", "int16", "int8", "uint8", "bool"),
        _names(_ANY),
    ),
    "h5": Format(
        HDF5File, lambda path, tensors: write_hdf5(path, specs_of(tensors), tensors.items(), "tfgptj_model"),
        "an HDF5 file", ("float32", "float16", "float64"), _names(_HDF5, 2),
    ),
    "msgpack": Format(
        FlaxFile, lambda path, tensors: write_flax(path, specs_of(tensors), tensors.items()), "a Flax msgpack file",
        tuple(FLOAT_DTYPES), _names(_FLAX, 2).map(sorted),
    ),
}  # fmt: skip

# How many bytes an array of a Flax file may have before it is parted, for the file of that name.
_PARTED = 30


@st.composite
def tensors_of(draw: st.DrawFn, form: str, dtypes: tuple[str, ...] = ()) -> Tensors:
    """Tensors of any dtype, shape and values that a format has."""
    known = {dtype.name: dtype for dtype in DTYPES.values()}
    result = {}
    for name in draw(FORMATS[form].names):
        dtype = known[draw(st.sampled_from(dtypes or FORMATS[form].dtypes))]
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        count = int(np.prod(shape)) * dtype.itemsize
        values = draw(st.binary(min_size=count, max_size=count))
        values = bytes(byte & 1 for byte in values) if dtype.kind == "b" else values
        result[name] = np.frombuffer(values, dtype).reshape(shape)
    return result


class Sound(NamedTuple):
    """A file from which others are made by damaging it."""

    form: str
    build: Callable[[Path], object]
    exact: bool = True  # whether the format tells a tensor's size twice, so that a changed one is found


def _small(path: Path, form: str) -> None:
    names = {"h5": ("lm_head/bias:0", "transformer/wte/weight:0")}.get(form, ("head", "wte"))
    values = np.arange(12, dtype=np.float32).reshape(3, 4), np.ones((7, 3), np.float16)
    FORMATS[form].write(path, dict(zip(names, values, strict=True)))


def _packed_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as h5:
        h5["lm_head/kernel:0"] = np.arange(12, dtype=np.float32).reshape(3, 4)
        h5.create_dataset("wte/weight:0", data=np.ones((70, 3), np.float16), chunks=(40, 2), compression="gzip")


def _parted_flax(path: Path) -> None:
    usual, flax_msgpack._CHUNK_BYTES = flax_msgpack._CHUNK_BYTES, _PARTED
    try:
        _small(path, "msgpack")
    finally:
        flax_msgpack._CHUNK_BYTES = usual


SOUND = {
    **{form: Sound(form, lambda path, form=form: _small(path, form)) for form in FORMATS},
    "bin of PyTorch": Sound(
        "bin", lambda path: path.write_bytes((GOLDENS / "formats/torch/variants/mixed.pt").read_bytes())
    ),
    "h5 in chunks": Sound("h5", _packed_hdf5, exact=False),
    "msgpack in parts": Sound("msgpack", _parted_flax),
}
