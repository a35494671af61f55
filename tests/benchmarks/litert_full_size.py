"""GPT-J-6B's full size in few bits on LiteRT's kernels: conversion, start, memory, and speed beside the bandwidth.

    python tests/benchmarks/litert_full_size.py [--directory DIRECTORY] [--kinds int4 int4-wide int8] [--rounds 3]

Writes 12.1 GB of random bfloat16 weights, and one converted model after the other; all is removed at the end. Each step
is a process of its own. A start is from the process's beginning to the first token after a prompt of 128, with the
model's files in the page cache as `cat` leaves them; memory is that of a text of 512 tokens, before the bandwidth is
measured that a float32 product reads with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from full_size import peak_memory
from generators import LITERT
from peers import memory

SHORT, CONTEXT, NEW = 128, 512, 16


def write(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint, by the streaming writer."""
    from random_checkpoint import write_random_checkpoint

    from tfgptj.config import GPTJConfig

    write_random_checkpoint(directory / "bfloat16", GPTJConfig(), dtype="bfloat16")
    return {}


def convert(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """To few bits."""
    from tfgptj.litert.convert import convert

    convert(directory / "bfloat16", directory / options.kind, **LITERT[options.kind])
    return {"bytes": sum(path.stat().st_size for path in (directory / options.kind).iterdir())}


class Clock:
    """A streamer that writes down when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: Any) -> None:
        """The prompt, then token after token."""
        self.times.append(time.time())

    def end(self) -> None:
        """There are no more."""


def run(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A start, its memory, and the time of a token."""
    import numpy as np

    from tfgptj.litert.model import LiteRTGPTJForCausalLM

    model = LiteRTGPTJForCausalLM.from_pretrained(directory / options.kind)
    found: dict[str, Any] = {"loaded_seconds": time.time() - options.began}
    for prompt in (SHORT, CONTEXT - NEW):
        ids, decodes = np.random.default_rng(0).integers(0, 50000, (1, prompt)), []
        for _ in range(options.rounds):
            clock = Clock()
            model.generate(ids, max_new_tokens=NEW, eos_token_id=None, streamer=clock)
            found.setdefault("start_to_first_token_seconds", clock.times[1] - options.began)
            decodes += np.diff(clock.times[1:]).tolist()
        found[f"prompt_{prompt}_milliseconds"] = 1e3 * (clock.times[1] - clock.times[0])
        found[f"token_behind_{prompt}_milliseconds"] = 1e3 * statistics.median(decodes)
    found |= {f"{name}_mb": size // 10**6 for name, size in memory().items()}
    return {**found, **beside_bandwidth(model, 1e-3 * found[f"token_behind_{SHORT}_milliseconds"])}


def beside_bandwidth(model: Any, seconds: float) -> dict[str, float]:
    """What a token reads, and how fast that is beside a float32 product."""
    from tfgptj.benchmark.machine import ReadBandwidth

    bandwidth, read = ReadBandwidth(time.perf_counter), model.read_per_step(1)[1] / 1e9
    speed = statistics.median(bandwidth() / 1e9 for _ in range(5))
    return {
        "tokens_per_second": 1 / seconds,
        "gb_per_token": read,
        "bandwidth_gb_per_second": speed,
        "share_of_bandwidth": read / seconds / speed,
    }


STEPS = {"write": write, "convert": convert, "run": run}


def step(directory: str, name: str, *options: str) -> None:
    """One step in a process of its own, and a line about it."""
    command = [sys.executable, __file__, "--directory", directory, "--step", name, *options]
    command += ["--began", str(time.time())]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(output.splitlines()[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="where there is room for 19 GB; default: a temporary directory")
    parser.add_argument("--kinds", nargs="+", choices=LITERT, default=list(LITERT))
    parser.add_argument("--rounds", type=int, default=3, help="texts of each length")
    for name, kind in {"step": str, "kind": str, "began": float}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        start = time.perf_counter()
        found = STEPS[options.step](Path(options.directory), options)
        facts = {"seconds": time.perf_counter() - start, "peak_mb": peak_memory(), **found}
        rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in facts.items()}
        print(json.dumps({"step": options.step, "kind": options.kind, **rounded}))
        return
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="litert-6b-") as directory:
        step(directory, "write")
        for kind in options.kinds:
            step(directory, "convert", "--kind", kind)
            with open("/dev/null", "wb") as nowhere:
                subprocess.run(["cat", *map(str, Path(directory, kind).iterdir())], check=True, stdout=nowhere)
            step(directory, "run", "--kind", kind, "--rounds", str(options.rounds))
            shutil.rmtree(Path(directory, kind))


if __name__ == "__main__":
    main()
