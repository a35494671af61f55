"""A training step of GPT-J-6B's full size in little memory: LoRA beside a frozen bfloat16 base, with checkpointing.

    python tests/benchmarks/full_size_training.py [--directory DIRECTORY] [--tokens 1024] [--limit 22]

Writes 12.1 GB of random bfloat16 weights, which are removed at the end, and measures one optimizer step as
`training_memory.py` does, in a process of its own. Fails if the peak is over the limit, in GiB, or the loss not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from random_checkpoint import write_random_checkpoint

from tfgptj.config import GPTJConfig

MEASURE = Path(__file__).with_name("training_memory.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="where there is room for 12.1 GB; default: a temporary directory")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--limit", type=float, default=22.0, metavar="GIB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        config = GPTJConfig(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        write_random_checkpoint(Path(directory) / "model", config, dtype="bfloat16")
        settings = {"model": Path(directory) / "model", "tokens": options.tokens, "rank": options.rank, "steps": 1}
        arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, str(MEASURE), "lora", "--dtype", "bfloat16", *arguments]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    print(json.dumps(found))
    if found["peak_mib"] > 1024 * options.limit or not math.isfinite(found["loss"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
