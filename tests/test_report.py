"""What `benchmarks/report.py` makes of what scripts say; nothing is measured here, and nothing installed."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
MODULES = ("report", "report_rows", "report_tables", "environments")


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """The report's modules, which find each other as scripts do."""
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(BENCHMARKS))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def rows(modules: Any) -> Any:
    return modules.report_rows


def options(**given: Any) -> Namespace:
    defaults = {"quick": False, "full_size": False, "memory": 4.0, "reference": None, "directory": None}
    return Namespace(**{**defaults, **given})


def script(directory: Path, name: str, code: str) -> None:
    (directory / name).write_text("import json, sys\n" + code)


# Rows


def test_ratios_say_how_many_times_better_ours_is(rows: Any) -> None:
    faster = rows.compared("a", "ms", ("tfgptj", [1.0, 2.0, 4.0]), ("other", [3.0, 4.0, 6.0]))
    assert faster.ratio == (2.0, 1.5, 3.0) and faster.verdict == "ahead"
    assert faster.ours == ("tfgptj", (2.0, 1.0, 4.0)) and faster.theirs == ("other", (4.0, 3.0, 6.0))
    slower = rows.compared("a", "ms", ("tfgptj", [4.0]), ("other", [3.0]))
    assert slower.ratio.median == 0.75 and slower.verdict == "behind"
    mixed = rows.compared("a", "ms", ("tfgptj", [4.0, 4.0]), ("other", [3.0, 5.0]))
    assert mixed.verdict == "level"
    better = rows.compared("a", "accuracy", ("tfgptj", [80.0]), ("other", [40.0]), more_is_better=True)
    assert better.ratio.median == 2.0
    of_medians = rows.compared("a", "s", ("tfgptj", [1.0, 2.0, 9.0]), ("other", [4.0]))
    assert of_medians.ratio == (2.0, 2.0, 2.0)


def test_rows_of_generation(rows: Any) -> None:
    def measured(median: float, ratios: list[float]) -> dict[str, Any]:
        spread = {"median": median, "least": median / 2, "most": median * 2}
        return {**spread, "baseline": "tfgptj float32", "ratios_to_ours": ratios}

    facts = {"memory": {"peak": 2**30}}
    found = {
        "results": {
            "tfgptj float32 | 1x8 | decode": measured(2.0, [1.0]),
            "HF PyTorch float32 | 1x8 | decode": measured(3.0, [1.5, 1.4, 1.7]),
            "KerasHub float32 | 1x8 | decode": measured(3.0, []),
        },
        "peers": {"tfgptj float32": facts, "HF PyTorch float32": {"memory": {"peak": 2**29}}},
    }
    first, second = rows.generation(found)
    assert first.asked == "each further step, 1x8" and first.ours == ("tfgptj float32", (2.0, 1.0, 4.0))
    assert first.theirs[0] == "HF PyTorch float32" and first.ratio == (1.5, 1.4, 1.7)
    assert second.unit == "MiB" and second.ratio.median == 0.5 and second.verdict == "behind"


def test_rows_of_training(rows: Any) -> None:
    peers = {
        name: {"memory": {"peak": 2**20}}
        for name in ("tfgptj float32", "tfgptj mixed_bfloat16", "HF bfloat16 autocast")
    }
    samples = {"tfgptj float32": [9.0], "tfgptj mixed_bfloat16": [4.0], "HF bfloat16 autocast": [6.0]}
    found = {"settings": {"rows": 4, "tokens": 8}, "samples_ms": samples, "peers": peers}
    step, memory = rows.training(found)
    assert step.asked == "training step, 4 x 8 tokens" and step.ours[0] == "tfgptj mixed_bfloat16"
    assert step.ratio.median == 1.5 and memory.ratio.median == 1.0 and memory.verdict == "level"


