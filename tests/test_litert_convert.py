"""Conversion for LiteRT, and the commands and pipelines that know what it makes."""

from __future__ import annotations

import errno
import importlib
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import GOLDENS
from malformed.killed_saves import in_a_process
from safetensors.numpy import load_file, save_file

import tfgptj.litert
from tfgptj import cli, limits, pipeline
from tfgptj.checkpoints.directory import find_weights
from tfgptj.errors import BackendError, CheckpointError, CheckpointFormatError, ConfigError, InputError
from tfgptj.litert.convert import convert
from tfgptj.litert.layout import read_layout
from tfgptj.litert.validate import validate

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="LiteRT computes, not a Keras backend")
BASE = GOLDENS / "base" / "causal_lm"


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model in 4 bits."""
    directory = tmp_path_factory.mktemp("litert") / "shakespeare"
    assert cli.main(["convert", "shakespeare", str(directory), "--format", "litert", "--bits", "4", "--quiet"]) == 0
    return directory


def test_the_directory_has_all_that_belongs_to_the_model(shakespeare: Path) -> None:
    names = {path.name for path in shakespeare.iterdir()}
    assert {"litert.json", "config.json", "generation_config.json", "tokenizer.json", "head.tflite"} <= names
    layout = read_layout(shakespeare, 4)
    assert (layout.bits, layout.block_size, layout.head_bits) == (4, 32, 8)
    assert layout.description == "4 bits in blocks of 32, the head 8 bits"
    stored = load_file(shakespeare / "outside.safetensors")
    assert stored["wte.weight"].dtype == np.float16  # as in the source
    assert not list(shakespeare.parent.glob(".tfgptj-*"))


def test_info_and_validate_know_it(shakespeare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(shakespeare)]) == 0
    assert "stored as     4 bits in blocks of 32, the head 8 bits\n" in capsys.readouterr().out
    assert cli.main(["validate", str(shakespeare), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "sha256 segment-004.tflite" in printed and printed.endswith("no faults\n")


def test_validate_finds_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(BASE, tmp_path / "model")
    head = tmp_path / "model" / "head.tflite"
    content = bytearray(head.read_bytes())
    content[-1] ^= 1
    head.write_bytes(content)
    assert validate(tmp_path / "model").faults == [
        "head.tflite: its SHA-256 is not the one that was written down: convert it again"
    ]
    head.unlink()
    assert "head.tflite: has 0 bytes, expected" in validate(tmp_path / "model").faults[0]
    assert cli.main(["validate", str(tmp_path / "model"), "--quiet"]) == 1
    assert "1 fault(s), listed above" in capsys.readouterr().err


def test_pipelines_and_the_command_generate_with_it(shakespeare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate: Any = pipeline("text-generation", shakespeare, max_new_tokens=8, do_sample=False)
    [result] = generate("ROMEO:")
    assert "".join(generate.stream("ROMEO:", return_full_text=True)) == result["generated_text"]
    flags = ["--model", str(shakespeare), "--max-new-tokens", "8", "--greedy"]
    assert cli.main(["run", *flags, "ROMEO:"]) == 0
    assert capsys.readouterr().out == result["generated_text"] + "\n"
    with pytest.raises(InputError, match=r"dtype would have no effect: .*shakespeare holds a LiteRT model"):
        pipeline("text-generation", shakespeare, dtype="bfloat16")


def test_bench_tells_what_it_reads(shakespeare: Path) -> None:
    from tfgptj.benchmark.generation import Settings, traffic
    from tfgptj.litert.model import LiteRTGPTJForCausalLM

    model = LiteRTGPTJForCausalLM.from_pretrained(shakespeare)
    found = traffic(model, Settings(batch_size=2, prompt_length=10, new_tokens=4))
    assert found.parameters == model.num_parameters() - 1024 * 256 + 2 * 256
    matrices, head = 4 * 12 * 256 * 256, 1024 * 256
    assert matrices * 9 // 16 + head < found.weight_bytes < 1.1 * (matrices * 9 // 16 + head)  # 4 bits and scales of 16
    assert found.cache_bytes == 2 * 4 * 2 * 12 * 256 * 4


def test_loaders_of_checkpoints_say_what_it_is(shakespeare: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a LiteRT model; load it with LiteRTGPTJForCausalLM"):
        find_weights(shakespeare)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (BASE, {"bits": 5}, r"bits and head_bits must be one of \(4, 8, 32\), got 5 and 8"),
        (
            BASE,
            {"bits": 4, "block_size": 16},
            r"block_size must be one of \(32, 64, 128\), and belongs to 4 bits; got 16",
        ),
        (BASE, {"bits": 8, "block_size": 32}, r"and belongs to 4 bits; got 32"),
        (BASE, {"bits": 4, "block_size": 32}, r"block_size=32 does not divide 16: choose another one, or 8 bits"),
        (GOLDENS / "odd_sizes" / "causal_lm", {"bits": 4, "block_size": 0}, r"block_size=0 does not divide 21"),
        (GOLDENS / "prelu" / "causal_lm", {}, r"activation_function 'prelu' has weights of its own"),
    ],
)
def test_what_cannot_be_had(source: Path, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / "model", **options)
    assert not list(tmp_path.iterdir())


def test_only_language_models_without_nan_and_into_new_directories(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the checkpoint has the head 'classification'; only language models"):
        convert(GOLDENS / "base" / "classification", tmp_path / "model")
    with pytest.raises(CheckpointError, match="there is something already; choose another directory"):
        convert(BASE, BASE)
    shutil.copytree(BASE, tmp_path / "source")
    stored = load_file(BASE / "model.safetensors")
    stored["transformer.h.1.mlp.fc_out.weight"][3, 3] = np.nan
    save_file(stored, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.fc_out.kernel: holds NaN or infinite values"):
        convert(tmp_path / "source", tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file.*: could not be written: "):
        convert(BASE, tmp_path / "file" / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "file"}


def test_flags_of_other_formats_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--format", "litert", "--dtype", "float16"], "--dtype does not go with --format litert"),
        (["--bits", "4"], "--bits does not go with --format safetensors"),
        (["--keep-head-bits", "8"], "--keep-head-bits does not go with --format safetensors"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["convert", "shakespeare", "nowhere", *flags])
        assert message in capsys.readouterr().err


def test_an_empty_directory_is_taken_and_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    convert(BASE, tmp_path, bits=32, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1][0] == told[-1][1]
    assert read_layout(tmp_path, 2).description == "32 bits, the head 32 bits"


def doomed(directory: Path, at: int, bits: int) -> None:
    """A conversion whose process is killed when so much has been put on disk."""
    sync, count = os.fsync, iter(range(at))

    def killed(descriptor: int) -> None:
        if next(count, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = killed
    convert(BASE, directory, bits=bits, overwrite=True)


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_leaves_nothing_that_loads(tmp_path: Path) -> None:
    assert status_of(in_a_process(doomed, tmp_path / "model", 9, 8)) == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    [left] = tmp_path.iterdir()
    files = {path.name for path in (left / "model").iterdir()}
    assert left.name.startswith(".tfgptj-") and "attention.tflite" in files and "litert.json" not in files
    with pytest.raises(CheckpointError, match=r"holds no LiteRT model, there is no litert.json"):
        read_layout(left / "model", 2)
    convert(BASE, tmp_path / "model")


def test_a_kill_leaves_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    convert(BASE, target, bits=32)
    bits = []
    for at in itertools.count(0, 3):
        status = status_of(in_a_process(doomed, target, at, 8))
        assert validate(target).faults == []
        bits.append(read_layout(target, 2).bits)
        if status != -signal.SIGKILL:
            break
    assert status == 0 and bits[-1] == 8 and bits[:-2] == [32] * (len(bits) - 2) and len(bits) > 5
    [model] = (path for path in tmp_path.iterdir() if not path.name.startswith(".tfgptj-"))
    assert "litert.json" in {path.name for path in model.iterdir()}


def test_a_model_is_replaced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    convert(BASE, target, bits=32, overwrite=True)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(CheckpointError, match="there is something already; choose another directory, or overwrite it"):
        convert(BASE, target)
    assert cli.main(["convert", str(BASE), str(tmp_path / "link"), "--format", "litert", "--overwrite", "--quiet"]) == 0
    assert read_layout(target, 2).bits == 8 and validate(target).faults == []
    assert {path.name for path in tmp_path.iterdir()} == {"model", "link"}
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files, too, which would be lost: notes.txt"):
        convert(BASE, target, overwrite=True)
    (target / "notes.txt").rename(tmp_path / "notes.txt")
    for other in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(CheckpointError, match="holds no LiteRT model, and nothing else is overwritten"):
            convert(BASE, other, overwrite=True)
    monkeypatch.setattr("ctypes.CDLL", lambda *arguments, **options: object())
    monkeypatch.setattr("sys.platform", "other")
    with pytest.raises(CheckpointError, match=f"{target}: could not be written: {os.strerror(errno.ENOTSUP)}"):
        convert(BASE, target, bits=32, overwrite=True)
    assert read_layout(target, 2).bits == 8 and validate(target).faults == []


def test_a_list_of_files_that_is_far_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(BASE, tmp_path)
    monkeypatch.setattr(limits, "MAX_INDEX_BYTES", 10)
    with pytest.raises(CheckpointFormatError, match=r"bytes are too many for such a file"):
        read_layout(tmp_path, 2)


def test_without_litert_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"LiteRT is not installed; get it with pip install 'tfgptj\[litert\]'"):
        importlib.reload(tfgptj.litert)


def test_the_configuration_goes_along(shakespeare: Path) -> None:
    assert json.loads((shakespeare / "config.json").read_text())["architectures"] == ["GPTJForCausalLM"]
