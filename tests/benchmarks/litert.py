"""Few bits on LiteRT's kernels beside CTranslate2's int8 and ggml's q8_0 and q4_0, taken in turns in one run.

    python tests/benchmarks/litert.py CHECKPOINT [--ctranslate2 PYTHON] [--ggml PYTHON]
        [--scenarios 1x128 1x512 8x128] [--new 32] [--rounds 5] [--json FILE]

CHECKPOINT is a directory with `config.json` and `model.safetensors`, such as `load.py DIRECTORY --write` writes; what
is converted is kept beside it. PYTHON is the interpreter of an environment with ctranslate2, torch, transformers and
safetensors, or with ctransformers, numpy and safetensors, as `environments.py` builds them. Every peer loads the model
in a process of its own, and a round asks each in turn. ggml is left out where a scenario has several texts at once,
which its GPT-J cannot do. To see that all compute the same, take a trained model: random weights have near ties.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from generators import CLASSES
from peers import Host
from report_rows import few_bits
from report_tables import table

from tfgptj.files import write_json

WORKERS = Path(__file__).with_name("generators.py")
OURS = "LiteRT int8"  # whose likeliest tokens the others' are compared with
# The class of each peer, its dtype, and the option that gives its interpreter; None is ours.
PEERS: dict[str, tuple[str, str, str | None]] = {
    OURS: ("LiteRT", "int8", None),
    "LiteRT int4": ("LiteRT", "int4", None),
    "LiteRT int4-wide": ("LiteRT", "int4-wide", None),
    "CTranslate2 int8": ("CTranslate2", "int8", "ctranslate2"),
    "ggml q8_0": ("GGML", "q8_0", "ggml"),
    "ggml q4_0": ("GGML", "q4_0", "ggml"),
}


def start(options: Any) -> tuple[dict[str, Host], dict[str, str]]:
    """The peers that there is an interpreter for, and why the others are missing."""
    hosts, missing = {}, {}
    for name, (cls, dtype, option) in PEERS.items():
        python = getattr(options, option) if option else sys.executable
        if python is None:
            missing[name] = f"--{option} was not given"
            continue
        command = [python, str(WORKERS), cls, str(options.checkpoint), dtype]
        subprocess.run([*command, "--prepare"], check=True, stdout=sys.stderr)
        hosts[name] = Host(command)
    return hosts, missing


def measure(hosts: dict[str, Host], scenario: str, new: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round, by "peer | scenario | measure"; they are printed, too."""
    batch, prompt = map(int, scenario.split("x"))
    asked = {"mode": "", "batch": batch, "prompt": prompt, "new": new}
    hosts = {name: host for name, host in hosts.items() if batch <= CLASSES[PEERS[name][0]].most_rows}
    for host in hosts.values():
        host.ask("measure", **asked)  # the first one is slower
    found = [{name: host.ask("measure", **asked) for name, host in hosts.items()} for _ in range(rounds)]
    samples = {}
    for name, host in hosts.items():
        times = {key: [each[name][key] for each in found] for key in ("first_token", "decode")}
        samples |= {f"{name} | {scenario} | {key}": values for key, values in times.items()}
        first, decode = map(statistics.median, times.values())
        peak = host.ask("facts")["memory"]["peak"] / 2**20
        print(f"{name:18} {scenario:>9} {first:9,.1f} ms {decode:10,.2f} ms {peak:9,.0f}", flush=True)
    return samples


def agreement(hosts: dict[str, Host]) -> dict[str, str]:
    """How often each peer's likeliest token is ours in 8 bits, after prompts of 1 to 32 tokens."""
    asked = [{"mode": "", "batch": 1, "prompt": length, "new": 1} for length in range(1, 33)]
    tokens = {name: [host.ask("tokens", **each) for each in asked] for name, host in hosts.items()}
    same = {name: sum(a == b for a, b in zip(tokens[OURS], found, strict=True)) for name, found in tokens.items()}
    return {name: f"{count} of {len(asked)}" for name, count in same.items()}


def versions(facts: dict[str, Any]) -> str:
    """What a peer is made of; of ggml also the processors that it was compiled for, "local" being this one."""
    found = [f"{name} {version}" for name, version in facts["versions"].items()]
    return ", ".join([*found, *(f"compiled for {facts[key]}" for key in ("compiled_for",) if key in facts)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ctranslate2", metavar="PYTHON")
    parser.add_argument("--ggml", metavar="PYTHON")
    parser.add_argument("--scenarios", nargs="+", default=["1x128", "1x512", "8x128"])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    hosts, missing = start(options)
    print(f"{'':18} {'scenario':>9} {'first token':>12} {'each further':>13} {'peak MiB':>9}")
    samples: dict[str, list[float]] = {}
    for scenario in options.scenarios:
        samples |= measure(hosts, scenario, options.new, options.rounds)
    same = agreement(hosts)
    facts = {name: host.ask("facts") for name, host in hosts.items()}
    for host in hosts.values():
        host.stop()
    found = {"samples_ms": samples, "peers": facts, "agreement": same, "missing": missing}
    print(f"\nLikeliest token is that of {OURS}: {', '.join(f'{name} {text}' for name, text in same.items())}")
    print("", *table((row.asked, row) for row in few_bits(found)), sep="\n")
    print("", *(f"{name}: {versions(each)}" for name, each in facts.items()), sep="\n")
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
