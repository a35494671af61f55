"""Programs to compare, each in a process of its own that loads once and then works when it is asked.

Libraries of different environments are measured in one run this way, in turns, so that all meet the same neighbours on
the machine. A request and its answer are a line of JSON each; what libraries print of their own is passed over.

Worker processes import this module with nothing but the standard library.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ANSWER = "answer "


class PeerFailed(Exception):
    """A peer could not do what it was asked for."""


class Host:
    """A worker process, seen from the outside.

    Args:
        command: starts a program that calls :func:`serve`.

    Raises:
        PeerFailed: with the program's last words, if it cannot start.
    """

    def __init__(self, command: list[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed by stop()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
        except OSError as error:
            self._errors.close()
            raise PeerFailed(str(error)) from None
        try:
            self.facts = self._answer()
        except PeerFailed:
            self.stop()
            raise

    def ask(self, method: str, **arguments: Any) -> Any:
        """Call a method of the worker.

        Raises:
            PeerFailed: if it raises, or the process ends.
        """
        if self._process.poll() is not None:
            raise PeerFailed("ended before")
        assert self._process.stdin is not None
        print(json.dumps([method, arguments]), file=self._process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        """End the process and wait for it, so that its memory is free."""
        self._process.communicate()  # closes its standard input, and ours of its output
        self._errors.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                found = json.loads(line.removeprefix(ANSWER))
                if "error" in found:
                    raise PeerFailed(found["error"])
                return found["value"]
        code = self._process.wait()
        raise PeerFailed(f"ended with exit code {code}: {last_line(self._errors)}")


def serve(start: Callable[[], Any]) -> None:
    """Be a worker: make an object and call its methods on request, until standard input ends.

    Its `facts` is called first, to say what it is.
    """
    worker = _answered(start)
    if worker is None:
        sys.exit(1)
    _say({"value": worker.facts()})
    for line in sys.stdin:
        method, arguments = json.loads(line)
        value = _answered(lambda: {"value": getattr(worker, method)(**arguments)})  # noqa: B023  # called at once
        if value is not None:
            _say(value)


class Peer:
    """A worker that stands for a library."""

    packages: tuple[str, ...] = ()  # whose versions are told

    def facts(self) -> dict[str, Any]:
        """What this worker is, in plain values."""
        names = {name: importlib.metadata.version(name) for name in self.packages}
        return {"versions": {**names, "python": platform.python_version()}, "threads": processors(), "memory": memory()}


def memory() -> dict[str, int]:
    """Bytes of this process that are resident, now and at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: 1024 * int(status[key].split()[0]) for name, key in {"resident": "VmRSS", "peak": "VmHWM"}.items()}


def processors() -> int:
    """How many processors this process may use: as many threads are given to each library."""
    return len(os.sched_getaffinity(0))


def last_line(file: Any) -> str:
    """What a program said last."""
    file.seek(0)
    lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _answered(call: Callable[[], Any]) -> Any:
    """What a call returns; or None, if it failed and that was said."""
    try:
        return call()
    except Exception as error:
        _say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        return None


def _say(found: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(found), flush=True)
