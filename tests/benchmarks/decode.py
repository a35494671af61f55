"""Prefill and decode time beside Hugging Face's classes, taken in turns in one run.

    python tests/benchmarks/decode.py CHECKPOINT --reference PYTHON [--rounds 5] [--peers tfgptj hf_tf_xla ...]

CHECKPOINT is a directory with `config.json` and `model.safetensors`, such as `load.py` writes. PYTHON is the
interpreter of the reference environment described in tests/fixtures/make_goldens.py. Every peer loads the model in a
process of its own and then waits; a round asks each in turn, so that all meet the same neighbours on the machine. A
round also measures the bandwidth of a float32 matrix-vector product, which is what decoding cannot be faster than.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, NEW = 128, 32


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def worker_bandwidth(checkpoint: str) -> dict[str, Callable[[], float]]:
    import numpy as np

    matrix, vector = np.ones((16384, 16384), "float32"), np.ones(16384, "float32")  # 1 GiB, far beyond the caches

    def gigabytes_per_second() -> float:
        return 4 * matrix.nbytes / timed(lambda: [matrix @ vector for _ in range(4)]) / 1e6

    return {"GB/s": gigabytes_per_second}


def worker_tfgptj(checkpoint: str, dtype: str = "float32", jit: bool = False) -> dict[str, Callable[[], float]]:
    import numpy as np

    from tfgptj.heads import TFGPTJForCausalLM

    model = TFGPTJForCausalLM.from_pretrained(checkpoint, dtype=dtype, eos_token_id=None)
    ids = np.random.default_rng(0).integers(0, 50257, (1, PROMPT))

    def generate(new: int) -> float:
        return timed(lambda: model.generate(ids, max_new_tokens=new, jit_compile=jit))

    return {"prefill": lambda: generate(1), "decode": lambda: (generate(1 + NEW) - generate(1)) / NEW}


def worker_tfgptj_bfloat16(checkpoint: str) -> dict[str, Callable[[], float]]:
    return worker_tfgptj(checkpoint, "bfloat16")


def worker_tfgptj_xla(checkpoint: str) -> dict[str, Callable[[], float]]:
    return worker_tfgptj(checkpoint, jit=True)


def worker_hf_tf_xla(checkpoint: str) -> dict[str, Callable[[], float]]:
    import numpy as np
    import tensorflow as tf
    from transformers import TFGPTJForCausalLM

    model = TFGPTJForCausalLM.from_pretrained(_torch_file(checkpoint), from_pt=True, use_safetensors=False)
    ids = tf.constant(np.random.default_rng(0).integers(0, 50257, (1, PROMPT)), tf.int32)
    mask = tf.ones_like(ids)
    generate = tf.function(model.generate, jit_compile=True)

    def run(new: int) -> float:
        options = {"max_new_tokens": new, "pad_token_id": 0, "eos_token_id": 50399, "do_sample": False}
        return timed(lambda: generate(ids, attention_mask=mask, **options))

    return {
        "prefill": lambda: timed(lambda: model(ids).logits.numpy()),  # TensorFlow users' default: eager
        "decode": lambda: (run(2 + NEW) - run(2)) / NEW,  # a single new token makes it raise
    }


def worker_hf_torch(checkpoint: str) -> dict[str, Callable[[], float]]:
    import torch
    from transformers import GPTJForCausalLM

    model = GPTJForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.randint(0, 50257, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def run(new: int) -> float:
        return timed(
            lambda: model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        )

    return {"prefill": lambda: run(1), "decode": lambda: (run(1 + NEW) - run(1)) / NEW}


def _torch_file(checkpoint: str) -> str:
    """The same weights as `pytorch_model.bin`, the only file that transformers' TensorFlow classes can load here."""
    import torch
    from safetensors.torch import load_file

    directory = Path(checkpoint).with_name(Path(checkpoint).name + "-torch")
    if not (directory / "pytorch_model.bin").exists():
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text((Path(checkpoint) / "config.json").read_text())
        torch.save(load_file(str(Path(checkpoint) / "model.safetensors")), directory / "pytorch_model.bin")
    return str(directory)


class Peer:
    """A worker process: loads, says what it can measure, and then measures on demand."""

    def __init__(self, name: str, python: str, checkpoint: str) -> None:
        command = [python, __file__, checkpoint, "--worker", name]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.measures = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries print things of their own
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"{self.name} ended early")

    def measure(self, what: str) -> float:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self._answer()


def serve(name: str, checkpoint: str) -> None:
    measures = globals()[f"worker_{name}"](checkpoint)
    for measure in measures.values():  # compile, and touch every page
        measure()
    print("answer", json.dumps(list(measures)), flush=True)
    for line in sys.stdin:
        print("answer", measures[line.strip()](), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--reference", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", default=["tfgptj", "tfgptj_bfloat16", "hf_tf_xla", "hf_torch"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.worker, options.checkpoint)
        return
    peers = [
        Peer(name, options.reference if name.startswith("hf") else sys.executable, options.checkpoint)
        for name in ["bandwidth", *options.peers]
    ]
    samples: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for peer in peers:
            for what in peer.measures:
                samples.setdefault(f"{peer.name} {what}", []).append(peer.measure(what))
    for peer in peers:
        peer.process.terminate()
    print(f"{'median of ' + str(options.rounds):32} {'':>9} {'least':>9} {'most':>9}")
    for key, values in samples.items():
        unit = "GB/s" if key.endswith("GB/s") else "ms"
        print(f"{key:32} {statistics.median(values):9.1f} {min(values):9.1f} {max(values):9.1f} {unit}")


if __name__ == "__main__":
    main()
