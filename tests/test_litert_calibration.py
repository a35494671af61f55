"""Conversion for LiteRT with a text to calibrate with: how it is read, how it goes through a model, what comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import oracle
import pytest
from conftest import GOLDENS, Golden, assert_near
from documentation import topic_texts

from tfgptj import GPTJConfig, GPTJTokenizer, cli, limits
from tfgptj.checkpoints.convert import stored_weights
from tfgptj.errors import CheckpointFormatError, ConfigError, InputError, TokenizerError
from tfgptj.litert.calibration import Calibration, read_pieces
from tfgptj.litert.convert import convert
from tfgptj.litert.layout import read_layout
from tfgptj.litert.model import LiteRTGPTJForCausalLM
from tfgptj.litert.weights import Precision, WeightReader

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="LiteRT computes, not a Keras backend")
BASE = GOLDENS / "base" / "causal_lm"
TEXT, HELD_OUT = topic_texts()
FEW = {"bits": 4, "block_size": 0, "head_bits": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a text, and the packaged model: as it is, in few bits, and calibrated."""
    place = tmp_path_factory.mktemp("calibration")
    (place / "text.txt").write_text(TEXT[:5000], encoding="utf-8")
    convert("shakespeare", place / "float32", bits=32)
    convert("shakespeare", place / "plain", **FEW)
    convert("shakespeare", place / "calibrated", **FEW, calibration=place / "text.txt")
    return place


def log_probabilities(directory: Path, ids: np.ndarray) -> np.ndarray:
    """For int [2, T] those of the next tokens, float64 [2, T - 1, V]."""
    model, length = LiteRTGPTJForCausalLM.from_pretrained(directory), ids.shape[1]
    positions = np.tile(np.arange(length, dtype="int32"), (2, 1))
    hidden, _ = model.transformer.step(ids, positions, np.tile(np.tri(length, dtype=bool), (2, 1, 1, 1)))
    return oracle.log_softmax(model.lm_head(hidden)[:, :-1].astype("float64"))


def test_what_the_model_makes_of_other_text_changes_less(place: Path) -> None:
    tokenizer = GPTJTokenizer.from_pretrained("shakespeare")
    ids = np.array(tokenizer.encode(HELD_OUT[:1500])[:512], "int32").reshape(2, 256)
    exact, plain, calibrated = (log_probabilities(place / name, ids) for name in ("float32", "plain", "calibrated"))
    divergences = [float((np.exp(exact) * (exact - found)).sum(axis=-1).mean()) for found in (plain, calibrated)]
    assert divergences[1] < 0.75 * divergences[0]
    losses = [-np.take_along_axis(found, ids[:, 1:, None], axis=-1).mean() for found in (plain, calibrated)]
    assert losses[1] <= losses[0]


def test_the_command_writes_the_same_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--bits", "4", "--block-size", "0", "--keep-head-bits", "4", "--quiet"]
    command = ["convert", "shakespeare", str(place / "again"), "--format", "litert", *flags]
    assert cli.main([*command, "--calibration", str(place / "text.txt")]) == 0
    first, second = (read_layout(place / name, 4) for name in ("calibrated", "again"))
    assert first == second != read_layout(place / "plain", 4)
    tokens = first.calibration_tokens
    assert 1024 <= tokens <= len(GPTJTokenizer.from_pretrained("shakespeare").encode(TEXT[:5000]))
    assert cli.main(["info", str(place / "again")]) == 0
    shown = f"stored as     4 bits, the head 4 bits, calibrated with {tokens:,} tokens\n"
    assert shown in capsys.readouterr().out
    assert read_layout(place / "plain", 4).description == "4 bits, the head 4 bits"


