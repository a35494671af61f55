"""What is asked of the HDF5 library: damaged and hostile files, and disks that fail."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDENS
from malformed import hdf5_files
from malformed.child import read_in_child
from malformed.hdf5_files import FailingDisk, open_objects

from tfgptj.checkpoints.hdf5 import HDF5File
from tfgptj.checkpoints.hdf5_structure import LibraryFile, find_tensors
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
    results, memory = read_in_child(HDF5File, [tmp_path / case for case in cases])
    assert all("Error: " in result for result in results)
    assert memory < 2**25


def test_every_prefix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tf_model.h5"
    valid = hdf5_files.valid_bytes(path)
    for length in (*range(200), *np.linspace(200, len(valid) - 1, 64, dtype=int)):
        path.write_bytes(valid[:length])
        with pytest.raises(CheckpointFormatError, match="the file is empty|not an HDF5 file|cut short"):
            HDF5File(path)


def flipped_bits(content: bytes, directory: Path, count: int) -> list[Path]:
    """Copies with one other bit each."""
    chance, paths = random.Random(0), []
    for number in range(count):
        values = bytearray(content)
        values[chance.randrange(len(values))] ^= 1 << chance.randrange(8)
        paths.append(directory / f"{number}.h5")
        paths[-1].write_bytes(values)
    return paths


@pytest.mark.parametrize("chunked", [False, True])
def test_flipped_bits_give_an_error_or_tensors_of_the_stored_sizes(tmp_path: Path, chunked: bool) -> None:
    """In another process: the HDF5 library is written in C, and has crashed on damaged files before."""
    path, sound = tmp_path / "sound.h5", {"lm_head/kernel:0": ["float32", 3, 4], "wte/weight:0": ["float16", 70, 3]}
    content = hdf5_files.valid_bytes(path, **({"chunks": (40, 2), "compression": "gzip"} if chunked else {}))
    results, memory = read_in_child(HDF5File, [path, *flipped_bits(content, tmp_path, 500)])
    assert results[0] == sound
    errors = [result for result in results[1:] if isinstance(result, str)]
    assert len(errors) > 50
    assert all(error.startswith(("CheckpointFormatError: ", "UnsafeCheckpointError: ")) for error in errors)
    # Nothing confirms a name, or the shape of what is in chunks: that must be as the configuration calls for.
    found = [shape for result in results[1:] if not isinstance(result, str) for shape in result.values()]
    assert chunked or all(shape in sound.values() for shape in found)
    assert memory < 2**25


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


def test_h5py_may_read_in_its_other_way() -> None:
    assert LibraryFile(io.BytesIO(b"abc")).read(2) == b"ab"
