"""Trains on several devices and compares with one: programs of test_distribution.py, as devices cannot be had later.

    python distributed.py mirrored DIRECTORY               two logical CPUs
    python distributed.py others DIRECTORY                 more cases on them
    python distributed.py worker DIRECTORY INDEX PORTS     one of several processes
    python distributed.py layouts DIRECTORY                four of JAX's host devices

Each prints the largest relative differences of losses and of weights, for each case, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

IDS = np.random.default_rng(0).integers(0, 48, (8, 8)).astype("int32")
SIZES: dict[str, Any] = {"vocab_size": 48, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 16}
FIT: dict[str, Any] = {"steps_per_epoch": 2, "epochs": 3, "shuffle": False, "verbose": 0}


def build(
    dtype: str = "float32",
    optimizer: Any = None,
    lora: int = 0,
    scope: Any = None,
    head: str = "TFGPTJForCausalLM",
    **fields: Any,
) -> Any:
    """Always the same model, compiled; under a strategy if there is one."""
    import keras

    import tfgptj
    from tfgptj import GPTJConfig

    keras.utils.set_random_seed(0)
    with scope or nullcontext():
        config = GPTJConfig(**{**SIZES, **fields}, initializer_range=0.2, eos_token_id=None)
        model = getattr(tfgptj, head)(config, dtype=dtype)
        if lora:
            model.add_lora(rank=lora, targets="all-linear")
        model.compile(optimizer() if optimizer else keras.optimizers.AdamW(1e-2, use_ema=True))
    return model


def batches() -> Any:
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(IDS).batch(4).repeat()


def train(model: Any, data: Any = None, *callbacks: Any, **options: Any) -> list[float]:
    data = batches() if data is None else data
    return model.fit(data, **{**FIT, **options}, callbacks=list(callbacks)).history["loss"]


def difference(one: Any, other: Any) -> float:
    one, other = np.asarray(one, "float64"), np.asarray(other, "float64")
    # Some biases are zero but for rounding.
    return float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-3))


def differences(alone: Any, model: Any, losses: list[float], others: list[float]) -> list[float]:
    pairs = zip(alone.get_weights(), model.get_weights(), strict=True)
    return [difference(losses, others), max(difference(*pair) for pair in pairs)]


def compare(scope: Callable[[], Any], **options: Any) -> list[float]:
    alone, model = build(**options), build(scope=scope(), **options)
    return differences(alone, model, train(alone), train(model))


def heads(scope: Callable[[], Any], optimizer: Callable[[], Any]) -> list[float]:
    """The largest differences for the other heads, whose labels are in the dict of inputs."""
    found = []
    for head, labels in {
        "TFGPTJForSequenceClassification": {"labels": IDS[:, 0] % 2},
        "TFGPTJForQuestionAnswering": {"start_positions": IDS[:, 0] % 4, "end_positions": IDS[:, 1] % 8},
    }.items():
        models = [build(head=head, optimizer=optimizer, scope=each) for each in (None, scope())]
        x = {"input_ids": IDS, **labels}
        options: dict[str, Any] = {"batch_size": 4, "verbose": 0}
        losses = [m.fit(x, epochs=2, shuffle=False, **options).history["loss"] for m in models]
        found += differences(*models, *losses)
        found.append(difference(*(m.evaluate(x, **options) for m in models)))
    return found


class Interruption(Exception):
    """Instead of a power cut."""


def interrupt() -> None:
    raise Interruption


def interrupted_run(scope: Callable[[], Any], directory: Path) -> float:
    """The largest difference between a run and one that was cut off and resumed, dropout and all."""
    import keras
    from killed_runs import Stop

    from tfgptj.training.checkpointing import Checkpointing

    options: dict[str, Any] = {"resid_pdrop": 0.2, "dtype": "mixed_float16"}
    models = [build(scope=scope(), **options) for _ in range(3)]
    train(models[0], None, Checkpointing(directory / "whole"))
    with suppress(Interruption):
        train(models[1], None, Checkpointing(directory, save_freq=1), Stop(3, interrupt))
    checkpointing = Checkpointing(directory, save_freq=1)
    data = batches().skip(checkpointing.step)
    train(models[2], data, checkpointing, initial_epoch=checkpointing.epoch)
    pairs = zip(*([*m.variables, *m.optimizer.variables] for m in (models[0], models[2])), strict=True)
    return max(difference(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b)) for a, b in pairs)


def two_devices() -> Callable[[], Any]:
    """The scope of a strategy over them; before anything else runs on TensorFlow."""
    import tensorflow as tf

    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope


def sgd(**options: Any) -> Any:
    import keras

    return keras.optimizers.SGD(0.1, **options)


def mirrored(directory: Path) -> dict[str, Any]:
    scope = two_devices()
    from tfgptj import TFGPTJForCausalLM
    from tfgptj.training.optimizers import AdamW

    def clipping() -> Any:
        """With an epsilon that keeps it from dividing by what is rounding alone."""
        return AdamW(1e-2, epsilon=1e-3, global_clipnorm=0.1)

    alone, model = build(optimizer=clipping), build(optimizer=clipping, scope=scope())
    losses = differences(alone, model, train(alone), train(model))
    model.save_pretrained(directory / "saved")
    loaded = TFGPTJForCausalLM.from_pretrained(directory / "saved")
    texts = [m.generate(IDS[:2, :3], max_new_tokens=4).tolist() for m in (model, loaded, alone)]
    return {
        "AdamW, clipped": losses,
        "evaluate": difference(
            alone.evaluate(IDS, batch_size=4, verbose=0), model.evaluate(batches().take(2), verbose=0)
        ),
        "predict": difference(alone.predict(IDS, verbose=0), model.predict(IDS, batch_size=4, verbose=0)),
        "texts": [text == texts[0] for text in texts],
        "saved": max(difference(a, b) for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True)),
        "interrupted": interrupted_run(scope, directory / "checkpoints"),
    }


def others(directory: Path) -> dict[str, Any]:
    scope = two_devices()
    from tfgptj.training.optimizers import Adafactor

    return {
        "heads": heads(scope, sgd),
        "SGD": compare(scope, optimizer=sgd),
        "AdamW": compare(scope),
        "LoRA": compare(scope, lora=2),
        "mixed_bfloat16": compare(scope, dtype="mixed_bfloat16", optimizer=sgd),
        "mixed_float16": compare(scope, dtype="mixed_float16", optimizer=sgd),
        "Keras clips": compare(scope, optimizer=lambda: sgd(global_clipnorm=0.5)),
        "Adafactor, clipped": compare(scope, optimizer=lambda: Adafactor(1e-2, clipnorm=0.01)),
    }


def worker(directory: Path, index: str, ports: str) -> dict[str, Any]:
    workers = [f"127.0.0.1:{port}" for port in ports.split(",")]
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": workers}, "task": {"type": "worker", "index": int(index)}}
    )
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before anything else runs on TensorFlow
    from tfgptj.training.checkpointing import Checkpointing

    model = build(scope=strategy.scope())

    def share(context: Any) -> Any:
        start, size = 2 * context.input_pipeline_id, context.get_per_replica_batch_size(4)
        return batches().map(lambda ids: ids[start : start + size])

    checkpointing = Checkpointing(directory, save_freq=4)
    losses = train(model, strategy.distribute_datasets_from_function(share), checkpointing)
    text = model.generate(IDS[:2, :3], max_new_tokens=4).tolist()
    alone = build()
    return {
        "AdamW": differences(alone, model, train(alone), losses),
        "text": text == alone.generate(IDS[:2, :3], max_new_tokens=4).tolist(),
        "written": sorted(path.name for path in directory.iterdir()) if int(index) == 0 else [],
    }


def layouts(directory: Path) -> dict[str, Any]:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"  # before JAX looks for devices
    import keras

    from tfgptj import GPTJConfig
    from tfgptj.training.layouts import layout_map

    distribution = keras.distribution
    mesh = distribution.DeviceMesh((2, 2), ("batch", "model"), distribution.list_devices())
    found: dict[str, Any] = {}
    cases: dict[str, Any] = {
        "whole": {},
        "LoRA": {"vocab_size": 49, "lora": 2, "tie_word_embeddings": True},
    }
    for name, options in cases.items():
        config = GPTJConfig(**{**SIZES, **{k: v for k, v in options.items() if k != "lora"}})
        alone = build(**options)
        losses = train(alone)
        text = alone.generate(IDS[:2, :3], max_new_tokens=3).tolist()
        distribution.set_distribution(
            distribution.ModelParallel(layout_map=layout_map(mesh, config), batch_dim_name="batch")
        )
        model = build(**options)
        found[name] = differences(alone, model, losses, train(model))
        found[f"{name}: text"] = model.generate(IDS[:2, :3], max_new_tokens=3).tolist() == text
        state = [*model.variables, *model.optimizer.variables]
        found[f"{name}: not parted"] = sorted(
            v.path for v in state if len(v.shape) > 1 and v.value.sharding.is_fully_replicated
        )
        if name == "whole":
            found["interrupted"] = interrupted_run(nullcontext, directory / "checkpoints")
        distribution.set_distribution(None)
    return found


if __name__ == "__main__":
    mode, place, *arguments = sys.argv[1:]
    programs = {"mirrored": mirrored, "others": others, "worker": worker, "layouts": layouts}
    print(json.dumps(programs[mode](Path(place), *arguments)))
