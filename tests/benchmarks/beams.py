"""What a step of beam search costs beside a step of as many independent rows, and beside moving their caches.

    python tests/benchmarks/beams.py [--width 2048] [--layers 8] [--beams 4] [--prompt 128] [--new 64] [--rounds 5]

A model with random weights. The ways take turns in every round, so that all meet the same neighbours on the machine.
`moved` is the time to gather all keys and values of the beams once, which is what a search with a cache for each beam
does after each step, and `contrastive` has as many candidates as there are beams.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj.config import GPTJConfig
from tfgptj.generation.compiling import Compiled
from tfgptj.heads import TFGPTJForCausalLM


def milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def ways(options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    keras.utils.set_random_seed(0)
    heads = options.width // 256
    model = TFGPTJForCausalLM(
        GPTJConfig(n_embd=options.width, n_layer=options.layers, n_head=heads, eos_token_id=None), dtype=options.dtype
    )
    prompt = np.random.default_rng(0).integers(0, 50257, (1, options.prompt))

    def per_token(rows: int, **parameters: Any) -> Callable[[], float]:
        ids = np.repeat(prompt, rows, axis=0)

        def run(new: int) -> float:
            return milliseconds(lambda: model.generate(ids, max_new_tokens=new, jit_compile=options.xla, **parameters))

        return lambda: (run(1 + options.new) - run(1)) / options.new

    shape = (options.beams, options.prompt + options.new, heads, 256)
    caches = tuple(ops.zeros(shape, dtype=model.compute_dtype) for _ in range(2 * options.layers))
    origin = ops.convert_to_tensor(np.zeros(options.beams, "int32"))
    gather = Compiled(
        model, lambda model, _, origin, *caches: [ops.take(each, origin, axis=0) for each in caches], options.xla
    )
    beams = {"num_beams": options.beams}
    return {
        "1 row": per_token(1),
        f"{options.beams} rows": per_token(options.beams),
        "beams": per_token(1, **beams),
        "drawn beams": per_token(1, **beams, do_sample=True, top_k=0),
        "groups": per_token(1, **beams, num_beam_groups=2, diversity_penalty=0.5),
        "contrastive": per_token(1, penalty_alpha=0.6, top_k=options.beams),
        "moved": lambda: milliseconds(lambda: ops.convert_to_numpy(gather(None, origin, *caches)[-1][0, 0])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 2048, "layers": 8, "beams": 4, "prompt": 128, "new": 64, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--xla", action="store_true")
    options = parser.parse_args()
    measured = ways(options)
    for measure in measured.values():
        measure()  # compiles
    results: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(options.rounds):
        for name, measure in measured.items():
            results[name].append(measure())
    medians = {name: round(statistics.median(times), 2) for name, times in results.items()}
    print(json.dumps({**vars(options), "ms per token": medians, "samples": results}))


if __name__ == "__main__":
    main()
