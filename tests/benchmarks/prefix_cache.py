"""Time to the first token with a prefix cache and without, and the memory that a long prompt takes whole and in pieces.

    python tests/benchmarks/prefix_cache.py [--width 2048] [--layers 8] [--prefix 400] [--rest 20] [--rounds 7]
    python tests/benchmarks/prefix_cache.py --memory [--width 1024] [--layers 4] [--heads 16] [--long 2048]

A model with random weights. Prompts have a beginning in common, and each goes on in its own way; the ways take turns in
every round, so that all meet the same neighbours on the machine. "unchecked" leaves out the look at the weights. The
memory is the most that a process of its own held at once while it read the prompt, without the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PIECES = (0, 512, 128, 32)  # columns at once; 0 reads the prompt whole


def new_model(options: argparse.Namespace) -> Any:
    import keras

    from tfgptj import GPTJConfig, TFGPTJForCausalLM

    keras.utils.set_random_seed(0)
    shape = {"n_embd": options.width, "n_layer": options.layers, "n_head": options.heads, "n_positions": options.long}
    return TFGPTJForCausalLM(GPTJConfig(**shape, eos_token_id=None), dtype=options.dtype)


def first_token(options: argparse.Namespace) -> None:
    import numpy as np

    from tfgptj import PrefixCache
    from tfgptj.generation.prefix_cache import weights_mark

    model, random = new_model(options), np.random.default_rng(0)
    prefix = random.integers(0, 50257, options.prefix)
    ways: dict[str, Any] = {
        "without": None,
        "with": PrefixCache(),
        "unchecked": PrefixCache(check_weights=False),
    }

    def milliseconds(cache: Any) -> float:
        prompt = np.concatenate([prefix, random.integers(0, 50257, options.rest)])[None]
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=1, prefix_cache=cache)
        return 1e3 * (time.perf_counter() - start)

    def mark() -> float:
        start = time.perf_counter()
        weights_mark(model)
        return 1e3 * (time.perf_counter() - start)

    for cache in ways.values():
        for _ in range(3):  # compiles; and the second call is the first that finds something
            milliseconds(cache)
    found: dict[str, list[float]] = {name: [] for name in [*ways, "mark"]}
    for _ in range(options.rounds):
        for name, cache in ways.items():
            found[name].append(milliseconds(cache))
        found["mark"].append(mark())
    medians = {name: round(statistics.median(values), 1) for name, values in found.items()}
    ratio = {name: round(medians["without"] / medians[name], 2) for name in ("with", "unchecked")}
    told = {"ms to the first token": medians, "times faster": ratio, "reused": ways["with"].last_call}
    print(json.dumps({**told, "samples": found}))


def memory(options: argparse.Namespace) -> None:
    arguments = [f"--{name}={getattr(options, name)}" for name in ("width", "layers", "heads", "long", "dtype")]
    for piece in PIECES:
        command = [sys.executable, __file__, *arguments, f"--piece={piece}"]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        print(result.stdout.splitlines()[-1])


def one_piece(options: argparse.Namespace) -> None:
    import numpy as np

    model = new_model(options)
    piece = {"prefill_chunk_size": options.piece} if options.piece else {}
    prompt = np.random.default_rng(0).integers(0, 50257, (1, options.long - 1))
    model.generate(prompt[:, :64], max_new_tokens=1, prefill_chunk_size=32)  # what is there once, such as threads
    weights = model.count_params() * (4 if options.dtype == "float32" else 2)
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=1, **piece)
    found = {"columns at once": options.piece or options.long - 1, "seconds": round(time.perf_counter() - start, 2)}
    print(json.dumps({**found, "MiB": round(status("VmHWM") / 1024 - weights / 2**20)}))


def status(name: str) -> int:
    """Kilobytes, of /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"width": 2048, "layers": 8, "heads": 16, "prefix": 400, "rest": 20, "rounds": 7, "long": 2048, "piece": -1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if options.piece >= 0:
        one_piece(options)
    elif options.memory:
        memory(options)
    else:
        first_token(options)


if __name__ == "__main__":
    main()
