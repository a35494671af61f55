"""Prefill and decode beside other libraries, taken in turns in one run.

    python tests/benchmarks/generate.py CHECKPOINT [--reference PYTHON] [--ctranslate2 PYTHON] [--kerashub PYTHON]
        [--peers NAME ...] [--scenarios 1x128 1x512 8x128] [--new 32] [--rounds 5] [--memory 16] [--json FILE]

CHECKPOINT is a directory with `config.json` and `model.safetensors`, such as `load.py DIRECTORY --write` writes. The
PYTHONs are interpreters of environments with these packages:

    --reference    torch transformers==4.57.6 safetensors tensorflow tf-keras
    --ctranslate2  ctranslate2 torch transformers==4.57.6 safetensors
    --kerashub     keras-hub tensorflow-cpu

Every library loads the model in a process of its own and then waits; a round asks each in turn, and measures the
bandwidth of the memory, too. Libraries that do not fit into memory together are measured in groups, always together
with tfgptj, and their ratios are those of the same rounds. Whatever cannot be measured is named with the reason, and
makes the exit code 1 if it was asked for.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from peers import Host, PeerFailed

from tfgptj.benchmark.generation import spread
from tfgptj.benchmark.machine import describe_machine
from tfgptj.config import GPTJConfig
from tfgptj.files import write_json

WORKERS = Path(__file__).with_name("generators.py")
NEW_LENGTH = 200  # a prompt that no scenario has
AGREEMENT = 8  # tokens that are compared


class Peer(NamedTuple):
    """One way to generate: a class of `generators.py`, a dtype, a mode of it; peers of one class share a process."""

    cls: str
    dtype: str
    mode: str = ""
    python: str = ""  # the option that names the interpreter; our own by default
    copies: float = 1.0  # memory of the process, in copies of the float32 weights

    @property
    def host(self) -> tuple[str, str]:
        """What peers of one process have in common."""
        return self.cls, self.dtype


OURS = {
    "tfgptj float32": Peer("Ours", "float32"),
    "tfgptj bfloat16": Peer("Ours", "bfloat16", copies=0.5),
    "tfgptj float32 XLA": Peer("Ours", "float32", "XLA"),
    "tfgptj bfloat16 XLA": Peer("Ours", "bfloat16", "XLA", copies=0.5),
}
RIVALS = {
    "HF TensorFlow eager": Peer("HFTensorFlow", "float32", python="reference", copies=2.0),
    "HF TensorFlow XLA": Peer("HFTensorFlow", "float32", "XLA", python="reference", copies=2.0),
    "HF PyTorch float32": Peer("HFTorch", "float32", python="reference"),
    "HF PyTorch bfloat16": Peer("HFTorch", "bfloat16", python="reference", copies=0.5),
    "CTranslate2 float32": Peer("CTranslate2", "float32", python="ctranslate2"),
    "KerasHub float32": Peer("KerasHub", "float32", python="kerashub"),
    "KerasHub bfloat16": Peer("KerasHub", "bfloat16", python="kerashub", copies=0.5),
}
PEERS = OURS | RIVALS
PYTHONS = ("reference", "ctranslate2", "kerashub")
OVERHEAD = 1.0  # gigabytes of a process beside its weights: libraries, cache, scores
MATRIX = 2.2  # gigabytes of the process that measures the bandwidth, beside that


class Scenario(NamedTuple):
    """Prompts at once, and tokens of each."""

    batch: int
    prompt: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt}"


class Comparison:
    """Measurements of all peers, in groups that fit into memory.

    Args:
        checkpoint: the directory.
        pythons: interpreters, by the names of their options.
        scenarios: what to generate from.
        new: tokens whose time is measured.
        rounds: measurements of each.
    """

    def __init__(
        self, checkpoint: Path, pythons: dict[str, str], scenarios: list[Scenario], new: int, rounds: int
    ) -> None:
        self.checkpoint, self.pythons = checkpoint, pythons
        self.scenarios, self.new, self.rounds = scenarios, new, rounds
        self.hosts: dict[tuple[str, str], Host] = {}
        self.missing: dict[str, str] = {}  # by peer, or by peer and scenario: the reason
        self.facts: dict[str, dict[str, Any]] = {}
        self.tokens: dict[str, list[list[int]]] = {}
        self.groups: list[dict[str, list[float]]] = []  # samples, by "peer | scenario | measure"

    def run(self, names: Iterable[str], gigabytes: float) -> dict[str, Any]:
        """Measure these peers, with no more memory than this, and return all that was found."""
        names = list(names)
        machine = describe_machine()
        ours = [name for name in names if name in OURS]
        rivals = [name for name in names if name in RIVALS and self._has_python(name)]
        weights = self.checkpoint.joinpath("model.safetensors").stat().st_size / 1e9
        fixed = OVERHEAD + MATRIX + sum(needed(ours, weights))
        bandwidth = self._start(("Bandwidth", "float32"), sys.executable)
        self._prepare(ours)
        for group in packed(rivals, weights, gigabytes - fixed) or [[]]:
            say(f"group {len(self.groups) + 1}: {', '.join([*ours, *group])}")
            self._prepare(group)
            self.groups.append(self._measure_group([*ours, *group], bandwidth))
            self._stop(group)
        self._stop(ours)
        bandwidth.stop()
        return {"benchmark": "rivals", "machine": machine, **self._found(names)}

    def _has_python(self, name: str) -> bool:
        option = PEERS[name].python
        if option and not self.pythons.get(option):
            self._miss(name, f"--{option} was not given")
        return name not in self.missing

    def _start(self, host: tuple[str, str], python: str) -> Host:
        return Host([python, str(WORKERS), host[0], str(self.checkpoint), host[1]])

    def _prepare(self, names: list[str]) -> None:
        """Start the processes of these peers, and generate once with each, which compiles it."""
        for name in names:
            peer = PEERS[name]
            try:
                if peer.host not in self.hosts:
                    python = self.pythons[peer.python] if peer.python else sys.executable
                    prepare_weights(python, peer.cls, self.checkpoint)
                    self.hosts[peer.host] = self._start(peer.host, python)
                say(f"  {name}: started")
                self.facts[name] = dict(self.hosts[peer.host].facts)
                self._first_calls(name)
            except PeerFailed as error:
                self._miss(name, str(error))

    def _first_calls(self, name: str) -> None:
        first = self.scenarios[0]
        compiling = {"first_call_compile_seconds": first, "new_length_compile_seconds": Scenario(1, NEW_LENGTH)}
        for what, scenario in compiling.items():
            self.facts[name][what] = self._ask(name, "compile_seconds", scenario, self.new)
        self.tokens[name] = self._ask(name, "tokens", first, AGREEMENT)
        for scenario in self.scenarios:
            try:
                self._ask(name, "measure", scenario, self.new)
            except PeerFailed as error:
                self._miss(f"{name} | {scenario}", str(error))

    def _measure_group(self, names: list[str], bandwidth: Host) -> dict[str, list[float]]:
        samples: dict[str, list[float]] = {}
        for number in range(self.rounds):
            say(f"  round {number + 1} of {self.rounds}")
            samples.setdefault("GB/s", []).append(bandwidth.ask("gigabytes_per_second"))
            for scenario in self.scenarios:
                shift = number % len(names)  # nobody is always the first
                for name in names[shift:] + names[:shift]:
                    if name in self.missing or f"{name} | {scenario}" in self.missing:
                        continue
                    try:
                        found = self._ask(name, "measure", scenario, self.new)
                    except PeerFailed as error:
                        self._miss(f"{name} | {scenario}", str(error))
                        continue
                    for what, value in found.items():
                        samples.setdefault(f"{name} | {scenario} | {what}", []).append(value)
        for name in names:
            if name not in self.missing:
                self.facts[name]["memory"] = self.hosts[PEERS[name].host].ask("facts")["memory"]
        return samples

    def _ask(self, name: str, method: str, scenario: Scenario, new: int) -> Any:
        arguments = {"mode": PEERS[name].mode, **scenario._asdict(), "new": new}
        return self.hosts[PEERS[name].host].ask(method, **arguments)

    def _stop(self, names: list[str]) -> None:
        for host in {PEERS[name].host for name in names} & self.hosts.keys():
            self.hosts.pop(host).stop()

    def _miss(self, name: str, reason: str) -> None:
        say(f"missing: {name}: {reason}")
        self.missing[name] = reason

    def _found(self, names: list[str]) -> dict[str, Any]:
        return {
            "settings": {
                "new_tokens": self.new, "rounds": self.rounds, "scenarios": [str(each) for each in self.scenarios]
            },
            "model": GPTJConfig.from_json_file(self.checkpoint / "config.json").to_dict(),
            "bandwidth_gb_per_second": spread([value for group in self.groups for value in group["GB/s"]]),
            "peers": self.facts,
            "missing": self.missing,
            "agreement": {name: self._agreement(name) for name in names if name in self.tokens},
            "results": {
                f"{name} | {scenario} | {what}": found
                for scenario in self.scenarios
                for name in names
                for what in ("first_token", "decode")
                if (found := result(f"{name} | {scenario} | {what}", self.groups))
            },
        }  # fmt: skip

    def _agreement(self, name: str) -> str | None:
        """How many of the first new tokens are those of tfgptj, in float32.

        In bfloat16 rounding decides between the likeliest tokens of random weights, and KerasHub has another model.
        """
        theirs, ours = self.tokens[name], self.tokens.get("tfgptj float32")
        if ours is None or PEERS[name].dtype != "float32" or PEERS[name].cls == "KerasHub":
            return None
        equal = sum(a == b for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True))
        return f"{equal} of {sum(map(len, ours))}"


def needed(names: Iterable[str], weights: float) -> list[float]:
    """Gigabytes of the processes of these peers."""
    copies = {PEERS[name].host: PEERS[name].copies for name in names}
    return [OVERHEAD + each * weights for each in copies.values()]


def packed(names: list[str], weights: float, room: float) -> list[list[str]]:
    """Rivals in groups that need no more than so many gigabytes, those of one process together, in order.

    Raises:
        SystemExit: if one alone needs more.
    """
    groups: list[list[str]] = []
    for host in dict.fromkeys(PEERS[name].host for name in names):
        together = [name for name in names if PEERS[name].host == host]
        if sum(needed(together, weights)) > room:
            raise SystemExit(f"{together[0]} needs {sum(needed(together, weights)):.1f} GB; raise --memory")
        if groups and sum(needed(groups[-1] + together, weights)) <= room:
            groups[-1] += together
        else:
            groups.append(together)
    return groups


def prepare_weights(python: str, cls: str, checkpoint: Path) -> None:
    """The weights in a library's own format, if it has one.

    Raises:
        PeerFailed: with the last line of what was said.
    """
    if cls not in ("HFTensorFlow", "CTranslate2"):
        return
    command = [python, str(WORKERS), cls, str(checkpoint), "float32", "--prepare"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise PeerFailed(str(error)) from None
    if done.returncode:
        raise PeerFailed(f"its weights could not be converted: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")


def baseline(name: str) -> str:
    """Our own peer that another one is compared with: the default of the same dtype."""
    return f"tfgptj {PEERS[name].dtype}"


def result(key: str, groups: list[dict[str, list[float]]]) -> dict[str, Any] | None:
    """The spread of one measure over all groups, and that of its ratio to ours in the same rounds."""
    name, scenario, what = key.split(" | ")
    values = [value for group in groups for value in group.get(key, [])]
    if not values:
        return None
    ours = f"{baseline(name)} | {scenario} | {what}"
    ratios = [a / b for group in groups for a, b in zip(group.get(key, []), group.get(ours, []), strict=False)]
    return {
        **spread(values),
        "baseline": baseline(name),
        "ratio_to_ours": statistics.median(ratios) if ratios else None,
        "ratios_to_ours": ratios,
    }


def markdown(found: dict[str, Any]) -> str:
    """A comparison as tables: one for each scenario, one for what is not timed in rounds."""
    machine, peers, missing = found["machine"], found["peers"], found["missing"]
    bandwidth = found["bandwidth_gb_per_second"]
    named = [name for name in PEERS if name in peers or name in missing]
    lines = [
        f"{machine['processor']}, {machine['processors']} in use; load average {machine['load_average']} at the start.",
        f"Read bandwidth {bandwidth['median']:.1f} GB/s ({bandwidth['least']:.1f} to {bandwidth['most']:.1f}); at that "
        + ", ".join(f"{dtype} decodes a token in {limit_ms(found, size):.1f} ms" for dtype, size in SIZES.items())
        + " at best.",
        f"Medians of {found['settings']['rounds']} rounds, in brackets the least and the most; ratios of the time to "
        "that of tfgptj in the same dtype and rounds.",
    ]
    for scenario in found["settings"]["scenarios"]:
        batch, prompt = scenario.split("x")
        lines += ["", f"| batch {batch}, prompt {prompt} | first token, ms | ratio | each further step, ms | ratio |"]
        lines += ["|---|---|---|---|---|"]
        for name in named:
            reason = missing.get(name) or missing.get(f"{name} | {scenario}")
            cells = [cell for what in ("first_token", "decode") for cell in cells_of(found, name, scenario, what)]
            lines.append(f"| {name} | {' | '.join([f'missing: {reason}', '', '', ''] if reason else cells)} |")
    lines += [
        "",
        "| | compiles at first, s | a new length of prompt, s | resident, GB | at most, GB | tokens as ours |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for name in (name for name in named if name in peers and name not in missing):
        facts = peers[name]
        seconds = [f"{facts[f'{what}_compile_seconds']:.1f}" for what in ("first_call", "new_length")]
        sizes = [f"{facts['memory'][which] / 1e9:.1f}" for which in ("resident", "peak")]
        lines.append(f"| {name} | {' | '.join([*seconds, *sizes, found['agreement'].get(name) or 'not compared'])} |")
    return "\n".join([*lines, "", *version_lines(found)])


SIZES = {"float32": 4, "bfloat16": 2}


def limit_ms(found: dict[str, Any], itemsize: int) -> float:
    """Milliseconds to read all that a token needs: every weight but the embedding."""
    config = GPTJConfig.from_dict(found["model"])
    read = config.num_parameters() - config.vocab_size * config.n_embd
    return itemsize * read / found["bandwidth_gb_per_second"]["median"] / 1e6


def cells_of(found: dict[str, Any], name: str, scenario: str, what: str) -> list[str]:
    """A measure and its ratio for a table."""
    measured = found["results"].get(f"{name} | {scenario} | {what}")
    if measured is None:
        return ["", ""]
    ratio = measured["ratio_to_ours"]
    spread_ = f"{measured['median']:,.1f} ({measured['least']:,.1f} to {measured['most']:,.1f})"
    return [spread_, "" if ratio is None or name == baseline(name) else f"{ratio:.2f}"]


def version_lines(found: dict[str, Any]) -> list[str]:
    """The versions of each library, and what is missing."""
    versions = {PEERS[name].cls: facts["versions"] for name, facts in found["peers"].items()}
    told = [f"* {cls}: {', '.join(f'{key} {value}' for key, value in each.items())}" for cls, each in versions.items()]
    return [*told, *(f"* missing: {name}: {reason}" for name, reason in found["missing"].items())]


def say(text: str) -> None:
    """Tell on standard error how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path)
    for name in PYTHONS:
        add(f"--{name}", metavar="PYTHON", help="an interpreter; without it its peers are named as missing")
    add("--peers", nargs="+", default=["*"], metavar="NAME", help=f"patterns; there are {', '.join(PEERS)}")
    add("--scenarios", nargs="+", default=["1x128", "1x512", "8x128"], help="prompts at once x tokens of each")
    add("--new", type=int, default=32, help="tokens whose time is measured")
    add("--rounds", type=int, default=5)
    add("--memory", type=float, default=16.0, metavar="GB", help="what all processes together may need")
    add("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    options = parser.parse_args()
    names = [name for name in PEERS if any(fnmatch.fnmatch(name, pattern) for pattern in options.peers)]
    names += [name for name in OURS if name in map(baseline, names) and name not in names]
    pythons = {name: getattr(options, name) for name in PYTHONS}
    scenarios = [Scenario(*map(int, text.split("x"))) for text in options.scenarios]
    comparison = Comparison(options.checkpoint, pythons, scenarios, options.new, options.rounds)
    found = comparison.run(names, options.memory)
    print(markdown(found))
    if options.json:
        write_json(options.json, found)
    sys.exit(1 if comparison.missing else 0)


if __name__ == "__main__":
    main()
