"""What `benchmarks/generate.py` makes of measurements, and how it speaks with its workers; no library is measured."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tfgptj import GPTJConfig

BENCHMARKS = Path(__file__).parent / "benchmarks"
MODULES = ("generate", "peers", "ggml_file")

# A worker of the standard library alone; "rivals" print things of their own, raise, and end without a word.
WORKER = f"""
import os, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from peers import serve

class Worker:
    def __init__(self):
        if "fails" in sys.argv:
            raise ValueError("cannot  load")
    def facts(self):
        print("a library's own words")
        return {{"threads": 2}}
    def add(self, a, b):
        print("more words")
        return a + b
    def die(self):
        sys.stderr.write("out of memory\\n")
        sys.stderr.flush()
        os._exit(9)

serve(Worker)
"""


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[Any, ...]]:
    """Modules that find each other as scripts do."""
    sys.path.insert(0, str(BENCHMARKS))
    yield tuple(importlib.import_module(name) for name in MODULES)
    sys.path.remove(str(BENCHMARKS))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def generate(modules: tuple[Any, ...]) -> Any:
    return modules[0]


@pytest.fixture
def peers(modules: tuple[Any, ...]) -> Any:
    return modules[1]


@pytest.fixture
def ggml(modules: tuple[Any, ...]) -> Any:
    return modules[2]


def decoded(data: bytes, kind: str) -> np.ndarray:
    """Numbers of blocks of 32, one at a time, as ggml's description of its blocks has them."""
    values = []
    for at in range(0, len(data), {"q8_0": 34, "q4_0": 18}[kind]):
        [scale] = struct.unpack_from("<e", data, at)
        if kind == "q8_0":
            values += [scale * number for number in struct.unpack_from("<32b", data, at + 2)]
        else:
            packed = data[at + 2 : at + 18]
            values += [scale * ((byte & 15) - 8) for byte in packed] + [scale * ((byte >> 4) - 8) for byte in packed]
    return np.array(values, np.float32)


def test_a_worker_answers(peers: Any) -> None:
    host = peers.Host([sys.executable, "-c", WORKER])
    assert host.facts == {"threads": 2}
    assert host.ask("add", a=1, b=2) == 3
    with pytest.raises(peers.PeerFailed, match="TypeError: .*unsupported operand"):
        host.ask("add", a=1, b="x")
    assert host.ask("add", a="a", b="b") == "ab"  # it lives on
    with pytest.raises(peers.PeerFailed, match="ended with exit code 9: out of memory"):
        host.ask("die")
    with pytest.raises(peers.PeerFailed, match="ended before"):
        host.ask("add", a=1, b=2)
    host.stop()