def test_rows_of_few_bits(rows: Any) -> None:
    samples = {f"{name} | 1x8 | decode": [ms] for name, ms in {"LiteRT int8": 2.0, "CTranslate2 int8": 1.0}.items()}
    peers = {"LiteRT int8": {"memory": {"peak": 2**20}}, "CTranslate2 int8": {"memory": {"peak": 2**21}}}
    step, memory = rows.few_bits({"samples_ms": samples, "peers": peers})
    assert (step.ours[0], step.verdict, memory.ratio.median) == ("tfgptj LiteRT int8", "behind", 2.0)
    assert rows.few_bits({"samples_ms": {"LiteRT int8 | 1x8 | decode": [2.0]}, "peers": {}}) == []
    names = ("LiteRT int8", "LiteRT int4", "ggml q8_0", "ggml q4_0", "CTranslate2 int8")
    samples = {f"{name} | 1x8 | decode": [2.0] for name in names} | {"LiteRT int8 | 2x8 | decode": [2.0]}
    pairs = [(row.ours[0], row.theirs[0]) for row in rows.few_bits({"samples_ms": samples, "peers": {}})]
    assert pairs == [
        ("tfgptj LiteRT int8", "CTranslate2 int8"),
        ("tfgptj LiteRT int8", "ggml q8_0"),
        ("tfgptj LiteRT int4", "CTranslate2 int8"),
        ("tfgptj LiteRT int4", "ggml q4_0"),
    ]


def test_rows_of_printed_lines(rows: Any) -> None:
    [row] = rows.drafts([{"text": "copied", "plain": {"samples": [4.0]}, "lookup": {"samples": [1.0]}}])
    assert row.asked == "a token, text copied" and row.ratio.median == 4.0 and row.kind == rows.WAY
    samples = {"with": [1.0], "unchecked": [0.5], "without": [2.0], "mark": [0.1]}
    assert [row.ratio.median for row in rows.prefixes([{"samples": samples}])] == [2.0, 4.0]
    names = ("beams", "drawn beams", "groups", "contrastive", "4 rows", "moved")
    found = rows.beams([{"beams": 4, "samples": dict.fromkeys(names, [2.0])}])
    assert len(found) == 4 and {row.kind for row in found} == {rows.LIMIT}
    times = {"served": [2.0], "generate": [1.0]}
    [row] = rows.served([{"parameters": 1}, {"milliseconds": times}])
    assert row.verdict == "behind"
    lines = [
        {"way": way, "samples": {"step_ms": [ms]}, "peak_mb": 100 * ms}
        for way, ms in {"package": 1.0, "Keras's Dense": 2.0, "all weights": 4.0}.items()
    ]
    step, memory, *_ = rows.adapters(lines)
    assert step.theirs[0] == "Keras's Dense" and (step.kind, step.ratio.median, memory.ratio.median) == (
        rows.RIVAL,
        2,
        2,
    )
    assert rows.losses(lines) == []


def test_rows_beside_limits(rows: Any) -> None:
    line = {"format": "given", "dtype": "float32", "all_seconds": [2.0, 4.0], "touch_memory_seconds": 1.5,
            "weights_mb": 300, "peak_after_import_mb": 500, "peak_mb": 1000}  # fmt: skip
    load, memory = rows.loading([line])
    assert (load.ratio.median, memory.ratio.median) == (0.5, 0.8)
    [row] = rows.training_memory([
        {"way": "lora", "optimizer": "adamw", "dtype": "bfloat16", "tokens": 64, "weights_mib": 300, "empty_mib": 500,
         "peak_mib": 1600}
    ])  # fmt: skip
    assert row.ratio.median == 0.5 and row.kind == rows.LIMIT
    found = rows.full_size([{"step": "write", "seconds": 9.0}, {"step": "load", "seconds": 4.0, "cat_seconds": 2.0}])
    assert [(row.ours[0], row.ratio.median) for row in found] == [("tfgptj load", 0.5)]
    line = {"kind": "int8", "share_of_bandwidth": 0.5, "gb_per_token": 5.0, "tokens_per_second": 2.0,
            "bandwidth_gb_per_second": 20.0}  # fmt: skip
    [row] = rows.few_bits_full_size([{"step": "convert"}, line])
    assert (row.ours, row.ratio.median) == (("tfgptj LiteRT int8", (10.0, 10.0, 10.0)), 0.5)


