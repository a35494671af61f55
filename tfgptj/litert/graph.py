"""A LiteRT graph put together operator by operator, and written with its weights behind it.

Most graphs work on rows of numbers: tensors [rows, width] whose number of rows is chosen when it runs. The schema's own
classes, which come with LiteRT, write the file's head. The weights follow it at offsets that the head tells, so that
they go to disk as they are.

Source: tensorflow/lite/schema/schema.fbs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tfgptj.files import replaced_file
from tfgptj.litert.quantization import Matrix

ALIGNMENT = 64  # where weights begin; LiteRT wants 16

_KINDS = {"float32": schema.TensorType.FLOAT32, "float16": schema.TensorType.FLOAT16, "int32": schema.TensorType.INT32}
_OPERATORS, _OPTIONS = schema.BuiltinOperator, schema.BuiltinOptions


class Tensor(NamedTuple):
    """A tensor of a graph, by its number; -1 stands for sizes that are chosen when it runs."""

    number: int
    shape: tuple[int, ...]


class Graph:
    """Operators in the order in which they run.

    >>> graph = Graph()
    >>> x = graph.input("x", -1, 2)
    >>> graph.add(x, x).shape
    (-1, 2)
    """

    def __init__(self) -> None:
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: list[tuple[int, int]] = []
        self._inputs: list[int] = []
        self._values: list[np.ndarray] = []  # of the constants, in the order of their buffers

    def input(self, name: str, *shape: int, kind: str = "float32") -> Tensor:
        """What the graph is given."""
        tensor = self._array(name, shape, kind)
        self._inputs.append(tensor.number)
        return tensor

    def product(self, name: str, x: Tensor, matrix: Matrix, bias: np.ndarray | None = None) -> Tensor:
        """x Wᵀ + b: x is [rows, in], the matrix [out, in], the bias float32 [out]."""
        shape = (-1, len(matrix.values))
        options = schema.FullyConnectedOptionsT()
        options.asymmetricQuantizeInputs = False
        constants = [self._matrix(name, matrix), -1 if bias is None else self._constant(f"{name}_bias", bias)]
        return self._operator("FULLY_CONNECTED", 9, name, [x.number, *constants], shape, options)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Their sum."""
        return self._operator("ADD", 1, "sum", [x.number, y.number], x.shape, schema.AddOptionsT())

    def gelu(self, x: Tensor, approximate: bool) -> Tensor:
        """GELU, exact or by the hyperbolic tangent."""
        options = schema.GeluOptionsT()
        options.approximate = approximate
        return self._operator("GELU", 1, "gelu", [x.number], x.shape, options)

    def normalised(self, x: Tensor, gamma: np.ndarray, beta: np.ndarray, epsilon: float) -> Tensor:
        """The layer normalisation of each row."""
        centred = self._operator("SUB", 1, "centred", [x.number, self._mean(x).number], x.shape, schema.SubOptionsT())
        variance = self._mean(self._times(centred, centred.number))
        spread = self._operator(
            "ADD", 1, "variance", [variance.number, self._row("epsilon", [epsilon])], (-1, 1), schema.AddOptionsT()
        )
        inverse = self._operator("RSQRT", 1, "inverse", [spread.number], (-1, 1), None)
        scaled = self._times(self._times(centred, inverse.number), self._row("gamma", gamma))
        return self._operator(
            "ADD", 1, "normalised", [scaled.number, self._row("beta", beta)], x.shape, schema.AddOptionsT()
        )

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Of [B, N, T, H] and [B, N, S, H] the products of each with each, [B, N, T, S]."""
        return self._batch_product(query, key, (*query.shape[:3], key.shape[2]), turned=True)

    def mixed(self, weights: Tensor, value: Tensor) -> Tensor:
        """Of [B, N, T, S] and [B, N, S, H] the sums [B, N, T, H]."""
        return self._batch_product(weights, value, (*weights.shape[:3], value.shape[3]), turned=False)

    def softmax(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        return self._operator("SOFTMAX", 1, "softmax", [x.number], x.shape, options)

    def write(self, path: str | os.PathLike[str], outputs: list[Tensor]) -> None:
        """Write the file; an old one of that name is replaced in one step.

        Raises:
            OSError: if it cannot be written.
        """
        with replaced_file(Path(path)) as file:
            self.write_to(file, outputs)

    def write_to(self, file: BinaryIO, outputs: list[Tensor], signatures: Sequence[str] = ()) -> None:
        """Write to an empty file, which is at its end afterwards.

        Args:
            file: to write to.
            outputs: what the graph gives.
            signatures: names that the graph can be called by; inputs and outputs go by their own names then.
        """
        # All offsets take the same room, so that the head is as long with the right ones.
        start = _aligned(len(self._head(outputs, signatures, [ALIGNMENT] * len(self._values))))
        offsets = []
        for value in self._values:
            offsets.append(start)
            start = _aligned(start + value.nbytes)
        file.write(self._head(outputs, signatures, offsets))
        for offset, value in zip(offsets, self._values, strict=True):
            file.seek(offset)
            file.write(value.reshape(-1).view(np.uint8).data)
        file.truncate(start)
        file.seek(start)

    def _batch_product(self, x: Tensor, y: Tensor, shape: tuple[int, ...], turned: bool) -> Tensor:
        options = schema.BatchMatMulOptionsT()
        options.adjX, options.adjY = False, turned
        return self._operator("BATCH_MATMUL", 1, "batch_product", [x.number, y.number], shape, options)

    def _mean(self, x: Tensor) -> Tensor:
        options = schema.ReducerOptionsT()
        options.keepDims = True
        axes = self._constant("axes", np.array([1], "int32"))
        return self._operator("MEAN", 2, "mean", [x.number, axes], (-1, 1), options)

    def _times(self, x: Tensor, factor: int) -> Tensor:
        return self._operator("MUL", 1, "product", [x.number, factor], x.shape, schema.MulOptionsT())

    def _operator(
        self,
        name: str,
        version: int,
        result: str,
        inputs: list[int],
        shape: tuple[int, ...],
        options: Any,
        kind: str = "float32",
    ) -> Tensor:
        code = (getattr(_OPERATORS, name), version)
        if code not in self._codes:
            self._codes.append(code)
        operator, tensor = schema.OperatorT(), self._array(result, shape, kind)
        operator.opcodeIndex, operator.inputs, operator.outputs = self._codes.index(code), inputs, [tensor.number]
        if options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(_OPTIONS, type(options).__name__.removesuffix("T"))
        self._operators.append(operator)
        return tensor

    def _array(self, name: str, shape: tuple[int, ...], kind: str) -> Tensor:
        tensor = self._tensor(name, tuple(max(size, 1) for size in shape), _KINDS[kind])
        tensor.shapeSignature = list(shape)
        return Tensor(len(self._tensors) - 1, shape)

    def _row(self, name: str, values: Any) -> int:
        """A constant [1, width]."""
        return self._constant(name, np.asarray(values, "float32")[None])

    def _constant(self, name: str, values: np.ndarray) -> int:
        return self._stored(self._tensor(name, values.shape, _KINDS[values.dtype.name]), values)

    def _matrix(self, name: str, matrix: Matrix) -> int:
        if matrix.bits == 32:
            return self._constant(name, matrix.values)
        quantization = schema.QuantizationParametersT()
        quantization.quantizedDimension = 0
        outputs, inputs = matrix.values.shape
        if matrix.block_size is None:
            quantization.scale = matrix.scales[:, 0].astype("float32")
            quantization.zeroPoint = np.zeros(outputs, "int64")
        else:
            blocks = schema.BlockwiseQuantizationT()
            blocks.scales = self._constant(f"{name}_scales", matrix.scales.astype("float16"))
            blocks.zeroPoints, blocks.blockSize = -1, matrix.block_size
            quantization.details, quantization.detailsType = blocks, schema.QuantizationDetails.BlockwiseQuantization
        kind = schema.TensorType.INT8 if matrix.bits == 8 else schema.TensorType.INT4
        tensor = self._tensor(name, (outputs, inputs), kind)
        tensor.quantization = quantization
        return self._stored(tensor, matrix.packed())

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int) -> Any:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.hasRank, tensor.buffer = name, list(shape), kind, True, 0
        self._tensors.append(tensor)
        return tensor

    def _stored(self, tensor: Any, values: np.ndarray) -> int:
        self._values.append(np.ascontiguousarray(values))
        tensor.buffer = len(self._values)  # the first buffer is that of tensors without values
        return len(self._tensors) - 1

    def _head(self, outputs: list[Tensor], signatures: Sequence[str], offsets: list[int]) -> bytes:
        model, graph = schema.ModelT(), schema.SubGraphT()
        model.version, model.description = 3, "tfgptj"
        model.operatorCodes = [_operator_code(*code) for code in self._codes]
        model.buffers = [schema.BufferT()]
        for offset, value in zip(offsets, self._values, strict=True):
            buffer = schema.BufferT()
            buffer.offset, buffer.size = offset, value.nbytes
            model.buffers.append(buffer)
        graph.name, graph.tensors, graph.operators = "main", self._tensors, self._operators
        graph.inputs, graph.outputs = self._inputs, [tensor.number for tensor in outputs]
        model.subgraphs = [graph]
        model.signatureDefs = [self._signature(name, graph) for name in signatures]
        builder = flatbuffers.Builder()
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _signature(self, name: str, graph: Any) -> Any:
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = name, 0
        signature.inputs, signature.outputs = ([self._named(number) for number in numbers]
                                               for numbers in (graph.inputs, graph.outputs))  # fmt: skip
        return signature

    def _named(self, number: int) -> Any:
        named = schema.TensorMapT()
        named.name, named.tensorIndex = self._tensors[number].name, number
        return named


def _operator_code(builtin: int, version: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode, code.version = builtin, version
    code.deprecatedBuiltinCode = min(builtin, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    return code


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
