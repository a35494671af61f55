"""All that a training run has in memory, in one file: weights, optimizer, random seeds, and how far it has come.

Keras's own weight files hold no state of dropout, and a file for another optimizer is only warned of. So every variable
is written here as it is, bit for bit, in the safetensors format with a checksum for each.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from tfgptj.checkpoints.raw_file import bytes_of
from tfgptj.checkpoints.safetensors import SafetensorsFile, write_safetensors
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorSpec, health
from tfgptj.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError, NonFiniteLossError

_POSITION, _CHECKSUMS = "position", "checksums"
_KIND = "tfgptj training state 1"


class Position(NamedTuple):
    """How far a run has come.

    Attributes:
        step: batches that it was trained on.
        epoch: epochs that are complete.
        step_in_epoch: batches of the epoch that is not.
        steps_per_epoch: batches of an epoch; 0 if that is not known.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    steps_per_epoch: int = 0


def write_state(path: Path, model: Any, position: Position) -> None:
    """Write a compiled model's state to a file, which takes its name when all is on disk.

    Args:
        path: the file; an old one of that name is replaced, and is still there after an error.
        model: a compiled model.
        position: how far the run has come.

    Raises:
        NonFiniteLossError: if a weight, or a number of the optimizer, is NaN or infinite.
        CheckpointError: if the file cannot be written.
    """
    variables = _variables(model)
    specs = [_spec(name, variable) for name, variable in variables.items()]
    whole = [
        TensorSpec(_POSITION, (len(position),), np.dtype("int64")),
        *specs,
        TensorSpec(_CHECKSUMS, (len(specs) + 1,), np.dtype("uint32")),
    ]

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        checksums = []
        for spec in whole[:-1]:
            array = np.array(position) if spec.name == _POSITION else _array(variables[spec.name], spec)
            checksums.append(zlib.crc32(bytes_of(array)))
            yield spec.name, array
            del array  # before the next one is made
        yield _CHECKSUMS, np.array(checksums, "uint32")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, whole, tensors(), _metadata(model))
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{error.filename or path}: could not be written: {error.strerror}; the checkpoint before is whole"
        ) from error


def read_position(path: Path) -> Position:
    """How far the run had come whose state is in a file.

    Raises:
        CheckpointFormatError: if the file is damaged, or holds something else.
        CheckpointError: if it cannot be read.
    """
    file = SafetensorsFile(path)
    try:
        names = file.names
        if file.metadata.get("kind") != _KIND or (*names[:1], *names[-1:]) != (_POSITION, _CHECKSUMS):
            raise CheckpointFormatError(f"{path}: is no training state of this version of tfgptj")
        checksums = file.read(_CHECKSUMS)
        if len(checksums) != len(names) - 1 or file.spec(_POSITION).shape != (len(Position._fields),):
            raise CheckpointFormatError(f"{path}: is no training state of this version of tfgptj")
        return Position(*map(int, _checked(file, path, _POSITION, checksums[0])))
    finally:
        file.close()


def restore_state(path: Path, model: Any) -> None:
    """Give a compiled model the state that is in a file: all of it or, after an error, nothing.

    Args:
        path: the file.
        model: the same model as was saved, compiled with the same optimizer.

    Raises:
        CheckpointMismatchError: if model or optimizer are others, saying what differs.
        CheckpointFormatError: if the file is damaged.
        CheckpointError: if it cannot be read.
    """
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = _variables(model)
    file = SafetensorsFile(path)
    try:
        _compare(path, file, model, variables)
        checksums = dict(zip(file.names[:-1], file.read(_CHECKSUMS), strict=True))
        for name in variables:  # the file is read twice, so that nothing is assigned if any of it is damaged
            _checked(file, path, name, checksums[name])
        for name, variable in variables.items():
            variable.assign(file.read(name))
    finally:
        file.close()


def _variables(model: Any) -> dict[str, Any]:
    """All variables that training changes or needs, seeds of dropout among them."""
    parts = {"model": model.variables, "optimizer": model.optimizer.variables, "torch": torch_random()}
    # Numbered, as Keras gives some the same path; and their leaf alone, as it numbers models and optimizers, too.
    return {
        f"{part}.{index}.{variable.path.rpartition('/')[2]}": variable
        for part, variables in parts.items()
        for index, variable in enumerate(variables)
    }


class TorchRandom:
    """The state of PyTorch's own random numbers as a variable: of them, Keras's dropout draws on that backend."""

    path, dtype = "random_state", "uint8"

    def __init__(self, generator: Any) -> None:
        self._generator = generator  # the module `torch`, or `torch.cuda`

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the state."""
        return tuple(self._generator.get_rng_state().shape)

    def assign(self, value: np.ndarray) -> None:
        """Set the state, uint8 of that shape."""
        self._generator.set_rng_state(ops.convert_to_tensor(value, "uint8").cpu())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._generator.get_rng_state().numpy()


def torch_random() -> list[TorchRandom]:
    """The states of PyTorch's random numbers; none on another backend."""
    if keras.backend.backend() != "torch":
        return []
    import torch

    return [TorchRandom(torch), *([TorchRandom(torch.cuda)] if torch.cuda.is_available() else [])]


def _spec(name: str, variable: Any) -> TensorSpec:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return TensorSpec(name, tuple(variable.shape), FLOAT_DTYPES.get(dtype) or np.dtype(dtype))


def _array(variable: Any, spec: TensorSpec) -> np.ndarray:
    is_tensor = not isinstance(variable, TorchRandom)
    array = ops.convert_to_numpy(ops.convert_to_tensor(variable)) if is_tensor else variable
    array = np.asarray(array, spec.dtype, order="C")
    if spec.dtype in FLOAT_DTYPES.values() and spec.size and not health([array]).finite:
        raise NonFiniteLossError(
            f"{spec.name} holds NaN or infinite values after this step: training failed, and nothing was saved of it; "
            "the checkpoint before is whole. Lower the learning rate, clip gradients, or look at the data"
        )
    return array


def _metadata(model: Any) -> dict[str, str]:
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # within one that scales the loss
    return {"kind": _KIND, "model": type(model).__name__, "optimizer": type(optimizer).__name__}


def _compare(path: Path, file: SafetensorsFile, model: Any, variables: dict[str, Any]) -> None:
    faults = [
        f"{what} is {file.metadata.get(what)} in the file, and {name} here"
        for what, name in _metadata(model).items()
        if file.metadata.get(what) != name
    ]
    stored = set(file.names[1:-1])
    faults += [f"{name} is not in the file" for name in variables if name not in stored]
    faults += [f"{name} is in the file alone" for name in file.names[1:-1] if name not in variables]
    for name, variable in variables.items():
        own = _spec(name, variable)
        if name in stored and file.spec(name) != own:
            faults.append(f"{name} is {file.spec(name).description} in the file, and {own.description} here")
    if faults:
        more = f"\n  and {len(faults) - 20:,} more" if len(faults) > 20 else ""
        raise CheckpointMismatchError(
            "\n  ".join([f"{path}: was saved by another model or another optimizer than these:", *faults[:20]]) + more
        )


def _checked(file: SafetensorsFile, path: Path, name: str, checksum: Any) -> np.ndarray:
    array = file.read(name)
    if zlib.crc32(bytes_of(array)) != int(checksum):
        raise CheckpointFormatError(
            f"{path}: {name} is damaged: its checksum is another. Delete the file to go on from the one before it, or "
            "from the beginning"
        )
    return array
