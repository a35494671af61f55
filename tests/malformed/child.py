"""Reads files in processes of their own, which may crash, hang, or take more memory than they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # after which a file counts as one that never ends

# The first process reads nothing: the memory that it takes is none of the files'.
PROGRAM = """
import importlib, json, os, signal, sys, time, zlib
from pathlib import Path
from tfgptj.checkpoints.raw_file import bytes_of
from tfgptj.errors import CheckpointError

def read(path):
    found = {}
    try:
        with reader(Path(path)) as file:
            for name in file.names:
                array = file.read(name)
                assert file.spec(name) == (name, array.shape, array.dtype)
                if len(found) < 100:
                    found[name] = [array.dtype.name, list(array.shape), zlib.crc32(bytes_of(array))]
    except CheckpointError as error:
        return type(error).__name__ + ": " + str(error)[:1000]
    except BaseException as error:
        return "not foreseen: " + repr(error)[:1000]
    return found

def read_all(paths, output):
    for path in paths:
        signal.alarm(seconds)
        begin = time.process_time()
        print(json.dumps([read(path), time.process_time() - begin]), file=output, flush=True)

given = json.load(sys.stdin)
reader = getattr(importlib.import_module(given["module"]), given["reader"])
seconds, together, paths = given["seconds"], given["together"], given["paths"]
for group in [[], *(paths[start : start + together] for start in range(0, len(paths), together))]:
    receiver, sender = os.pipe()
    if not os.fork():
        with open(sender, "w") as output:
            read_all(group, output)
        os._exit(0)
    os.close(sender)
    with open(receiver) as output:
        results = [json.loads(line) for line in output]
    _, status, usage = os.wait3(0)
    if status:
        results.append([f"not foreseen: ended with {status}", 0])
    print(json.dumps([results, usage.ru_maxrss * 1024]), flush=True)
"""


class Outcome(NamedTuple):
    """What became of a file."""

    path: Path
    result: str | dict[str, Any]  # the text of its error, or dtype, shape and checksum by tensor name
    seconds: float  # of the processor's time, which other processes do not lengthen
    memory: int  # bytes that its process took beyond those of one that reads nothing


def read_in_children(reader: type, paths: Sequence[Path], together: int = 1, seconds: int = SECONDS) -> list[Outcome]:
    """Read every tensor of every file, so many files in a process; only the first 100 tensors are told."""
    given = {"module": reader.__module__, "reader": reader.__name__, "paths": [str(path) for path in paths]}
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps({**given, "together": together, "seconds": seconds}),
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert program.returncode == 0, program.stderr[-2000:]
    (_, before), *groups = map(json.loads, program.stdout.splitlines())
    outcomes: list[Outcome] = []
    for number, (results, memory) in enumerate(groups):
        group = paths[number * together : (number + 1) * together]
        unfinished = f"{group[len(results) - 1]}: {results[-1][0]}"
        assert len(results) == len(group) and "not foreseen" not in str(results[-1][0]), unfinished
        found = zip(group, results, strict=True)
        outcomes += [Outcome(path, result, taken, memory - before) for path, (result, taken) in found]
    return outcomes
