"""Time and peak memory of `from_pretrained`, each dtype in a process of its own.

    python tests/benchmarks/load.py [DIRECTORY] [--dtype float32 bfloat16] [--json]

Without a directory, a GPT-J of 610 million random float32 weights is written to a temporary one (2.4 GB). Run it twice,
or give a directory that was read before: the numbers are meant for a file in the page cache.

Beside the loading stands the time that this machine takes to touch as much fresh memory as the weights need. No loader
is faster; on a virtual machine whose host has to find the pages first, it can be most of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfgptj.checkpoints.mapping import plan
from tfgptj.checkpoints.safetensors import SafetensorsFile, write_safetensors
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorSpec
from tfgptj.config import GPTJConfig
from tfgptj.files import write_json


def write_random_checkpoint(directory: Path, config: GPTJConfig) -> None:
    """A causal language model with random weights, in float32."""
    generator = np.random.default_rng(0)
    specs = []
    for entry in plan(config, "causal_lm"):
        name = f"{'' if entry.in_head else 'transformer.'}{entry.names['torch']}"
        specs.append(TensorSpec(name, entry.stored_shape("torch"), FLOAT_DTYPES["float32"]))

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for spec in specs:
            mean = 1.0 if ".ln_" in spec.name and spec.name.endswith("weight") else 0.0
            yield spec.name, mean + 0.02 * generator.standard_normal(spec.shape, np.float32)

    write_safetensors(directory / "model.safetensors", specs, values())
    write_json(directory / "config.json", config.to_dict())


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(directory: str, dtype: str) -> dict[str, Any]:
    """Load once, in this process."""
    start = time.perf_counter()
    from tfgptj.heads import TFGPTJForCausalLM

    imported, import_peak = time.perf_counter() - start, peak_memory()
    start = time.perf_counter()
    model = TFGPTJForCausalLM.from_pretrained(directory, dtype=dtype)
    loaded, peak = time.perf_counter() - start, peak_memory()
    weights = model.count_params() * FLOAT_DTYPES[dtype].itemsize
    start = time.perf_counter()
    np.empty(weights, np.uint8).fill(1)
    touched = time.perf_counter() - start
    with SafetensorsFile(Path(directory) / "model.safetensors") as file:
        largest = max(file.spec(name).nbytes for name in file.names)
    return {
        "dtype": dtype,
        "import_seconds": round(imported, 2),
        "build_and_load_seconds": round(loaded, 2),
        "touch_memory_seconds": round(touched, 2),
        "weights_mb": weights // 10**6,
        "largest_tensor_mb": largest // 10**6,
        "peak_after_import_mb": import_peak // 10**6,
        "peak_mb": peak // 10**6,
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="a checkpoint with a single model.safetensors")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="dtype policies to load in")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.directory, options.dtype[0])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or temporary
        if options.directory is None:
            write_random_checkpoint(Path(directory), GPTJConfig(n_embd=2048, n_layer=8))
        for dtype in options.dtype:
            command = [sys.executable, __file__, directory, "--measure", "--dtype", dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result = json.loads(output.splitlines()[-1])
            print(json.dumps(result) if options.json else "".join(f"{k:24}{v}\n" for k, v in result.items()))


if __name__ == "__main__":
    main()
