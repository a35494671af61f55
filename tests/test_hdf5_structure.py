"""What is asked of the HDF5 library: damaged and hostile files, and disks that fail."""

from __future__ import annotations

import io
import os
import signal
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import GOLDENS
from malformed import hdf5_files
from malformed.child import read_in_children
from malformed.hdf5_files import FailingDisk, InterruptingDisk, open_objects
from reader_checks import assert_equal, read

from tfgptj import limits
from tfgptj.checkpoints.hdf5 import HDF5File
from tfgptj.checkpoints.hdf5_structure import LibraryFile, find_tensors, signals_deferred
from tfgptj.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError


@pytest.mark.parametrize("case", hdf5_files.REFUSED)
def test_damaged_and_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    build, text, error = hdf5_files.REFUSED[case]
    hdf5_files.write_secret(tmp_path)
    path = tmp_path / "tf_model.h5"
    build(path)
    with pytest.raises(error, match=text) as caught:
        HDF5File(path)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == [hdf5_files.SECRET, "tf_model.h5"]


def test_hostile_files_take_little_memory_and_open_no_others(tmp_path: Path) -> None:
    hdf5_files.write_secret(tmp_path)
    unsafe = [case for case, (_, _, error) in hdf5_files.REFUSED.items() if error is UnsafeCheckpointError]
    cases = [*unsafe, "nothing stored", "nothing stored, gzip", "some chunks stored", "chunks too wide"]
    for case in cases:
        hdf5_files.REFUSED[case].build(tmp_path / case)
    (tmp_path / hdf5_files.SECRET).unlink()
    os.mkfifo(tmp_path / hdf5_files.SECRET)  # whoever opened this would wait for ever
    for found in read_in_children(HDF5File, [tmp_path / case for case in cases], together=len(cases)):
        assert "Error: " in found.result
        assert found.memory < 2**25


def test_a_failing_disk_is_reported_wherever_it_fails() -> None:
    opened = open_objects()
    content = (GOLDENS / "formats" / "tensorflow" / "causal_lm" / "tf_model.h5").read_bytes()
    for calls in range(1000):
        disk = FailingDisk(content, calls)
        try:
            found = find_tensors(Path("m.h5"), LibraryFile(disk), len(content))
        except CheckpointError as error:
            assert str(error) == "m.h5: the header could not be read: Input/output error"
            assert type(error) is CheckpointError
        else:
            assert len(found) == 25
            break
    assert calls > 20
    assert open_objects() == opened


def test_an_interrupt_waits_until_the_library_is_done() -> None:
    opened = open_objects()
    content = (GOLDENS / "formats" / "tensorflow" / "causal_lm" / "tf_model.h5").read_bytes()
    for calls in (0, 1, 10, 20):
        with pytest.raises(KeyboardInterrupt):
            find_tensors(Path("m.h5"), LibraryFile(InterruptingDisk(content, calls)), len(content))
        assert open_objects() == opened


def test_signals_reach_those_who_wait_for_them() -> None:
    caught: list[int] = []
    usual = signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    try:
        with signals_deferred():
            signal.raise_signal(signal.SIGUSR1)
            assert not caught
        assert caught == [signal.SIGUSR1]
        with ThreadPoolExecutor(1) as pool:  # only the main thread may change what signals do, and needs to
            pool.submit(lambda: signals_deferred().__enter__()).result()
    finally:
        signal.signal(signal.SIGUSR1, usual)


@pytest.mark.parametrize("address", [2**62, 2**63 - 1])
def test_an_address_far_behind_the_file_is_no_failing_disk(tmp_path: Path, address: int) -> None:
    """To the operating system it is an invalid argument. Here it is that of what some driver has to say."""
    path = tmp_path / "m.h5"
    content = bytearray(hdf5_files.valid_bytes(path))
    sound = read(HDF5File, path)
    content[48:56] = struct.pack("<Q", address)
    path.write_bytes(content)
    assert_equal(read(HDF5File, path), sound)


@pytest.mark.parametrize("count", [5, 10])
def test_chunks_are_counted_over_all_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(limits, "MAX_HDF5_CHUNKS", 9)
    with h5py.File(tmp_path / "m.h5", "w") as h5:
        for name in "xyz"[: 10 // count]:
            h5.create_dataset(name, data=np.ones(count), chunks=(1,))
    with pytest.raises(CheckpointFormatError, match=f"has {count} chunks; at most 9 are read from a file; rewrite it"):
        HDF5File(tmp_path / "m.h5")


def test_h5py_may_read_in_its_other_way() -> None:
    assert LibraryFile(io.BytesIO(b"abc")).read(2) == b"ab"
