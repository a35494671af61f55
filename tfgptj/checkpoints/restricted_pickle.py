"""The pickles that `torch.save` writes for a dict of tensors, read as data by a small machine of its own.

A pickle is a program: its opcodes push values on a stack, and some of them name a function and call it. This machine
knows the opcodes that PyTorch writes for tensors, numbers, text, tuples, lists and dicts, in protocols 2 to 5, and the
few names that come with them. These names stand for entries of a table here; nothing is imported, looked up or called,
and there is no switch that would change that. The first name that is not in the table ends the reading.

What a pickle may do to time and memory is bounded by its size and its number of opcodes, see `limits.py`. Values may be
nested without limit, or contain themselves: nothing here or in the reader descends into them, prints or compares them.

Source: the comments of pickletools in Python's standard library.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tfgptj import limits
from tfgptj.errors import CheckpointFormatError, UnsafeCheckpointError


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """What a pickle says about a run of values that is stored outside of it."""

    key: str
    dtype: np.dtype[Any]
    size: int  # number of values


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view of a storage, in numbers of values. Whether it lies within the storage has not been checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A name of the table below, and no more than the name."""

    name: str
    dtype: np.dtype[Any] | None = None  # that of a storage class


_ORDERED_DICT = Global("collections.OrderedDict")
_REBUILD_TENSOR = Global("torch._utils._rebuild_tensor_v2")
_REBUILD_PARAMETER = Global("torch._utils._rebuild_parameter")
_SIZE = Global("torch.Size")

_STORAGE_TYPES = {
    "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16, "Double": np.float64,
    "Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
}  # fmt: skip
_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_GLOBALS = {
    entry.name: entry
    for entry in (
        *(_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, _SIZE),
        *(Global(f"torch.{name}Storage", np.dtype(kind)) for name, kind in _STORAGE_TYPES.items()),
        *(Global(f"torch.{name}") for name in _DTYPES),
    )
}

_PROTO, _STOP = 0x80, ord(".")
_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
_NUMBERS = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"}
_TEXTS = {ord("X"): "<I", 0x8C: "<B"}  # by how their length is written
_CONTAINERS: dict[int, Callable[[], Any]] = {ord("]"): list, ord("}"): dict}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_PUTS = {ord("q"): "<B", ord("r"): "<I"}
_GETS = {ord("h"): "<B", ord("j"): "<I"}

# Opcodes that have no other use than to make objects of a class that the pickle names.
_UNSAFE = {
    ord("o"): "OBJ", 0x81: "NEWOBJ", 0x92: "NEWOBJ_EX", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4",
}  # fmt: skip


def load_pickle(data: bytes, where: str) -> Any:
    """The value that a pickle describes: dicts, lists, tuples, numbers, text, and tensors as :class:`StoredTensor`.

    Args:
        data: the pickle.
        where: the file, for messages.

    Raises:
        UnsafeCheckpointError: if it names a function or class that tensors do not need, or misuses one.
        CheckpointFormatError: if it is damaged, or uses more opcodes than any checkpoint of weights.

    >>> load_pickle(b"\\x80\\x02}X\\x01\\x00\\x00\\x00aK\\x07s.", "a.bin")
    {'a': 7}
    """
    return _Machine(data, where).run()


