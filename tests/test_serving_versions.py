"""Versions of a served model: whole, or not there, whenever a process is killed and whatever the disk does."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest
from malformed.killed_saves import in_a_process

from tfgptj.errors import CheckpointError, InputError
from tfgptj.serving.versions import new_version, versions_in

FILES = {"saved_model.pb": b"graph" * 2000, "fingerprint.pb": b"print", "variables/variables.index": b"index" * 500}


def write(directory: Path, version: int | None = None) -> Path:
    """What an export writes, file by file."""
    with new_version(directory, version) as (path, target):
        for name, data in FILES.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(data)
    return target


def is_whole(path: Path) -> bool:
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return found == FILES


def write_for_ever(directory: Path) -> None:
    while True:
        write(directory)


def test_whenever_it_is_killed_no_version_is_half_there(tmp_path: Path) -> None:
    """The moments differ from run to run; what must hold does not."""
    chance, before = random.Random(0), 0
    for _ in range(40):
        child = in_a_process(write_for_ever, tmp_path)
        time.sleep(chance.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = versions_in(tmp_path)
        assert len(found) >= before
        assert all(is_whole(tmp_path / str(version)) for version in found)
        before = len(found)
    last = write(tmp_path)
    assert last.name == str(before + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, versions_in(tmp_path)))


def test_versions_follow_each_other(tmp_path: Path) -> None:
    assert [write(tmp_path / "new").name, write(tmp_path / "new", 7).name, write(tmp_path / "new").name] == [
        "1",
        "7",
        "8",
    ]
    with pytest.raises(CheckpointError, match="new/7 exists already: give another version, or none for the next"):
        write(tmp_path / "new", 7)


@pytest.mark.parametrize("version", [0, -1, 2**31, True, "3", 1.0])
def test_what_is_no_version(tmp_path: Path, version: object) -> None:
    with pytest.raises(InputError, match="version must be an integer from 1 to 2,147,483,647, got"):
        write(tmp_path, version)  # type: ignore[arg-type]


def test_another_export_that_is_faster(tmp_path: Path) -> None:
    taken = pytest.raises(CheckpointError, match="could not be written: Directory not empty")
    with taken, new_version(tmp_path, None) as (path, target):
        (path / "mine").write_bytes(b"")
        target.mkdir()
        (target / "theirs").write_bytes(b"")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(KeyboardInterrupt), new_version(tmp_path, None) as (path, _):
        (path / "half").write_bytes(b"")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("syncs", range(5))
def test_a_disk_that_fails_when_all_is_to_be_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: int) -> None:
    done: list[int] = []

    def fail(descriptor: int) -> None:
        if len(done) == syncs:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done.append(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: could not be written: Input/output error"):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="file: could not be written: File exists"):
        write(tmp_path / "file")
