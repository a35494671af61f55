"""Every comparison of this directory in one run, and one report of them: who is ahead, who is behind, what is missing.

    python tests/benchmarks/report.py [--output report] [--quick] [--full-size] [--only NAME ...]
        [--environments DIRECTORY] [--reference PYTHON] [--ctranslate2 PYTHON] [--ggml PYTHON] [--kerashub PYTHON]
        [--memory 20]

Writes DIRECTORY/report.md and report.json, and what each script said into DIRECTORY/logs. The libraries that tfgptj is
compared with are installed into virtual environments of their own, in `build/environments` or where `--environments`
says, and found there the next time; an interpreter that has them may be given instead. `--quick` takes small models and
few rounds: some minutes. `--full-size` measures GPT-J-6B, too, which takes 25 GB of disk and up to 22 GB of memory.
Exit code 1: something that was asked for could not be measured; the report says what and why.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import report_rows
from environments import ENVIRONMENTS, EnvironmentFailed, python_of
from report_rows import Row
from report_tables import markdown

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = Path(__file__).parent
QUICK_MODEL = {"width": 512, "layers": 2, "heads": 4}  # 55 million parameters, most of them the vocabulary's
LEFT_OUT = "--quick leaves it out"


class Comparison(NamedTuple):
    """One script and what is made of its JSON.

    Args:
        about: what it compares, in a sentence.
        arguments: of the script; "CHECKPOINT" is a model with random weights.
        quick: others for `--quick`; None leaves it out.
        rows: what makes rows of the JSON: of a file that the script writes, or of the lines that it prints.
        others: names of the environments that it takes interpreters of.
        writes_file: whether the JSON is in a file.
        runs: several calls with these first arguments.
        full_size: whether it is measured with `--full-size` alone.
        takes_memory: whether it has `--memory`.
    """

    about: str
    script: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...] | None
    rows: Callable[[Any], list[Row]]
    others: tuple[str, ...] = ()
    writes_file: bool = False
    runs: tuple[tuple[str, ...], ...] = ((),)
    full_size: bool = False
    takes_memory: bool = False


SMALL = ("--width=256", "--layers=2")
FEW = ("--rounds=2",)
COMPARISONS = {
    "generation": Comparison(
        "Prefill and decode of one model in every library.", "generate.py", ("CHECKPOINT",),
        ("CHECKPOINT", "--scenarios", "1x32", "4x32", "--new=8", *FEW, "--peers", "tfgptj float32", "tfgptj bfloat16",
         "HF TensorFlow eager", "HF PyTorch*", "CTranslate2*", "KerasHub*"),
        report_rows.generation, ("reference", "ctranslate2", "kerashub"), writes_file=True, takes_memory=True,
    ),
    "training": Comparison(
        "A training step of one model in every library.", "train.py", (),
        ("--width=128", "--layers=2", "--rows=2", "--tokens=64", *FEW, "--peers", "tfgptj float32",
         "tfgptj mixed_bfloat16", "HF PyTorch*", "HF TensorFlow float32", "HF TensorFlow mixed_bfloat16"),
        report_rows.training, ("reference",), writes_file=True,
    ),
    "few bits": Comparison(
        "LiteRT's kernels beside CTranslate2's and ggml's.", "litert.py", ("CHECKPOINT",),
        ("CHECKPOINT", "--scenarios", "1x32", "--new=8", *FEW), report_rows.few_bits,
        ("ctranslate2", "ggml"),
        writes_file=True,
    ),
    "LoRA": Comparison(
        "Adapters beside Keras's own, and beside training all weights.", "lora.py", (),
        (*SMALL, "--tokens=64"), report_rows.adapters,
    ),
    "convergence": Comparison(
        "Fine-tuning on real text beside what can be had without a model.", "convergence.py", (), None,
        report_rows.convergence, writes_file=True,
    ),
    "drafts": Comparison(
        "Tokens with drafts and without.", "speculation.py", (), (*SMALL, "--new=32", "--drafts=5", *FEW),
        report_rows.drafts,
    ),
    "prefix cache": Comparison(
        "Time to the first token with a prefix cache and without.", "prefix_cache.py", (),
        (*SMALL, "--heads=2", "--prefix=200", "--long=512", *FEW), report_rows.prefixes,
    ),
    "beams": Comparison(
        "A step of a search beside a step of as many independent rows.", "beams.py", (),
        (*SMALL, "--prompt=32", "--new=16", *FEW), report_rows.beams,
    ),
    "serving": Comparison(
        "An exported model beside `generate`.", "serving.py", ("decode", "CHECKPOINT"),
        ("decode", "CHECKPOINT", "--prompt=32", "--new=8", *FEW), report_rows.served,
    ),
    "loss": Comparison(
        "The loss without whole logits beside the plain one.", "loss.py", (), ("--rows=1", "--tokens=128"),
        report_rows.losses,
    ),
    "loading": Comparison(
        "Time and peak memory of from_pretrained.", "load.py", ("--json", "--format", "safetensors", "h5", "msgpack"),
        ("CHECKPOINT", "--json", "--times=2"), report_rows.loading,
    ),
    "training memory": Comparison(
        "The peak of a training step beside what the weights take.", "training_memory.py",
        ("--width=2048", "--layers=8"), (*SMALL, "--tokens=64"), report_rows.training_memory,
        runs=(("lora",), ("full", "--dtype=float32")),
    ),
    "full size": Comparison(
        "GPT-J-6B converted and loaded.", "full_size.py", (), None, report_rows.full_size, full_size=True,
    ),
    "full size, few bits": Comparison(
        "GPT-J-6B on LiteRT's kernels.", "litert_full_size.py", (), None, report_rows.few_bits_full_size,
        full_size=True,
    ),
    "full size, training": Comparison(
        "A step of LoRA for GPT-J-6B.", "full_size_training.py", (), None, report_rows.full_size_training,
        full_size=True,
    ),
}  # fmt: skip


class Run:
    """All comparisons of one report.

    Args:
        output: directory for the logs.
        pythons: interpreters by environment; or why there is none.
        checkpoint: a model with random weights.
        options: of the command.
    """

    def __init__(
        self, output: Path, pythons: dict[str, Path | EnvironmentFailed], checkpoint: Path, options: Any
    ) -> None:
        self.output, self.pythons, self.checkpoint, self.options = output, pythons, checkpoint, options
        (output / "logs").mkdir(parents=True, exist_ok=True)

    def measure(self, name: str, comparison: Comparison) -> tuple[dict[str, Any], list[Row]]:
        """One comparison: what the report says of it, and its rows."""
        arguments = comparison.quick if self.options.quick else comparison.arguments
        entry: dict[str, Any] = {"about": comparison.about, "command": comparison.script, "seconds": 0.0}
        reason = self._left_out(comparison, arguments)
        if reason or arguments is None:
            return {**entry, "missing": {"": reason}, "found": None}, []
        entry["command"] = shlex.join([comparison.script, *arguments])
        missing = {each: str(self.pythons[each]) for each in comparison.others if self._failed(each)}
        start = time.perf_counter()
        found, faults = self._found(name, comparison, self._arguments(comparison, arguments))
        entry |= {"seconds": round(time.perf_counter() - start, 1), "found": found}
        try:
            rows = comparison.rows(found) if found else []
        except (KeyError, TypeError, ValueError) as error:  # a script that failed half-way
            rows, faults = [], {**faults, "its results": f"{type(error).__name__}: {error}"}
        if isinstance(found, dict):
            faults |= found.get("missing", {})
        return {**entry, "missing": {**missing, **faults}}, rows

    def _left_out(self, comparison: Comparison, arguments: tuple[str, ...] | None) -> str:
        if comparison.full_size and not self.options.full_size:
            return "needs --full-size"
        return LEFT_OUT if arguments is None else ""

    def _failed(self, environment: str) -> bool:
        return isinstance(self.pythons[environment], EnvironmentFailed)

    def _arguments(self, comparison: Comparison, arguments: tuple[str, ...]) -> list[str]:
        given = [str(self.checkpoint) if text == "CHECKPOINT" else text for text in arguments]
        for each in comparison.others:
            if not self._failed(each):
                given += [f"--{each}", str(self.pythons[each])]
        return [*given, f"--memory={self.options.memory}"] if comparison.takes_memory else given

    def _found(self, name: str, comparison: Comparison, arguments: list[str]) -> tuple[Any, dict[str, str]]:
        """The JSON of a script, and what went wrong."""
        lines: list[Any] = []
        faults: dict[str, str] = {}
        for first in comparison.runs:
            with tempfile.TemporaryDirectory() as directory:
                file = Path(directory) / "found.json"
                written = [f"--json={file}"] if comparison.writes_file else []
                command = [sys.executable, str(BENCHMARKS / comparison.script), *first, *arguments, *written]
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment())
                self._log("-".join([name, *first]), done)
                if done.returncode:
                    faults[" ".join(first) or "the script"] = f"exit code {done.returncode}: {last_words(done.stderr)}"
                if file.exists():
                    return json.loads(file.read_text()), {} if done.returncode == 1 else faults
            lines += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return lines, faults

    def _log(self, name: str, done: subprocess.CompletedProcess[str]) -> None:
        path = self.output / "logs" / f"{name.replace(' ', '-').replace(',', '').replace('/', '-')}.txt"
        path.write_text(f"{done.stdout}\n{done.stderr}", encoding="utf-8")


def environment() -> dict[str, str]:
    """The environment of scripts: they find the package that stands here."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def last_words(text: str) -> str:
    """The last line of what a program said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def interpreters(options: Any, needed: set[str]) -> dict[str, Path | EnvironmentFailed]:
    """An interpreter for each environment that is needed: given, found or built."""
    found: dict[str, Path | EnvironmentFailed] = {}
    for name in sorted(needed):
        try:
            given = getattr(options, name)
            if given is None:
                say(f"environment {name}")
            found[name] = given or python_of(name, options.environments)
        except EnvironmentFailed as error:
            found[name] = EnvironmentFailed(f"no environment {name}: {error}")
    return found


def packages_of(python: Path) -> list[str]:
    """What is installed beside an interpreter, of the packages that environments are made of."""
    texts = {text for texts in ENVIRONMENTS.values() for text in texts if not text.startswith("-")}
    names = sorted(text.split("==")[0] for text in texts)
    program = """