def test_rows_of_scores(rows: Any) -> None:
    runs = {
        "language model": {"validation": {"bits_per_byte": 2.0}, "baselines": {"xz bits per byte": 1.5}},
        "classifier": {"validation": {"accuracy": 60.0}, "baselines": {"naive Bayes": {"accuracy": 80.0}}},
    }
    found = rows.convergence({"results": runs})
    assert [(row.unit, row.ratio.median) for row in found] == [("bits per byte", 0.75), ("accuracy", 0.75)]


# The report


def test_losses_and_gaps_come_first(modules: Any) -> None:
    rows = modules.report_rows
    ahead = rows.compared("ahead of it", "ms", ("tfgptj", [1.0]), ("other", [2.0]))
    behind = rows.compared("behind it", "ms", ("tfgptj", [2.0, 2.0]), ("other", [1.0, 1.5]))
    limit = rows.compared("slower than a limit", "ms", ("tfgptj", [2.0]), ("a limit", [1.0]), rows.LIMIT)
    entry = {"about": "About it.", "command": "x.py --now", "seconds": 3.2, "missing": {"Other": "not there"}}
    report = {
        "machine": {"processor": "P", "processors": 2, "memory_bytes": 2**33, "device": "CPU:0", "load_average": 0.5},
        "versions": {"tfgptj": "1"}, "quick": True, "load_average_at_the_end": 1.0,
        "environments": {"reference": ["torch 2"]},
        "comparisons": {"steps": entry, "more": {**entry, "missing": {"": "why"}}},
    }  # fmt: skip
    text = modules.report_tables.markdown(report, {"steps": [ahead, behind, limit], "more": []})
    order = ["A quick run", "* steps: Other: not there", "* more: why", "ahead: 1 of 2", "steps: behind it", "## steps"]
    assert sorted(order, key=text.index) == order
    assert (
        "| behind it | tfgptj | 2.00 ms | other | 1.25 (1.00 to 1.50) ms | 0.62 (0.50 to 0.75) | **behind** |" in text
    )
    assert "| ahead of it | tfgptj | 1.00 ms | other | 2.00 ms | 2.00 | ahead |" in text
    assert "| slower than a limit | tfgptj | 2.00 ms | a limit | 1.00 ms | 0.50 | of the limit |" in text
    assert text.count("slower than a limit") == 1
    assert "## more\n\n`x.py --now`, 3 s. About it.\n\nNothing was measured." in text
    assert "* reference: torch 2" in text


def test_scripts_are_run_and_their_json_is_kept(modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules.report, "BENCHMARKS", tmp_path)
    python = Path("rivals/python")
    run = modules.report.Run(tmp_path, {"reference": python}, tmp_path / "model", options(quick=True))
    script(
        tmp_path, "writes.py", "open(sys.argv[-1][7:], 'w').write(json.dumps({'missing': {}, 'given': sys.argv[1:-1]}))"
    )
    comparison = modules.report.Comparison(
        "About.",
        "writes.py",
        (),
        ("CHECKPOINT", "--rounds=2"),
        lambda found: [],
        ("reference",),
        True,
        takes_memory=True,
    )
    entry, _ = run.measure("one", comparison)
    assert entry["found"]["given"] == [
        *(str(tmp_path / "model"), "--rounds=2", "--reference", str(python), "--memory=4.0")
    ]
    assert entry["missing"] == {} and entry["command"] == "writes.py CHECKPOINT --rounds=2"
    script(tmp_path, "prints.py", "print('words'); print(json.dumps(sys.argv[1:2] and {'way': sys.argv[1]}))")
    printing = comparison._replace(script="prints.py", quick=(), writes_file=False, others=(), takes_memory=False)
    entry, _ = run.measure("two", printing._replace(runs=(("a",), ("b",))))
    assert entry["found"] == [{"way": "a"}, {"way": "b"}]
    assert (tmp_path / "logs" / "two-a.txt").read_text().startswith("words")


