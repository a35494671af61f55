"""Do the tests notice a fault? Small changes to the model's formulas and tables, one at a time, that tests must catch.

    python tests/mutation.py [--each 25] [--seed 0] [--list] [MODULE ...]

Each change is tried in a process forked from this one, which has imported what is slow to import and computed nothing.
Tests end at the first failure; what runs far longer than the unchanged module did counts as noticed too. Ends with an
error if of some module under 90 % of the changes are noticed. `--list` shows all changes, and which are none.
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
# Reasons of several changes that are none.
LAST = "arrays have two dimensions there"
SORTED = "what nothing is cut from is sorted, too, and left as it was"
# Modules by the part that they belong to, and the tests that must notice, the quickest first.
MODEL = ("test_cached_decoding.py::test_prefill_reads_the_last_real_token", "test_parity.py")
ALONE, VECTORS = "test_processors.py", ("test_processor_vectors.py", "test_chain.py")
TARGETS: dict[str, tuple[str, ...]] = {
    "rotary": ("test_rotary.py", *MODEL),
    "attention": ("test_attention.py", "test_lean_attention.py", *MODEL),
    "losses": ("test_losses.py", "test_pipelines.py::test_default_function", "test_parity.py"),
    "checkpoints.mapping": ("test_mapping.py", "test_save.py::test_files_are_those_of_hugging_face"),
    "generation.processors": (ALONE, *VECTORS),
    "generation.penalties": (*VECTORS, ALONE),
    "generation.constraints": (*VECTORS, ALONE),
}

# Changes that no test can notice: a piece of text, what it becomes, and why that is the same.
EQUIVALENT: dict[str, dict[tuple[str, str], str]] = {
    "rotary": {("ops.sin(angles) * signs", "ops.sin(angles) / signs"): "the signs are 1 and -1"},
    "attention": {
        ("-1000000000.0", "-2000000000.0"): "the softmax of either is 0",
        ("cos, training=False)", "cos, training=True)"): "tells how gradients are computed; nobody asks a step for any",
        ("(0, 0, slot, 0)", "(1, 0, slot, 0)"): "what is as wide as the cache begins at 0: TensorFlow sees to it",
        ("(0, 0, slot, 0)", "(0, 1, slot, 0)"): "the same of heads",
    },
    "losses": {
        ("labels, 0)", "labels, 1)"): "any label will do where none counts",
        ("strict=True", "strict=False"): "there are two of each",
        ("binary, axis=-1)", "binary, axis=1)"): LAST,
        ("logits.shape[-1]", "logits.shape[1]"): LAST,
    },
    "checkpoints.mapping": {("layer: int=0", "layer: int=1"): "for rows of the table that do not name the layer"},
    "generation.processors": {
        ("axis=-1", "axis=1"): LAST,
        ("logits.shape[-1]", "logits.shape[1]"): LAST,
        ("k > 0", "k >= 0"): SORTED,
        ("share < 1", "share <= 1"): SORTED,
        ("share < 1", "share < 2"): SORTED,
        ("keep > 1", "keep >= 1"): "the nearest of all stays as it is",
    },
    "generation.penalties": {
        ("ops.log_softmax(logits, axis=-1)", "ops.log_softmax(logits, axis=1)"): LAST,
        ("logits.shape[-1]", "logits.shape[1]"): LAST,
        ("logits < 0", "logits <= 0"): "0 times and 0 divided by a number are 0",
        ("4 * FORBIDDEN", "5 * FORBIDDEN"): "only has to stay finite",
    },
    "generation.constraints": {("logits.shape[-1]", "logits.shape[1]"): LAST},
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
SMALL = (ast.Constant, ast.UnaryOp, ast.Tuple, ast.List, ast.Slice, ast.keyword)


class Mutant(NamedTuple):
    """One change: the line where it stands, what was there and what stands there instead, and the whole module."""

    line: int
    before: str
    after: str
    tree: ast.Module

    def is_exchange(self, before: str, after: str) -> bool:
        """Whether it puts one piece of text into the place of another."""
        parts = self.before.split(before)
        return any(before.join(parts[:n]) + after + before.join(parts[n:]) == self.after for n in range(1, len(parts)))

    def __str__(self) -> str:
        same = len(os.path.commonprefix([self.before, self.after]))
        return f"line {self.line}: {_short(self.before, same)}  became  {_short(self.after, same)}"


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


def of_module(target: str) -> tuple[Path, str, list[Mutant], dict[tuple[str, str], int]]:
    """A module's path and text, the changes that tests can notice, and of those that they cannot how many are of which
    kind."""
    path = ROOT.joinpath("tfgptj", *target.split(".")).with_suffix(".py")
    source, kinds, found = path.read_text(encoding="utf-8"), EQUIVALENT.get(target, {}), []
    without_effect = dict.fromkeys(kinds, 0)
    for mutant in mutants(source):
        kind = next((kind for kind in kinds if mutant.is_exchange(*kind)), None)
        if kind is None:
            found.append(mutant)
        else:
            without_effect[kind] += 1
    unused = [f"{before} -> {after}" for (before, after), count in without_effect.items() if not count]
    if unused:
        sys.exit(f"{target}: EQUIVALENT has what is not in the module: {', '.join(unused)}")
    return path, source, found, without_effect


def check(target: str, each: int, seed: int) -> bool:
    """Try changes to a module, and tell how many there are and which nothing noticed. Whether enough were noticed."""
    name, tests = f"tfgptj.{target}", TARGETS[target]
    path, source, found, without_effect = of_module(target)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    if run(name, path, ast.parse(source), tests, 3600):
        sys.exit(f"{target}: the tests fail without any change: {' '.join(tests)}")
    seconds = int(3 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)) + 60
    chosen = sorted(random.Random(seed).sample(found, min(each, len(found))), key=lambda mutant: mutant.line)
    # 1: tests failed; 2: they could not be collected; below 0: a signal ended them.
    unnoticed = [mutant for mutant in chosen if run(name, path, mutant.tree, tests, seconds) == 0]
    share = 1 - len(unnoticed) / len(chosen)
    print(f"{target:24} {len(found):7} {sum(without_effect.values()):10} {len(chosen):5} {share:8.0%}", flush=True)
    for mutant in unnoticed:
        print(f"  {mutant}", flush=True)
    return share >= SHARE


def show(target: str) -> None:
    """All changes to a module, and why some of them are none."""
    _, _, found, without_effect = of_module(target)
    print(f"{target}: {len(found)} changes")
    for mutant in found:
        print(f"  {mutant}")
    for (before, after), count in without_effect.items():
        print(f"  without effect, {count} times: {before}  became  {after}: {EQUIVALENT[target][before, after]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TARGETS)}; all if none is named")
    parser.add_argument("--each", type=int, default=25, help="changes to each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--list", action="store_true", help="only show the changes")
    given = parser.parse_args()
    if given.list:
        for target in given.modules or TARGETS:
            show(target)
        return 0
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import hypothesis  # noqa: F401  # what a test may need, but nothing of this package
    import keras  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.numpy  # noqa: F401

    print(f"{'module':24} changes  no effect tried  noticed")
    enough = [check(target, given.each, given.seed) for target in given.modules or TARGETS]
    return int(not all(enough))


def _short(code: str, start: int) -> str:
    """One line, from so far before the place of interest that it can be recognised."""
    line = " ".join(code.split())
    first = max(0, min(start - 30, len(line) - 70))
    return f"{'…' if first else ''}{line[first : first + 70]}{'…' if line[first + 70 :] else ''}"


if __name__ == "__main__":
    sys.exit(main())