def test_a_worker_that_cannot_start(peers: Any) -> None:
    with pytest.raises(peers.PeerFailed, match="ValueError: cannot load$"):
        peers.Host([sys.executable, "-c", WORKER, "fails"])
    with pytest.raises(peers.PeerFailed, match="ended with exit code 3: it said nothing"):
        peers.Host([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(peers.PeerFailed, match="No such file"):
        peers.Host(["/nowhere/python"])


def test_resident_memory(peers: Any) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells in /proc")
    found = peers.memory()
    assert 2**20 < found["resident"] <= found["peak"]


def test_groups_fit_and_keep_processes_together(generate: Any) -> None:
    rivals = list(generate.RIVALS)
    assert generate.packed(rivals, 2.4, 1000) == [rivals]
    groups = generate.packed(rivals, 2.4, 6)
    assert sum(groups, []) == rivals and len(groups) > 1
    assert all(sum(generate.needed(group, 2.4)) <= 6 for group in groups)
    together = [group for group in groups if "HF TensorFlow eager" in group]
    assert together == [["HF TensorFlow eager", "HF TensorFlow XLA"]]  # one process: 5.8 GB
    assert generate.needed(together[0], 2.4) == [pytest.approx(5.8)]
    with pytest.raises(SystemExit, match="HF TensorFlow eager needs 5.8 GB; raise --memory"):
        generate.packed(rivals, 2.4, 5)


def test_ratios_are_those_of_the_same_rounds(generate: Any) -> None:
    ours, theirs = "tfgptj bfloat16 | 1x8 | decode", "HF PyTorch bfloat16 | 1x8 | decode"
    groups = [{ours: [1.0, 2.0, 4.0]}, {ours: [10.0, 20.0, 40.0], theirs: [30.0, 40.0, 40.0]}]
    found = generate.result(theirs, groups)
    assert found["ratio_to_ours"] == 2.0  # of 3, 2 and 1
    assert (found["median"], found["least"], found["most"]) == (40.0, 30.0, 40.0)
    assert generate.result(ours, groups)["median"] == 7.0
    assert generate.result("HF PyTorch float32 | 1x8 | decode", groups) is None


def test_table(generate: Any) -> None:
    config = GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    facts = {
        "versions": {"python": "3.14"}, "memory": {"resident": 1.5e9, "peak": 2e9},
        "first_call_compile_seconds": 3.0, "new_length_compile_seconds": 0.25,
    }  # fmt: skip
    one, two = {"median": 1.0, "least": 0.5, "most": 2.0}, {"median": 3.0, "least": 3.0, "most": 3.0}
    found = {
        "machine": {"processor": "Fast One", "processors": 2, "load_average": 0.5},
        "bandwidth_gb_per_second": one,
        "settings": {"rounds": 3, "scenarios": ["1x8", "2x8"]},
        "model": config.to_dict(),
        "peers": {"tfgptj float32": facts, "HF PyTorch float32": facts},
        "missing": {"KerasHub float32": "--kerashub was not given", "HF PyTorch float32 | 2x8": "too large"},
        "agreement": {"tfgptj float32": "8 of 8", "HF PyTorch float32": "7 of 8"},
        "results": {
            "tfgptj float32 | 1x8 | decode": {**one, "ratio_to_ours": 1.0},
            "HF PyTorch float32 | 1x8 | decode": {**two, "ratio_to_ours": 3.0},
        },
    }
    text = generate.markdown(found)
    assert "| tfgptj float32 |  |  | 1.0 (0.5 to 2.0) |  |\n" in text
    assert "| HF PyTorch float32 |  |  | 3.0 (3.0 to 3.0) | 3.00 |\n" in text
    assert text.count("| KerasHub float32 | missing: --kerashub was not given |  |  |  |\n") == 2
    assert "| HF PyTorch float32 | missing: too large |  |  |  |\n" in text
    assert "| HF PyTorch float32 | 3.0 | 0.2 | 1.5 | 2.0 | 7 of 8 |\n" in text
    assert "* missing: HF PyTorch float32 | 2x8: too large" in text
    read = config.num_parameters() - 50 * 16
    assert generate.limit_ms(found, 2) == pytest.approx(2 * read / 1e9 * 1e3)


def test_a_peer_without_an_interpreter_is_named(generate: Any) -> None:
    comparison = generate.Comparison(Path("nowhere"), {"reference": None}, [], 1, 1)
    assert not comparison._has_python("HF PyTorch float32")
    assert comparison.missing == {"HF PyTorch float32": "--reference was not given"}
    assert comparison._has_python("tfgptj float32")


@pytest.mark.parametrize(("kind", "steps"), [("q8_0", 127), ("q4_0", 8)])
def test_blocks_of_ggml(ggml: Any, kind: str, steps: int) -> None:
    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    values[1, :32] = 0
    values[2, 5], values[2, 40] = 6, -6  # the farthest from zero, on either side
    back = decoded(ggml.KINDS[kind].encode(values).tobytes(), kind).reshape(values.shape)
    blocks, found = values.reshape(-1, 32), back.reshape(-1, 32)
    step = np.abs(blocks).max(1, keepdims=True) / steps
    rounding = np.abs(blocks) * 2**-10  # of the scale to float16
    # In 4 bits there are 8 steps on the side of the farthest number and 7 on the other: at its end one is off by one.
    far = 1.0 if kind == "q4_0" else 0.5
    assert (np.abs(found - blocks) <= far * step + rounding).all()
    assert np.abs(found - blocks).mean() < 0.3 * step.mean()
    assert not back[1, :32].any() and back[2, 5] == pytest.approx(6, rel=1e-3)
    assert back[2, 40] == pytest.approx(-6, rel=1e-3)


def test_file_of_ggml(ggml: Any, tmp_path: Path) -> None:
    config = {"vocab_size": 11, "n_positions": 16, "n_embd": 32, "n_head": 2, "n_layer": 1, "rotary_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    matrix = np.random.default_rng(0).standard_normal((1500, 32)).astype(np.float16)  # in two pieces
    vector = np.arange(3, dtype=np.float32)
    save_file({"a.weight": matrix, "b.bias": vector, "h.attn.bias": vector}, tmp_path / "model.safetensors")
    ggml.write_ggml(tmp_path, tmp_path / "file", "q4_0")
    data = (tmp_path / "file").read_bytes()
    assert data.startswith(b"lmgg") and struct.unpack_from("<8I", data, 4) == (11, 16, 32, 2, 1, 8, 2002, 11)
    at = 36 + sum(4 + len(str(token)) for token in range(11))
    assert data[36:46] == b"\1\0\0\x000\1\0\0\x001" and data[at - 2 : at] == b"10"
    assert struct.unpack_from("<5I8s", data, at) == (2, 8, 2, 32, 1500, b"a.weight")
    at += 28 + 1500 * 18
    assert decoded(data[at - 1500 * 18 : at], "q4_0") == pytest.approx(matrix.ravel(), abs=0.6)
    assert data[at:] == struct.pack("<4I6s3f", 1, 6, 0, 3, b"b.bias", *vector)
    save_file({"a.weight": matrix[:, :31].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="^a.weight: rows of 31 numbers cannot be cut into blocks of 32$"):
        ggml.write_ggml(tmp_path, tmp_path / "file", "q4_0")
