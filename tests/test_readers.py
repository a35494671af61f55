"""What holds for the reader of every weight format: what it reads, what it refuses, and how it says so."""

from __future__ import annotations

import os
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import msgpack_files, torch_files
from reader_checks import (
    FORMATS,
    ONE,
    SOUND,
    Tensors,
    as_somebody_else,
    assert_blocks_are_rows,
    assert_equal,
    read,
    specs_of,
    tensors_of,
)

from tfgptj.checkpoints.flax_msgpack import write_flax
from tfgptj.checkpoints.hdf5 import write_hdf5
from tfgptj.checkpoints.raw_file import RawFile
from tfgptj.checkpoints.safetensors import write_safetensors
from tfgptj.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError

WRITERS = {
    "safetensors": write_safetensors,
    "h5": lambda path, specs, tensors: write_hdf5(path, specs, tensors, None),
    "msgpack": write_flax,
}
ANY_FORMAT = pytest.mark.parametrize("form", FORMATS)
ANY_WRITER = pytest.mark.parametrize("form", WRITERS)


# What is read


@ANY_FORMAT
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject) -> None:
    original, path = data.draw(tensors_of(form)), tmp_path_factory.mktemp(form) / "file"
    FORMATS[form].write(path, original)
    assert_equal(read(FORMATS[form].reader, path), original)
    with FORMATS[form].reader(path) as file:
        assert_blocks_are_rows(file)
        assert {name: file.spec(name) for name in file.names} == {spec.name: spec for spec in specs_of(original)}


@ANY_FORMAT
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (64,), (65, 3), (200, 2, 2)])
def test_blocks_are_the_rows_of_the_tensor(tmp_path: Path, form: str, shape: tuple[int, ...]) -> None:
    original = np.random.default_rng(0).standard_normal(shape, np.float32)
    FORMATS[form].write(tmp_path / "file", {"x": original})
    with FORMATS[form].reader(tmp_path / "file") as file:
        assert_blocks_are_rows(file)
        assert all(len(block) <= 64 for block in file.blocks("x"))
        if len(original.reshape(-1)) > 130:  # some rows alone
            parts = [block.copy() for block in file.blocks("x", 5, 40)]
            np.testing.assert_array_equal(np.concatenate(parts), original[5:40])


def huge_and_empty(form: str, path: Path) -> None:
    """A tensor `x` of shape [2^58, 0], which takes no bytes."""
    if form == "safetensors":
        header = b'{"x":{"dtype":"F32","shape":[288230376151711744,0],"data_offsets":[0,0]}}'
        path.write_bytes(struct.pack("<Q", len(header)) + header)
    elif form == "bin":
        path.write_bytes(torch_files.torch_file(torch_files.dict_of({"x": torch_files.tensor(shape=(2**58, 0))})))
    elif form == "h5":
        with h5py.File(path, "w") as h5:
            h5.create_dataset("x", (2**58, 0), np.float32)
    else:
        array = msgpack_files.array((2**58, 0), values=b"")
        path.write_bytes(msgpack_files.mapping((msgpack_files.text("x"), array)))


@ANY_FORMAT
def test_a_tensor_may_have_many_rows_of_nothing(tmp_path: Path, form: str) -> None:
    huge_and_empty(form, tmp_path / "file")
    with FORMATS[form].reader(tmp_path / "file") as file:
        assert file.read("x").shape == file.spec("x").shape == (2**58, 0)
        assert list(file.blocks("x")) == []


@ANY_FORMAT
def test_threads_read_at_once(tmp_path: Path, form: str) -> None:
    expected = {f"{number}/x": np.full(100, number, np.float32) for number in range(40)}
    FORMATS[form].write(tmp_path / "file", dict(sorted(expected.items())))
    with FORMATS[form].reader(tmp_path / "file") as file, ThreadPoolExecutor(8) as pool:
        names = list(expected) * 8
        assert_equal(dict(zip(names, pool.map(file.read, names), strict=True)), expected)


