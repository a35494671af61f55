"""What TensorFlow Serving reads beside a SavedModel: requests to warm up with, batching, versions and their labels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from tfgptj.errors import CheckpointError, InputError
from tfgptj.files import replaced_file
from tfgptj.serving.readme import readme
from tfgptj.serving.versions import versions_in
from tfgptj.serving.wire import ModelSpec, predict_request, prediction_log

WARMUP_FILE = Path("assets.extra") / "tf_serving_warmup_requests"
BATCHING_FILE = "batching_params.pbtxt"
CONFIG_FILE = "models.config"
README_FILE = "README.md"

# What a warm-up gives for inputs of these names; other numbers are 0, and one row and one slot are enough of all. The
# text has at least two tokens, which a score needs, and few.
TEXT = b"The mill"
VALUES = {"lengths": 1, "max_new_tokens": 2, "top_p": 1.0}
WAIT_MICROSECONDS = 2000  # for others to merge a request with; a token takes much longer


def add_serving_files(version: Path, name: str, max_batch_size: int) -> None:
    """Add a warm-up of all signatures, and batching parameters, to a SavedModel.

    A server replays the warm-up when it loads the model, and refuses the model if that fails.

    Args:
        version: the SavedModel's directory.
        name: the model's on the server.
        max_batch_size: rows that requests may be merged to; such that no merged request asks for too much.

    Raises:
        InputError: if `max_batch_size` is below 1.
    """
    parameters = batching_parameters(max_batch_size)
    warm_up = version / WARMUP_FILE
    warm_up.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(warm_up)) as writer:
        for signature, inputs in signatures_of(version).items():
            arrays = {key: _example(key, info) for key, info in inputs.items()}
            writer.write(prediction_log(predict_request(ModelSpec(name, signature), arrays)))
    (version / BATCHING_FILE).write_text(parameters)


def signatures_of(version: Path) -> dict[str, dict[str, Any]]:
    """The signatures of a SavedModel: of each, the names and `TensorInfo`s of its inputs.

    Raises:
        CheckpointError: if there is no SavedModel.
    """
    path = version / "saved_model.pb"
    if not path.is_file():
        raise CheckpointError(f"{version}: found no {path.name}; give the directory of a version.")
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    found = {name: dict(definition.inputs) for name, definition in saved.meta_graphs[0].signature_def.items()}
    return {name: inputs for name, inputs in sorted(found.items()) if inputs}


def batching_parameters(max_batch_size: int, threads: int | None = None) -> str:
    """The text of a `BatchingParameters` file.

    Batches are rounded up to few sizes, the powers of two, and no more requests wait than threads work, so that
    an overloaded server says so at once.

    Args:
        max_batch_size: rows.
        threads: batches at once; None for the machine's cores.

    Raises:
        InputError: if `max_batch_size` is below 1.

    >>> print(batching_parameters(6, threads=2))
    max_batch_size { value: 6 }
    batch_timeout_micros { value: 2000 }
    num_batch_threads { value: 2 }
    max_enqueued_batches { value: 2 }
    allowed_batch_sizes: 1
    allowed_batch_sizes: 2
    allowed_batch_sizes: 4
    allowed_batch_sizes: 6
    <BLANKLINE>
    """
    if isinstance(max_batch_size, bool) or not isinstance(max_batch_size, int) or max_batch_size < 1:
        raise InputError(f"max_batch_size is {max_batch_size!r:.80}, expected an integer from 1 on.")
    threads = threads or os.cpu_count() or 1
    sizes = [2**power for power in range(max_batch_size.bit_length()) if 2**power < max_batch_size]
    numbers = {
        "max_batch_size": max_batch_size,
        "batch_timeout_micros": WAIT_MICROSECONDS,
        "num_batch_threads": threads,
        "max_enqueued_batches": threads,
    }
    lines = [f"{name} {{ value: {number} }}" for name, number in numbers.items()]
    lines += [f"allowed_batch_sizes: {size}" for size in [*sizes, max_batch_size]]
    return "\n".join(lines) + "\n"


def write_deployment(directory: str | os.PathLike[str], name: str, labels: Mapping[str, int] | None = None) -> None:
    """Write a server's configuration of a model, and a README of how to serve it and ask it, beside its versions.

    Args:
        directory: that of all versions.
        name: the model's on the server.
        labels: versions by label, for requests that ask for "stable" or "canary"; None for the newest as "stable".

    Raises:
        CheckpointError: if there is no version.
        InputError: if a label's version is not there.
    """
    directory = Path(directory)
    versions = versions_in(directory)
    if not versions:
        raise CheckpointError(f"{directory}: found no version; export the model first.")
    labels = {"stable": versions[-1]} if labels is None else labels
    text = model_config(name, directory.resolve(), versions, labels)
    newest = signatures_of(directory / str(versions[-1]))
    example = {key: _as_json(_example(key, info)) for key, info in sorted(newest["serving_default"].items())}
    signatures = [(signature, sorted(inputs)) for signature, inputs in newest.items()]
    words = ", ".join(f'"{label}" is {version}' for label, version in labels.items()) or "none"
    for file, content in ((CONFIG_FILE, text), (README_FILE, readme(name, signatures, example, words))):
        with replaced_file(directory / file) as stream:
            stream.write(content.encode())


def model_config(name: str, base_path: Path, versions: list[int], labels: Mapping[str, int]) -> str:
    """The text of a `ModelServerConfig` file: which versions are served, and what they are called.

    Raises:
        InputError: if a label's version is not among them, or a name holds what would have to be quoted.

    >>> print(model_config("gptj", Path("/models/gptj"), [1, 2], {"stable": 1}))
    model_config_list {
      config {
        name: "gptj"
        base_path: "/models/gptj"
        model_platform: "tensorflow"
        model_version_policy { specific { versions: 1 versions: 2 } }
        version_labels { key: "stable" value: 1 }
      }
    }
    <BLANKLINE>
    """
    for text in (name, str(base_path), *labels):
        if not text or not text.isprintable() or set(text) & set('"\\'):
            raise InputError(f"{text!r:.80} cannot be a name on a server: it is empty, or holds quotes or controls.")
    for label, version in labels.items():
        if version not in versions:
            raise InputError(f"The label {label!r} is of version {version!r}, but there are {versions}.")
    wanted = " ".join(f"versions: {version}" for version in versions)
    lines = [f'name: "{name}"', f'base_path: "{base_path}"', 'model_platform: "tensorflow"']
    lines += [f"model_version_policy {{ specific {{ {wanted} }} }}"]
    lines += [f'version_labels {{ key: "{label}" value: {version} }}' for label, version in labels.items()]
    inner = "".join(f"    {line}\n" for line in lines)
    return f"model_config_list {{\n  config {{\n{inner}  }}\n}}\n"


def _example(name: str, info: Any) -> np.ndarray:
    """One row for an input; dimensions of any size get the size 1."""
    shape = [max(dim.size, 1) for dim in info.tensor_shape.dim]
    dtype = tf.dtypes.as_dtype(info.dtype)
    if dtype == tf.string:
        return np.full(shape, TEXT, object)
    return np.full(shape, VALUES.get(name, 0), dtype.as_numpy_dtype)


def _as_json(array: np.ndarray) -> list[Any]:
    shown: list[Any] = [text.decode() for text in array] if array.dtype == object else array.tolist()
    return shown
