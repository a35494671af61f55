"""A checkpoint of GPT-J-6B's full size: converted and loaded, with time and peak memory of each step.

    python tests/benchmarks/full_size.py [--directory DIRECTORY]

Writes 12.1 GB of random float16 weights and, from them, 12.1 GB in bfloat16; all files are removed at the end. Loading
needs 13 GB of memory. Beside each step stands the time that `cat` takes for the same files, as they are then: whatever
is not in the page cache comes from the disk; and beside the conversion that of `cp` and `sync`, which write as much.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def peak_memory() -> int:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 10**6


def write(directory: Path) -> dict[str, Any]:
    """The float16 checkpoint, by the streaming writer."""
    from random_checkpoint import write_random_checkpoint

    from tfgptj.config import GPTJConfig

    write_random_checkpoint(directory / "float16", GPTJConfig(), dtype="float16")
    return {}


def convert(directory: Path) -> dict[str, Any]:
    """What `tfgptj convert` does."""
    from tfgptj.cli import main

    arguments = ["convert", str(directory / "float16"), str(directory / "bfloat16"), "--dtype", "bfloat16", "--quiet"]
    return {"exit_code": main(arguments)}


def load(directory: Path) -> dict[str, Any]:
    """from_pretrained and one forward pass over 32 tokens."""
    import numpy as np

    from tfgptj.heads import TFGPTJForCausalLM

    start = time.perf_counter()
    model = TFGPTJForCausalLM.from_pretrained(directory, dtype="bfloat16")
    loaded, peak = time.perf_counter() - start, peak_memory()
    start = time.perf_counter()
    logits = np.asarray(model(np.arange(32)[None]))
    return {
        "parameters": model.count_params(),
        "load_seconds": round(loaded, 1),
        "load_peak_mb": peak,
        "forward_seconds": round(time.perf_counter() - start, 1),
        "logits_are_finite": bool(np.isfinite(logits).all()),
    }


STEPS = {
    "write": (write, ""),
    "convert": (convert, "float16"),
    "load float16 as bfloat16": (lambda directory: load(directory / "float16"), "float16"),
    "load bfloat16": (lambda directory: load(directory / "bfloat16"), "bfloat16"),
}


def cat(directory: Path) -> float:
    """Seconds to read the weight files of a directory."""
    files = [str(path) for path in sorted(directory.glob("*.safetensors"))]
    start = time.perf_counter()
    subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - start, 1)


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the files of a directory and have them on disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    seconds = round(time.perf_counter() - start, 1)
    shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="where there is room for 25 GB; default: a temporary directory")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        start = time.perf_counter()
        found = STEPS[options.step][0](Path(options.directory))
        print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "peak_mb": peak_memory(), **found}))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for step, (_, read) in STEPS.items():
            before = {"cat_seconds": cat(Path(directory) / read)} if read else {}
            if step == "convert":
                before["copy_seconds"] = copy(Path(directory) / read, Path(directory) / "copy")
            command = [sys.executable, __file__, "--directory", directory, "--step", step]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(json.dumps({"step": step, **before, **json.loads(output.splitlines()[-1])}), flush=True)


if __name__ == "__main__":
    main()
