"""The memory of a training step: peak resident size of one `fit` of a few steps, beside what the weights take.

    python tests/benchmarks/training_memory.py lora [--model DIRECTORY] [--dtype bfloat16] [--tokens 1024]
    python tests/benchmarks/training_memory.py full [--optimizer adafactor] [--no-checkpointing] [--jit]

Without a directory the model has the shape of `--width` and `--layers`, and random weights. One measurement is one
process. The peak is counted from when the model is there, where the system (Linux) can count anew; XLA's compiler and
TensorFlow's own code and buffers are part of it, and are shown apart as what there was before the model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

MIB = 2**20


def resident(field: str) -> int:
    """Bytes: VmRSS as of now, VmHWM at most since the last :func:`begin`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def begin() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def load(options: argparse.Namespace) -> Any:
    from tfgptj import GPTJConfig, TFGPTJForCausalLM

    if options.model is not None:
        return TFGPTJForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    config = GPTJConfig(
        n_embd=options.width, n_layer=options.layers, n_head=options.width // 128, n_positions=2048
    )  # fmt: skip
    return TFGPTJForCausalLM(config, dtype=options.dtype)


def optimizer(options: argparse.Namespace) -> Any:
    from tfgptj.training.optimizers import Adafactor, AdamW

    settings = {"global_clipnorm": options.clip, "float32_master": not options.no_master}
    return AdamW(1e-4, **settings) if options.optimizer == "adamw" else Adafactor(1e-3, **settings)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import tensorflow as tf

    tf.matmul(tf.ones((64, 64)), tf.ones((64, 64)))
    empty = resident("VmRSS")
    model = load(options)
    if options.way == "lora":
        model.add_lora(rank=options.rank, targets="all-linear")
    if not options.no_checkpointing:
        model.gradient_checkpointing_enable()
    weights = sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in model.weights)
    loaded = resident("VmRSS")
    model.compile(optimizer(options), jit_compile=options.jit)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (options.batch * options.steps, options.tokens))
    begin()
    start = time.perf_counter()
    history = model.fit(ids.astype("int32"), batch_size=options.batch, verbose=0)
    peak = resident("VmHWM")
    return {
        "parameters": model.count_params(),
        "trainable": model.num_parameters(only_trainable=True),
        "empty_mib": empty // MIB,
        "weights_mib": weights // MIB,
        "loaded_mib": loaded // MIB,
        "peak_mib": peak // MIB,
        "beyond_weights_mib": (peak - weights) // MIB,
        "bytes_per_parameter": round(peak / model.count_params(), 2),
        "seconds_per_step": round((time.perf_counter() - start) / options.steps, 1),
        "loss": round(history.history["loss"][0], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("way", choices=("lora", "full"))
    parser.add_argument("--model", help="a directory with a checkpoint")
    parser.add_argument("--optimizer", choices=("adamw", "adafactor"), default="adamw")
    parser.add_argument("--dtype", default="bfloat16")
    for name, default in (
        *(("width", 1024), ("layers", 4), ("rank", 8)),
        *(("batch", 1), ("tokens", 1024), ("steps", 2)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--clip", type=float, help="global_clipnorm")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--no-master", action="store_true", help="no float32 copy of narrow weights")
    parser.add_argument("--jit", action="store_true")
    options = parser.parse_args()
    print(json.dumps({**vars(options), **measure(options)}))


if __name__ == "__main__":
    main()
