"""save_pretrained: what is written can be loaded bit for bit, and an interrupted save leaves the old or the new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import CONFIGS, GOLDENS, elsewhere
from keras import ops
from safetensors import safe_open
from safetensors.numpy import load_file
from test_load import BASE, CLASSES, LOADING, assert_loaded, loaded_tensors, stored_tensors

from tfgptj.backbone import TFGPTJModel
from tfgptj.checkpoints.save import save_pretrained
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.checkpoints.tensors import TensorSpec
from tfgptj.checkpoints.write import WRITTEN, parse_size, split_into_shards
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, ConfigError
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForSequenceClassification

pytestmark = pytest.mark.core
NOT_IN_HDF5 = ("h5", "bfloat16")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model() -> Any:
    """The base causal language model."""
    return TFGPTJForCausalLM.from_pretrained(BASE, dtype="float32")


@pytest.fixture(scope="module")
def other() -> Any:
    """A model of another configuration, with other tensors."""
    return TFGPTJForCausalLM.from_pretrained(GOLDENS / "one_layer" / "causal_lm", dtype="float32")


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("head", CLASSES)
@pytest.mark.parametrize("name", ["base", "odd_sizes", "tied", "prelu", "xielu"])
def test_files_are_those_of_hugging_face(tmp_path: Path, name: str, head: str) -> None:
    directory = GOLDENS / name / head
    CLASSES[head].from_pretrained(directory).save_pretrained(tmp_path)
    theirs, ours = load_file(directory / WHOLE), load_file(tmp_path / WHOLE)
    assert list(ours) == list(theirs)
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array, err_msg=key)
    assert (tmp_path / WHOLE).read_bytes() == (directory / WHOLE).read_bytes()


@pytest.mark.parametrize("name", elsewhere(CONFIGS, "odd_sizes"))
def test_config_json_means_the_same_to_hugging_face(tmp_path: Path, name: str) -> None:
    model = TFGPTJForCausalLM(GPTJConfig.from_pretrained(GOLDENS / name / "causal_lm"))
    model.save_pretrained(tmp_path)
    theirs = json.loads((GOLDENS / name / "causal_lm" / "config.json").read_text())
    ours = json.loads((tmp_path / "config.json").read_text())
    assert {key: ours[key] for key in theirs} == theirs
    assert GPTJConfig.from_pretrained(tmp_path).to_dict() == ours


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, dtype) for form in WRITTEN for dtype in ("float32", "float16", "bfloat16") if (form, dtype) != NOT_IN_HDF5],
)
@pytest.mark.parametrize("limit", ["1GB", "6KB"])
def test_a_round_trip_changes_no_bit(tmp_path: Path, form: str, dtype: str, limit: str) -> None:
    model = TFGPTJForCausalLM.from_pretrained(BASE, dtype=dtype)
    save_pretrained(model, tmp_path, format=form, max_shard_size=limit)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert_loaded(TFGPTJForCausalLM.from_pretrained(tmp_path, dtype="auto"), loaded_tensors(model), dtype)


@pytest.mark.parametrize("head", CLASSES)
@pytest.mark.parametrize("name", ["base", "tied", "odd_sizes"])
def test_every_head_in_the_format_of_tensorflow(tmp_path: Path, name: str, head: str) -> None:
    model = CLASSES[head].from_pretrained(GOLDENS / name / head)
    model.save_pretrained(tmp_path, format="h5")
    assert_loaded(CLASSES[head].from_pretrained(tmp_path), loaded_tensors(model))


def test_a_backbone_has_no_prefix(tmp_path: Path) -> None:
    TFGPTJModel.from_pretrained(BASE).save_pretrained(tmp_path)
    assert (tmp_path / WHOLE).read_bytes() == (LOADING / "headless" / WHOLE).read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPTJModel"]


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_another_dtype(tmp_path: Path, model: Any, dtype: str, numpy_dtype: Any) -> None:
    model.save_pretrained(tmp_path, dtype=dtype)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["dtype"] == fields["torch_dtype"] == dtype
    for name, array in stored_tensors(tmp_path).items():
        assert array.dtype == numpy_dtype
        np.testing.assert_array_equal(array, loaded_tensors(model)[name].astype(numpy_dtype))
    assert (tmp_path / WHOLE).read_bytes() == (LOADING / dtype / WHOLE).read_bytes()


def test_shards_have_an_index(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    index = json.loads((tmp_path / INDEX).read_text())
    theirs = json.loads((LOADING / "sharded" / INDEX).read_text())
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert set(index["weight_map"]) == set(theirs["weight_map"])
    count = len(set(index["weight_map"].values()))
    shards = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert [name for name in names_in(tmp_path) if name.startswith("model-")] == shards
    for shard in shards:
        with safe_open(tmp_path / shard, "np") as file:
            assert file.metadata() == {"format": "pt"}
            assert {name for name, place in index["weight_map"].items() if place == shard} == set(file.keys())
    assert_loaded(TFGPTJForCausalLM.from_pretrained(tmp_path), loaded_tensors(model))


def test_shards_are_filled_up_in_order() -> None:
    specs = [
        TensorSpec(name, (size,), np.dtype("int8")) for name, size in zip("abcdef", (3, 4, 2, 30, 1, 10), strict=True)
    ]
    assert ["".join(spec.name for spec in shard) for shard in split_into_shards(specs, 10)] == ["abc", "d", "e", "f"]
    assert split_into_shards(specs, 50) == [specs]


@pytest.mark.parametrize(
    ("size", "count"),
    [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1GiB", 2**30), (" 1.5 KB ", 1500), ("7", 7), (7, 7), ("2TiB", 2**41)],
)
def test_sizes(size: int | str, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["", "GB", "5 XB", "-5GB", "0", 0, -1, 0.5, True, None, "5gb", "1e9", "٣GB", "9" * 99])
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(CheckpointError, match="max_shard_size must be a number of bytes, or text like '5GB'"):
        parse_size(size)


def test_invalid_arguments(tmp_path: Path, model: Any) -> None:
    with pytest.raises(CheckpointError, match="format must be one of safetensors.*; got 'onnx'"):
        model.save_pretrained(tmp_path, format="onnx")
    with pytest.raises(CheckpointError, match="dtype must be None or one of float32, .*; got 'int8'"):
        model.save_pretrained(tmp_path, dtype="int8")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: is a file, expected a directory to save to"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="below: could not be written: Not a directory"):
        model.save_pretrained(tmp_path / "file" / "below")
    assert names_in(tmp_path) == ["file"]


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    model = TFGPTJForSequenceClassification.from_pretrained(GOLDENS / "base" / "classification")
    model.score.kernel.assign(np.full((2, 16), 1e5, "float32"))
    with pytest.raises(CheckpointError, match=r"score\.weight: holds values too large for float16"):
        model.save_pretrained(tmp_path, dtype="float16")


def test_a_configuration_that_json_cannot_hold(tmp_path: Path) -> None:
    config = GPTJConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=1, rotary_dim=4, custom={1, 2})
    model = TFGPTJModel(config)
    with pytest.raises(ConfigError, match="a field that JSON cannot hold: Object of type set"):
        model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == []


def test_a_generation_configuration_goes_along(tmp_path: Path) -> None:
    class Settings:
        def to_dict(self) -> dict[str, Any]:
            return {"top_k": 3}

    model = TFGPTJForCausalLM.from_pretrained(BASE)
    model.generation_config = Settings()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"top_k": 3}


def test_lora_is_merged_and_quantized_kernels_are_refused(tmp_path: Path) -> None:
    model = TFGPTJForSequenceClassification.from_pretrained(GOLDENS / "base" / "classification")
    before = loaded_tensors(model)
    model.score.enable_lora(1)
    model.score.lora_kernel_b.assign(np.ones((1, 2), "float32"))
    model.save_pretrained(tmp_path)
    expected = before["score.weight"].T + ops.convert_to_numpy(model.score.lora_kernel_a.value) @ np.ones(
        (1, 2), "float32"
    )
    np.testing.assert_allclose(load_file(tmp_path / WHOLE)["score.weight"].T, expected, atol=1e-6)

    quantized = TFGPTJForSequenceClassification.from_pretrained(GOLDENS / "base" / "classification")
    quantized.score.quantize("int8")
    with pytest.raises(
        CheckpointError, match=r"score\.kernel: is int8 \[16, 2\], expected floats \[2, 16\]: a quantized"
    ):
        quantized.save_pretrained(tmp_path)


def test_one_kind_replaces_the_other_and_nothing_else(tmp_path: Path, model: Any, other: Any) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / ".tfgptj-left-by-a-crash.tmp").touch()
    for saved, options in [(model, {}), (other, {"max_shard_size": "9KB"}), (model, {"max_shard_size": "9KB"}),
                           (model, {"max_shard_size": "9KB"}), (other, {}), (other, {})]:  # fmt: skip
        saved.save_pretrained(tmp_path, **options)
        assert_loaded(TFGPTJForCausalLM.from_pretrained(tmp_path), loaded_tensors(saved))
        with Checkpoint(tmp_path) as checkpoint:
            shards = checkpoint.shards
        assert names_in(tmp_path) == sorted(
            {"vocab.json", "config.json", "generation_config.json", *shards, INDEX if options else WHOLE}
        )


def test_saving_over_the_files_that_a_model_came_from(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path, dirs_exist_ok=True)
    with Checkpoint(tmp_path) as reader:
        model = TFGPTJForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
        model.save_pretrained(tmp_path)
        np.testing.assert_array_equal(reader.read("lm_head.bias"), stored_tensors(BASE)["lm_head.bias"])
    assert_loaded(TFGPTJForCausalLM.from_pretrained(tmp_path, dtype="bfloat16"), loaded_tensors(model), "bfloat16")