@ANY_FORMAT
def test_opening_reads_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    FORMATS[form].write(tmp_path / "file", {str(number): np.ones(10**6, np.float32) for number in range(3)})
    tracemalloc.start()
    try:
        FORMATS[form].reader(tmp_path / "file").close()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# What is no file


@ANY_FORMAT
def test_things_that_are_no_files(tmp_path: Path, form: str) -> None:
    reader, kind = FORMATS[form].reader, FORMATS[form].file
    with pytest.raises(CheckpointError, match="missing: there is no such file"):
        reader(tmp_path / "missing")
    with pytest.raises(CheckpointFormatError, match=f"is a directory, expected {kind}"):
        reader(tmp_path)
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(CheckpointError, match="loop: cannot be opened: Too many levels of symbolic links"):
        reader(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointFormatError, match=f"pipe: is no regular file, expected {kind}"):
        reader(tmp_path / "pipe")
    with pytest.raises(CheckpointFormatError, match=f"/dev/zero: is no regular file, expected {kind}"):
        reader(Path("/dev/zero"))


@ANY_FORMAT
def test_a_file_that_may_not_be_read(form: str) -> None:
    with tempfile.TemporaryDirectory() as directory:  # others cannot look into pytest's own
        path = Path(directory) / "file"
        SOUND[form].build(path)
        path.chmod(0)
        Path(directory).chmod(0o755)
        with as_somebody_else(), pytest.raises(CheckpointError, match="cannot be opened: Permission denied") as caught:
            FORMATS[form].reader(path)
    assert type(caught.value) is CheckpointError
    assert str(path) in str(caught.value)


# What is something else

