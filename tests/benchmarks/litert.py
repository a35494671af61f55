"""Few bits on LiteRT's kernels beside CTranslate2's int8, taken in turns in one run.

    python tests/benchmarks/litert.py CHECKPOINT [--ctranslate2 PYTHON] [--scenarios 1x128 1x512 8x128] [--new 32]
        [--rounds 5] [--json FILE]

CHECKPOINT is a directory with `config.json` and `model.safetensors`, such as `load.py DIRECTORY --write` writes; what
is converted is kept beside it. PYTHON is the interpreter of an environment with ctranslate2, torch, transformers and
safetensors. Every peer loads the model in a process of its own, and a round asks each in turn.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from peers import Host

from tfgptj.files import write_json

WORKERS = Path(__file__).with_name("generators.py")
KINDS = ("int8", "int4", "int4-wide")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ctranslate2", metavar="PYTHON")
    parser.add_argument("--scenarios", nargs="+", default=["1x128", "1x512", "8x128"])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    peers = {f"LiteRT {kind}": (sys.executable, "LiteRT", kind) for kind in KINDS}
    if options.ctranslate2:
        peers["CTranslate2 int8"] = (options.ctranslate2, "CTranslate2", "int8")
    samples: dict[str, list[float]] = {}  # milliseconds, by "peer | scenario | measure"
    hosts = {}
    for name, (python, cls, dtype) in peers.items():
        command = [python, str(WORKERS), cls, str(options.checkpoint), dtype]
        subprocess.run([*command, "--prepare"], check=True, stdout=sys.stderr)
        hosts[name] = Host(command)
    print(f"{'':18} {'scenario':>9} {'first token':>12} {'each further':>13} {'peak MiB':>9}")
    for scenario in options.scenarios:
        batch, prompt = map(int, scenario.split("x"))
        measure = {"mode": "", "batch": batch, "prompt": prompt, "new": options.new}
        for host in hosts.values():
            host.ask("measure", **measure)  # the first one is slower
        rounds = [{name: host.ask("measure", **measure) for name, host in hosts.items()} for _ in range(options.rounds)]
        for name, host in hosts.items():
            for key in ("first_token", "decode"):
                samples[f"{name} | {scenario} | {key}"] = [found[name][key] for found in rounds]
            first, decode = (
                statistics.median(samples[f"{name} | {scenario} | {key}"]) for key in ("first_token", "decode")
            )
            peak = host.ask("facts")["memory"]["peak"] / 2**20
            print(f"{name:18} {scenario:>9} {first:9,.1f} ms {decode:10,.2f} ms {peak:9,.0f}", flush=True)
    peers_facts = {name: host.ask("facts") for name, host in hosts.items()}
    for host in hosts.values():
        host.stop()
    if options.json:
        missing = {} if options.ctranslate2 else {"CTranslate2 int8": "--ctranslate2 was not given"}
        write_json(options.json, {"samples_ms": samples, "peers": peers_facts, "missing": missing})


if __name__ == "__main__":
    main()