def test_older_files_say_nothing_of_it(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "plain", tmp_path / "model")
    path = tmp_path / "model" / "litert.json"
    fields = json.loads(path.read_text())
    assert fields.pop("calibration_tokens") == 0
    path.write_text(json.dumps(fields))
    assert read_layout(tmp_path / "model", 4) == read_layout(place / "plain", 4)
    for value in (-1, True, "many"):
        path.write_text(json.dumps({**fields, "calibration_tokens": value}))
        with pytest.raises(
            CheckpointFormatError, match=f"calibration_tokens must be a number of tokens, got {value!r}"
        ):
            read_layout(tmp_path / "model", 4)


@pytest.mark.parametrize("name", ["base", "tied", "silu", "odd_sizes", "rotary_none", "wide_eps"])
def test_the_text_goes_through_the_model_of_the_checkpoint(name: str) -> None:
    golden, directory = Golden(name), GOLDENS / name / "causal_lm"
    with stored_weights(directory) as stored:
        reader = WeightReader(stored, lambda done, total: None)
        calibration = Calibration(reader, golden["none/input_ids"], Precision(8, None, 8))
        for layer in range(stored.config.n_layer):
            shape = golden[f"none/causal_lm/hidden_states/{layer}"].shape
            assert_near(calibration.hidden.reshape(shape), golden[f"none/causal_lm/hidden_states/{layer}"])
            calibration.block(*reader.kernels(layer))
    weights, config = oracle.load_weights(directory, np.float32), json.loads((directory / "config.json").read_text())
    normal = oracle.layer_norm(calibration.hidden, weights, "ln_f", config["layer_norm_epsilon"])
    assert_near(normal.reshape(shape), golden[f"none/causal_lm/hidden_states/{stored.config.n_layer}"])


def test_pieces_are_from_the_whole_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT[:60000], encoding="utf-8")
    tokenizer = GPTJTokenizer.from_pretrained("shakespeare")
    ids = tokenizer.encode(TEXT[:60000])
    for positions, count, length in ((256, 16, 256), (2048, 8, 512)):
        found = read_pieces(tmp_path / "text", tokenizer, GPTJConfig(vocab_size=1024, n_positions=positions))
        assert found.shape == (count, length)
        assert found[0].tolist() == ids[:length] and found[-1].tolist() == ids[-length:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text.txt: the text to calibrate with could not be read: No such file"),
        (b"", "text.txt: has 0 tokens, and calibration takes at least 1,024"),
        (b"To be, or not to be", r"text.txt: has \d+ tokens, and calibration takes at least 1,024"),
        (b"caf\xe9 " * 2000, "text.txt: is not text in UTF-8: "),
        (b"a" * 20001, "text.txt: has 20,001 bytes, at most 20,000 are read: take a part of it"),
    ],
)
def test_texts_that_do_not_do(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CALIBRATION_BYTES", 20000)
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        convert("shakespeare", tmp_path / "model", calibration=tmp_path / "text.txt")
    assert {path.name for path in tmp_path.iterdir()} <= {"text.txt"}


def test_checkpoints_that_cannot_read_it(place: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"base.causal_lm: found no vocab.json or encoder.json. A tokenizer is"):
        convert(BASE, tmp_path / "model", calibration=place / "text.txt")
    with pytest.raises(ConfigError, match="calibration belongs to 8 or 4 bits; with 32 nothing is rounded"):
        convert("shakespeare", tmp_path / "model", bits=32, calibration=place / "text.txt")
    shutil.copytree(BASE, tmp_path / "source")
    GPTJTokenizer.from_pretrained("shakespeare").save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match=r"the tokenizer makes token [\d,]+ of .*text.txt, and the model has 48: take"):
        convert(tmp_path / "source", tmp_path / "model", calibration=place / "text.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_flag_is_of_one_format(capsys: pytest.CaptureFixture[str]) -> None:
    for format in ("safetensors", "tflite"):
        with pytest.raises(SystemExit):
            cli.main(["convert", "shakespeare", "nowhere", "--format", format, "--calibration", "text.txt"])
        assert f"--calibration does not go with --format {format}" in capsys.readouterr().err
