"""Gradient checkpointing: the same gradients from less that is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import elsewhere, foremost, numbers, run_python
from test_models import HEADS, IDS, LABELS, config

from tfgptj import TFGPTJForCausalLM

BACKEND = keras.backend.backend()
DROPOUT = {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}


def build(cls: Any = TFGPTJForCausalLM, *, dtype: str = "float32", lora: bool = False, **changes: Any) -> Any:
    """Always the same weights, adapters, and state of the random numbers."""
    keras.utils.set_random_seed(0)
    model = cls(config(**changes), dtype=dtype)
    if lora:
        model.add_lora(rank=2, targets="all-linear", dropout=changes.get("resid_pdrop", 0.0))
        for i, variable in enumerate(model.trainable_variables):
            variable.assign(np.random.default_rng(i).normal(0, 0.3, variable.shape))
    return model


def trained(
    model: Any, *, rate: float = 1.0, steps: int = 1, run_eagerly: bool = BACKEND == "tensorflow", **options: Any
) -> dict[str, np.ndarray]:
    """What `fit` makes of the weights that train: after one step of plain gradient descent, their gradients."""
    before = {v.path: numbers(v) for v in model.trainable_variables}
    model.compile(keras.optimizers.SGD(rate), run_eagerly=run_eagerly, **options)
    keras.utils.set_random_seed(1)
    model.fit({"input_ids": IDS, **LABELS[type(model)]}, batch_size=2, epochs=steps, verbose=0)
    return {v.path: numbers(v) - before[v.path] for v in model.trainable_variables}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    largest = max(float(np.abs(x).max()) for x in expected.values())
    assert largest > 0 and actual.keys() == expected.keys()
    for path, value in expected.items():
        assert float(np.abs(actual[path] - value).max()) <= tolerance * largest, path


GRAPH = {"run_eagerly": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, GRAPH),
    "dropout": (DROPOUT, GRAPH),
    "attentions": ({"output_attentions": True, "output_hidden_states": True}, GRAPH),
    "lora": ({**DROPOUT, "lora": True}, GRAPH),
    "xla": ({}, {**GRAPH, "jit_compile": True}),
    "xla with dropout": (DROPOUT, {**GRAPH, "jit_compile": True}),
    "eager": ({**DROPOUT, "lora": True}, {"run_eagerly": True}),
}


@pytest.mark.core
@pytest.mark.parametrize("case", elsewhere(foremost(CASES, "attentions", "lora"), "lora"))
def test_gradients_are_the_same(case: str) -> None:
    settings, options = CASES[case]
    model = build(**settings)
    assert not model.is_gradient_checkpointing
    expected = trained(model, **options)
    model = build(**settings)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.transformer.is_gradient_checkpointing
    assert_same(trained(model, **options), expected)


@pytest.mark.parametrize("cls", HEADS[1:])
def test_every_head_trains_as_before(cls: Any) -> None:
    expected = trained(build(cls))
    model = build(cls)
    model.gradient_checkpointing_enable()
    assert_same(trained(model), expected)


@pytest.mark.parametrize("dtype", foremost(["mixed_bfloat16", "mixed_float16", "bfloat16"], "mixed_bfloat16"))
def test_narrow_dtypes(dtype: str) -> None:
    expected = trained(build(dtype=dtype), rate=0.1, steps=3)
    model = build(dtype=dtype)
    model.gradient_checkpointing_enable()
    assert_same(trained(model, rate=0.1, steps=3), expected, 0.03)


def test_adapters_of_a_quantized_model() -> None:
    found = []
    for enabled in (False, True):
        model = build()
        model.quantize("int8", filters="q_proj")
        model.add_lora(rank=2)
        for i, variable in enumerate(model.trainable_variables):
            variable.assign(np.random.default_rng(i).normal(0, 0.3, variable.shape))
        if enabled:
            model.gradient_checkpointing_enable()
        found.append(trained(model))
    assert_same(found[1], found[0])


@pytest.mark.usefixtures("eager_generation")
def test_a_model_that_was_compiled_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def remat(function: Callable[..., Any], real: Any = keras.remat) -> Any:
        calls.append(function)
        return real(function)

    monkeypatch.setattr(keras, "remat", remat)
    model = build()

    def recomputed(run: Callable[[], Any]) -> bool:
        calls.clear()
        run()
        return bool(calls)

    def fit() -> Any:
        return model.fit(IDS, batch_size=2, verbose=0)

    model.compile("sgd")
    assert not recomputed(fit)
    for part in (model, model.transformer):
        part.gradient_checkpointing_enable()
        assert recomputed(fit) and model.optimizer is not None
        assert not recomputed(lambda: (model(IDS), model.evaluate(IDS, verbose=0), model.predict(IDS, verbose=0)))
        assert not recomputed(lambda: model.generate(IDS, max_new_tokens=2))
        part.gradient_checkpointing_disable()
        assert not recomputed(fit)


def kept_by_tensorflow(model: Any) -> int:
    """Bytes of the traced step that are alive at once where most are, if operations run in the order of the trace."""
    import tensorflow as tf

    shapes = tf.TensorSpec(LONG.shape, "int32")
    graph = tf.function(lambda ids: model.train_step(({"input_ids": ids},))).get_concrete_function(shapes).graph
    operations = graph.get_operations()
    last = {tensor.name: n for n, op in enumerate(operations) for tensor in op.inputs}
    ends: dict[int, int] = {}
    alive = most = 0
    for n, op in enumerate(operations):
        for tensor in op.outputs:
            if tensor.name in last and tensor.shape.is_fully_defined() and tensor.dtype.is_floating:
                size = tensor.shape.num_elements() * tensor.dtype.size
                alive += size
                ends[last[tensor.name]] = ends.get(last[tensor.name], 0) + size
        most = max(most, alive)
        alive -= ends.pop(n, 0)
    return most


def kept_by_torch(model: Any) -> int:
    """Bytes that PyTorch keeps for the backward pass."""
    import torch

    sizes = []

    def pack(tensor: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(LONG, training=True)
    return sum(sizes)


def kept_by_jax(model: Any) -> int:
    """Bytes that JAX keeps for the backward pass. What XLA makes of it on a CPU is another matter."""
    import jax

    def forward(trainable: Any) -> Any:
        others = [v.value for v in model.non_trainable_variables]
        return model.stateless_call(trainable, others, {"input_ids": LONG}, training=True)[0]

    _, backward = jax.vjp(forward, [v.value for v in model.trainable_variables])
    return sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(backward))


LONG = np.random.default_rng(0).integers(0, 31, (1, 64)).astype("int32")
KEPT: dict[str, Callable[[Any], int]] = {
    "tensorflow": kept_by_tensorflow,
    "jax": kept_by_jax,
    "torch": kept_by_torch,
}


@pytest.mark.core
@pytest.mark.parametrize("rate", foremost([0.0, 0.2], 0.2))
def test_less_is_kept(rate: float) -> None:
    model = build(n_layer=6, n_positions=64, attn_pdrop=rate, resid_pdrop=rate)
    model.compile(keras.optimizers.SGD())
    plain = KEPT[BACKEND](model)
    model.gradient_checkpointing_enable()
    assert KEPT[BACKEND](model) < 0.4 * plain


PROGRAM = """
import tensorflow as tf

