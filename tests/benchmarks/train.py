"""A training step beside other libraries, taken in turns in one run.

    python tests/benchmarks/train.py [--reference PYTHON] [--rows 4] [--tokens 256] [--rounds 5] [--peers NAME ...]
        [--width 512] [--layers 8] [--json FILE]

The model has random weights, the same for all, and by default 77 million parameters; every peer uses AdamW, and the
first loss of each shows that they compute the same. PYTHON is an interpreter of an environment with torch,
transformers==4.57.6, safetensors, tensorflow and tf-keras. Every library loads the model in a process of its own; a
round asks each in turn for one step, and measures what the machine's product of matrices gives. All eight together take
20 GB of memory.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers import Host, PeerFailed
from random_checkpoint import write_random_checkpoint

from tfgptj.benchmark.generation import spread
from tfgptj.benchmark.machine import describe_machine
from tfgptj.config import GPTJConfig
from tfgptj.files import write_json

WORKERS = Path(__file__).with_name("trainers.py")
HEAD = 64  # width of a head

# Class of `trainers.py` and mode, by name.
PEERS = {
    "tfgptj float32": ("Ours", "float32"),
    "tfgptj float32 XLA": ("Ours", "float32 XLA"),
    "tfgptj mixed_bfloat16": ("Ours", "mixed_bfloat16"),
    "HF PyTorch float32": ("HFTorch", "float32"),
    "HF PyTorch bfloat16 autocast": ("HFTorch", "mixed_bfloat16"),
    "HF TensorFlow float32": ("HFTensorFlow", "float32"),
    "HF TensorFlow float32 XLA": ("HFTensorFlow", "float32 XLA"),
    "HF TensorFlow mixed_bfloat16": ("HFTensorFlow", "mixed_bfloat16"),
}


def shape(width: int, layers: int) -> GPTJConfig:
    """A model to train: heads of 64, and no dropout, which every library draws in its own way."""
    return GPTJConfig(
        vocab_size=50400, n_embd=width, n_layer=layers, n_head=width // HEAD, rotary_dim=32, n_positions=2048,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def flops(config: GPTJConfig, rows: int, tokens: int) -> float:
    """Floating-point operations of a training step: those of the products alone, forward and twice backward.

    Each weight but the embedding multiplies once for each token, and scores and mixture take 4 T D each per layer, of
    which the causal half that is masked is counted, too, as all of these libraries compute it.
    """
    weights = config.num_parameters() - config.vocab_size * config.n_embd
    attention = 4 * config.n_layer * tokens * config.n_embd
    return 3 * rows * tokens * (2 * weights + attention)


def compare(names: list[str], checkpoint: Path, reference: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """Measure these peers."""
    missing: dict[str, str] = {}
    config = shape(options.width, options.layers)
    hosts: dict[str, Host] = {}
    for name in names:
        cls, mode = PEERS[name]
        python = sys.executable if cls == "Ours" else reference
        if python is None:
            missing[name] = "--reference was not given"
            continue
        try:
            hosts[name] = Host([python, str(WORKERS), cls, str(checkpoint), mode])
            first = hosts[name].ask("measure", rows=options.rows, tokens=options.tokens)
            hosts[name].facts["first_loss"] = first["loss"]
            hosts[name].ask("measure", rows=options.rows, tokens=options.tokens)
        except PeerFailed as error:
            missing[name] = str(error)
            hosts.pop(name, None)
        say(f"{name}: {missing.get(name, 'started')}")
    machine = describe_machine()
    peaks = {dtype: Host([sys.executable, str(WORKERS), "Peak", "-", dtype]) for dtype in ("float32", "bfloat16")}
    samples: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for dtype, host in peaks.items():
            host.ask("gigaflops")
            samples.setdefault(dtype, []).append(host.ask("gigaflops"))
        shift = number % max(len(hosts), 1)  # nobody is always the first
        for name in [*hosts][shift:] + [*hosts][:shift]:
            found = hosts[name].ask("measure", rows=options.rows, tokens=options.tokens)
            samples.setdefault(name, []).append(found["step"])
        say(f"round {number + 1} of {options.rounds}")
    facts = {name: {**host.facts, "memory": host.ask("facts")["memory"]} for name, host in hosts.items()}
    for host in (*hosts.values(), *peaks.values()):
        host.stop()
    return {
        "benchmark": "training step",
        "machine": machine,
        "settings": {name: getattr(options, name) for name in ("rows", "tokens", "rounds")},
        "parameters": config.num_parameters(),
        "peaks_gflops": {dtype: spread(samples[dtype]) for dtype in peaks},
        "flops": flops(config, options.rows, options.tokens),
        "peers": facts,
        "missing": missing,
        "samples_ms": {name: samples[name] for name in hosts},
    }


def markdown(found: dict[str, Any]) -> str:
    """A comparison as a table: times, ratios to ours of the same precision in the same rounds, and use of the peak."""
    samples, settings, machine = found["samples_ms"], found["settings"], found["machine"]
    peaks = {dtype: each["median"] for dtype, each in found["peaks_gflops"].items()}
    lines = [
        f"{machine['processor']}, {machine['processors']} in use; load average {machine['load_average']} at the start.",
        f"{found['parameters']:,} parameters, {settings['rows']} x {settings['tokens']} tokens, AdamW, medians of "
        f"{settings['rounds']} rounds; products of 4096 x 4096: "
        + ", ".join(f"{dtype} {peak:.0f} GFLOP/s" for dtype, peak in peaks.items())
        + ".",
        "",
        "| | step, ms | least to most | ratio to ours | GFLOP/s | of the product's | peak memory, GB | first loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, times in samples.items():
        mode = PEERS[name][1]
        ours = samples.get("tfgptj mixed_bfloat16" if mode.startswith("mixed") else "tfgptj float32", times)
        ratio = statistics.median(a / b for a, b in zip(times, ours, strict=True))
        rate = found["flops"] / statistics.median(times) / 1e6
        peak = peaks["bfloat16" if mode.startswith("mixed") else "float32"]
        facts = found["peers"][name]
        lines.append(
            f"| {name} | {statistics.median(times):.0f} | {min(times):.0f} to {max(times):.0f} | {ratio:.2f} | "
            f"{rate:.0f} | {rate / peak:.0%} | {facts['memory']['peak'] / 1e9:.1f} | {facts['first_loss']:.4f} |"
        )
    versions = {PEERS[name][0]: facts["versions"] for name, facts in found["peers"].items()}
    lines += ["", *(f"* {cls}: {', '.join(f'{k} {v}' for k, v in each.items())}" for cls, each in versions.items())]
    return "\n".join([*lines, *(f"* missing: {name}: {reason}" for name, reason in found["missing"].items())])


def say(text: str) -> None:
    """Tell on standard error how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", metavar="PYTHON")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=512, help=f"a multiple of {HEAD}")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--peers", nargs="+", metavar="NAME", default=["*"], help="names or patterns; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    names = [name for name in PEERS if any(fnmatch.fnmatch(name, pattern) for pattern in options.peers)]
    if not names:
        parser.error(f"--peers: there are {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "model"
        write_random_checkpoint(checkpoint, shape(options.width, options.layers))
        found = compare(names, checkpoint, options.reference, options)
    if options.json:
        write_json(options.json, found)
    print(markdown(found))
    if options.reference and found["missing"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
