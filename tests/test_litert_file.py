"""A whole model in one file, run by LiteRT's interpreter alone: Hugging Face's numbers, in steps as at once."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import oracle
import pytest
from ai_edge_litert.interpreter import Interpreter
from conftest import GOLDENS, Golden, assert_near
from generation_goldens import DIRECTORY
from tokenizers import Tokenizer

from tfgptj import cli, limits
from tfgptj.errors import CheckpointError, ConfigError
from tfgptj.litert.quantization import quantized
from tfgptj.litert.single_file import convert_to_file

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="LiteRT computes, not a Keras backend")
BASE, MODEL = GOLDENS / "base" / "causal_lm", DIRECTORY / "model"
IDS = np.array([5, 9, 3, 17, 9, 3, 30, 2], "int32")


class Phone:
    """What an application has: the file, and LiteRT."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            self.config = json.loads(archive.read("config.json"))
        self.interpreter = Interpreter(str(path), num_threads=1)
        self.called = {name: self.interpreter.get_signature_runner(name) for name in ("prefill", "decode")}
        self.cache: dict[str, np.ndarray] = {}
        for name, details in self.called["decode"].get_input_details().items():
            if name.startswith("kv_cache_"):
                self.cache[name] = np.zeros(details["shape"], details["dtype"])

    def read(self, ids: np.ndarray, start: int, name: str = "prefill") -> np.ndarray:
        """The logits [V] after tokens [T], of which the first has a place in the text."""
        places = np.arange(start, start + len(ids), dtype="int32")
        found = self.called[name](tokens=ids.astype("int32")[None], input_pos=places, **self.cache)
        [logits] = found.pop("logits")
        assert found.keys() == self.cache.keys()
        self.cache = found
        return logits

    def read_in_steps(self, ids: np.ndarray, first: int = 1) -> np.ndarray:
        """The logits [T - first + 1, V] after so many tokens, and after each further one."""
        logits = [self.read(ids[:first], 0)]
        logits += [self.read(ids[i : i + 1], i, "decode") for i in range(first, len(ids))]
        return np.stack(logits)


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model in 4 bits."""
    path = tmp_path_factory.mktemp("file") / "shakespeare.tflite"
    flags = ["--format", "tflite", "--bits", "4", "--positions", "64", "--quiet"]
    assert cli.main(["convert", "shakespeare", str(path), *flags]) == 0
    return path


@pytest.mark.parametrize(
    "name", ["base", "tied", "exact_gelu", "silu", "relu", "odd_sizes", "rotary_none", "rotary_half", "wide_eps"]
)
def test_float32_gives_hugging_face_s_numbers(name: str, tmp_path: Path) -> None:
    convert_to_file(GOLDENS / name / "causal_lm", tmp_path / "model.tflite", bits=32)
    golden = Golden(name)
    for ids, expected in zip(golden["none/input_ids"], golden["none/causal_lm/logits"], strict=True):
        assert_near(Phone(tmp_path / "model.tflite").read_in_steps(ids), expected)
        assert_near(Phone(tmp_path / "model.tflite").read_in_steps(ids, 3), expected[2:])


@pytest.mark.parametrize(("bits", "block_size"), [(8, None), (4, 32)])
def test_few_bits_are_those_of_the_rounded_weights(bits: int, block_size: int | None, tmp_path: Path) -> None:
    convert_to_file(MODEL, tmp_path / "model.tflite", bits=bits, block_size=block_size)
    weights = oracle.load_weights(MODEL, np.float32)
    for name, matrix in weights.items():
        if matrix.ndim == 2:
            kind = (8, None) if name in ("lm_head.weight", "wte.weight") else (bits, block_size)
            weights[name] = quantized(matrix, *kind).floats()
    phone, ids = Phone(tmp_path / "model.tflite"), np.tile(IDS, 3)
    expected = oracle.causal_lm_logits(weights, phone.config, ids[None])[0]
    assert_near(phone.read_in_steps(ids, 16), expected[15:], 0.04)  # as for models in a directory


def test_pieces_change_nothing_and_old_texts_leave_no_trace(tmp_path: Path) -> None:
    convert_to_file(MODEL, tmp_path / "model.tflite", bits=32, positions=24)
    phone = Phone(tmp_path / "model.tflite")
    whole = phone.read(np.tile(IDS, 3), 0)
    phone.read(IDS[::-1], 0)  # another text, over the first one
    phone.read(np.tile(IDS, 2), 0)
    assert_near(phone.read(IDS, 16), whole, 1e-5)
    assert {details["shape"].tolist()[2] for name, details in phone.called["decode"].get_input_details().items()
            if name in phone.cache} == {24}  # fmt: skip


def test_it_writes_what_the_model_writes(shakespeare: Path) -> None:
    from tfgptj.litert.convert import convert
    from tfgptj.litert.model import LiteRTGPTJForCausalLM

    with zipfile.ZipFile(shakespeare) as archive:
        tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
    phone, ids = Phone(shakespeare), tokenizer.encode("ROMEO:").ids
    logits, text = phone.read(np.array(ids), 0), list(ids)
    for _ in range(10):
        text.append(int(logits.argmax()))
        logits = phone.read(np.array(text[-1:]), len(text) - 1, "decode")
    convert("shakespeare", shakespeare.parent / "model", bits=4)
    model = LiteRTGPTJForCausalLM.from_pretrained(shakespeare.parent / "model")
    assert model.generate([ids], max_new_tokens=10, do_sample=False)[0].tolist() == text


def test_the_archive_has_what_belongs_to_the_model(shakespeare: Path, tmp_path: Path) -> None:
    from tfgptj.checkpoints.hub import PACKAGED

    with zipfile.ZipFile(shakespeare) as archive:
        assert archive.testzip() is None
        for name in ("tokenizer.json", "generation_config.json"):
            assert archive.read(name) == (PACKAGED / "shakespeare" / name).read_bytes()
        assert json.loads(archive.read("config.json"))["architectures"] == ["GPTJForCausalLM"]
    told: list[tuple[int, int]] = []
    again = tmp_path / "deep" / "again.tflite"
    convert_to_file("shakespeare", again, bits=4, positions=64, progress=lambda done, total: told.append((done, total)))
    assert again.read_bytes() == shakespeare.read_bytes()
    assert told == sorted(told) and told[-1][0] == told[-1][1]


@pytest.mark.parametrize(
    ("ids", "start", "message"),
    [([1024], 0, "index out of bounds"), ([-1], 0, "index out of bounds"), ([5], 64, "index out of bounds"),
     ([5, 6], 63, "index out of bounds"), ([5], -1, "index out of bounds")],
)  # fmt: skip
def test_tokens_and_places_that_there_are_not_are_errors(
    ids: list[int], start: int, message: str, shakespeare: Path
) -> None:
    with pytest.raises(RuntimeError, match=message):
        Phone(shakespeare).read(np.array(ids), start)


def test_what_is_too_large_is_refused_before_anything_is_read(
    shakespeare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = shakespeare.stat().st_size
    options: dict[str, Any] = {"bits": 4, "positions": 64, "progress": lambda done, total: pytest.fail("it reads")}
    monkeypatch.setattr(limits, "MAX_TFLITE_BYTES", size - 1)
    with pytest.raises(
        ConfigError, match=r"would have about [\d,]+ bytes, and phones map at most [\d,]+: choose fewer"
    ):
        convert_to_file("shakespeare", tmp_path / "model.tflite", **options)
    monkeypatch.setattr(limits, "MAX_TFLITE_BYTES", int(1.2 * size))
    convert_to_file("shakespeare", tmp_path / "model.tflite", **{**options, "progress": None})
    monkeypatch.undo()
    config = tmp_path / "6b"
    config.mkdir()
    (config / "config.json").write_text(json.dumps({"model_type": "gptj"}))  # GPT-J-6B, without its weights
    with pytest.raises(ConfigError, match=r"about 3,[\d,]+ bytes, and phones map at most 2,147,483,647"):
        convert_to_file(config, tmp_path / "6b.tflite", bits=4)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (BASE, {"bits": 5}, r"bits and head_bits must be one of \(4, 8, 32\), got 5 and 8"),
        (BASE, {"bits": 4}, r"block_size=32 does not divide 16"),
        (BASE, {"positions": 0}, r"positions must be an integer from 1 to n_positions=\d+, got 0"),
        (BASE, {"positions": 10**9}, r"positions must be an integer from 1 to n_positions=\d+, got 1000000000"),
        (BASE, {"positions": True}, r"positions must be an integer from 1 to n_positions=\d+, got True"),
        (
            GOLDENS / "prelu" / "causal_lm",
            {},
            r"activation_function 'prelu' is no operator of such a graph; gelu_new, ",
        ),
    ],
)
def test_what_cannot_be_had(source: Path, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_to_file(source, tmp_path / "model.tflite", **options)
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.tflite"
    path.write_text("old")
    with pytest.raises(CheckpointError, match=r"model.tflite: there is something already; choose another file, or"):
        convert_to_file(BASE, path)
    with pytest.raises(CheckpointError, match=r"there is something already; choose another file, or overwrite a file"):
        convert_to_file(BASE, tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match=r"model.tflite: could not be written: "):
        convert_to_file(BASE, path / "below.tflite")
    with pytest.raises(CheckpointError, match="the checkpoint has the head 'classification'; only language models"):
        convert_to_file(GOLDENS / "base" / "classification", tmp_path / "other.tflite")
    assert [file.name for file in tmp_path.iterdir()] == ["model.tflite"] and path.read_text() == "old"
    assert cli.main(["convert", str(BASE), str(path), "--format", "tflite", "--overwrite", "--quiet"]) == 0
    assert Phone(path).read(IDS, 0).shape == (Phone(path).config["vocab_size"],)
    assert f"saved in {path}\n" in capsys.readouterr().out
    for format, flag in (("tflite", "--dtype=float16"), ("litert", "--positions=9"), ("h5", "--positions=9")):
        with pytest.raises(SystemExit):
            cli.main(["convert", str(BASE), str(path), "--format", format, flag])
        assert f"{flag.split('=')[0]} does not go with --format {format}" in capsys.readouterr().err
