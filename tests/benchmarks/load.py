"""Time and peak memory of `from_pretrained`, each format and dtype in a process of its own.

    python tests/benchmarks/load.py [DIRECTORY] [--format safetensors bin h5 msgpack] [--dtype float32 bfloat16]

Without a directory, a GPT-J of 610 million random float32 weights is written to a temporary one (2.4 GB), once for each
format; "bin" needs PyTorch for that. The numbers are meant for files in the page cache, so each is read before.

Beside the loading stands the time that this machine takes to touch as much fresh memory as the weights need. No loader
is faster; on a virtual machine whose host has to find the pages first, it can be most of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import write_random_checkpoint

from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.checkpoints.tensors import FLOAT_DTYPES
from tfgptj.config import GPTJConfig

FORMATS = ("safetensors", "bin", "h5", "msgpack")


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
    with Checkpoint(Path(directory)) as checkpoint:
        largest = max(checkpoint.spec(name).nbytes for name in checkpoint.names)
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


def run(directory: str, dtype: str, times: int) -> dict[str, Any]:
    """The medians of several loads, each in a process of its own."""
    for path in Path(directory).iterdir():
        if path.is_file():
            subprocess.run(["cat", str(path)], check=True, stdout=subprocess.DEVNULL)
    results = []
    for _ in range(times):
        command = [sys.executable, __file__, directory, "--measure", "--dtype", dtype]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
    medians = {key: statistics.median(result[key] for result in results) for key in results[0] if key != "dtype"}
    return {"dtype": dtype, **medians, "all_seconds": [result["build_and_load_seconds"] for result in results]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="a checkpoint")
    parser.add_argument("--format", nargs="+", default=["safetensors"], choices=FORMATS, help="what to write and load")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="dtype policies to load in")
    parser.add_argument("--times", type=int, default=5, help="loads of which the median is taken")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_random_checkpoint(Path(options.directory), GPTJConfig(n_embd=2048, n_layer=8), format=options.format[0])
        return
    if options.measure:
        print(json.dumps(measure(options.directory, options.dtype[0])))
        return
    for form in options.format if options.directory is None else ["given"]:
        with tempfile.TemporaryDirectory() as temporary:
            directory = options.directory or temporary
            if options.directory is None:  # in a process of its own: this one's memory would count for its children
                subprocess.run([sys.executable, __file__, directory, "--write", "--format", form], check=True)
            for dtype in options.dtype:
                result = {"format": form, **run(directory, dtype, options.times)}
                print(json.dumps(result) if options.json else "".join(f"{k:24}{v}\n" for k, v in result.items()))


if __name__ == "__main__":
    main()
