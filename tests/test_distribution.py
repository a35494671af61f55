"""Training under a MirroredStrategy, on two logical CPUs: the same numbers as on one device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import tensorflow as tf

[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

import keras
import numpy as np
from test_models import CLASSES, LABELS, config

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
ids = np.random.default_rng(0).integers(0, 31, (8, 6)).astype("int32")
for cls in CLASSES[1:]:
    labels = {"labels": ids} if cls is CLASSES[1] else {n: np.tile(v, 4) for n, v in LABELS[cls].items()}
    alone = cls(config())
    with strategy.scope():
        mirrored = cls(config())
        mirrored.compile(keras.optimizers.SGD(0.1))
    mirrored.set_weights(alone.get_weights())
    alone.compile(keras.optimizers.SGD(0.1))
    x = {"input_ids": ids, **labels}
    options = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
    one, two = (model.fit(x, **options).history["loss"] for model in (alone, mirrored))
    np.testing.assert_allclose(two, one, rtol=1e-4)
    for a, b in zip(alone.get_weights(), mirrored.get_weights()):
        np.testing.assert_allclose(b, a, atol=1e-4)
    np.testing.assert_allclose(mirrored.evaluate(x, verbose=0), alone.evaluate(x, verbose=0), rtol=1e-4)
mirrored = CLASSES[1](config())
assert mirrored.generate(ids[:1], max_new_tokens=2, eos_token_id=None).shape == (1, 8)
print("equal")
"""


def test_two_replicas_train_like_one_device() -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=here, env=environment, check=False
    )
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]