class _Machine:
    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self._where = where
        self._position = 0
        self._start = 0  # of the opcode being carried out
        self._stack: list[Any] = []
        self._marks: list[int] = []  # lengths that the stack had
        self._memo: list[Any] = []

    def run(self) -> Any:
        if self._take(1)[0] != _PROTO or not 2 <= self._take(1)[0] <= 5:
            raise self._fault(f"a pickle of protocol 2 to 5 was expected, it begins with {self._data[:2]!r}")
        for _ in range(limits.MAX_PICKLE_OPCODES):
            self._start = self._position
            opcode = self._take(1)[0]
            if opcode == _STOP:
                return self._finish()
            self._step(opcode)
        raise self._fault(f"more than {limits.MAX_PICKLE_OPCODES:,} opcodes; no checkpoint of weights needs so many")

    def _finish(self) -> Any:
        if self._marks or len(self._stack) != 1 or self._position != len(self._data):
            left, rest = len(self._stack) + len(self._marks), len(self._data) - self._position
            raise self._fault(f"the end, with {left:,} values on the stack, expected 1, and {rest:,} bytes after it")
        return self._stack[0]

    def _step(self, opcode: int) -> None:
        if opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode])
        elif opcode in _NUMBERS:
            self._stack.append(self._number(_NUMBERS[opcode]))
        elif opcode in _TEXTS:
            self._stack.append(self._text(_TEXTS[opcode]))
        elif opcode in _CONTAINERS:
            self._stack.append(_CONTAINERS[opcode]())
        elif opcode in _TUPLES:
            self._stack.append(tuple(self._pop(_TUPLES[opcode])))
        elif opcode in _PUTS:
            self._put(self._number(_PUTS[opcode]))
        elif opcode in _GETS:
            self._get(self._number(_GETS[opcode]))
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self)
        elif opcode in _UNSAFE:
            raise self._refusal(f"an object of any class, with the opcode {_UNSAFE[opcode]}")
        else:
            raise self._fault(f"0x{opcode:02x} is no opcode that PyTorch writes")

    # The stack

    def _pop(self, count: int) -> list[Any]:
        bottom = len(self._stack) - count
        if bottom < (self._marks[-1] if self._marks else 0):
            raise self._fault(f"{count} values were taken from the stack, which has fewer")
        values = self._stack[bottom:]
        del self._stack[bottom:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise self._fault("a mark was expected on the stack")
        values = self._stack[self._marks[-1] :]
        del self._stack[self._marks.pop() :]
        return values

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _append(self) -> None:
        self._extend(self._pop(1))

    def _appends(self) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._target()
        if type(target) is not list:
            raise self._fault(f"a list was to be extended, but it is {_describe(target)}")
        target.extend(values)

    def _set_item(self) -> None:
        self._update(self._pop(2))

    def _set_items(self) -> None:
        self._update(self._pop_to_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._target()
        if type(target) is not dict:
            raise self._fault(f"a dict was to be filled, but it is {_describe(target)}")
        if len(items) % 2:
            raise self._fault("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Larger numbers could be chosen so that all have one hash, and each took as long as all before it.
            if type(key) is not str and not (type(key) is int and abs(key) < 2**60):
                raise self._fault(f"the key of a dict must be text or a number, got {_describe(key)}")
            if key in target:
                raise self._fault(f"the key {key!r:.200} comes twice")
            target[key] = value

    def _target(self) -> Any:
        """The value at the top of the stack, which stays there."""
        (value,) = self._pop(1)
        self._stack.append(value)
        return value

    # The memo, which Python fills from 0 without gaps

    def _put(self, index: int) -> None:
        if index > len(self._memo):
            raise self._fault(f"memo entry {index:,} was set, but there are {len(self._memo):,} before it")
        self._memo[index : index + 1] = [self._target()]

    def _memoize(self) -> None:
        self._put(len(self._memo))

    def _get(self, index: int) -> None:
        if index >= len(self._memo):
            raise self._fault(f"memo entry {index:,} was asked for, but there are {len(self._memo):,}")
        self._stack.append(self._memo[index])

    # Values

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._position:
            raise self._fault(f"cut short: {count:,} more bytes expected, {len(self._data) - self._position:,} found")
        self._position += count
        return self._data[self._position - count : self._position]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def _text(self, form: str) -> str:
        encoded = self._take(self._number(form))
        try:
            return encoded.decode()
        except UnicodeDecodeError as error:
            raise self._fault(f"text that is not UTF-8: {error.reason}") from None

    def _frame(self) -> None:
        self._number("<Q")  # how much to read ahead, from a stream; all is here already

    # Names, and what they are used for

    def _global(self) -> None:
        self._name(self._line(), self._line())

    def _stack_global(self) -> None:
        module, name = self._pop(2)
        if type(module) is not str or type(name) is not str:
            raise self._fault(f"a name must be text, got {_describe(module)} and {_describe(name)}")
        self._name(module, name)

    def _instance(self) -> None:
        name = f"{self._line()}.{self._line()}"
        raise self._refusal(f"an object of {name!r:.200}")

    def _line(self) -> str:
        end = self._data.find(b"\n", self._position, self._position + limits.MAX_PICKLE_NAME)
        if end < 0:
            raise self._fault(f"a name that does not end within {limits.MAX_PICKLE_NAME} bytes")
        return self._take(end + 1 - self._position)[:-1].decode("ascii", "backslashreplace")

    def _name(self, module: str, name: str) -> None:
        full_name = f"{module}.{name}"
        if full_name not in _GLOBALS or "." in name:
            raise self._refusal(f"{full_name!r:.200}")
        self._stack.append(_GLOBALS[full_name])

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if type(arguments) is not tuple:
            raise self._fault(f"arguments must be a tuple, got {_describe(arguments)}")
        if function is _ORDERED_DICT and not arguments:
            self._stack.append({})
        elif function is _REBUILD_TENSOR:
            self._stack.append(self._tensor(arguments))
        elif (
            function is _REBUILD_PARAMETER
            and len(arguments) == 3
            and type(arguments[0]) is StoredTensor
            or function is _SIZE
            and len(arguments) == 1
            and _are_sizes(arguments[0])
        ):
            self._stack.append(arguments[0])
        else:
            raise self._refusal(f"a call of {_describe(function)} that is none of PyTorch's")

    def _tensor(self, arguments: tuple[Any, ...]) -> StoredTensor:
        # After these come whether it needs a gradient, hooks, and in new files metadata: nothing that has values.
        storage, offset, shape, strides = arguments[:4] if len(arguments) in (6, 7) else (None,) * 4
        if type(storage) is not Storage or not _is_size(offset) or not _are_sizes(shape):
            raise self._fault("a tensor must be made from a storage, an offset, a shape and strides")
        if not _are_sizes(strides) or len(strides) != len(shape):
            raise self._fault(f"a tensor's strides must be {len(shape)} numbers, none of them negative")
        return StoredTensor(storage, offset, shape, strides)

    def _persistent(self) -> None:
        (identity,) = self._pop(1)
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise self._fault("only storages can be outside of the pickle, with a type, a key, a place and a size")
        _, storage, key, _, size = identity
        if type(storage) is not Global or storage.dtype is None or type(key) is not str or not _is_size(size):
            raise self._fault("a storage must have a type, a key and a size")
        self._stack.append(Storage(key, storage.dtype, size))

    def _build(self) -> None:
        # PyTorch gives an OrderedDict an attribute, the versions of its modules, that no reader needs.
        (state,) = self._pop(1)
        if type(self._target()) is not dict or type(state) is not dict:
            raise self._refusal(f"attributes for {_describe(self._target())}")

    # Faults

    def _fault(self, what: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{self._where}: byte {self._start:,}: {what}")

    def _refusal(self, what: str) -> UnsafeCheckpointError:
        return UnsafeCheckpointError(
            f"{self._where}: byte {self._start:,}: asks for {what}, which no weights need and which could run code; "
            "nothing was run. If you trust where the file comes from, save its weights as safetensors with PyTorch."
        )


_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    ord("("): _Machine._mark,
    ord("t"): _Machine._tuple,
    ord("a"): _Machine._append,
    ord("e"): _Machine._appends,
    ord("s"): _Machine._set_item,
    ord("u"): _Machine._set_items,
    ord("c"): _Machine._global,
    0x93: _Machine._stack_global,
    ord("i"): _Machine._instance,
    ord("R"): _Machine._reduce,
    ord("b"): _Machine._build,
    ord("Q"): _Machine._persistent,
    0x94: _Machine._memoize,
    0x8A: _Machine._long,
    0x95: _Machine._frame,
}


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= limits.MAX_TENSOR_BYTES


def _are_sizes(values: Any) -> bool:
    # A long tuple is not looked through: a pickle could ask for that again and again.
    return type(values) is tuple and len(values) <= limits.MAX_DIMENSIONS and all(map(_is_size, values))


def _describe(value: Any) -> str:
    """A name or a type; never the value, which may be deep."""
    return value.name if type(value) is Global else type(value).__name__
