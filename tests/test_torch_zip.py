"""The reader of PyTorch's files: against files of PyTorch's own, and against others.

Its two parts, the machine for pickles and the reader of archives, have tests of their own.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import torch_cases as cases
from malformed.torch_files import (
    GOOD,
    SOUND,
    archive,
    dict_of,
    members,
    program,
    save,
    storage,
    tensor,
    torch_file,
)
from reader_checks import assert_blocks_are_rows, assert_equal, read

from tfgptj.checkpoints.load import match_plan
from tfgptj.checkpoints.mapping import plan
from tfgptj.checkpoints.safetensors import SafetensorsFile
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.checkpoints.tensors import TensorSpec, assemble
from tfgptj.checkpoints.torch_zip import TorchZipFile
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError

TORCH = GOLDENS / "formats" / "torch"
VARIANTS = TORCH / "variants"
WHOLE = np.arange(24, dtype=np.float32).reshape(4, 6)
BASE = GOLDENS / "base" / "causal_lm" / "model.safetensors"
# Files that PyTorch wrote


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_hugging_face_wrote_is_equal_bit_for_bit(dtype: str) -> None:
    path = BASE if dtype == "float32" else GOLDENS / "loading" / dtype / "model.safetensors"
    expected = read(SafetensorsFile, path)
    assert_equal(read(TorchZipFile, TORCH / dtype / "pytorch_model.bin"), expected)
    with TorchZipFile(TORCH / dtype / "pytorch_model.bin") as file:
        assert file.metadata == {"format": "pt"}
        assert {key: file.spec(key) for key in file.names} == {
            key: TensorSpec(key, array.shape, array.dtype) for key, array in expected.items()
        }
        assert_blocks_are_rows(file)


def test_shards_and_old_buffers_load_as_a_checkpoint() -> None:
    expected = read(SafetensorsFile, BASE)
    for directory in ("float32", "sharded", "buffers"):
        config = GPTJConfig.from_json_file(TORCH / directory / "config.json")
        with Checkpoint(TORCH / directory) as checkpoint:
            assert checkpoint.layout == "torch"
            assert len(checkpoint.shards) == (3 if directory == "sharded" else 1)
            match = match_plan(plan(config, "causal_lm"), checkpoint)
            assert_equal({key: checkpoint.read(key) for _, key in match.stored}, expected)
            assert (set(checkpoint.names) == set(expected)) == (directory != "buffers")


def test_buffers_are_listed_as_they_are() -> None:
    found = read(TorchZipFile, TORCH / "buffers" / "pytorch_model.bin")
    mask = np.tril(np.ones((32, 32), bool)).reshape(1, 1, 32, 32)
    np.testing.assert_array_equal(found["transformer.h.1.attn.bias"], mask)
    assert found["transformer.h.1.attn.masked_bias"] == np.float32(-1e9)


def test_every_dtype() -> None:
    found = read(TorchZipFile, VARIANTS / "dtypes.pt")
    assert len(found) == 10
    for key, array in found.items():
        expected = np.arange(6).astype(ml_dtypes.bfloat16 if key == "bfloat16" else key)
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_views_of_one_storage() -> None:
    expected = {
        "whole": WHOLE, "shared": WHOLE, "row": WHOLE[1], "column": WHOLE[:, 2], "part": WHOLE[1:3, 2:5],
        "transposed": WHOLE.T, "permuted": WHOLE.reshape(2, 3, 4).transpose(2, 0, 1), "scalar": WHOLE[2, 3],
        "empty": WHOLE[:0], "expanded": WHOLE[:1],
    }  # fmt: skip
    path = VARIANTS / "views.pt"
    assert_equal(read(TorchZipFile, path), {key: np.asarray(array) for key, array in expected.items()})
    with TorchZipFile(path) as file:
        assert_blocks_are_rows(file)
        assert all(file.read(key).flags.c_contiguous and file.read(key).flags.owndata is False for key in file.names)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_state_dict_of_a_training_run(protocol: int) -> None:
    expected = {"weight": np.ones((3, 2), np.float32), "bias": np.zeros(3, np.float32)}
    assert_equal(read(TorchZipFile, VARIANTS / f"training-{protocol}.pt"), expected)


def test_numbers_and_text_among_the_tensors_are_left_out() -> None:
    assert_equal(read(TorchZipFile, VARIANTS / "mixed.pt"), {"x": WHOLE})


def test_a_file_without_checksums_is_read() -> None:
    assert_equal(read(TorchZipFile, VARIANTS / "without_checksums.pt"), {"x": WHOLE})


def test_the_old_format_is_refused() -> None:
    with pytest.raises(UnsafeCheckpointError, match="a bare pickle, as PyTorch wrote before release 1.6: never read"):
        TorchZipFile(VARIANTS / "legacy.pt")


def test_pytorchs_own_files_of_today_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch; the goldens hold files of its release 2.13")
    base = torch.arange(24.0).view(4, 6)
    content = {
        "parameter": torch.nn.Parameter(base[1:3]), "slice": base[::2, 1::2], "tied": base, "again": base,
        "half": base.half().t(), "brain": base.bfloat16()[2], "nan": torch.tensor(float("nan")),
    }  # fmt: skip
    torch.save(content, tmp_path / "a.bin")
    found = read(TorchZipFile, tmp_path / "a.bin")
    for key, value in content.items():
        expected = value.detach().float().numpy()
        np.testing.assert_array_equal(found[key].astype(np.float32), expected)


# Files put together here


def test_the_hand_made_file_is_sound(tmp_path: Path) -> None:
    path = save(tmp_path, SOUND)
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert_equal(read(TorchZipFile, path), {"x": expected})
    with zipfile.ZipFile(path) as peer:  # the builder's archives are what others take for one, too
        assert peer.testzip() is None
        assert peer.read("archive/data.pkl") == GOOD


def test_bytes_of_big_endian_machines_are_swapped(tmp_path: Path) -> None:
    kinds = {
        "FloatStorage": "f4",
        "HalfStorage": "f2",
        "LongStorage": "i8",
        "ByteStorage": "u1",
        "BFloat16Storage": "u2",
    }
    entries, storages, expected = {}, {}, {}
    for key, code in kinds.items():
        values = np.arange(200, dtype=code)
        entries[key] = tensor(storage(key, key, 200), shape=(100, 2), strides=(2, 1))
        entries[f"{key} transposed"] = tensor(storage(key, key, 200), shape=(2, 100), strides=(1, 2))
        storages[key] = values.astype(f">{code}").tobytes()
        dtype = ml_dtypes.bfloat16 if key == "BFloat16Storage" else code
        expected[key] = values.view(dtype).reshape(100, 2)
        expected[f"{key} transposed"] = expected[key].T
    path = save(tmp_path, torch_file(dict_of(entries), storages, byteorder=b"big"))
    assert_equal(read(TorchZipFile, path), expected)
    with TorchZipFile(path) as file:
        assert_blocks_are_rows(file)


def test_a_file_from_before_byte_orders_were_noted(tmp_path: Path) -> None:
    assert_equal(
        read(TorchZipFile, save(tmp_path, torch_file(dict_of({"x": tensor()}), byteorder=None))),
        read(TorchZipFile, save(tmp_path, SOUND)),
    )


@st.composite
def views(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """An array, and a view of it as slicing and transposing give them."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    dtype = draw(st.sampled_from(["float32", "float16", "int64", "uint8"]))
    base = np.arange(np.prod(shape)).astype(dtype)
    cuts = [slice(draw(st.integers(0, size)), draw(st.integers(0, size)), draw(st.integers(1, 3))) for size in shape]
    return base, base.reshape(shape)[tuple(cuts)].transpose(draw(st.permutations(range(len(shape)))))


KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "uint8": "ByteStorage"}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(given_views=st.lists(views(), max_size=3), order=st.sampled_from(["little", "big"]))
def test_any_view_is_read_as_numpy_reads_it(
    tmp_path_factory: pytest.TempPathFactory, given_views: list[tuple[np.ndarray, np.ndarray]], order: str
) -> None:
    entries, storages = {}, {}
    for key, (base, view) in enumerate(given_views):
        strides = [step // base.itemsize for step in view.strides]
        offset = (view.ctypes.data - base.ctypes.data) // base.itemsize if view.size else 0
        stored = storage(str(key), KINDS[base.dtype.name], base.size)
        entries[str(key)] = tensor(stored, offset, view.shape, strides)
        storages[str(key)] = base.astype(base.dtype.newbyteorder(order)).tobytes()
    path = tmp_path_factory.mktemp("views") / "a.bin"
    path.write_bytes(torch_file(dict_of(entries), storages, order.encode()))
    assert_equal(read(TorchZipFile, path), {str(key): view for key, (_, view) in enumerate(given_views)})
    with TorchZipFile(path) as file:
        assert_blocks_are_rows(file)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_blocks_of_many_rows(tmp_path: Path, rows: int) -> None:
    values = np.random.default_rng(0).standard_normal((rows, 5), np.float32)
    entries = {
        "a": tensor(storage(size=rows * 5), shape=(rows, 5), strides=(5, 1)),
        "b": tensor(storage(size=rows * 5), 5, shape=(rows - 1, 5), strides=(5, 1)),
        "c": tensor(storage(size=rows * 5), shape=(5, rows), strides=(1, 5)),
    }
    with TorchZipFile(save(tmp_path, torch_file(dict_of(entries), {"0": values.tobytes()}))) as file:
        assert_blocks_are_rows(file)
        assert all(len(block) <= 64 for block in file.blocks("a"))
        found = assemble(file.blocks("a"), file.spec("a"), np.dtype(np.float32), transpose=True)
        np.testing.assert_array_equal(found, values.T)
        np.testing.assert_array_equal(file.read("b"), values[1:])
        np.testing.assert_array_equal(file.read("c"), values.T)


# Hostile files


@pytest.mark.parametrize("case", cases.MISFITS | cases.STRANGERS)
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, case: str) -> None:
    content, said = (cases.MISFITS | cases.STRANGERS)[case]
    path = save(tmp_path, content)
    with pytest.raises(CheckpointFormatError, match=said) as caught:
        TorchZipFile(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("case", cases.LEGACY)
def test_older_formats_are_refused_with_a_way_out(tmp_path: Path, case: str) -> None:
    content, said = cases.LEGACY[case]
    with pytest.raises(UnsafeCheckpointError, match=said):
        TorchZipFile(save(tmp_path, content))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_an_error_or_a_value(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "a.bin"
    for data in (content, SOUND[:40] + content, archive(members(program(content)))):
        path.write_bytes(data)
        try:
            TorchZipFile(path).close()
        except CheckpointError as error:
            assert str(path) in str(error)


# Files that cannot be read