def test_what_fails_is_named(modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules.report, "BENCHMARKS", tmp_path)
    failed = modules.environments.EnvironmentFailed("no environment reference: no network")
    run = modules.report.Run(tmp_path, {"reference": failed}, tmp_path, options())
    comparison = modules.report.Comparison("About.", "x.py", (), None, lambda found: found["rows"], ("reference",))
    script(tmp_path, "x.py", "print('{\"rows\": 1}'); sys.exit('out of memory')")
    entry, rows = run.measure("x", comparison)
    assert rows == [] and entry["missing"] == {
        "reference": "no environment reference: no network",
        "the script": "exit code 1: out of memory",
        "its results": "TypeError: list indices must be integers or slices, not str",
    }
    script(tmp_path, "x.py", 'open(sys.argv[1][7:], \'w\').write(\'{"missing": {"Other": "too large"}}\'); sys.exit(1)')
    entry, _ = run.measure("x", comparison._replace(writes_file=True, others=(), rows=lambda found: []))
    assert entry["missing"] == {"Other": "too large"}
    quick = modules.report.Run(tmp_path, {}, tmp_path, options(quick=True))
    assert quick.measure("x", comparison)[0]["missing"] == {"": "--quick leaves it out"}
    assert run.measure("x", comparison._replace(full_size=True))[0]["missing"] == {"": "needs --full-size"}
    assert modules.report.last_words("\n \n") == "it said nothing"


def test_every_comparison_is_of_a_script_that_is_there(modules: Any) -> None:
    comparisons = modules.report.COMPARISONS.values()
    scripts = {path.name for path in BENCHMARKS.glob("*.py")}
    helpers = {"peers.py", "generators.py", "ggml_file.py", "trainers.py", "random_checkpoint.py"} | {
        f"{name}.py" for name in MODULES
    }
    assert {each.script for each in comparisons} == scripts - helpers
    assert {other for each in comparisons for other in each.others} == set(modules.environments.ENVIRONMENTS)


# Environments


def test_environments_are_built_once(modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments = modules.environments
    built: list[list[str]] = []

    def create(directory: Path, clear: bool, with_pip: bool) -> None:
        python = directory / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        assert env["CFLAGS"] == "-march=native"
        built.append(command)
        fails = "ctranslate2==4.8.5" in command
        return SimpleNamespace(returncode=int(fails), stderr="warning\nERROR: no such version\n" if fails else "")

    monkeypatch.setattr(environments.venv, "create", create)
    monkeypatch.setattr(environments.subprocess, "run", run)
    monkeypatch.setattr(environments.sys, "platform", "linux")
    python = environments.python_of("kerashub", tmp_path)
    assert python == tmp_path / "kerashub" / "bin" / "python" and "keras-hub==0.32.0" in built[0]
    assert environments.python_of("kerashub", tmp_path) == python and len(built) == 1
    (tmp_path / "kerashub" / environments.DONE).write_text("keras-hub==0.1")  # of another release
    environments.python_of("kerashub", tmp_path)
    assert len(built) == 2
    (tmp_path / "kerashub" / environments.DONE).unlink()  # made by somebody else
    environments.python_of("kerashub", tmp_path)
    assert len(built) == 2
    for _ in range(2):  # what failed is tried again
        with pytest.raises(environments.EnvironmentFailed, match="^ERROR: no such version$"):
            environments.python_of("ctranslate2", tmp_path)
    assert len(built) == 4


def test_interpreters(modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def python_of(name: str, home: Path) -> Path:
        raise modules.environments.EnvironmentFailed("no network")

    monkeypatch.setattr(modules.report, "python_of", python_of)
    given = options(reference=Path("here"), kerashub=None, environments=tmp_path)
    found = modules.report.interpreters(given, {"reference", "kerashub"})
    assert found["reference"] == Path("here") and str(found["kerashub"]) == "no environment kerashub: no network"


def test_packages_of_an_interpreter(modules: Any) -> None:
    found = modules.report.packages_of(Path(sys.executable))
    assert any(line.startswith("numpy ") for line in found)
    assert json.dumps(found)
