"""Opens files in a process of their own, which may crash, or take more memory than it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import importlib, json, resource, sys
from tfgptj.errors import CheckpointError
module, name, *paths = sys.stdin.read().split("\\n")
reader = getattr(importlib.import_module(module), name)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in paths:
    try:
        with reader(path) as file:
            arrays = {name: file.read(name) for name in file.names}
            result = {name: [array.dtype.name, *array.shape] for name, array in arrays.items()}
    except CheckpointError as error:
        result = type(error).__name__ + ": " + str(error)
    print(json.dumps(result), flush=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
"""


class Outcome(NamedTuple):
    """What a process made of some files."""

    results: list[Any]  # for each file, the text of its error or dtype and shape by tensor name
    memory: int  # bytes by which its memory grew at most


def read_in_child(reader: type, paths: Iterable[Path], timeout: float = 60) -> Outcome:
    """Read every tensor of every file, and tell which file it was if that does not come to an end."""
    files = [str(path) for path in paths]
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM], input="\n".join([reader.__module__, reader.__name__, *files]),
        capture_output=True, text=True, timeout=timeout, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = child.stdout.splitlines()
    unfinished = files[len(lines)] if len(lines) < len(files) else ""
    assert child.returncode == 0, f"{unfinished}: ended with {child.returncode}: {child.stderr[-2000:]}"
    return Outcome([json.loads(line) for line in lines[:-1]], int(lines[-1]) * 1024)
