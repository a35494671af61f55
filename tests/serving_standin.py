"""A server that stands in for TensorFlow Serving on loopback: its gRPC and REST calls, and its batching session.

What it holds clients and graphs to was read in TensorFlow Serving's source: predict_util.cc (which inputs a request
must have), batching_session.cc and batching_util.cc (how requests are merged), json_tensor.cc (REST). Requests of a
signature are merged along axis 0 and the results cut apart; a request that does not fit is split; a batch is filled up
to an allowed size with the first request's first row; tensors of different lengths are filled up on the right with
their own first element.
"""

import base64
import json
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2
from tensorflow.core.framework import tensor_pb2

HTTP_CODES = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "FAILED_PRECONDITION": 412}
PATH = re.compile(r"/v1/models/(?P<name>[^/:]+)(/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?:predict")


def _messages() -> dict[str, Any]:
    """The protocol buffers that do not come with TensorFlow."""
    file = descriptor_pb2.FileDescriptorProto(name="standin.proto", package="standin", syntax="proto3")
    file.dependency.extend([tensor_pb2.DESCRIPTOR.name, wrappers_pb2.DESCRIPTOR.name])
    tensor, int64 = ".tensorflow.TensorProto", ".google.protobuf.Int64Value"
    described: dict[str, list[tuple[str, int, str]]] = {
        "ModelSpec": [("name", 1, ""), ("version", 2, int64), ("signature_name", 3, ""), ("version_label", 4, "")],
        "PredictRequest": [("model_spec", 1, ".standin.ModelSpec"), ("inputs", 2, "map")],
        "PredictResponse": [("outputs", 1, "map"), ("model_spec", 2, ".standin.ModelSpec")],
        "PredictLog": [("request", 1, ".standin.PredictRequest")],
        "PredictionLog": [("predict_log", 6, ".standin.PredictLog")],
    }
    for name, fields in described.items():
        message = file.message_type.add(name=name)
        for label, number, kind in fields:
            entry = message.field.add(name=label, number=number, type=11 if kind else 9, label=1)
            if kind == "map":
                nested = message.nested_type.add(name=f"{label.title()}Entry")
                nested.options.map_entry = True
                nested.field.add(name="key", number=1, type=9, label=1)
                nested.field.add(name="value", number=2, type=11, label=1, type_name=tensor)
                entry.label, kind = 3, f".standin.{name}.{nested.name}"
            if kind:
                entry.type_name = kind
    pool = descriptor_pool.Default()
    pool.Add(file) if hasattr(pool, "Add") else pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"standin.{name}")) for name in described}


MESSAGES = _messages()


