"""Graphs of whole models: what is done with a text beside products with weights.

A text is one row of T tokens, and T is chosen when the graph runs. Keys and values come and go as [1, N, S, H].

Source: tensorflow/lite/schema/schema.fbs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tfgptj.attention import MASKED
from tfgptj.litert.graph import Graph, Tensor
from tfgptj.litert.quantization import Matrix


class SequenceGraph(Graph):
    """A graph that reads tokens.

    >>> graph = SequenceGraph()
    >>> tokens = graph.flat(graph.input("tokens", 1, -1, kind="int32"))
    >>> graph.rows(tokens, np.eye(5, 2, dtype="float32")).shape
    (-1, 2)
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Matrix, int]] = {}

    def flat(self, x: Tensor) -> Tensor:
        """Integers [1, T] as [T]."""
        shape = self._constant("shape", np.array([-1], "int32"))
        return self._operator("RESHAPE", 1, "flat", [x.number, shape], (-1,), _options("Reshape"), "int32")

    def embedded(self, tokens: Tensor, matrix: Matrix) -> Tensor:
        """The rows [T, D] of a matrix [V, D] for int [T]; a number beyond them is an error at run time."""
        inputs, shape = [tokens.number, self._matrix("embedding", matrix)], (-1, matrix.values.shape[1])
        return self._operator("EMBEDDING_LOOKUP", 1 if matrix.bits == 32 else 4, "embedded", inputs, shape, None)

    def rows(self, places: Tensor, table: np.ndarray) -> Tensor:
        """The rows [T, W] of a constant [S, W] for int [T]; a number beyond them is an error at run time."""
        options = _options("Gather")
        options.axis, options.batchDims = 0, 0
        inputs = [self._constant("table", table), places.number]
        return self._operator("GATHER", 1, "rows", inputs, (-1, table.shape[1]), options)

    def first(self, places: Tensor) -> Tensor:
        """Where in a cache the first of int [T] lies, as int [4]."""
        ends = [self._constant("end", np.array([end], "int32")) for end in (0, 1, 1)]
        options = _options("StridedSlice")
        first = self._operator("STRIDED_SLICE", 1, "first", [places.number, *ends], (1,), options, "int32")
        around = self._constant("around", np.array([[2, 1]], "int32"))
        return self._operator("PAD", 1, "start", [first.number, around], (4,), _options("Pad"), "int32")

    def last(self, x: Tensor) -> Tensor:
        """The last row [1, W] of [T, W]."""
        options, width = _options("StridedSlice"), x.shape[1]
        options.endMask = 1
        ends = [self._constant("end", np.array(end, "int32")) for end in ([-1, 0], [0, width], [1, 1])]
        return self._operator("STRIDED_SLICE", 1, "last", [x.number, *ends], (1, width), options)

    def reshaped(self, x: Tensor, *shape: int) -> Tensor:
        """The same numbers in another shape."""
        inputs = [x.number, self._constant("shape", np.array(shape, "int32"))]
        return self._operator("RESHAPE", 1, "reshaped", inputs, shape, _options("Reshape"))

    def swapped(self, x: Tensor) -> Tensor:
        """[1, T, N, H] as [1, N, T, H], or back."""
        order = self._constant("order", np.array([0, 2, 1, 3], "int32"))
        shape = (x.shape[0], x.shape[2], x.shape[1], x.shape[3])
        return self._operator("TRANSPOSE", 1, "swapped", [x.number, order], shape, _options("Transpose"))

    def parts(self, x: Tensor, axis: int, *sizes: int) -> list[Tensor]:
        """[…] cut along an axis."""
        found, start = [], 0
        for size in sizes:
            begin, extent = np.zeros(len(x.shape), "int32"), np.full(len(x.shape), -1, "int32")  # -1: all of it
            begin[axis], extent[axis], start = start, size, start + size
            inputs = [x.number, self._constant("begin", begin), self._constant("extent", extent)]
            shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
            found.append(self._operator("SLICE", 1, "part", inputs, shape, _options("Slice")))
        return found

    def joined(self, parts: list[Tensor]) -> Tensor:
        """[…] put together along the last dimension."""
        options, shape = _options("Concatenation"), parts[0].shape
        options.axis = len(shape) - 1
        shape = (*shape[:-1], sum(part.shape[-1] for part in parts))
        return self._operator("CONCATENATION", 1, "joined", [part.number for part in parts], shape, options)

    def turned(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """The first R dimensions of [1, N, T, H] rotated, of which i and i + R / 2 are a pair; sin, cos [1, 1, T, R].

        Sines of the first ones of pairs are negated.
        """
        width, rest = sin.shape[-1], x.shape[-1] - sin.shape[-1]
        first, second, *passing = self.parts(x, 3, width // 2, width // 2, *([rest] if rest else []))
        crossed, straight = self.joined([second, first]), self.joined([first, second])
        straight, crossed = self._times(straight, cos.number), self._times(crossed, sin.number)
        turned = self.add(straight, crossed)
        return self.joined([turned, *passing]) if passing else turned

    def unseen(self, places: Tensor, slots: int) -> Tensor:
        """What is added to scores, so that float places [T, 1] see the slots up to themselves: [1, 1, T, S]."""
        own = self._row("slots", np.arange(slots))
        behind = self._operator("SUB", 1, "behind", [places.number, own], (-1, slots), _options("Sub"))
        none = self._row("none", [0])
        options = _options("MaximumMinimum")
        behind = self._operator("MINIMUM", 1, "behind", [behind.number, none], (-1, slots), options)
        return self.reshaped(self._times(behind, self._row("masked", [-MASKED])), 1, 1, -1, slots)

    def written(self, name: str, cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
        """A cache [1, N, S, H] with [1, N, T, H] in it."""
        options = _options("DynamicUpdateSlice")
        return self._operator(
            "DYNAMIC_UPDATE_SLICE", 1, name, [cache.number, new.number, start.number], cache.shape, options
        )

    def activated(self, x: Tensor, name: str) -> Tensor:
        """One of :data:`ACTIVATIONS`."""
        operator, multiplied = ACTIVATIONS[name]
        result = self._operator(operator, 1, name, [x.number], x.shape, None)
        return self._times(x, result.number) if multiplied else result

    def _matrix(self, name: str, matrix: Matrix) -> int:
        """A matrix that is used twice is stored once."""
        if id(matrix) not in self._known:
            self._known[id(matrix)] = matrix, super()._matrix(name, matrix)
        return self._known[id(matrix)][1]


# Activations that are an operator of the graph, and whether its result is multiplied with what it was given.
ACTIVATIONS = {
    **{"relu": ("RELU", False), "tanh": ("TANH", False), "sigmoid": ("LOGISTIC", False)},
    **dict.fromkeys(("silu", "swish"), ("LOGISTIC", True)),
}


def _options(name: str) -> Any:
    return getattr(schema, f"{name}OptionsT")()
