"""CodeGen's checkpoints as GPT-J models: the same logits, exact matrices, every kind of file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import FIXTURES, GOLDENS, elsewhere, numbers
from keras import ops
from safetensors.numpy import load_file, save_file

from tfgptj.backbone import TFGPTJModel
from tfgptj.checkpoints.codegen import UnfusedFile
from tfgptj.checkpoints.raw_file import RawFile
from tfgptj.checkpoints.safetensors import SafetensorsFile
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointFormatError, CheckpointMismatchError, ConfigError
from tfgptj.foreign import as_gptj
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification
from tfgptj.tokenizer import GPTJTokenizer

CODEGEN = GOLDENS / "codegen"
RECIPES = ("four_heads", "eight_heads", "short_context", "tied")
FILES = ("four_heads", "sharded", "bin", "sharded_bin")
FUSED = "transformer.h.1.attn.qkv_proj.weight"


def split(fused: np.ndarray) -> dict[str, np.ndarray]:
    """The three matrices, by the reshapes of transformers' modeling_codegen.py."""
    width = fused.shape[1]
    groups = fused.reshape(4, 3, width // 4, width)  # group, q v k, rows of the group's heads, D
    return {name: groups[:, i].reshape(width, width) for i, name in enumerate(("q_proj", "v_proj", "k_proj"))}


def assert_same_logits(model: Any, name: str, tolerance: float = 2e-5) -> None:
    golden = np.load(CODEGEN / name / "outputs.npz")
    inputs = {key: golden[key] for key in ("input_ids", "attention_mask", "position_ids")}
    real = golden["attention_mask"] == 1  # what stands at padding depends on how a masked row is computed
    logits, expected = numbers(model(inputs))[real], golden["logits"][real]
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()


def edited(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], object] = lambda tensors: 0, **fields: Any
) -> Path:
    """`four_heads` with other tensors and fields; a field of None is removed."""
    tensors = load_file(CODEGEN / "four_heads" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((CODEGEN / "four_heads" / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return tmp_path


@pytest.mark.core
@pytest.mark.parametrize("name", elsewhere(RECIPES, "four_heads"))
def test_the_logits_are_hugging_faces(name: str) -> None:
    model = TFGPTJForCausalLM.from_pretrained(CODEGEN / name)
    assert model.config.model_type == "gptj"
    assert_same_logits(model, name)


@pytest.mark.parametrize("directory", FILES)
def test_every_kind_of_file_gives_the_same_matrices(directory: str) -> None:
    stored = load_file(CODEGEN / "four_heads" / "model.safetensors")
    model = TFGPTJForCausalLM.from_pretrained(CODEGEN / directory)
    for layer, block in enumerate(model.transformer.blocks):
        for name, expected in split(stored[f"transformer.h.{layer}.attn.qkv_proj.weight"]).items():
            kernel = getattr(block.attn, name).kernel
            np.testing.assert_array_equal(ops.convert_to_numpy(kernel), expected, err_msg=name)
    assert_same_logits(model, "four_heads")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes(dtype: str) -> None:
    model = TFGPTJForCausalLM.from_pretrained(CODEGEN / "four_heads", dtype=dtype)
    assert keras.backend.standardize_dtype(model.transformer.blocks[0].attn.q_proj.kernel.dtype) == dtype
    assert_same_logits(model, "four_heads", 0.05)


def test_every_class(tmp_path: Path) -> None:
    causal_lm = TFGPTJForCausalLM.from_pretrained(CODEGEN / "four_heads")
    backbone = TFGPTJModel.from_pretrained(CODEGEN / "four_heads")
    ids = [[1, 2, 3]]
    expected = numbers(causal_lm.transformer(ids))
    np.testing.assert_array_equal(numbers(backbone(ids)), expected)
    for cls in (TFGPTJForSequenceClassification, TFGPTJForQuestionAnswering):
        with pytest.warns(UserWarning, match=f"of {cls.__name__} are not in the checkpoint"):
            model = cls.from_pretrained(CODEGEN / "four_heads")
        np.testing.assert_array_equal(numbers(model.transformer(ids)), expected)


def test_it_is_saved_as_a_gptj(tmp_path: Path) -> None:
    TFGPTJForCausalLM.from_pretrained(CODEGEN / "eight_heads").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("gptj", ["GPTJForCausalLM"])
    assert "transformer.h.0.attn.v_proj.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_logits(TFGPTJForCausalLM.from_pretrained(tmp_path), "eight_heads")


def test_loading_into_a_model_that_exists() -> None:
    model = TFGPTJForCausalLM(GPTJConfig.from_pretrained(CODEGEN / "four_heads"))
    model.load_pretrained(CODEGEN / "sharded_bin")
    assert_same_logits(model, "four_heads")


# The configuration


@pytest.mark.parametrize("name", RECIPES)
def test_the_configuration_is_that_of_a_gptj(name: str) -> None:
    fields = json.loads((CODEGEN / name / "config.json").read_text())
    config = GPTJConfig.from_pretrained(CODEGEN / name)
    fields |= {"model_type": "gptj", "architectures": ["GPTJForCausalLM"]}
    assert config == GPTJConfig.from_dict(fields)
    assert config.rotary_dim == fields["rotary_dim"]  # n_ctx does not cap it


def test_defaults_are_those_of_a_gptj() -> None:
    # transformers' CodeGenConfig() has the very defaults of GPTJConfig(), and n_ctx.
    assert GPTJConfig.from_dict({"model_type": "codegen"}) == GPTJConfig()
    assert as_gptj({"model_type": "gptj", "architectures": 3}) == {"model_type": "gptj", "architectures": 3}
    assert as_gptj({"model_type": "codegen", "architectures": 3})["architectures"] == 3


@pytest.mark.parametrize("n_head", [1, 2, 6])
def test_heads_that_the_groups_cannot_share_out(tmp_path: Path, n_head: int) -> None:
    text = f"n_head must be divisible by 4 in a CodeGen, whose attention weights .*; got {n_head}"
    with pytest.raises(ConfigError, match=rf"config\.json: {text}"):
        GPTJConfig.from_pretrained(edited(tmp_path, n_head=n_head, n_embd=24))
    with pytest.raises(ConfigError, match=text):
        GPTJConfig.from_dict({"model_type": "codegen"}, num_attention_heads=n_head)
    with pytest.raises(ConfigError, match=text):  # whatever the configuration calls itself
        config = GPTJConfig(vocab_size=48, n_layer=2, n_embd=6 * n_head, n_head=n_head, rotary_dim=2)
        TFGPTJForCausalLM.from_pretrained(CODEGEN / "four_heads", config=config)


@pytest.mark.parametrize("n_head", ["4", 0, 10**40])
def test_what_is_no_number_of_heads(n_head: object) -> None:
    with pytest.raises(ConfigError, match="n_head must be (an integer|between 1 and)"):
        GPTJConfig.from_dict({"model_type": "codegen", "n_head": n_head})


def test_a_codegen_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    directory = edited(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_codegen.CodeGenForCausalLM"})
    text = r"this CodeGen comes with Python code \(auto_map\), which is not run\. Some .* in other than 4 groups"
    with pytest.raises(ConfigError, match=text):
        TFGPTJForCausalLM.from_pretrained(directory)


# The matrices


def matrix_of(height: int, width: int) -> np.ndarray:
    return np.arange(height * width, dtype=np.float32).reshape(height, width)


@pytest.fixture
def unfused(tmp_path: Path) -> Iterator[UnfusedFile]:
    """A matrix of 1,200 rows, read in blocks of 64 that lie across its groups, and a bias."""
    tensors = {"h.0.attn.qkv_proj.weight": matrix_of(1200, 400), "h.0.mlp.fc_in.bias": np.ones(3, np.float32)}
    save_file(tensors, tmp_path / "x.safetensors")
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        yield UnfusedFile(file)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 400), (0, 1), (99, 101), (100, 200), (37, 399), (5, 5)])
def test_rows_of_a_part(unfused: UnfusedFile, part: str, start: int, stop: int | None) -> None:
    name = f"h.0.attn.{part}.weight"
    expected = split(matrix_of(1200, 400))[part]
    blocks = [block.copy() for block in unfused.blocks(name, start, stop)]
    assert all(0 < len(block) <= 64 for block in blocks)
    np.testing.assert_array_equal(np.concatenate([expected[:0], *blocks]), expected[start:stop])
    np.testing.assert_array_equal(unfused.read(name), expected)
    assert unfused.spec(name).shape == (400, 400)


def test_other_tensors_are_as_in_the_file(unfused: UnfusedFile) -> None:
    assert sorted(unfused.names) == [f"h.0.attn.{part}_proj.weight" for part in "kqv"] + ["h.0.mlp.fc_in.bias"]
    assert unfused.read("h.0.mlp.fc_in.bias").tolist() == [1, 1, 1]
    assert [block.tolist() for block in unfused.blocks("h.0.mlp.fc_in.bias", 1)] == [[1, 1]]
    assert unfused.spec("h.0.mlp.fc_in.bias").shape == (3,)
    assert unfused.metadata == {}
    assert len(unfused.sha256()) == 64
    unfused.close()


def test_only_some_rows_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, fill = 0, RawFile._read_bytes

    def watch(self: RawFile, start: int, out: memoryview, what: str) -> None:
        nonlocal largest
        largest = max(largest, len(out) if "qkv_proj" in what else 0)
        fill(self, start, out, what)

    monkeypatch.setattr(RawFile, "_read_bytes", watch)
    TFGPTJForCausalLM.from_pretrained(CODEGEN / "eight_heads")
    assert 0 < largest <= 64 * 32 * 4


@pytest.mark.parametrize("shape", [(47, 16), (48,), (54, 18), (48, 16, 1), (0, 0)])
def test_a_matrix_that_no_codegen_has(tmp_path: Path, shape: tuple[int, ...]) -> None:
    directory = edited(tmp_path, lambda tensors: tensors.update({FUSED: np.ones(shape, np.float32)}))
    with pytest.raises(
        CheckpointMismatchError, match=r"missing \(3\): h\.1\.attn\.q_proj.*\n.*unexpected \(1\): .*qkv_"
    ):
        TFGPTJForCausalLM.from_pretrained(directory)


def test_a_matrix_that_is_stored_twice(tmp_path: Path) -> None:
    name = "transformer.h.1.attn.k_proj.weight"
    directory = edited(tmp_path, lambda tensors: tensors.update({name: np.ones((16, 16), np.float32)}))
    with pytest.raises(CheckpointFormatError, match=f"holds tensor '{name}' by itself and as part of qkv_proj"):
        Checkpoint(directory)


def test_damage_in_a_fused_matrix_is_found(tmp_path: Path) -> None:
    shutil.copytree(CODEGEN / "bin", tmp_path, dirs_exist_ok=True)
    path, stored = tmp_path / "pytorch_model.bin", load_file(CODEGEN / "four_heads" / "model.safetensors")
    data = bytearray(path.read_bytes())
    data[data.index(stored[FUSED].tobytes()) + 4 * 16 * 30] ^= 1  # in a row of a key
    path.write_bytes(data)
    with pytest.raises(CheckpointFormatError, match=f"{FUSED}': damaged: its checksum is"):
        TFGPTJForCausalLM.from_pretrained(tmp_path)


# The tokenizer: GPT-2's, and runs of blanks behind the vocabulary

TEXTS = {  # the ids are those of transformers' CodeGenTokenizerFast
    "def f(x):\n    return x\n\n\t\ty =  1   ": [
        *(67, 68, 69, 297, 7, 87, 8, 25, 198, 611, 542, 220, 87, 198, 198, 621, 88, 220, 28, 613, 16, 612),
    ],
    "a" + " " * 70 + "b": [64, 584, 584, 607, 65],
    "\t\t\tif x:" + "\t" * 11 + "end<|endoftext|>  <": [620, 450, 220, 87, 25, 614, 621, 68, 265, 583, 613, 27],
    "  the miller": [613, 83, 259, 552, 274],
    "\n\n  \n    pass": [198, 198, 613, 198, 611, 79, 64, 462],
}  # fmt: skip


@pytest.mark.parametrize("flags", [None, {"normalized": True, "special": False}])
def test_codegens_tokenizer(tmp_path: Path, flags: dict[str, bool] | None) -> None:
    shutil.copytree(FIXTURES / "small_vocab", tmp_path, dirs_exist_ok=True)
    blanks = {" " * count: 615 - count for count in range(2, 32)} | {
        "\t" * count: 623 - count for count in range(2, 10)
    }
    config: dict[str, Any] = {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False}
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    if flags is None:
        (tmp_path / "added_tokens.json").write_text(json.dumps(blanks))
    else:
        (tmp_path / "added_tokens.json").unlink()
        end = {"583": {"content": "<|endoftext|>", "special": True}}
        config["added_tokens_decoder"] = end | {str(i): {"content": text, **flags} for text, i in blanks.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = GPTJTokenizer.from_pretrained(tmp_path)
    for text, ids in TEXTS.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