class Refusal(Exception):
    """A status that is not OK."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass
class Task:
    """One request for one signature, and the parts of it that were run."""

    inputs: dict[str, np.ndarray]
    size: int
    answer: "Future[dict[str, np.ndarray]]" = field(default_factory=Future)
    parts: list[dict[str, np.ndarray]] = field(default_factory=list)


class Batcher:
    """The batching session of one signature.

    Attributes:
        batches: rows of real requests and rows in all, of each run.
    """

    def __init__(self, function: Any, allowed: list[int], pads: bool) -> None:
        self._function, self._allowed, self._pads = function, allowed, pads
        self._waiting: list[Task] = []
        self._change = threading.Condition()
        self.held = 1  # requests that must be waiting before any is run
        self.batches: list[tuple[int, int]] = []

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Wait for the answer to a request; whoever comes last runs what is waiting."""
        if any(not array.shape for array in inputs.values()):
            raise Refusal("INVALID_ARGUMENT", "Batching Run() input tensors must have at least one dimension.")
        sizes = {array.shape[0] for array in inputs.values()}
        if len(sizes) != 1:
            text = "Batching Run() input tensors must have equal 0th-dimension size."
            raise Refusal("INVALID_ARGUMENT", text)
        task = Task(inputs, sizes.pop())
        with self._change:
            self._waiting.append(task)
            if len(self._waiting) >= self.held:
                self.held, tasks = 1, self._waiting
                self._waiting = []
                self._run_all(tasks)
        return task.answer.result(timeout=120)

    def _run_all(self, tasks: list[Task]) -> None:
        batch: list[tuple[Task, dict[str, np.ndarray]]] = []
        room = largest = self._allowed[-1]
        for task in tasks:
            start = 0
            while start < task.size:
                stop = min(task.size, start + room)
                batch.append((task, {name: array[start:stop] for name, array in task.inputs.items()}))
                room -= stop - start
                start = stop
                if not room:
                    self._run_batch(batch)
                    batch, room = [], largest
        if batch:
            self._run_batch(batch)
        for task in tasks:
            if not task.answer.done():
                whole = {name: np.concatenate([part[name] for part in task.parts]) for name in task.parts[0]}
                task.answer.set_result(whole)

    def _run_batch(self, batch: list[tuple[Task, dict[str, np.ndarray]]]) -> None:
        sizes = [len(next(iter(part.values()))) for _, part in batch]
        rows = next(size for size in self._allowed if size >= sum(sizes))
        self.batches.append((sum(sizes), rows))
        try:
            merged = {name: self._merged([part[name] for _, part in batch], rows) for name in batch[0][1]}
            outputs = {key: value.numpy() for key, value in self._function(**merged).items()}
            if {len(value) for value in outputs.values()} != {rows}:
                raise Refusal("FAILED_PRECONDITION", "Batched output tensor's 0th dimension does not equal the sum.")
        except (Refusal, tf.errors.OpError) as error:
            code = error.code if isinstance(error, Refusal) else "INVALID_ARGUMENT"
            for task, _ in batch:
                if not task.answer.done():
                    task.answer.set_exception(Refusal(code, str(error)))
            return
        start = 0
        for (task, _), size in zip(batch, sizes, strict=True):
            task.parts.append({name: value[start : start + size] for name, value in outputs.items()})
            start += size

    def _merged(self, parts: list[np.ndarray], rows: int) -> tf.Tensor:
        shape = np.max([part.shape[1:] for part in parts], axis=0).astype(int)
        if any(part.shape[1:] != tuple(shape) for part in parts):
            if not self._pads:
                text = "Tensors with name have different shapes. Set pad_variable_length_inputs to true."
                raise Refusal("FAILED_PRECONDITION", text)
            widths = [
                [(0, 0), *((0, most - has) for most, has in zip(shape, part.shape[1:], strict=True))] for part in parts
            ]
            parts = [
                np.pad(part, width, constant_values=part.flat[0]) for part, width in zip(parts, widths, strict=True)
            ]
        padding = [parts[0][:1]] * (rows - sum(map(len, parts)))
        return tf.constant(np.concatenate([*parts, *padding]))


