"""Several workers of a `tf.distribute` strategy: what Keras leaves out, and who writes files."""

from __future__ import annotations

from typing import Any

import keras


def is_chief(model: Any) -> bool:
    """Whether this process is the one that writes files: alone, or the first of several workers."""
    strategy = getattr(model, "distribute_strategy", None)  # Keras's other backends have none
    return strategy is None or bool(strategy.extended.should_checkpoint)


def reducible(results: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a step in such a form that Keras takes their mean over several workers.

    Keras 3.15 asks for the mean over the first axis, and its own metrics, being scalars, have none: `fit` fails with
    "Invalid reduction dimension 0 for input with 0 dimensions".
    """
    if keras.backend.backend() != "tensorflow":
        return results
    import tensorflow as tf

    is_replica = tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()
    if not is_replica or not isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
        return results
    return {name: tf.reshape(value, (1,)) for name, value in results.items()}
