"""What the language model's loss costs: a training step and its memory, with logits and without, and in parts.

    python tests/benchmarks/loss.py [--rows 4] [--tokens 256] [--dtype float32]

The model has 77 million parameters. Each way runs in a process of its own, since peak memory is that of a process.
Times are the least of several, and those of a step are also given as processor time, which other processes on the
machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

from lora import milliseconds

WAYS = {"logits": 1, "fused": 1, "fused, 4 parts": 4}


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    import keras
    import numpy as np

    from tfgptj import GPTJConfig, TFGPTJForCausalLM

    class Plain(TFGPTJForCausalLM):
        """A language model whose loss is computed of logits."""

        def head_loss(self, *args: Any) -> Any:
            return super().head_loss(*args)

    config = GPTJConfig(vocab_size=50400, n_embd=512, n_layer=8, n_head=8, rotary_dim=32, n_positions=2048)
    model = (Plain if way == "logits" else TFGPTJForCausalLM)(config, dtype=options.dtype)
    model.compile(keras.optimizers.AdamW(1e-4), micro_batches=WAYS[way])
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (options.rows, options.tokens)).astype("int32")

    def step() -> None:
        model.train_on_batch(ids, ids)

    step()
    times = milliseconds(step)
    return {
        "step_ms": round(min(times["ms"])),
        "step_cpu_ms": round(min(times["cpu_ms"])),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "samples": {"step_ms": times["ms"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rows", 4), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps({"way": options.way, **measure(options.way, options)}))
        return
    for way in WAYS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], check=True)


if __name__ == "__main__":
    main()
