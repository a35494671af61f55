"""Answers requests with a SavedModel, in a process that has TensorFlow alone::

    python -I tests/served_alone.py DIRECTORY < requests.json > answers.json

A request is a signature with its tensors, each as dtype and nested lists, texts in base64. An answer is the same of its
outputs, or the error. The memory that the process has after each request is told, too.
"""

import base64
import importlib.abc
import json
import sys


class Refusing(importlib.abc.MetaPathFinder):
    """Fails whatever wants what wrote the model."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tfgptj", "tokenizers"):
            raise AssertionError(f"{name} is imported")


if __name__ == "__main__":
    sys.meta_path.insert(0, Refusing())

import tensorflow as tf  # noqa: E402


def decoded(values):
    """Texts out of base64, in nested lists."""
    return [decoded(value) for value in values] if isinstance(values, list) else base64.b64decode(values)


def encoded(values):
    """Texts in base64, in nested lists."""
    return [encoded(value) for value in values] if isinstance(values, list) else base64.b64encode(values).decode()


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def answer(signatures, name, tensors):
    """The outputs of a signature, or the error."""
    try:
        given = {
            key: tf.constant(decoded(values) if dtype == "string" else values, dtype, shape=shape)
            for key, (dtype, shape, values) in tensors.items()
        }
        outputs = signatures[name](**given)
    except (tf.errors.OpError, TypeError, ValueError) as error:
        return {"error": str(error)}
    return {
        key: [value.dtype.name, encoded(value.numpy().tolist()) if value.dtype == tf.string else value.numpy().tolist()]
        for key, value in outputs.items()
    }


def main():
    """Answer all requests."""
    signatures = tf.saved_model.load(sys.argv[1]).signatures
    answers = []
    for name, tensors in json.load(sys.stdin):
        found = answer(signatures, name, tensors)
        answers.append([found, resident()])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
