"""tf_model.h5, the HDF5 file of Hugging Face's TensorFlow classes: read, and written.

What the HDF5 library says of where the values lie stands in `hdf5_structure.py`; they are read, and unpacked where need
be, here. Attributes, among them a Keras model's `model_config`, are never looked at.

A whole file has the layout of Keras 2: `<layer>/<model>/<layer>/…`, where the model's name depends on the class that
saved it and on how many were built before. A shard is flat: `<layer>/…`. Both give the names of the table's TensorFlow
column. HDF5 has no bfloat16: h5py stores such values as opaque bytes, which neither Hugging Face nor this module reads.

Source: `save_weights_to_hdf5_group` in Keras 2; `load_tf_weights_from_h5` and `load_tf_shard` in transformers'
modeling_tf_utils.py.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import h5py
import numpy as np
from h5py import h5z

from tfgptj.checkpoints.hdf5_structure import (
    DTYPES,
    SUPERBLOCK_BYTES,
    LibraryFile,
    Piece,
    StoredTensor,
    check_superblock,
    find_tensors,
    signals_deferred,
)
from tfgptj.checkpoints.raw_file import RawFile, bytes_of
from tfgptj.checkpoints.tensors import TensorSpec, aligned_empty, announced
from tfgptj.errors import CheckpointError, CheckpointFormatError
from tfgptj.files import replaced_file

# What Hugging Face's TensorFlow classes call themselves in a file, by head.
MODEL_NAMES = {
    "none": "tfgptj_model",
    "causal_lm": "tfgptj_for_causal_lm",
    "classification": "tfgptj_for_sequence_classification",
    "question_answering": "tfgptj_for_question_answering",
}

# Keras's limit on one attribute. A longer list of names is spread over several, which are numbered.
_ATTRIBUTE_BYTES = 64512


class HDF5File(RawFile):
    """One tf_model.h5, or a shard of one, open for reading, by several threads if need be.

    Args:
        path: the file.

    Raises:
        CheckpointFormatError: if the file is damaged or no HDF5 file of weights, saying what is wrong with it.
        UnsafeCheckpointError: if it leads to other files, or wants filters from a plugin.
        CheckpointError: if the file cannot be opened or read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "an HDF5 file")

    def read(self, name: str) -> np.ndarray:
        stored = self._stored.get(name)
        if stored is None or stored.chunk is None:
            return super().read(name)
        array = aligned_empty(stored.spec.shape, stored.spec.dtype)
        for piece in stored.pieces:
            corner = zip(piece.corner, stored.chunk, strict=True)
            region = array[tuple(slice(start, start + count) for start, count in corner)]
            # A chunk at the edge may stand out over the tensor.
            region[...] = self._read_chunk(stored, piece)[tuple(slice(count) for count in region.shape)]
        return array

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """The values of a tensor, some rows at a time; all at once where they are stored in chunks."""
        if self.spec(name).size and self._stored[name].chunk is not None:
            yield self.read(name)[start:stop]
        else:
            yield from super().blocks(name, start, stop)

    def _fill(self, name: str, skip: int, out: np.ndarray) -> None:
        if out.size:  # of an empty tensor HDF5 stores nothing
            self._read_bytes(self._stored[name].pieces[0].start + skip, bytes_of(out), f"tensor {name!r}")

    def _read_header(self) -> None:
        size = self._size()
        head = bytearray(min(size, SUPERBLOCK_BYTES))
        self._read_bytes(0, memoryview(head), "the header")
        check_superblock(self.path, bytes(head), size)
        self._stored = find_tensors(self.path, LibraryFile(self._file, size), size)
        self._specs = {name: stored.spec for name, stored in self._stored.items()}
        self._metadata = {"format": "tf"}

    def _read_chunk(self, stored: StoredTensor, piece: Piece) -> np.ndarray:
        """A chunk, after its filters have been undone."""
        spec, shape = stored.spec, stored.chunk or ()
        data = bytearray(piece.nbytes)
        self._read_bytes(piece.start, memoryview(data), f"tensor {spec.name!r}")
        size = math.prod(shape) * spec.dtype.itemsize
        for number, kind in reversed(list(enumerate(stored.filters))):
            if piece.skipped >> number & 1:
                continue
            if kind == h5z.FILTER_DEFLATE:
                data = _inflate(data, size)
            elif len(data) == size:  # shuffled: the first bytes of all values, then the second ones, …
                data = bytearray(np.frombuffer(data, np.uint8).reshape(spec.dtype.itemsize, -1).T.tobytes())
        if len(data) != size:
            raise CheckpointFormatError(
                f"{self.path}: tensor {spec.name!r}: the chunk at {list(piece.corner)} does not unpack to its "
                f"{size:,} bytes"
            )
        return np.frombuffer(data, spec.dtype).reshape(shape)


