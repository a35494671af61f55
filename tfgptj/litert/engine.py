"""The graphs of a converted model, loaded and run by LiteRT's interpreters."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from tfgptj.errors import CheckpointFormatError

_MAPS, _MADV_DONTNEED = Path("/proc/self/maps"), 4

Shape = tuple[int, ...]  # -1 for sizes that are chosen when a graph runs


class Program:
    """One graph in an interpreter of its own, which keeps its weights in the order that the kernels want.

    Args:
        path: the file.
        threads: that it may take.
        inputs, outputs: shapes of what it takes and gives, in their order.

    Raises:
        CheckpointFormatError: if LiteRT cannot read the file, or it is another graph.
    """

    def __init__(self, path: Path, threads: int, inputs: tuple[Shape, ...], outputs: tuple[Shape, ...]) -> None:
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
            Copies of the first outputs.
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
        return [interpreter.get_tensor(index) for index in self._outputs[:wanted]]


def give_back(path: Path) -> None:
    """Let go of the pages of a file that LiteRT has mapped, on Linux.

    The kernels have packed the weights in an order of their own, and do not look at the file's again: without this they
    would be in memory twice. What is looked at nevertheless is read from the file once more.
    """
    if not _MAPS.is_file():
        return
    library, name = ctypes.CDLL(None), str(path.resolve())
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)  # addresses, permissions, …, file
        if len(fields) == 6 and fields[5] == name and fields[1].startswith("r--"):  # never what was written to
            start, stop = (int(address, 16) for address in fields[0].split("-"))
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)


def default_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
