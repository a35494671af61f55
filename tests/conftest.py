"""Settings that every test runs under, and the goldens of Hugging Face's GPT-J."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tests compile much and run little: XLA's machine code is not made faster, which takes a third of JAX's time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
# And what is this small is not worth sharing among threads.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parent
FIXTURES = TESTS / "fixtures"
GOLDENS = FIXTURES / "goldens"
CONFIGS = sorted(path.parent.name for path in GOLDENS.glob("*/outputs.npz"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "TF_CPP_MIN_LOG_LEVEL": "1"}


def run_python(*arguments: Any, cwd: Path = TESTS, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, where the package and the tests' modules can be imported."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**ENVIRONMENT, **environment})


def elsewhere(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Parameters of a test: on TensorFlow all of them, on the other backends, which compile for each, those to keep."""
    import keras

    everything = list(cases)
    assert [case for case in kept if case not in everything] == []
    return everything if keras.backend.backend() == "tensorflow" else list(kept)


def foremost(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Parameters of a test: those to keep, and on TensorFlow the others too, if slow tests are asked for."""
    everything = list(cases)
    return [
        case if case in kept else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)
        for case in elsewhere(everything, *kept)
    ]


class Golden:
    """One tiny checkpoint and what Hugging Face's PyTorch classes computed with it: see fixtures/make_goldens.py."""

    def __init__(self, name: str) -> None:
        self.directory = GOLDENS / name
        self.arrays = np.load(self.directory / "outputs.npz")

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def inputs(self, case: str) -> dict[str, np.ndarray]:
        names = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds")
        return {name: self[f"{case}/{name}"] for name in names if f"{case}/{name}" in self}

    def load(self, cls: Any, head: str = "causal_lm", **options: Any) -> Any:
        return cls.from_pretrained(self.directory / head, **options)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> Iterator[None]:
    """Also where the tests run in the background of a script, which starts them, and what they start, deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_compiled_twice(tmp_path_factory: pytest.TempPathFactory) -> None:
    """JAX compiles for each model anew, and for most the same: it finds again on disk what it has compiled before."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def _graphs_run_as_traced(request: pytest.FixtureRequest) -> Iterator[None]:
    """TensorFlow improves each graph before its first run, which takes a sixth of the tests' time.

    Modules in which users' graphs are the subject keep that, with `OPTIMIZED = True`; so do processes of their own.
    """
    import keras

    if keras.backend.backend() != "tensorflow" or getattr(request.module, "OPTIMIZED", False):
        yield
        return
    import tensorflow as tf

    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False, **before})


@pytest.fixture
def eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` computes its few steps as Python says: on TensorFlow to trace one takes as long as to make seventy."""
    import keras

    compiled = keras.Model.compile

    def compile(self: Any, *args: Any, **options: Any) -> Any:
        if not options.get("jit_compile") and options.get("steps_per_execution", 1) == 1:
            options.setdefault("run_eagerly", True)
        return compiled(self, *args, **options)

    if keras.backend.backend() == "tensorflow":
        monkeypatch.setattr(keras.Model, "compile", compile)


@pytest.fixture
def eager_generation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of `generate`, whose few tokens take less than to trace the loop.

    Not with XLA, nor in tests marked `compiled`; no program that was compiled is used, and none is kept.
    """
    import keras

    from tfgptj.generation.compiling import Compiled, plain_graph, runs_itself

    compiled = Compiled.__call__

    def call(self: Compiled, static: Any, *tensors: Any) -> Any:
        if self.jit_compile or runs_itself(self.model):
            return compiled(self, static, *tensors)
        with plain_graph():
            return self.function(self.model, static, *tensors)

    if keras.backend.backend() == "tensorflow" and request.node.get_closest_marker("compiled") is None:
        monkeypatch.setattr(Compiled, "__call__", call)


@pytest.fixture(autouse=True, scope="module")
def _what_stays_is_searched_once() -> Iterator[None]:
    """Keras collects garbage for each kernel that it quantizes, and libraries keep much of what has been compiled."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(params=elsewhere(CONFIGS, "base", "odd_sizes", "rotary_none", "tied"))
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden configuration in turn."""
    return Golden(request.param)


@pytest.fixture
def base() -> Golden:
    """The golden configuration with GPT-J's own settings."""
    return Golden("base")


@pytest.fixture(autouse=True)
def _same_start() -> Any:
    """Every test begins with the same seed and the float32 policy."""
    import keras

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")


def numbers(tensor: Any) -> np.ndarray:
    """A tensor of any backend as float or int NumPy."""
    from keras import ops

    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32") if "float" in str(tensor.dtype) else tensor))


def assert_near(actual: Any, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    """max |difference| <= tolerance · max |expected|."""
    actual = numbers(actual)
    assert actual.shape == expected.shape
    worst = float(np.abs(actual.astype("float64") - expected).max())
    assert worst <= tolerance * float(np.abs(expected).max()), f"differs by {worst:.3g}"