def index_name(key: str) -> str:
    """The tensor that a key in `tf_model.h5.index.json` stands for: it, too, begins with the model's name.

    >>> index_name("tfgptj_for_causal_lm_1/lm_head/bias:0")
    'lm_head/bias:0'
    """
    return key.partition("/")[2] or key


def _inflate(data: bytearray, size: int) -> bytearray:
    """Unpack what zlib packed, up to one byte more than there should be; nothing, where that fails."""
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(data, size + 1)
    except zlib.error:
        return bytearray()
    return bytearray(unpacked) if unpacker.eof else bytearray()


def write_hdf5(
    path: str | os.PathLike[str],
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    model_name: str | None,
) -> None:
    """Write a file that Hugging Face's TensorFlow classes read; an old file of that name is replaced in one step.

    Args:
        path: the file.
        specs: name, shape and dtype of every tensor, in the order in which they come. The names are those of the
            table's TensorFlow column, with `transformer/` before the backbone's, whatever the head.
        tensors: names and values.
        model_name: one of :data:`MODEL_NAMES`, for a whole file; None for a shard, which is flat. The keys in the
            shards' index are `<model name>/<tensor name>`.

    Raises:
        CheckpointError: if the tensors are not those that `specs` announce, or HDF5 cannot hold them.
        OSError: if the file cannot be written.
    """
    check_hdf5_dtypes(path, specs)
    with replaced_file(path) as target:
        file = LibraryFile(target)
        try:
            with _library(file) as h5:
                for name, array in announced(path, specs, tensors):
                    place = name if model_name is None else f"{_layer(name)}/{model_name}/{name}"
                    _write_tensor(path, h5, place, array)
                    del array  # before the next one is made
                    if file.error:  # raised below, when the library is done
                        break
                with signals_deferred():
                    _write_names(h5, [spec.name for spec in specs], model_name)
        finally:
            if file.error:
                raise file.error


@contextmanager
def _library(file: LibraryFile) -> Iterator[h5py.File]:
    with signals_deferred():
        h5 = h5py.File(file, "w")
    try:
        yield h5
    finally:
        with signals_deferred():
            h5.close()


def check_hdf5_dtypes(path: str | os.PathLike[str], specs: Iterable[TensorSpec]) -> None:
    """Refuse what HDF5 cannot hold.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {spec.name!r}: HDF5 has no {spec.dtype.name}; "
                "save as float16 or float32, or in another format"
            )


def _write_tensor(path: str | os.PathLike[str], h5: h5py.File, place: str, array: np.ndarray) -> None:
    try:
        with signals_deferred():
            h5.create_dataset(place, data=array)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: the HDF5 library cannot store {place!r:.200}: {error}") from error


def _write_names(h5: h5py.File, names: list[str], model_name: str | None) -> None:
    """The attributes by which Keras 2 and Hugging Face find the tensors."""
    if model_name is None:
        _write_attribute(h5, "layer_names", names)
        return
    layers = list(dict.fromkeys(_layer(name) for name in names))
    _write_attribute(h5, "layer_names", layers)
    h5.attrs["backend"], h5.attrs["keras_version"] = "tensorflow", "2.15.0"  # the last of Keras 2
    for layer in layers:
        _write_attribute(h5[layer], "weight_names", [f"{model_name}/{name}" for name in names if _layer(name) == layer])
    _write_attribute(h5.create_group("top_level_model_weights"), "weight_names", [])


def _layer(name: str) -> str:
    return name.partition("/")[0]


def _write_attribute(group: h5py.Group, name: str, values: list[str]) -> None:
    encoded = np.array([value.encode() for value in values], "S" if values else np.float64)  # as Keras 2 does
    count = max(1, math.ceil(encoded.nbytes / _ATTRIBUTE_BYTES))
    for number, part in enumerate(np.array_split(encoded, count)):
        group.attrs[name if count == 1 else f"{name}{number}"] = part