[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

import sys

import keras
import numpy as np
from test_models import config
from tfgptj import TFGPTJForCausalLM
from tfgptj.training.optimizers import Adafactor, AdamW

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
ids = np.random.default_rng(0).integers(0, 31, (4, 6)).astype("int32")
CASES = (
    ("float32", False, lambda: AdamW(1e-2, 0.1), 1e-4),
    ("bfloat16", False, lambda: AdamW(1e-2, 0.1), 0.02),
    ("bfloat16", False, lambda: Adafactor(1e-2), 0.02),
    ("mixed_float16", True, lambda: AdamW(1e-2), 0.02),
)
for number in map(int, sys.argv[1]):
    dtype, lora, optimizer, tolerance = CASES[number]
    models = []
    for scope in (tf.distribute.get_strategy().scope(), strategy.scope()):
        with scope:
            keras.utils.set_random_seed(0)
            model = TFGPTJForCausalLM(config(), dtype=dtype)
            if lora:
                model.add_lora(rank=2)
            model.gradient_checkpointing_enable()
            model.compile(optimizer())
            models.append(model)
    models[1].set_weights(models[0].get_weights())
    one, two = (m.fit(ids, batch_size=4, epochs=3, shuffle=False, verbose=0).history["loss"] for m in models)
    np.testing.assert_allclose(two, one, rtol=tolerance)
    assert one[-1] < one[0]
    optimizer = models[1].optimizer
    if dtype == "bfloat16":
        for master, weight in zip(optimizer._masters, models[1].trainable_variables, strict=True):
            parts = [strategy.experimental_local_results(v.value) for v in (master, weight)]
            for a, b in zip(*parts, strict=True):  # on each replica
                np.testing.assert_array_equal(tf.cast(tf.cast(a, "bfloat16"), "float32"), tf.cast(b, "float32"))
        models[1].save_weights("model.weights.h5")
print("equal")
"""


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a strategy of TensorFlow")
@pytest.mark.parametrize("cases", foremost(["1", "3", "02"], "1"))
def test_two_replicas_train_like_one_device(tmp_path: Path, cases: str) -> None:
    done = run_python("-c", PROGRAM, cases, cwd=tmp_path)
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]
