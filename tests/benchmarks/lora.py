"""What LoRA costs: a training step, its memory, and a generated token, with all weights trained, with Keras's own
`Dense` in LoRA mode, and with the package's.

    python tests/benchmarks/lora.py [--width 1024] [--layers 4] [--rank 8] [--tokens 128] [--mode int8]

Each way runs in a process of its own, since peak memory is that of a process. Times are the least of several, and those
of a step are also given as processor time, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

WAYS = ("all weights", "Keras's Dense", "package")
ROWS, PROMPT, NEW, ROUNDS = 4, 16, 24, 6


def milliseconds(call: Callable[[], Any], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """What several calls take each, by the wall's clock and in processor time."""
    clocks = {"ms": time.perf_counter, "cpu_ms": time.process_time}
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        start = {name: clock() for name, clock in clocks.items()}
        call()
        for name, clock in clocks.items():
            times[name].append(1e3 * (clock() - start[name]))
    return times


def call_as_keras(layer: Any, inputs: Any, training: bool | None = None) -> Any:
    """What Keras's `Dense` does in LoRA mode: a kernel with its adapters is made at each call, and multiplied with."""
    from keras import ops

    x = ops.matmul(inputs, ops.transpose(layer.kernel))  # ours lies [out, in]
    return x if layer.bias is None else ops.add(x, layer.bias)


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from tfgptj import GPTJConfig, TFGPTJForCausalLM
    from tfgptj.projection import Projection

    config = GPTJConfig(
        vocab_size=4096, n_embd=options.width, n_layer=options.layers, n_head=options.width // 64, rotary_dim=32,
        n_positions=1024, eos_token_id=None,
    )  # fmt: skip
    model = TFGPTJForCausalLM(config, dtype=options.dtype)
    if options.mode is not None:
        model.quantize(options.mode)
    if way != "all weights":
        model.add_lora(rank=options.rank, targets="all-linear")
    if way == "Keras's Dense":
        Projection.call = call_as_keras
    model.compile("adam")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, options.tokens)).astype("int32")

    def step() -> None:
        model.train_on_batch(ids, ids)

    def generate() -> None:
        model.generate(ids[:1, :PROMPT], max_new_tokens=NEW)

    step()
    steps = milliseconds(step)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    generate()
    tokens = [each / NEW for each in milliseconds(generate, 3)["ms"]]
    return {
        "trainable": model.num_parameters(only_trainable=True),
        "step_ms": round(min(steps["ms"]), 1),
        "step_cpu_ms": round(min(steps["cpu_ms"]), 1),
        "peak_mb": round(peak, 1),
        "token_ms": round(min(tokens), 1),
        "samples": {"step_ms": steps["ms"], "token_ms": tokens},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("width", 1024), ("layers", 4), ("rank", 8), ("tokens", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mode", choices=("int8", "int4"))
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps({"way": options.way, **measure(options.way, options)}))
        return
    # A quantized base has no weights to train, and both its ways are Keras's.
    for way in WAYS if options.mode is None else WAYS[2:]:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], check=True)


if __name__ == "__main__":
    main()
