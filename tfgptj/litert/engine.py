"""The graphs of a converted model, loaded and run by LiteRT's interpreters."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from tfgptj.errors import CheckpointFormatError


class Program:
    """One graph in an interpreter of its own, which keeps its weights in the order that the kernels want.

    Args:
        path: the file.
        threads: that it may take.
        inputs, outputs: widths of the rows that it takes and gives, in their order.

    Raises:
        CheckpointFormatError: if LiteRT cannot read the file, or it is another graph.
    """

    def __init__(self, path: Path, threads: int, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        try:
            self._interpreter = Interpreter(model_path=str(path), num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise CheckpointFormatError(f"{path}: LiteRT cannot run it: {str(error)[:300]}") from error
        found = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        widths = tuple(tuple(int(each["shape"][-1]) for each in details) for details in found)
        if widths != (inputs, outputs):
            raise CheckpointFormatError(
                f"{path}: takes and gives rows of {widths} numbers, and the configuration calls for {(inputs, outputs)}"
            )
        self._inputs, self._outputs = ([each["index"] for each in details] for details in found)
        self._rows = 1

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run the graph on arrays [rows, width] in the order of its inputs; the outputs are copies."""
        interpreter, rows = self._interpreter, len(arrays[0])
        if rows != self._rows:
            for index, array in zip(self._inputs, arrays, strict=True):
                interpreter.resize_tensor_input(index, array.shape)
            interpreter.allocate_tensors()
            self._rows = rows
        for index, array in zip(self._inputs, arrays, strict=True):
            interpreter.tensor(index)()[:] = array  # a view; none may be left when it runs
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in self._outputs]


def default_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
