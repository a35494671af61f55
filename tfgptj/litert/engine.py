"""The graphs of a converted model, loaded and run by LiteRT's interpreters."""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from tfgptj.errors import CheckpointFormatError

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED, _MADV_COLLAPSE = 4, 25
_LARGE_PAGE = 2**21

Shape = tuple[int, ...]  # -1 for sizes that are chosen when a graph runs


class Room:
    """Memory for what graphs give, kept from one run to the next: new pages would cost more than to fill them."""

    def __init__(self) -> None:
        self._arrays: dict[int, np.ndarray] = {}

    def copy(self, place: int, values: np.ndarray) -> np.ndarray:
        """Values in one of the places, until others are copied to it."""
        if place not in self._arrays or self._arrays[place].size < values.size:
            self._arrays[place] = np.empty(values.size, "float32")
        copied = self._arrays[place][: values.size].reshape(values.shape)
        copied[...] = values
        return copied


class Program:
    """One graph in an interpreter of its own, which keeps its weights in the order that the kernels want.

    Args:
        path: the file.
        threads: that it may take.
        inputs, outputs: shapes of what it takes and gives, in their order.
        room: where its outputs are copied to; None for new memory.

    Raises:
        CheckpointFormatError: if LiteRT cannot read the file, or it is another graph.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        inputs: tuple[Shape, ...],
        outputs: tuple[Shape, ...],
        room: Room | None = None,
    ) -> None:
        self._room = room
        try:
            self._interpreter = Interpreter(model_path=str(path), num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise CheckpointFormatError(f"{path}: LiteRT cannot run it: {str(error)[:300]}") from error
        details = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        found = tuple(tuple(tuple(each["shape_signature"].tolist()) for each in side) for side in details)
        if found != (inputs, outputs):
            raise CheckpointFormatError(
                f"{path}: takes and gives {found}, and the configuration calls for {(inputs, outputs)}"
            )
        self._inputs, self._outputs = ([each["index"] for each in side] for side in details)
        self._shapes: list[Shape] = []
        give_back(path)

    def __call__(self, *arrays: np.ndarray, wanted: int | None = None) -> list[np.ndarray]:
        """Run the graph.

        Args:
            *arrays: float32, in the order of its inputs.
            wanted: how many of its outputs are asked for; None for all.

        Returns:
            Copies of the first outputs. Those in a room are there until a graph with the same room runs.
        """
        interpreter, shapes = self._interpreter, [array.shape for array in arrays]
        if shapes != self._shapes:
            for index, shape in zip(self._inputs, shapes, strict=True):
                interpreter.resize_tensor_input(index, shape)
            interpreter.allocate_tensors()
            self._shapes = shapes
        for index, array in zip(self._inputs, arrays, strict=True):
            interpreter.tensor(index)()[:] = array  # a view; none may be left when it runs
        interpreter.invoke()
        wanted_outputs = self._outputs[:wanted]
        if self._room is None:
            return [interpreter.get_tensor(index) for index in wanted_outputs]
        return [self._room.copy(place, interpreter.tensor(index)()) for place, index in enumerate(wanted_outputs)]


def give_back(path: Path) -> None:
    """Let go of the pages of a file that LiteRT has mapped, on Linux.

    The kernels have packed the weights in an order of their own, and do not look at the file's again: without this they
    would be in memory twice. What is looked at nevertheless is read from the file once more.
    """
    for region in _regions():
        if region.file == str(path.resolve()) and region.permissions.startswith("r--"):  # never what was written to
            _advise(region.start, region.stop, _MADV_DONTNEED)


class LargePages:
    """Puts what is allocated within it into large pages, on Linux.

    Weights are read from one end to the other for every token. In pages of 4 KiB the processor looks up half a million
    addresses for that, and stops to read ahead at the end of each. The kernel copies a weight for it, beside the graph
    that is loaded next.
    """

    def __enter__(self) -> LargePages:
        self._pool, self._seen = ThreadPoolExecutor(1), set(_regions())
        return self

    def __exit__(self, *error: Any) -> None:
        self.take(0)
        self._pool.shutdown()

    def take(self, least: int = 2**24) -> None:
        """Begin with what is there by now, if it has so many bytes or more."""
        regions = set(_regions())
        fresh = [region for region in regions - self._seen if region.stop - region.start >= least]
        self._seen |= set(fresh)
        for region in fresh:
            start, stop = -(-region.start // _LARGE_PAGE) * _LARGE_PAGE, region.stop // _LARGE_PAGE * _LARGE_PAGE
            if region.file in ("", "[heap]") and region.permissions.startswith("rw-p") and start < stop:
                begun = threading.Event()  # LiteRT lets no other thread of Python run while it loads a graph
                self._pool.submit(_collapse, start, stop, begun)
                begun.wait()


def _collapse(start: int, stop: int, begun: threading.Event) -> None:
    begun.set()
    _advise(start, stop, _MADV_COLLAPSE)  # a kernel that cannot says so, and leaves it as it is


class _Region(NamedTuple):
    start: int
    stop: int
    permissions: str
    file: str


def _regions() -> list[_Region]:
    """What is mapped in this process; nothing where the system does not say."""
    found = []
    text = _MAPS.read_text(encoding="utf-8", errors="surrogateescape") if _MAPS.is_file() else ""
    for line in text.splitlines():
        addresses, permissions, _, _, _, *file = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in addresses.split("-"))
        found.append(_Region(start, stop, permissions, *(file or [""])))
    return found


def _advise(start: int, stop: int, advice: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


def default_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
