"""GPT-J-6B's full size in few bits on LiteRT's kernels: conversion, start, memory, and speed beside the bandwidth.

    python tests/benchmarks/litert_full_size.py [--directory DIRECTORY] [--kinds int4 int4-wide int8] [--rounds 3]

Writes 12.1 GB of random bfloat16 weights, and one converted model after the other; all is removed at the end. Each step
is a process of its own. A start is from the process's beginning to the first token after a prompt of 128, once with the
model's files as they are in the page cache after `cat`; memory is that of a text of 512 tokens; a further token is
timed within that text, in turns with the bandwidth that a float32 product reads with.
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
from generators import LITERT, timed
from peers import memory

CONTEXT, NEW = 512, 16


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


def run(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A start, its memory, and the time of a token."""
    import numpy as np

    from tfgptj.litert.model import LiteRTGPTJForCausalLM

    model = LiteRTGPTJForCausalLM.from_pretrained(directory / options.kind)
    loaded = time.time() - options.began
    ids = np.random.default_rng(0).integers(0, 50000, (1, CONTEXT - NEW - 1))

    def milliseconds(prompt: int, new: int) -> float:
        return timed(lambda: model.generate(ids[:, :prompt], max_new_tokens=new, eos_token_id=None))[1]

    milliseconds(128, 1)
    found: dict[str, Any] = {"loaded_seconds": loaded, "first_token_seconds": time.time() - options.began}
    found["first_token_milliseconds"] = statistics.median(milliseconds(128, 1) for _ in range(options.rounds))
    milliseconds(CONTEXT - NEW, NEW)
    found |= {f"{name}_mb": size // 10**6 for name, size in memory().items()}

    from tfgptj.benchmark.machine import ReadBandwidth

    bandwidth, decodes, speeds = ReadBandwidth(time.perf_counter), [], []
    for _ in range(options.rounds):
        speeds.append(bandwidth() / 1e9)
        decodes.append((milliseconds(CONTEXT - NEW, NEW) - milliseconds(CONTEXT - NEW, 1)) / (NEW - 1))
    decode, speed = statistics.median(decodes), statistics.median(speeds)
    read = model.read_per_step(1)[1] / 1e9
    found |= {"token_milliseconds": decode, "tokens_per_second": 1e3 / decode, "bandwidth_gb_per_second": speed}
    return {**found, "gb_per_token": read, "share_of_bandwidth": read / (decode / 1e3) / speed}


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
    parser.add_argument("--rounds", type=int, default=3)
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
