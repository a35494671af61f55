"""`tfgptj bench`: what is counted, and what is made of times; these come from a clock that the tests move."""

from __future__ import annotations

import functools
import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tfgptj import GPTJConfig, TFGPTJForCausalLM, cli
from tfgptj.benchmark import generation, machine
from tfgptj.benchmark.generation import Settings, measure, traffic
from tfgptj.errors import InputError, ResourceLimitError

MODEL = Path(__file__).parent / "fixtures" / "pipeline_goldens" / "causal_lm"  # 64 positions
TINY = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64}
SETTINGS = Settings(batch_size=2, prompt_length=12, new_tokens=5, rounds=3, jit_compile=False)

# Seconds by which the clock moves in a generation: to compile, once and for each length of prompt; for the prompt; for
# each token after the first. And in the products that measure the bandwidth.
COMPILE, NEW_LENGTH, PROMPT, TOKEN, PRODUCTS = 100.0, 10.0, 0.5, 0.25, 2.0
SIDE = 64  # of the matrix


class Clock:
    """Stands still but for what the functions that it is given to take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self.token = TOKEN

    def __call__(self) -> float:
        return self.now

    def generate(self, model: Any, ids: Any, **parameters: Any) -> Any:
        generated = self.original(model, ids, **parameters)
        lengths = {shape[1] for shape, _ in self.calls}
        self.now += PROMPT + (parameters["max_new_tokens"] - 1) * self.token
        self.now += (NEW_LENGTH if ids.shape[1] not in lengths else 0) + (COMPILE if not lengths else 0)
        self.calls.append((ids.shape, parameters))
        assert generated.shape == (len(ids), ids.shape[1] + parameters["max_new_tokens"])  # no end of text
        return generated

    original = staticmethod(TFGPTJForCausalLM.generate)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def wait(tensor: Any) -> None:
        clock.now += PRODUCTS

    monkeypatch.setattr(
        TFGPTJForCausalLM, "generate", lambda model, ids, **options: clock.generate(model, ids, **options)
    )
    monkeypatch.setattr(machine, "to_numpy", wait)
    monkeypatch.setattr(machine, "matrix_side", lambda free: SIDE)
    return clock


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return TFGPTJForCausalLM(GPTJConfig(**TINY))


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    return capsys.readouterr().err


# What is counted


@pytest.mark.parametrize(
    ("dtype", "stored", "cached"), [("float32", 4, 4), ("bfloat16", 2, 2), ("mixed_bfloat16", 4, 2)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_step(dtype: str, stored: int, cached: int, tied: bool) -> None:
    config = GPTJConfig(**TINY, tie_word_embeddings=tied, resid_pdrop=0.1)
    read = traffic(TFGPTJForCausalLM(config, dtype=dtype), SETTINGS)
    # Of an embedding that is the head too, all of it; else a row for each of the batch.
    rows = 50 if tied else 2
    assert read.parameters == config.num_parameters() + (rows - 50) * 16
    assert read.weight_bytes == stored * read.parameters
    assert (
        read.cache_bytes == 2 * 2 * (2 * 14 * 16) * cached
    )  # keys and values, layers, batch, 12 + 5 // 2 slots, width


# What is made of times


@pytest.mark.core
def test_times_and_rates(model: TFGPTJForCausalLM, clock: Clock) -> None:
    found = measure(model, SETTINGS, clock)
    results = found["results"]
    assert results["first_token_ms"] == {"median": 500.0, "least": 500.0, "most": 500.0, "samples": [500.0] * 3}
    assert results["decode_ms_per_step"]["samples"] == [250.0] * 3
    assert results["prefill_tokens_per_second"] == 2 * 12 / 0.5
    assert results["decode_tokens_per_second"] == 2 / 0.25
    assert results["first_call_compile_seconds"] == COMPILE + NEW_LENGTH
    assert results["new_shape_compile_seconds"] == NEW_LENGTH
    bandwidth = results["read_bandwidth_gb_per_second"]
    assert bandwidth["samples"] == pytest.approx([machine.PRODUCTS * 4 * SIDE**2 / PRODUCTS / 1e9] * 3)
    counted = found["model"]
    read = counted["weight_bytes_read_per_step"] + counted["cache_bytes_read_per_step"]
    assert results["decode_gb_per_second"] == pytest.approx(read / 0.25 / 1e9)
    assert results["share_of_bandwidth"] == pytest.approx(read / 0.25 / 1e9 / bandwidth["median"])
    assert counted["parameters"] == model.config.num_parameters() and counted["dtype"] == "float32"
    assert found["settings"] == SETTINGS._asdict()


def test_order_of_the_measurements(model: TFGPTJForCausalLM, clock: Clock) -> None:
    measure(model, SETTINGS, clock)
    lengths = [(shape, parameters["max_new_tokens"]) for shape, parameters in clock.calls]
    once = [((2, 12), 5), ((2, 12), 1), ((2, 6), 5), ((2, 6), 5)]
    assert lengths == [*once, *[((2, 12), 1), ((2, 12), 5)] * 3]
    assert all(parameters["jit_compile"] is False for _, parameters in clock.calls)


def test_spread() -> None:
    assert generation.spread([4.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 4.0, "samples": [4.0, 1.0, 2.0]}


def test_times_that_say_nothing(model: TFGPTJForCausalLM, clock: Clock) -> None:
    clock.token = 0.0
    with pytest.raises(InputError, match="5 new tokens took no longer than one, so that decoding cannot be measured"):
        measure(model, SETTINGS, clock)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected an integer from 1 on"),
        ({"rounds": -1}, "rounds is -1, expected an integer from 1 on"),
        ({"prompt_length": 1}, "prompt_length is 1, expected an integer from 2 on: there is nothing to compare"),
        ({"new_tokens": 1}, "new_tokens is 1, expected an integer from 2 on"),
        (
            {"prompt_length": 60, "new_tokens": 5},
            "prompt_length=60 and new_tokens=5 make 65 tokens, and the model has 64 positions",
        ),
    ],
)
def test_settings_that_do_not_fit(model: TFGPTJForCausalLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        measure(model, SETTINGS._replace(**settings))
    SETTINGS._replace(prompt_length=59).check(model.config)  # the last that fits


# The machine


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells in /proc what to compare with")
def test_peak_memory() -> None:
    found = machine.peak_memory()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    told = int(status["VmHWM"].split()[0]) * 1024
    assert found is not None and abs(found - told) <= 0.1 * told  # the kernel counts in batches


def test_a_system_that_tells_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_memory() is None


def test_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "processor", lambda: "of old")
    assert machine.describe_machine()["processor"] == "of old"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast   One\nmodel name\t: Another\n")
    assert machine.describe_machine()["processor"] == "Fast One"


def test_description_is_plain() -> None:
    found = machine.describe_machine()
    assert json.loads(json.dumps(found)) == found
    assert found["processors"] >= 1 and platform.node() not in found.values()
    versions = machine.versions()
    assert versions["keras"] == keras.__version__ and versions["numpy"] == np.__version__
    assert keras.backend.backend() in versions and "unknown" not in versions.values()


def test_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "abacus")
    assert machine.versions()["abacus"] == "unknown"


def test_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    assert machine.peak_device_memory() is None
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["a device of TensorFlow's"])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: {"device_name": "Model T"})
    monkeypatch.setattr(tf.config.experimental, "get_memory_info", lambda name: {"current": 1, "peak": 2**30})
    assert machine.peak_device_memory() == 2**30
    assert machine.describe_machine()["device"] == "Model T"
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")  # TensorFlow's GPU is then nothing to it
    assert machine.peak_device_memory() is None


@pytest.mark.core
def test_bandwidth_reads_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matrix_side", lambda free: SIDE)
    ticks = iter([0.0, 1.0, 10.0, 12.0])
    bandwidth = machine.ReadBandwidth(lambda: next(ticks))
    assert bandwidth.matrix.shape == (SIDE, SIDE)
    assert bandwidth() == machine.PRODUCTS * 4 * SIDE**2 / 2.0


def test_matrix_fits_into_free_memory() -> None:
    for free in (2**30, 2**32, 2**40):
        size = 4 * machine.matrix_side(free) ** 2
        assert 0.99 * min(free / machine.PART_OF_FREE, machine.LARGEST_MATRIX) < size <= free / machine.PART_OF_FREE
    with pytest.raises(
        ResourceLimitError, match="a matrix of at least 256 MiB in 4 times as much .* 1,020 MiB are free"
    ):
        machine.matrix_side(1020 * 2**20)


# The command

BENCH = ["bench", "generate"]
NUMBERS = ["--batch-size", "2", "--prompt-length", "12", "--new-tokens", "5", "--rounds", "3", "--no-jit"]


@pytest.fixture
def command(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    monkeypatch.setattr(generation, "measure", functools.partial(measure, clock=clock))
    return cli.main


def test_command(
    command: Callable[[list[str]], int], clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    file.write_text("an old one")
    assert command([*BENCH, str(MODEL), *NUMBERS, "--dtype", "float32", "--json", str(file)]) == cli.OK
    found = json.loads(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    assert found["benchmark"] == "generate" and found["settings"] == SETTINGS._asdict()
    config = GPTJConfig.from_pretrained(MODEL)
    assert found["model"]["parameters"] == config.num_parameters() and found["model"]["n_layer"] == 2
    out = capsys.readouterr().out
    assert f"model             {config.num_parameters():,} parameters, float32\n" in out
    assert "generated         2 x 12 + 5 tokens, in each of 3 rounds\n" in out
    assert re.search(r"first token +500\.00 +500\.00 +500\.00 ms\n", out)
    assert re.search(r"each further one +250\.00 +250\.00 +250\.00 ms\n", out)
    assert "prompt            48.0 tokens/s\nnew tokens        8.0 tokens/s\n" in out
    assert "compiling         110.00 s at the first call, 10.00 s for another length of prompt\n" in out
    assert re.search(r"peak +[\d.]+ [MG]iB in memory\n", out)
    assert command([*BENCH, *NUMBERS]) == cli.OK  # the packaged model, which recommends to draw
    assert all(parameters["do_sample"] is False for _, parameters in clock.calls)
    assert "model             3,678,720 parameters, float32\n" in capsys.readouterr().out


def test_a_shape_without_a_checkpoint(
    command: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GPTJConfig(**TINY).save_pretrained(tmp_path)
    for given in (tmp_path, tmp_path / "config.json"):
        assert command([*BENCH, "--config", str(given), *NUMBERS, "--dtype", "bfloat16"]) == cli.OK
        assert f"{GPTJConfig(**TINY).num_parameters():,} parameters, bfloat16\n" in capsys.readouterr().out


def test_wrong_arguments(command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command([*BENCH, str(MODEL)]) == cli.FAILED  # the default numbers
    assert "prompt_length=128 and new_tokens=32 make 160 tokens, and the model has 64" in capsys.readouterr().err
    assert command([*BENCH, "no such model"]) == cli.FAILED
    assert "neither a directory" in capsys.readouterr().err
    assert command([*BENCH, "--config", str(MODEL.parent / "none.json")]) == cli.FAILED
    assert "neither a directory" in capsys.readouterr().err
    assert "there is no directory nowhere" in usage_error([*BENCH, "--json", "nowhere/a.json"], capsys)
    assert "not allowed with argument" in usage_error([*BENCH, "a", "--config", "b"], capsys)
    assert "with --config there are none" in usage_error([*BENCH, "--config", "b", "--dtype", "auto"], capsys)
    assert "invalid int value: 'many'" in usage_error([*BENCH, "--rounds", "many"], capsys)
    assert "required: WHAT" in usage_error(["bench"], capsys)
