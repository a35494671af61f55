"""The devices that a run is on: one, all of a machine, or those of several machines."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras

from tfgptj.errors import BackendError, InputError
from tfgptj.files import parse_json

Shard = tuple[int, int]


class Devices:
    """A `tf.distribute` strategy by its name; "none" is Keras's own choice of a device.

    Args:
        name: "none", "mirrored" or "multiworker".

    Raises:
        BackendError: for a strategy on another backend than TensorFlow.
    """

    def __init__(self, name: str) -> None:
        self._strategy: Any = None
        self._several = name == "multiworker"
        if name == "none":
            return
        if keras.backend.backend() != "tensorflow":
            raise BackendError(f"strategy {name} needs TensorFlow, and Keras runs on {keras.backend.backend()}")
        import tensorflow as tf

        distribute = tf.distribute
        self._strategy = distribute.MultiWorkerMirroredStrategy() if self._several else distribute.MirroredStrategy()

    def scope(self) -> AbstractContextManager[Any]:
        """Where the model is made and compiled."""
        return self._strategy.scope() if self._strategy is not None else nullcontext()

    def feed(self, make: Callable[[int, Shard], Any], batch_size: int) -> Any:
        """The data for `fit`.

        Args:
            make: a dataset of a number of rows for a shard, which is an index and the number of workers.
            batch_size: rows of a step on all devices together.

        Raises:
            InputError: if they cannot be divided among the devices of all workers.
        """
        if not self._several:
            return make(batch_size, (0, 1))

        def share(context: Any) -> Any:
            workers, devices = context.num_input_pipelines, context.num_replicas_in_sync
            if batch_size % devices:
                raise InputError(f"batch_size {batch_size} cannot be divided evenly among {devices} devices")
            rows = make(batch_size // workers, (context.input_pipeline_id, workers))
            return rows if devices == workers else rows.rebatch(batch_size // devices)  # each device takes one

        return self._strategy.distribute_datasets_from_function(share)


def is_first_worker(strategy: str) -> bool:
    """Whether this process writes the files of a run: it is alone, or the chief of what TF_CONFIG tells of.

    Raises:
        InputError: if TF_CONFIG is not JSON.
    """
    if strategy != "multiworker":
        return True
    try:
        fields = parse_json(os.environ.get("TF_CONFIG") or "{}")
        task, has_chief = fields.get("task", {}), "chief" in fields.get("cluster", {})
        return bool(task.get("type") == "chief" if has_chief else int(task.get("index", 0)) == 0)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"TF_CONFIG in the environment is not what TensorFlow wants: {error}") from None
