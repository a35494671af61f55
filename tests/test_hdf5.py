"""The reader and writer of tf_model.h5: against Hugging Face's files and h5py."""

from __future__ import annotations

import io
import json
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import hdf5_files
from malformed.hdf5_files import FailingDisk, InterruptingDisk, open_objects
from reader_checks import ONE, Tensors, assert_equal, read, specs_of, tensors_of

from tfgptj.checkpoints import hdf5
from tfgptj.checkpoints.hdf5 import MODEL_NAMES, HDF5File, index_name, write_hdf5
from tfgptj.checkpoints.mapping import plan
from tfgptj.checkpoints.safetensors import SafetensorsFile
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, CheckpointFormatError

FORMATS = GOLDENS / "formats" / "tensorflow"
WHOLE = {  # by head: what Hugging Face's TensorFlow class wrote, and the weights that it was given
    "none": ("headless", "loading/headless"),
    "causal_lm": ("causal_lm", "base/causal_lm"),
    "classification": ("classification", "base/classification"),
    "question_answering": ("question_answering", "base/question_answering"),
}
NOISE = np.random.default_rng(0).bytes(5000)


def write(path: Path, tensors: Tensors, model_name: str | None = "tfgptj_model") -> Path:
    write_hdf5(path, specs_of(tensors), tensors.items(), model_name)
    return path


def weights(head: str) -> Tensors:
    """PyTorch's weights under the table's TensorFlow names, in the order of the plan."""
    directory = GOLDENS / WHOLE[head][1]
    found = {}
    with SafetensorsFile(directory / "model.safetensors") as file:
        for entry in plan(GPTJConfig.from_pretrained(directory), head):
            below = "" if entry.in_head else "transformer/"
            stored = file.read(f"{'' if entry.in_head or head == 'none' else 'transformer.'}{entry.names['torch']}")
            found[f"{below}{entry.names['tensorflow']}"] = np.ascontiguousarray(stored.T if entry.transpose else stored)
    return found


# Hugging Face's files


@pytest.mark.parametrize("head", WHOLE)
def test_hugging_faces_files_hold_pytorchs_weights(head: str) -> None:
    path = FORMATS / WHOLE[head][0] / "tf_model.h5"
    assert_equal(read(HDF5File, path), weights(head))
    with HDF5File(path) as file:
        assert file.metadata == {"format": "tf"}
        assert file.spec("transformer/wte/weight:0") == ("transformer/wte/weight:0", (48, 16), np.float32)


def test_the_goldens_bear_models_names_with_and_without_a_number() -> None:
    with h5py.File(FORMATS / "headless" / "tf_model.h5") as h5:
        assert list(h5["transformer"]) == ["tfgptj_model_1"]
    with h5py.File(FORMATS / "causal_lm" / "tf_model.h5") as h5:
        assert list(h5["transformer"]) == list(h5["lm_head"]) == ["tfgptj_for_causal_lm"]


def test_hugging_faces_shards_and_their_index() -> None:
    index = json.loads((FORMATS / "sharded" / "tf_model.h5.index.json").read_text())["weight_map"]
    assert all(key.startswith("tfgptj_for_causal_lm_1/") for key in index)
    found = {}
    for shard in sorted(set(index.values())):
        tensors = read(HDF5File, FORMATS / "sharded" / shard)
        assert set(tensors) == {index_name(key) for key in index if index[key] == shard}
        found |= tensors
    assert_equal(found, weights("causal_lm"))


def test_a_key_without_a_models_name_stays_as_it_is() -> None:
    assert index_name("kernel:0") == "kernel:0"


def attributes(path: Path) -> dict[str, Any]:
    found = {}
    with h5py.File(path) as h5:
        for place in ("/", *h5):
            for name, value in h5[place].attrs.items():
                names = [item.decode() if isinstance(item, bytes) else item for item in np.ravel(value)]
                found[f"{place} {name}"] = names
    return {key: value for key, value in found.items() if not key.endswith("keras_version")}


@pytest.mark.parametrize("head", WHOLE)
def test_what_is_written_is_what_hugging_face_writes(tmp_path: Path, head: str) -> None:
    """Its classes read our files without a missing or unexpected key: that was tried with transformers 4.57.6."""
    golden = FORMATS / WHOLE[head][0] / "tf_model.h5"
    path = write(tmp_path / "tf_model.h5", weights(head), "tfgptj_model_1" if head == "none" else MODEL_NAMES[head])
    assert attributes(path) == attributes(golden)
    with h5py.File(path) as ours, h5py.File(golden) as theirs:
        places: tuple[list[str], list[str]] = [], []
        ours.visit(places[0].append)
        theirs.visit(places[1].append)
        assert places[0] == places[1]
        for place in places[0]:
            if isinstance(ours[place], h5py.Dataset):
                np.testing.assert_array_equal(ours[place], theirs[place])


def test_a_shard_is_flat_and_lists_its_tensors(tmp_path: Path) -> None:
    tensors = read(HDF5File, FORMATS / "sharded" / "tf_model-00003-of-00003.h5")
    path = write(tmp_path / "shard.h5", dict(sorted(tensors.items())), None)
    assert attributes(path) == attributes(FORMATS / "sharded" / "tf_model-00003-of-00003.h5")
    assert_equal(read(HDF5File, path), tensors)


def test_many_names_are_spread_over_attributes_as_keras_does(tmp_path: Path) -> None:
    names = [f"transformer/h_._{layer}/attn/q_proj/kernel:0" for layer in range(1500)]
    path = write(tmp_path / "tf_model.h5", dict.fromkeys(names, ONE), "tfgptj_model")
    with h5py.File(path) as h5:
        assert list(h5["transformer"].attrs) == ["weight_names0", "weight_names1"]
        parts = [h5["transformer"].attrs[f"weight_names{number}"] for number in (0, 1)]
    assert [name.decode() for part in parts for name in part] == [f"tfgptj_model/{name}" for name in names]


