"""Training on several devices: the same numbers as on one."""

from __future__ import annotations

import importlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import pytest
from conftest import ENVIRONMENT, TESTS

from tfgptj import GPTJConfig
from tfgptj.errors import BackendError, InputError
from tfgptj.training.layouts import layout_map

ON_JAX = keras.backend.backend() == "jax"


def start(*arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, TESTS / "distributed.py", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TESTS, env=ENVIRONMENT
    )


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return result(start("mirrored", tmp_path_factory.mktemp("mirrored")))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return result(start("others", tmp_path_factory.mktemp("others")))


# Largest relative differences of losses and of weights. AdamW divides gradients by their size, small ones too, rounding
# and all, unless its epsilon is larger, as in the clipped case; and in the mixed policies they are rounded to 8 or 11
# bits on each device, before they are added up.
@pytest.mark.parametrize(
    ("case", "losses", "weights"),
    [("AdamW, clipped", 1e-6, 1e-6)],
)
def test_two_replicas_train_like_one_device(mirrored: dict[str, Any], case: str, losses: float, weights: float) -> None:
    assert mirrored[case][0] <= losses and mirrored[case][1] <= weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "losses", "weights"),
    [
        ("SGD", 1e-6, 1e-6),
        ("AdamW", 1e-6, 2e-6),
        ("LoRA", 1e-6, 1e-6),
        ("Adafactor, clipped", 1e-6, 1e-6),
        ("mixed_bfloat16", 1e-3, 2e-2),
        ("mixed_float16", 1e-4, 2e-3),
    ],
)
def test_others_too_train_like_one_device(others: dict[str, Any], case: str, losses: float, weights: float) -> None:
    assert others[case][0] <= losses and others[case][1] <= weights


@pytest.mark.slow
def test_keras_clips_each_replica_s_own_gradients(others: dict[str, Any]) -> None:
    """Keras clips before it adds up what the replicas have. Should this fail, the README is out of date."""
    assert others["Keras clips"][1] > 1e-2


def test_mirrored_models_do_all_that_others_do(mirrored: dict[str, Any]) -> None:
    assert mirrored["evaluate"] <= 1e-6 and mirrored["predict"] <= 1e-6
    assert mirrored["texts"] == [True] * 3
    assert mirrored["saved"] == 0.0


def test_a_mirrored_run_that_is_cut_off_goes_on_exactly(mirrored: dict[str, Any]) -> None:
    assert mirrored["interrupted"] == 0.0


@pytest.mark.slow
def test_every_head_trains_on_two_replicas(others: dict[str, Any]) -> None:
    assert len(others["heads"]) == 6 and max(others["heads"]) <= 1e-5


def test_two_workers_train_like_one_process(tmp_path: Path) -> None:
    with socket.socket() as one, socket.socket() as two:
        for sock in (one, two):
            sock.bind(("127.0.0.1", 0))
        ports = ",".join(str(sock.getsockname()[1]) for sock in (one, two))
    workers = [start("worker", tmp_path, index, ports) for index in range(2)]
    try:
        found = [result(worker) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for each in found:
        assert each["AdamW"][0] <= 1e-6 and each["AdamW"][1] <= 5e-6 and each["text"]
    assert found[0]["written"] == ["step-00000006.safetensors"]


# Layouts


@pytest.mark.core
@pytest.mark.skipif(not ON_JAX, reason="weights are parted on the JAX backend only")
def test_parted_weights_train_like_whole_ones(tmp_path: Path) -> None:
    found = result(start("layouts", tmp_path))
    assert found["interrupted"] == 0.0
    for name in ("whole", "LoRA"):
        assert max(found[name]) <= 1e-5 and found[f"{name}: text"]
        # Of adapters, one of two matrices belongs to no device in particular.
        left = [path for path in found[f"{name}: not parted"] if "lora_kernel" not in path]
        assert left == []


@pytest.mark.core
@pytest.mark.skipif(not ON_JAX, reason="weights are parted on the JAX backend only")
def test_meshes_that_do_not_fit_are_refused() -> None:
    def mesh(devices: int, *axes: str) -> keras.distribution.DeviceMesh:
        return keras.distribution.DeviceMesh((1, devices), axes, [f"cpu:{i}" for i in range(devices)])

    with pytest.raises(InputError, match="the mesh has the axes data, model; expected batch and model"):
        layout_map(mesh(1, "data", "model"))
    with pytest.raises(InputError, match="n_head=16 cannot be parted evenly among 3 devices of the axis model"):
        layout_map(mesh(3, "batch", "model"), GPTJConfig())


@pytest.mark.core
@pytest.mark.skipif(ON_JAX, reason="works there")
def test_other_backends_say_what_to_take_instead() -> None:
    remedy = "tf.distribute.MirroredStrategy" if keras.backend.backend() == "tensorflow" else "KERAS_BACKEND=jax"
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
    with pytest.raises(BackendError, match=f"parts weights on the JAX backend only, and this is .*: take {remedy}"):
        layout_map(mesh)


def test_the_need_for_metrics_with_an_axis_is_still_there() -> None:
    """Keras takes the mean of several workers over an axis. Should this fail, tfgptj/workers.py can go."""
    trainer = importlib.import_module("keras.src.backend.tensorflow.trainer")
    assert 'strategy.reduce("MEAN", v, axis=0)' in Path(str(trainer.__file__)).read_text()
