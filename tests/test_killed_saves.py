"""Saves that are cut off for real: by signals, in threads beside readers, by full, failing and forbidden disks."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from array_weights import is_same, open_state, random_weights, state_of
from reader_checks import as_somebody_else

from tfgptj import files
from tfgptj.checkpoints.directory import FORMATS, fingerprint
from tfgptj.checkpoints.write import WRITTEN, write_checkpoint
from tfgptj.errors import CheckpointError, TFGPTJError

ROOT = Path(__file__).parents[1]
ANY_FORMAT = pytest.mark.parametrize("form", WRITTEN)
LIMITS = pytest.mark.parametrize("limit", ["1GB", "2KB"])
OLD, NEW = random_weights(1, documents=True), random_weights(2, n_layer=2, layer_norm_epsilon=1e-3)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def belongs(name: str) -> bool:
    """Whether a file is one of a finished save."""
    heads = [head for form in FORMATS.values() for head in (form.whole, form.index)]
    is_shard = any(form.is_shard(name) for form in FORMATS.values())
    return name in (*heads, "config.json", "generation_config.json") or is_shard


# Signals


@pytest.mark.parametrize(("number", "trials"), [("SIGKILL", 50), ("SIGTERM", 15), ("SIGINT", 15)])
def test_whenever_it_is_killed_one_checkpoint_or_the_other_is_there(tmp_path: Path, number: str, trials: int) -> None:
    """The moments differ from run to run; what must hold does not."""
    program = [sys.executable, "tests/malformed/killed_saves.py", str(tmp_path / "saved"), number, str(trials), "0"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == trials
    assert {state for state, _ in found} <= {"checkpoint 0", "checkpoint 1", "checkpoint 2"}
    assert all(belongs(name) for _, names in found for name in names)  # the next save clears up what is left


@ANY_FORMAT
@LIMITS
def test_an_interrupt_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path, form: str, limit: str) -> None:
    write_checkpoint(tmp_path, OLD, format="safetensors")
    before, tensors = contents(tmp_path), []

    def press(done: int, total: int) -> None:
        tensors.append(done)
        if len(tensors) == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, NEW, format=form, max_shard_size=limit, progress=press)
    assert contents(tmp_path) == before


# Threads


def test_readers_see_one_checkpoint_or_the_other_while_they_are_replaced(tmp_path: Path) -> None:
    forms, stop = [*WRITTEN, *WRITTEN], threading.Event()
    write_checkpoint(tmp_path / "old", OLD)
    write_checkpoint(tmp_path / "new", NEW)
    states = state_of(tmp_path / "old"), state_of(tmp_path / "new")
    directory = tmp_path / "shared"
    write_checkpoint(directory, OLD)

    def load() -> set[int]:
        """As `from_pretrained` does: again, if files were replaced between the first look and the last."""
        found: set[int] = set()
        while len(found) < 2 or not stop.is_set():
            before = fingerprint(directory)
            try:
                with open_state(directory) as (fields, weights):
                    if fingerprint(directory) != before:
                        continue
                    state = fields, {name: weights.arrays[name] for name in states[1][1] if _has(weights, name)}
            except (TFGPTJError, OSError):
                if fingerprint(directory) == before:
                    raise
                continue
            assert is_same(state, states[0]) or is_same(state, states[1])
            found.add(int(is_same(state, states[1])))
        return found

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(load) for _ in range(4)]
        try:
            for number, form in enumerate(forms * 5):
                limit = "2KB" if number % 3 else "1GB"
                write_checkpoint(directory, (NEW, OLD)[number % 2], format=form, max_shard_size=limit)
        finally:
            stop.set()
        assert [reader.result(timeout=60) for reader in readers] == [{0, 1}] * 4


def _has(weights: Any, name: str) -> bool:
    return not name.startswith("blocks.1.") or weights.config.n_layer == 2


# Disks


@pytest.fixture(params=[*WRITTEN])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory with a checkpoint, which is there unchanged, and alone, when the test is over."""
    write_checkpoint(tmp_path / "old", OLD, format=request.param)
    (tmp_path / "old" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "old")
    yield tmp_path / "old"
    assert contents(tmp_path / "old") == before


@ANY_FORMAT
@LIMITS
def test_a_full_disk(old: Path, form: str, limit: str) -> None:
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, allowed[1]))
    try:
        with pytest.raises(CheckpointError, match=f"{old}.*: could not be written: File too large"):
            write_checkpoint(old, NEW, format=form, max_shard_size=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)


class Failing:
    """A file that fails after so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Failing:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._file.write(data)


@ANY_FORMAT
@pytest.mark.parametrize("room", [0, 1000, 5000])
def test_a_disk_that_fails_while_it_is_written_to(
    old: Path, monkeypatch: pytest.MonkeyPatch, form: str, room: int
) -> None:
    monkeypatch.setattr(files, "open", lambda *args: Failing(io.FileIO(*args), room), raising=False)
    with pytest.raises(CheckpointError, match=f"{old}: could not be written: Input/output error"):
        write_checkpoint(old, NEW, format=form)


@ANY_FORMAT
@pytest.mark.parametrize("syncs", range(3))
def test_a_disk_that_fails_when_all_is_to_be_on_it(
    old: Path, monkeypatch: pytest.MonkeyPatch, form: str, syncs: int
) -> None:
    done: list[int] = []
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if len(done) == syncs:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done.append(descriptor)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=f"{old}: could not be written: Input/output error"):
        write_checkpoint(old, NEW, format=form)


@ANY_FORMAT
def test_a_name_that_cannot_be_changed(old: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    def fail(source: Any, target: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match=f"{old}/.*: could not be written: Read-only file system"):
        write_checkpoint(old, NEW, format=form)


@ANY_FORMAT
def test_a_directory_that_may_not_be_written_to(form: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # others cannot look into pytest's own
        directory = Path(name)
        write_checkpoint(directory, OLD)
        for path in [*directory.iterdir(), directory]:
            path.chmod(0o555)
        before = contents(directory)
        with as_somebody_else(), pytest.raises(CheckpointError, match=f"{name}/.*written: Permission denied"):
            write_checkpoint(directory, NEW, format=form)
        with as_somebody_else(), pytest.raises(CheckpointError, match=f"{name}/below: could not .* Permission denied"):
            write_checkpoint(directory / "below", NEW, format=form)
        assert contents(directory) == before
        directory.chmod(0o755)
