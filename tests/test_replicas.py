"""A training step under a MirroredStrategy, on two logical CPUs that hold different numbers of labels."""

from __future__ import annotations

from conftest import run_python

PROGRAM = """
import tensorflow as tf

[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

import keras
import numpy as np
from test_training_step import IDS, LABELS, HEADS, Taken, config
from tfgptj.training.metrics import Perplexity

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
IDS = IDS[:4]
LABELS = np.where(np.arange(4)[:, None] < 2, -100, LABELS[:4])  # the second device has all
TARGETS = {
    "causal_lm": LABELS,
    "classification": np.array([-100, -100, 0, 1]),
    "question_answering": {"start_positions": np.array([9, 9, 0, 2]), "end_positions": np.array([3, 4, 1, 9])},
}
CASES = [("causal_lm", 1, None), ("causal_lm", 2, None), ("causal_lm", 2, "mixed_float16"),
         ("classification", 2, None), ("question_answering", 1, None)]
for head, micro_batches, dtype in CASES:
    cls, y = HEADS[head], TARGETS[head]
    alone = cls(config(), dtype=dtype)
    metrics = lambda: [Perplexity()] if head == "causal_lm" else None
    with strategy.scope():
        mirrored = cls(config(), dtype=dtype)
        mirrored.compile(Taken(), micro_batches=micro_batches, metrics=metrics())
    mirrored.set_weights(alone.get_weights())
    alone.compile(Taken(), metrics=metrics())
    before = alone.evaluate(IDS, y, verbose=0), mirrored.evaluate(IDS, y, batch_size=4, verbose=0)
    np.testing.assert_allclose(*before, rtol=1e-6 if dtype is None else 1e-3)
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    one, two = (list(model.fit(IDS, y, **options).history.values()) for model in (alone, mirrored))
    np.testing.assert_allclose(one, two, rtol=1e-6 if dtype is None else 1e-3)
    for a, b in zip(alone.trainable_variables, mirrored.trainable_variables, strict=True):
        np.testing.assert_allclose(b.numpy(), a.numpy(), rtol=0, atol=1e-6 if dtype is None else 2e-3, err_msg=a.path)
print("equal")
"""


def test_the_loss_is_the_mean_over_the_global_batch() -> None:
    done = run_python("-c", PROGRAM)
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]
