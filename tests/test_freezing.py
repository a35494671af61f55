"""Freezing by pattern: what is frozen does not change and costs no backward pass."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from conftest import numbers
from test_models import IDS, config

from tfgptj import TFGPTJForCausalLM, TFGPTJModel
from tfgptj.errors import InputError, InputTypeError
from tfgptj.training.freezing import freeze, unfreeze

OPTIMIZED = True  # graphs run as they do for users: see conftest.py

LOWER = ["wte", r"transformer\.h\.[01]\..*"]  # with three blocks, all below the last


def build(**changes: Any) -> Any:
    keras.utils.set_random_seed(0)
    return TFGPTJForCausalLM(config(n_layer=3, **changes))


def trained(model: Any) -> set[str]:
    """The weights that a step changes."""
    before = {v.path: numbers(v) for v in model.variables}
    model.compile(keras.optimizers.Adam(0.1))
    model.fit(IDS, batch_size=2, verbose=0)
    return {v.path for v in model.weights if not np.array_equal(numbers(v), before[v.path])}


@pytest.mark.core
@pytest.mark.usefixtures("eager_steps")
def test_what_is_frozen_stays() -> None:
    model = build()
    model.compile("adam")
    names = freeze(model, LOWER)
    assert len(names) == 21 and {"transformer.wte.weight", "transformer.h.1.mlp.fc_in.bias"} <= set(names)
    assert model.optimizer is None
    assert freeze(model, "ln_f") == ("transformer.ln_f.weight", "transformer.ln_f.bias")
    changed = trained(model)
    assert len(changed) == 12 and all("h_2" in path or "lm_head" in path for path in changed)
    assert len(model.optimizer.variables) == 2 + 2 * 12
    assert unfreeze(model, r"transformer\.h\.0\.attn\..*") == tuple(
        f"transformer.h.0.attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    )
    assert len(trained(model)) == 16


@pytest.mark.usefixtures("eager_steps")
def test_frozen_blocks_and_gradient_checkpointing() -> None:
    """The first block that trains has an input without a gradient."""
    found = []
    for enabled in (False, True):
        model = build(resid_pdrop=0.2)
        freeze(model, LOWER)
        if enabled:
            model.gradient_checkpointing_enable()
        model.compile(keras.optimizers.SGD(1.0))
        keras.utils.set_random_seed(1)
        model.fit(IDS, batch_size=2, verbose=0)
        found.append([numbers(v) for v in model.trainable_variables])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def products(model: Any) -> int:
    """Matrix products with weights in one training step, after TensorFlow has left out what nobody needs."""
    from tensorflow.python.eager import context  # TensorFlow has no public way to see the graph that it runs

    model.compile(keras.optimizers.SGD(0.1))
    context.enable_run_metadata()
    model.train_on_batch(IDS)
    graphs = context.export_run_metadata().function_graphs
    context.disable_run_metadata()
    kinds = ("MatMul", "_FusedMatMul", "Einsum")
    return sum(node.op in kinds for graph in graphs for node in graph.post_optimization_graph.node)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graph")
def test_products_that_nobody_needs_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Attention head by head has products that look like those with weights.
    monkeypatch.setattr("tfgptj.attention.pays", lambda: False)
    # Each block has 6, the head 1; the backward pass has twice as many. A block that is computed again leaves out the
    # last two, whose result it does not need. The gradient of the head's bias is one more.
    forward, bias = 3 * 6 + 1, 1
    model = build()
    assert products(model) == 3 * forward + bias
    model.gradient_checkpointing_enable()
    assert products(model) == 3 * forward + bias + 3 * 4
    freeze(model, LOWER)
    assert products(model) == forward + bias + 2 * (6 + 1) + 4
    model.gradient_checkpointing_disable()
    assert products(model) == forward + bias + 2 * (6 + 1)
    freeze(model, lambda path, layer: "lm_head" not in path)
    assert products(model) == forward + bias + 1
    # With adapters there are for each kernel x, (x A) B in the forward pass; its own gradient in no pass, and that of
    # its input in all but the first block.
    model = build()
    model.add_lora(rank=2, targets="all-linear")
    plain = products(model)
    assert plain < 3 * forward + 3 * 18 * 2
    model.gradient_checkpointing_enable()
    assert products(model) == plain + 3 * (4 + 4 * 2 + 2)


def test_what_is_refused() -> None:
    model = build()
    with pytest.raises(InputError, match="patterns: 'h.7' matches no layer; there are wte, ln_1, q_proj"):
        freeze(model, ["wte", "h.7"])
    assert all(v.trainable for v in model.weights)
    with pytest.raises(InputTypeError, match="patterns must be names, regular expressions or a function"):
        unfreeze(model, 3)  # type: ignore[arg-type]
    model.quantize("int8", filters="fc_in")
    assert len(freeze(model, "fc_in")) == 6
    with pytest.raises(InputError, match=r"h.0.mlp.fc_in.weight is quantized and cannot be trained: leave its layer"):
        unfreeze(model, "fc_in")
    model = build()
    model.add_lora(rank=2)
    for change in (freeze, unfreeze):
        with pytest.raises(InputError, match="has LoRA adapters, beside which everything is frozen"):
            change(model, "wte")


def test_a_backbone_s_layers_are_the_model_s() -> None:
    model = build()
    model.compile("adam")
    assert len(freeze(model.transformer, "wte")) == 1
    assert model.optimizer is None
    assert len(model.trainable_variables) == len(model.weights) - 1
    alone = TFGPTJModel(config())
    alone.trainable = False
    assert unfreeze(alone, "ln_f") == ("ln_f.weight", "ln_f.bias")
    assert len(alone.trainable_variables) == 2