class StandIn:
    """Serves a SavedModel on loopback until `close`.

    Args:
        version: the SavedModel's directory, whose name is the number of the version.
        name: the model's.
        labels: versions by label.
        allowed: batch sizes, ascending.
        pads: whether tensors of different lengths are filled up.
    """

    def __init__(self, version: Path, name: str, labels: dict[str, int], allowed: list[int], pads: bool = True) -> None:
        self._model = tf.saved_model.load(str(version))
        self._name, self._versions, self._labels = name, {int(version.name)}, labels
        self.batchers = {key: Batcher(call, allowed, pads) for key, call in self._model.signatures.items()}
        self._grpc = grpc.server(ThreadPoolExecutor(48), options=[("grpc.max_receive_message_length", -1)])
        handler = grpc.unary_unary_rpc_method_handler(
            self._predict, MESSAGES["PredictRequest"].FromString, lambda message: message.SerializeToString()
        )
        service = grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", {"Predict": handler})
        self._grpc.add_generic_rpc_handlers((service,))
        self.target = f"localhost:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"server_of": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._grpc.stop(None).wait()
        self._http.shutdown()
        self._http.server_close()

    def answer(
        self, name: str, version: int | None, label: str | None, signature: str, inputs: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The outputs for a request, or a refusal."""
        if label:
            if label not in self._labels:
                raise Refusal("INVALID_ARGUMENT", f"Unrecognized servable version label: {label}")
            version = self._labels[label]
        if name != self._name or (version or min(self._versions)) not in self._versions:
            raise Refusal("NOT_FOUND", f"Servable not found for request: Specific({name}, {version})")
        if signature not in self.batchers:
            raise Refusal("FAILED_PRECONDITION", f'Serving signature name: "{signature}" not found in signature def')
        required = self.specs(signature)
        if set(inputs) != set(required):
            extra, missing = sorted(set(inputs) - set(required)), sorted(set(required) - set(inputs))
            raise Refusal(
                "INVALID_ARGUMENT",
                f"input size does not match signature: {len(inputs)}!={len(required)} "
                f"Sent extra: {{{','.join(extra)}}}. Missing but required: {{{','.join(missing)}}}.",
            )
        for key, array in inputs.items():
            found = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
            if found != required[key].dtype:
                raise Refusal(
                    "INVALID_ARGUMENT", f"Tensor {key} has dtype {found.name}, not {required[key].dtype.name}"
                )
        return self.batchers[signature].run(inputs)

    def specs(self, signature: str) -> dict[str, tf.TensorSpec]:
        """The inputs of a signature."""
        return self._model.signatures[signature].structured_input_signature[1]

    def _predict(self, request: Any, context: grpc.ServicerContext) -> Any:
        spec = request.model_spec
        version = spec.version.value if spec.HasField("version") else None
        inputs = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
        try:
            outputs = self.answer(
                spec.name, version, spec.version_label, spec.signature_name or "serving_default", inputs
            )
        except Refusal as error:
            context.abort(getattr(grpc.StatusCode, error.code), str(error))
        response = MESSAGES["PredictResponse"]()
        for name, array in outputs.items():
            response.outputs[name].CopyFrom(as_proto_field(array))
        return response


def as_proto_field(array: np.ndarray) -> tensor_pb2.TensorProto:
    """A tensor as the server writes it, element by element and not as one run of bytes."""
    proto = tf.make_tensor_proto(np.zeros([0], array.dtype) if array.dtype != object else np.zeros([0], "S1"))
    proto = tensor_pb2.TensorProto(dtype=proto.dtype, tensor_shape=tf.TensorShape(array.shape).as_proto())
    flat = array.ravel()
    if array.dtype == object:
        proto.string_val.extend(flat.tolist())
    elif array.dtype.itemsize == 2:
        proto.half_val.extend(flat.view(np.uint16).tolist())
    else:
        names = {"float32": "float", "float64": "double", "int64": "int64", "bool": "bool"}
        getattr(proto, f"{names.get(array.dtype.name, 'int')}_val").extend(flat.tolist())
    return proto


class Handler(BaseHTTPRequestHandler):
    """REST, in columns."""

    server_of: StandIn

    def do_POST(self) -> None:
        """Answer a request."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            code, answer = 200, {"outputs": self._outputs(json.loads(body))}
        except Refusal as error:
            code, answer = HTTP_CODES[error.code], {"error": str(error)}
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _outputs(self, request: dict[str, Any]) -> Any:
        server = self.server_of
        match = PATH.fullmatch(self.path)
        if not match:
            raise Refusal("INVALID_ARGUMENT", f"Malformed request: POST {self.path}")
        signature = request.get("signature_name", "serving_default")
        specs = server.specs(signature) if signature in server.batchers else {}
        inputs = {name: self._array(value, specs.get(name)) for name, value in request["inputs"].items()}
        version = int(match["version"]) if match["version"] else None
        outputs = server.answer(match["name"], version, match["label"], signature, inputs)
        columns = {name: self._json(name, array) for name, array in outputs.items()}
        return columns if len(columns) > 1 else next(iter(columns.values()))

    @staticmethod
    def _array(value: Any, spec: tf.TensorSpec | None) -> np.ndarray:
        if spec is None or spec.dtype != tf.string:
            return np.array(value, spec.dtype.as_numpy_dtype if spec is not None else None)
        return np.array([base64.b64decode(x["b64"]) if isinstance(x, dict) else x.encode() for x in value], object)

    @staticmethod
    def _json(name: str, array: np.ndarray) -> Any:
        if array.dtype != object:
            return array.tolist()
        as_bytes = name.endswith("_bytes")
        flat = [{"b64": base64.b64encode(x).decode()} if as_bytes else x.decode() for x in array.ravel()]
        return np.array([*flat, None], object)[:-1].reshape(array.shape).tolist()

    def log_message(self, *_: object) -> None:
        """Say nothing."""