STRANGERS = {
    "empty": (b"", "the file is empty"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*`git lfs pull`"),
    "web page": (b"<!DOCTYPE html><html></html>", "a web page or XML, not weights: an error page was saved"),
    "page in capitals": (b"<HTML><BODY>404</BODY></HTML>" + bytes(100), "a web page or XML, not weights"),
    "pickle": (torch_files.GOOD, "pickle.*never read"),
    "zeros": (bytes(1000), "not a|expected a map"),
    "text": (b"Entry not found", "not a|expected a map"),
}


@pytest.mark.parametrize("case", STRANGERS)
@ANY_FORMAT
def test_what_is_often_saved_as_weights_is_named(tmp_path: Path, form: str, case: str) -> None:
    content, text = STRANGERS[case]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises((CheckpointFormatError, UnsafeCheckpointError), match=text) as caught:
        FORMATS[form].reader(tmp_path / "file")
    assert str(caught.value).startswith(f"{tmp_path / 'file'}: ")


@pytest.mark.parametrize("stored", SOUND)
@ANY_FORMAT
def test_the_content_counts_and_not_the_name(tmp_path: Path, form: str, stored: str) -> None:
    if SOUND[stored].form == form:
        return
    path = tmp_path / f"model.{form}"
    SOUND[stored].build(path)
    with pytest.raises(CheckpointFormatError, match=str(path)) as caught:
        FORMATS[form].reader(path)
    if stored.startswith(("bin", "h5")):  # which are known by their first bytes
        assert "under a wrong name" in str(caught.value)


@pytest.mark.parametrize("added", ["bin", "h5", "safetensors", "msgpack", "a byte", "zeros", "itself"])
@pytest.mark.parametrize("sound", SOUND)
def test_a_file_is_nothing_else_besides(tmp_path: Path, sound: str, added: str) -> None:
    """Nothing may stand behind a sound file or before it, or two programs could read two files in one."""
    path, other = tmp_path / "file", tmp_path / "other"
    SOUND[sound].build(path)
    if added in FORMATS:
        SOUND[added].build(other)
    content = path.read_bytes()
    behind = {"a byte": b"\0", "zeros": bytes(512), "itself": content}.get(added) or other.read_bytes()
    for polyglot in (content + behind, behind + content):
        path.write_bytes(polyglot)
        with pytest.raises((CheckpointFormatError, UnsafeCheckpointError), match=str(path)):
            FORMATS[SOUND[sound].form].reader(path)


# What goes wrong later


@ANY_FORMAT
def test_reading_what_is_not_there(tmp_path: Path, form: str) -> None:
    path = tmp_path / "file"
    FORMATS[form].write(path, {"x": np.ones(10_000)})
    with FORMATS[form].reader(path) as file:
        for ask in (file.spec, file.read, lambda name: next(file.blocks(name))):
            with pytest.raises(CheckpointError, match="file: holds no tensor 'y'"):
                ask("y")
        os.truncate(path, 1000)
        with pytest.raises(CheckpointFormatError, match="cut short while being read: tensor 'x' ends"):
            file.read("x")
    with pytest.raises(CheckpointError, match="tensor 'x' was asked for after the file was closed"):
        file.read("x")
    file.close()


@ANY_FORMAT
def test_a_failing_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    class Broken:
        def seek(self, start: int) -> None:
            raise OSError(5, "Input/output error")

        def close(self) -> None: ...

    path = tmp_path / "file"
    SOUND[form].build(path)
    with FORMATS[form].reader(path) as file:
        name = file.names[0]
        file._file.close()
        monkeypatch.setattr(file, "_file", Broken())
        with pytest.raises(CheckpointError, match=f"tensor '{name}' could not be read: Input/output error"):
            file.read(name)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_refused_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    closed: list[RawFile] = []
    close = RawFile.close
    monkeypatch.setattr(RawFile, "close", lambda self: (closed.append(self), close(self)))
    (tmp_path / "file").write_bytes(b"hello")
    with pytest.raises(CheckpointFormatError):
        FORMATS[form].reader(tmp_path / "file")
    assert closed[0]._file.closed


# What is written


@ANY_WRITER
@pytest.mark.parametrize(
    ("announced", "given", "text"),
    [
        ({"x": ONE}, {"y": ONE}, r"expected tensor 'x', float32 \[2\], got 'y', float32 \[2\]"),
        ({"x": ONE}, {"x": np.ones(3, np.float32)}, r"got 'x', float32 \[3\]"),
        ({"x": ONE}, {"x": np.ones(2)}, r"got 'x', float64 \[2\]"),
        ({"x": ONE, "y": ONE}, {"x": ONE}, r"expected tensor 'y', float32 \[2\], got nothing"),
        ({"x": ONE}, {"x": ONE, "y": ONE}, "got more tensors than the 1 that were announced"),
        ({"x": np.ones(2, complex)}, {"x": np.ones(2, complex)}, "tensor 'x': .*complex128"),
    ],
)
def test_tensors_must_be_those_announced(
    tmp_path: Path, form: str, announced: Tensors, given: Tensors, text: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=text):
        WRITERS[form](path, specs_of(announced), given.items())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@ANY_WRITER
def test_two_tensors_cannot_have_one_name(tmp_path: Path, form: str) -> None:
    text = {"safetensors": "the name 'x' is taken", "h5": "cannot store 'x'", "msgpack": "'x': a part of the name is"}
    with pytest.raises(CheckpointError, match=text[form]):
        WRITERS[form](tmp_path / "m", specs_of({"x": ONE}) * 2, [("x", ONE)] * 2)
    assert list(tmp_path.iterdir()) == []


@ANY_WRITER
def test_only_one_tensor_is_held_at_a_time(tmp_path: Path, form: str) -> None:
    def values() -> Iterable[tuple[str, np.ndarray]]:
        for name in "abcdefgh":
            assert not (tmp_path / "m").exists()
            yield name, np.ones(2**18, np.float32)

    specs = specs_of(dict.fromkeys("abcdefgh", np.ones(2**18, np.float32)))
    tracemalloc.start()
    try:
        WRITERS[form](tmp_path / "m", specs, values())
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    finally:
        tracemalloc.stop()


@ANY_WRITER
@pytest.mark.parametrize("moment", ["values", "sync"])
def test_a_disk_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, moment: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    def values() -> Iterator[tuple[str, np.ndarray]]:
        if moment == "values":
            fail()
        yield "x", ONE

    (tmp_path / "m").write_bytes(b"old")
    writer: Callable[..., object] = WRITERS[form]
    if moment == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        writer(tmp_path / "m", specs_of({"x": ONE}), values())
    assert (tmp_path / "m").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
