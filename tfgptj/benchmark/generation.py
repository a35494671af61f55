"""How fast a model generates: time to the first token, time per token, memory, and the share of the bandwidth.

A token of decoding reads every weight once, so that no machine decodes faster than it reads. What is measured is
therefore set beside a matrix-vector product that is timed in the same rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tfgptj.batching import check_positive
from tfgptj.benchmark.machine import ReadBandwidth, describe_machine, peak_device_memory, peak_memory, versions
from tfgptj.checkpoints.tensors import FLOAT_DTYPES
from tfgptj.config import GPTJConfig
from tfgptj.errors import InputError
from tfgptj.generation.compiling import runs_itself
from tfgptj.heads import TFGPTJForCausalLM


class Settings(NamedTuple):
    """What to measure.

    Args:
        batch_size: int, prompts at once.
        prompt_length: int from 2 on, tokens of each.
        new_tokens: int from 2 on, tokens that are added.
        rounds: int, measurements of which the median is taken.
        jit_compile: as for :func:`tfgptj.generation.generate.generate`.
    """

    batch_size: int = 1
    prompt_length: int = 128
    new_tokens: int = 32
    rounds: int = 5
    jit_compile: bool | None = None

    def check(self, config: GPTJConfig) -> None:
        """See whether a model can be measured so.

        Raises:
            InputError: for a number that is too small, or more tokens than the model has positions.
        """
        for name in ("batch_size", "prompt_length", "new_tokens", "rounds"):
            check_positive(name, getattr(self, name))
        for name in ("prompt_length", "new_tokens"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} is 1, expected an integer from 2 on: there is nothing to compare one with")
        if self.prompt_length + self.new_tokens > config.n_positions:
            raise InputError(
                f"prompt_length={self.prompt_length} and new_tokens={self.new_tokens} make "
                f"{self.prompt_length + self.new_tokens} tokens, and the model has {config.n_positions} positions: "
                "make one of them smaller"
            )


class Traffic(NamedTuple):
    """What a step of decoding cannot do without: parameters read, their bytes, and the bytes of keys and values."""

    parameters: int
    weight_bytes: int
    cache_bytes: int


def traffic(model: TFGPTJForCausalLM, settings: Settings) -> Traffic:
    """What a step of decoding reads at least, halfway through the new tokens.

    Of an embedding only the rows of its tokens, unless it is the head too; everything else once, in the dtype that it
    is stored in: a mixed policy has float32 variables. Keys and values of real tokens only.

    >>> config = GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    >>> found = traffic(TFGPTJForCausalLM(config), Settings(prompt_length=10, new_tokens=4))
    >>> found.parameters == config.num_parameters() - 50 * 16 + 16
    True
    >>> found.cache_bytes == 2 * 2 * 12 * 16 * 4  # keys and values of 2 layers, 12 tokens, width 16, float32
    True
    """
    config, slots = model.config, settings.prompt_length + settings.new_tokens // 2
    numbers = 2 * config.n_layer * settings.batch_size * slots * config.n_embd
    cache_bytes = numbers * FLOAT_DTYPES[model.compute_dtype].itemsize
    if runs_itself(model):
        parameters, weight_bytes = model.read_per_step(settings.batch_size)
        return Traffic(parameters, weight_bytes, cache_bytes)
    table = model.transformer.embedding.wte.embeddings
    read = {variable.path: (variable.shape, variable.dtype) for variable in model.weights}
    if not config.tie_word_embeddings:
        read[table.path] = ((settings.batch_size, config.n_embd), table.dtype)
    sizes = [(int(np.prod(shape)), FLOAT_DTYPES[dtype].itemsize) for shape, dtype in read.values()]
    return Traffic(
        parameters=sum(size for size, _ in sizes),
        weight_bytes=sum(size * itemsize for size, itemsize in sizes),
        cache_bytes=cache_bytes,
    )


def measure(
    model: TFGPTJForCausalLM, settings: Settings, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Measure a model.

    The time to the first token is that of a generation of one; the time per token of decoding is the difference between
    a long generation and that one. Greedy, without an end of text.

    Args:
        model: as it is; its own generation parameters count, but for sampling and ends of text.
        settings: what to measure.
        clock: gives seconds.

    Returns:
        `settings`, `model`, `machine`, `versions` and `results`, all in plain values that JSON can hold.

    Raises:
        InputError: for settings that do not fit the model, or too few new tokens to measure.
        ResourceLimitError: when there is not enough memory.
    """
    settings.check(model.config)
    machine = describe_machine()
    seconds = _Stopwatch(model, settings, clock)
    long, short = (settings.prompt_length, settings.new_tokens), (settings.prompt_length, 1)
    first = seconds(*long)
    seconds(*short)
    other = (settings.prompt_length // 2, settings.new_tokens)
    new_shape = seconds(*other) - seconds(*other)
    memory = {"peak_memory_bytes": peak_memory(), "peak_device_memory_bytes": peak_device_memory()}
    bandwidth = ReadBandwidth(clock)
    rounds = [(seconds(*short), seconds(*long), bandwidth()) for _ in range(settings.rounds)]
    return {
        "benchmark": "generate",
        "settings": settings._asdict(),
        "model": _describe_model(model, settings),
        "machine": machine,
        "versions": versions(),
        "results": {
            **_results(rounds, settings, traffic(model, settings)),
            "first_call_compile_seconds": first - statistics.median(long for _, long, _ in rounds),
            "new_shape_compile_seconds": new_shape,
            **memory,
        },
    }


class _Stopwatch:
    """Times generations of a model from random prompts."""

    def __init__(self, model: TFGPTJForCausalLM, settings: Settings, clock: Callable[[], float]) -> None:
        self.model, self.settings, self.clock = model, settings, clock
        shape = (settings.batch_size, settings.prompt_length)
        self.ids = np.random.default_rng(0).integers(0, model.config.vocab_size, shape, dtype="int32")

    def __call__(self, prompt_length: int, new_tokens: int) -> float:
        start = self.clock()
        self.model.generate(
            self.ids[:, :prompt_length],
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            jit_compile=self.settings.jit_compile,
        )
        return self.clock() - start


def _describe_model(model: TFGPTJForCausalLM, settings: Settings) -> dict[str, Any]:
    read, config = traffic(model, settings), model.config
    return {
        **{name: getattr(config, name) for name in ("n_layer", "n_embd", "n_head", "vocab_size")},
        "dtype": model.layout.description if runs_itself(model) else model.dtype_policy.name,
        "parameters": model.num_parameters(),
        "parameters_read_per_step": read.parameters,
        "weight_bytes_read_per_step": read.weight_bytes,
        "cache_bytes_read_per_step": read.cache_bytes,
    }


def _results(rounds: list[tuple[float, float, float]], settings: Settings, read: Traffic) -> dict[str, Any]:
    """What follows from the rounds, each of them seconds of a short and a long generation, and bytes per second."""
    steps = settings.new_tokens - 1
    first_token = spread([1e3 * short for short, _, _ in rounds])
    decode = spread([1e3 * (long - short) / steps for short, long, _ in rounds])
    bandwidth = spread([1e-9 * bandwidth for _, _, bandwidth in rounds])
    if decode["median"] <= 0:
        raise InputError(
            f"{settings.new_tokens} new tokens took no longer than one, so that decoding cannot be measured: "
            "raise new_tokens or rounds"
        )
    reached = 1e-6 * (read.weight_bytes + read.cache_bytes) / decode["median"]  # gigabytes per second
    return {
        "first_token_ms": first_token,
        "decode_ms_per_step": decode,
        "read_bandwidth_gb_per_second": bandwidth,
        "prefill_tokens_per_second": 1e3 * settings.batch_size * settings.prompt_length / first_token["median"],
        "decode_tokens_per_second": 1e3 * settings.batch_size / decode["median"],
        "decode_gb_per_second": reached,
        "share_of_bandwidth": reached / bandwidth["median"],
    }


def spread(samples: list[float]) -> dict[str, Any]:
    """Median, least and most of some measurements, and all of them.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'least': 1.0, 'most': 3.0, 'samples': [3.0, 1.0, 2.0]}
    """
    return {
        "median": statistics.median(samples),
        "least": min(samples),
        "most": max(samples),
        "samples": samples,
    }