# Reading


@settings(max_examples=40, deadline=None, derandomize=True)
@given(original=tensors_of("h5"), model_name=st.sampled_from([None, *MODEL_NAMES.values()]))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, original: Tensors, model_name: str | None
) -> None:
    path = write(tmp_path_factory.mktemp("a") / "tf_model.h5", original, model_name)
    assert_equal(read(HDF5File, path), original)
    with h5py.File(path) as h5:
        for name, array in original.items():
            place = name if model_name is None else f"{name.split('/')[0]}/{model_name}/{name}"
            assert h5[place][()].tobytes() == array.tobytes()


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"shuffle": True},
                                     {"compression": "gzip", "shuffle": True, "compression_opts": 9}])  # fmt: skip
@pytest.mark.parametrize(("shape", "chunks"), [((70, 5), (32, 2)), ((3, 4, 5), (3, 4, 5)), ((9,), (4,))])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_chunks_are_put_together(
    tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, options: dict[str, Any]
) -> None:
    original = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    with h5py.File(tmp_path / "tf_model.h5", "w") as h5:
        h5.create_dataset("x", data=original, chunks=chunks, **options)
    assert_equal(read(HDF5File, tmp_path / "tf_model.h5"), {"x": original})
    with HDF5File(tmp_path / "tf_model.h5") as file:
        np.testing.assert_array_equal(np.concatenate(list(file.blocks("x"))), original)


def test_chunks_may_have_been_left_uncompressed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "tf_model.h5", "w") as h5:
        x = h5.create_dataset("x", (2,), np.float32, chunks=(2,), compression="gzip", shuffle=True)
        x.id.write_direct_chunk((0,), ONE.tobytes(), 0b11)
        h5.create_dataset("empty", (0, 3), np.float32, chunks=(1, 3), maxshape=(None, 3), compression="gzip")
    assert_equal(read(HDF5File, tmp_path / "tf_model.h5"), {"x": ONE, "empty": np.ones((0, 3), np.float32)})


def test_attributes_are_never_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path / "tf_model.h5", {"lm_head/kernel:0": ONE})
    with h5py.File(path, "a") as h5:
        h5.attrs["model_config"] = json.dumps({"class_name": "Lambda", "config": {"function": "os.system"}})
        h5.attrs["layer_names"] = ["../../elsewhere", "x" * 60_000]
        h5.attrs["points"] = h5["lm_head"].ref
        h5["lm_head"].attrs["weight_names"] = h5py.Empty("f4")
    assert_equal(read(HDF5File, path), {"lm_head/kernel:0": ONE})


# What cannot be read


def test_a_chunk_that_unpacks_to_more_than_its_size_is_refused_early(tmp_path: Path) -> None:
    path = tmp_path / "tf_model.h5"
    hdf5_files.structure(hdf5_files.packed_chunk(hdf5_files.bomb(2**27)))(path)
    with HDF5File(path) as file:
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointFormatError, match=r"'x': the chunk at \[0, 0\] does not unpack to its"):
                file.read("x")
            assert tracemalloc.get_traced_memory()[1] < 2**24
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("stored", [bytes(5000), hdf5_files.bomb(2**22)[:-10], zlib.compress(NOISE)])
@pytest.mark.parametrize("options", [{}, {"shuffle": True}])
def test_damaged_chunks_are_refused(tmp_path: Path, stored: bytes, options: dict[str, Any]) -> None:
    path = tmp_path / "tf_model.h5"
    hdf5_files.structure(hdf5_files.packed_chunk(stored, **options))(path)
    with HDF5File(path) as file, pytest.raises(CheckpointFormatError, match="does not unpack to its 4,194,304 bytes"):
        file.read("x")


# Writing


def test_a_full_disk_is_reported_wherever_it_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library alone would stay unable to close its file."""
    opened, tensors = open_objects(), {f"lm_head/{number}": np.ones(100) for number in range(20)}
    for calls in range(1000):
        disk = FailingDisk(b"", calls)

        @contextmanager
        def failing(path: Path, disk: io.BytesIO = disk) -> Iterator[io.BytesIO]:
            yield disk

        monkeypatch.setattr(hdf5, "replaced_file", failing)
        try:
            write(tmp_path / "tf_model.h5", tensors)
        except OSError as error:
            assert (type(error), error.errno) in [(OSError, 28), (OSError, 5)]  # it reads what it wrote
        else:
            break
        finally:
            assert open_objects() == opened
    assert calls > 20


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"x": ONE.astype(ml_dtypes.bfloat16)}, "tensor 'x': HDF5 has no bfloat16; save as float16 or float32"),
        ({"x": ONE, "x/y": ONE}, "the HDF5 library cannot store 'x/y'"),
    ],
)
def test_tensors_that_hdf5_cannot_hold(tmp_path: Path, tensors: Tensors, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        write(tmp_path / "tf_model.h5", tensors, None)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_waits_until_the_library_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a method that the library calls would leave it unable to close the file."""
    opened, tensors = open_objects(), {f"lm_head/{number}": np.ones(100) for number in range(20)}
    for calls in range(1000):
        disk = InterruptingDisk(b"", calls)

        @contextmanager
        def interrupting(path: Path, disk: io.BytesIO = disk) -> Iterator[io.BytesIO]:
            yield disk

        monkeypatch.setattr(hdf5, "replaced_file", interrupting)
        try:
            write(tmp_path / "tf_model.h5", tensors)
        except KeyboardInterrupt:
            assert disk.calls < 0
        else:
            break
        finally:
            assert open_objects() == opened
    assert calls > 20
