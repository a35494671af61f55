"""Do the tests notice a fault? Small changes to the model's formulas and tables, one at a time, that tests must catch.

    python tests/mutation.py [--each 25] [--seed 0] [MODULE ...]

Each change is tried in a process forked from this one, which has imported what is slow to import and computed nothing.
Tests end at the first failure; what runs far longer than the unchanged module did counts as noticed too. Ends with an
error if of some module under 90 % of the changes are noticed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import os
import random
import resource
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SHARE = 0.9
# Modules by the part that they belong to, and the tests that must notice, the quickest first.
MODEL = ("test_cached_decoding.py::test_prefill_reads_the_last_real_token", "test_parity.py")
PROCESSORS = ("test_processors.py", "test_processor_vectors.py", "test_chain.py")
TARGETS: dict[str, tuple[str, ...]] = {
    "rotary": ("test_rotary.py", *MODEL, "test_training_step.py"),
    "attention": (*MODEL, "test_models.py", "test_lean_attention.py"),
    "losses": ("test_losses.py", "test_parity.py"),
    "checkpoints.mapping": (
        *("test_mapping.py", "test_formats.py", "test_save.py::test_files_are_those_of_hugging_face"),
        "test_load.py::test_every_head",
    ),
    "generation.processors": PROCESSORS,
    "generation.penalties": PROCESSORS,
    "generation.constraints": PROCESSORS,
}

# Each of these for all on the left; of a pair either for the other.
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
}  # fmt: skip
FUNCTIONS = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "any": "all", "all": "any",
             "sin": "cos", "cos": "sin", "sum": "max", "mean": "sum", "logical_and": "logical_or",
             "logical_or": "logical_and", "argmax": "argmin", "softmax": "log_softmax"}  # fmt: skip

# Too small to tell by themselves what they are there for.
SMALL = (ast.Constant, ast.UnaryOp, ast.Tuple, ast.List, ast.Slice)


class Mutant(NamedTuple):
    """One change: the line where it stands, what was there and what stands there instead, and the whole module."""

    line: int
    before: str
    after: str
    tree: ast.Module


def mutants(source: str) -> Iterator[Mutant]:
    """All changes to a module, in the order of its lines."""
    count = len(list(_changes(ast.parse(source))))
    for number in range(count):
        tree = ast.parse(source)
        node, around, change = list(_changes(tree))[number]
        before, line = ast.unparse(around), node.lineno
        change()
        yield Mutant(line, before, ast.unparse(around), ast.fix_missing_locations(tree))


def _changes(tree: ast.AST) -> Iterator[tuple[Any, ast.AST, Callable[[], None]]]:
    """Nodes, for each the expression around it that tells what it is there for, and what changes it."""
    for node, around in _code(tree, tree):
        yield from ((node, around, change) for change in _changes_of(node))


def _code(node: ast.AST, around: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """What runs and can be seen: neither docstrings, annotations and types, nor imports and the texts of errors."""
    if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
        return
    yield node, around if isinstance(node, ast.Constant | ast.UnaryOp) else node
    around = around if isinstance(node, SMALL) else node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list", "bases"):
            for child in (value if isinstance(value, list) else [value])[_is_named(node, name) :]:
                if isinstance(child, ast.AST):
                    yield from _code(child, around)


def _is_named(node: ast.AST, field: str) -> bool:
    """Whether the first of a call's arguments only tells a reader of error messages what is called."""
    return field == "args" and isinstance(node, ast.Call) and ast.unparse(node.func) in ("ContextVar", "TypeVar")


def _changes_of(node: Any) -> Iterator[Callable[[], None]]:
    match node:
        case ast.Compare(ops=[operator]) | ast.BinOp(op=operator) | ast.BoolOp(op=operator) if type(operator) in SWAPS:
            name, value = ("ops", [SWAPS[type(operator)]()]) if isinstance(node, ast.Compare) else ("op", None)
            yield lambda: setattr(node, name, value or SWAPS[type(operator)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield lambda: _become(node, node.operand)
        case ast.Constant(value=bool() | int() | float() | str()):
            yield lambda: setattr(node, "value", _other(node.value))
        case ast.Attribute(value=ast.Name(id="ops" | "np" | "math"), attr=name) if name in FUNCTIONS:
            yield lambda: setattr(node, "attr", FUNCTIONS[name])
        case ast.If() | ast.IfExp():
            yield lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield lambda: _become(node, ast.Pass())


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "_"
    return value + 1 if isinstance(value, int) else 2 * value or 1.0


def _become(node: ast.AST, other: ast.AST) -> None:
    """Put another node in the place of this one."""
    node.__class__ = other.__class__  # type: ignore[assignment]
    node.__dict__ = {**{key: node.__dict__[key] for key in ("lineno", "col_offset")}, **other.__dict__}


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module from another tree than its file's."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(self.path))

    def exec_module(self, module: types.ModuleType) -> None:
        module.__file__ = str(self.path)
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


def run(name: str, path: Path, tree: ast.Module, tests: tuple[str, ...], seconds: int) -> int:
    """The exit status of the tests with that tree, in a process that may take so many seconds of CPU time."""
    child = os.fork()
    if not child:
        status = 70
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            quiet = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(quiet, stream)
            sys.meta_path.insert(0, Changed(name, path, tree))
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
            status = int(pytest.main([*options, *(f"tests/{test}" for test in tests)]))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(target: str, each: int, seed: int) -> tuple[int, list[Mutant]]:
    """How many changes to a module were tried, and those that nothing noticed."""
    name, tests = f"tfgptj.{target}", TARGETS[target]
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    if run(name, path, ast.parse(source), tests, 3600):
        sys.exit(f"{target}: the tests fail without any change: {' '.join(tests)}")
    seconds = int(3 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)) + 60
    found = list(mutants(source))
    chosen = sorted(random.Random(seed).sample(found, min(each, len(found))), key=lambda mutant: mutant.line)
    # 1: tests failed; 2: they could not be collected; below 0: a signal ended them.
    return len(chosen), [mutant for mutant in chosen if run(name, path, mutant.tree, tests, seconds) == 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TARGETS)}; all if none is named")
    parser.add_argument("--each", type=int, default=25, help="changes to each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import hypothesis  # noqa: F401  # what a test may need, but nothing of this package
    import keras  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.numpy  # noqa: F401

    failed = False
    print(f"{'module':24} tried  noticed")
    for target in given.modules or TARGETS:
        tried, unnoticed = check(target, given.each, given.seed)
        share = 1 - len(unnoticed) / tried
        failed |= share < SHARE
        print(f"{target:24} {tried:5}  {share:6.0%}", flush=True)
        for mutant in unnoticed:
            print(f"  line {mutant.line}: {_short(mutant.before)}  became  {_short(mutant.after)}", flush=True)
    return int(failed)


def _short(code: str) -> str:
    line = " ".join(code.split())
    return line if len(line) <= 70 else f"{line[:69]}…"


if __name__ == "__main__":
    sys.exit(main())