import sys
from importlib.metadata import distributions
found = {each.name.replace("_", "-"): each.version for each in distributions()}
print(*(f"{name} {found[name]}" for name in sys.argv[1:] if name in found), sep="\\n")
"""
    done = subprocess.run([str(python), "-c", program, *names], capture_output=True, text=True, errors="replace")
    return done.stdout.split("\n")[:-1] or [last_words(done.stderr)]


def describe() -> tuple[dict[str, Any], dict[str, str]]:
    """The machine, and versions, asked in a process of its own, whose memory is free again afterwards."""
    program = """
import json
from tfgptj.benchmark.machine import describe_machine, versions
print(json.dumps([describe_machine(), versions()]))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    machine, versions = json.loads(done.stdout.splitlines()[-1])
    return machine, versions


def write_model(directory: Path, quick: bool) -> None:
    """The model with random weights that several scripts load."""
    shape = [f"--{name}={value}" for name, value in (QUICK_MODEL if quick else {}).items()]
    command = [sys.executable, str(BENCHMARKS / "random_checkpoint.py"), str(directory), *shape]
    subprocess.run(command, env=environment(), check=True)


def say(text: str) -> None:
    """Tell on standard error how far it is."""
    print(text, file=sys.stderr, flush=True)


def write_report(options: Any, names: list[str]) -> dict[str, Any]:
    """Measure, and write both files after each comparison, so that a run that is cut off leaves what it has."""
    machine, versions = describe()
    pythons = interpreters(options, {each for name in names for each in COMPARISONS[name].others})
    there = {name: python for name, python in pythons.items() if isinstance(python, Path)}
    report: dict[str, Any] = {
        "benchmark": "report", "quick": options.quick, "machine": machine, "versions": versions,
        "environments": {name: packages_of(python) for name, python in there.items()}, "comparisons": {},
    }  # fmt: skip
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        checkpoint = Path(directory) / "model"
        write_model(checkpoint, options.quick)
        run = Run(options.output, pythons, checkpoint, options)
        for number, name in enumerate(names, 1):
            say(f"{number} of {len(names)}: {name}")
            entry, rows[name] = run.measure(name, COMPARISONS[name])
            told = [{**row._asdict(), "verdict": row.verdict} for row in rows[name]]
            report["comparisons"][name] = {**entry, "rows": told}
            report["load_average_at_the_end"] = round(os.getloadavg()[0], 2)
            (options.output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
            (options.output / "report.md").write_text(markdown(report, rows), encoding="utf-8")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("report"), metavar="DIRECTORY")
    add("--quick", action="store_true", help="small models, few rounds")
    add("--full-size", action="store_true", help="GPT-J-6B, too")
    add("--only", nargs="+", default=["*"], metavar="NAME", help=f"patterns; there are {', '.join(COMPARISONS)}")
    add("--environments", type=Path, default=ROOT / "build" / "environments", metavar="DIRECTORY")
    for name in ENVIRONMENTS:
        add(f"--{name}", type=Path, metavar="PYTHON", help="an interpreter, in place of an environment of our own")
    add("--directory", type=Path, help="where there is room for weights; default: for temporary files")
    add("--memory", type=float, default=20.0, metavar="GB", help="what processes measured together may need")
    options = parser.parse_args()
    names = [name for name in COMPARISONS if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    if not names:
        parser.error(f"--only: there are {', '.join(COMPARISONS)}")
    report = write_report(options, names)
    say(f"{options.output / 'report.md'}")
    by_choice = {LEFT_OUT, "needs --full-size"}
    failed = [r for entry in report["comparisons"].values() for r in entry["missing"].values() if r not in by_choice]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
