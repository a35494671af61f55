"""Ctrl-C, dropped streams, callbacks that fail: generation stops, keeps nothing, and can be called again."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, elsewhere

from tfgptj import GPTJTokenizer, TFGPTJForCausalLM
from tfgptj.generation.compiling import Compiled
from tfgptj.generation.run import CHUNK, Run
from tfgptj.generation.strategies import new_run

TOKENIZER = GPTJTokenizer.from_directory(FIXTURES / "small_vocab")
OPTIONS: dict[str, Any] = {"max_new_tokens": CHUNK + 4, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return TFGPTJForCausalLM.from_pretrained(FIXTURES / "pipeline_goldens" / "causal_lm", dtype="float32")


@pytest.fixture(scope="module")
def expected(model: TFGPTJForCausalLM) -> np.ndarray:
    """What there is without any fault."""
    return model.generate([[5, 6]], **OPTIONS)


class Fault(Exception):
    """Raised by a caller's function."""


def fail(*arguments: Any) -> Any:
    raise Fault


def interrupt(*arguments: Any) -> Any:
    signal.raise_signal(signal.SIGINT)


class Streamer:
    """Calls a function at the third token."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.given = function, 0

    def put(self, ids: np.ndarray) -> None:
        self.given += 1
        if self.given == 4:  # the prompt comes first
            self.function()

    def end(self) -> None:
        raise AssertionError("the stream did not end")


def stream(model: TFGPTJForCausalLM) -> Iterator[str]:
    return model.stream("The king", tokenizer=TOKENIZER, **OPTIONS)


def runs() -> list[Run]:
    """Generations that are still in memory, with their keys and values."""
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), Run)]


def check_nothing_is_left(model: TFGPTJForCausalLM, expected: np.ndarray) -> None:
    assert runs() == []
    np.testing.assert_array_equal(model.generate([[5, 6]], **OPTIONS), expected)


@pytest.mark.core
@pytest.mark.parametrize("streamed", elsewhere([False, True], False))
def test_control_c_while_the_model_computes_ends_within_a_chunk(
    model: TFGPTJForCausalLM, expected: np.ndarray, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, calls = Compiled.__call__, []

    def interrupted(self: Compiled, *arguments: Any) -> Any:
        calls.append(self)
        sender = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
        if len(calls) == 2:  # after the prompt the first chunk; in a stream the second token
            sender.start()
        try:
            return call(self, *arguments)
        finally:
            if len(calls) == 2:
                sender.join()

    with monkeypatch.context() as patch:
        patch.setattr(Compiled, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _ = list(stream(model)) if streamed else model.generate([[5, 6]], **OPTIONS)
    assert len(calls) == 2
    check_nothing_is_left(model, expected)


@pytest.mark.parametrize(("function", "error"), [(interrupt, KeyboardInterrupt), (fail, Fault)])
def test_a_streamer_that_does_not_return(
    model: TFGPTJForCausalLM, expected: np.ndarray, function: Callable[..., Any], error: type[BaseException]
) -> None:
    streamer = Streamer(function)
    with pytest.raises(error):
        model.generate([[5, 6]], streamer=streamer, **OPTIONS)
    assert streamer.given == 4  # nothing after the step in which it came
    check_nothing_is_left(model, expected)


@pytest.mark.parametrize("argument", ["logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria"])
@pytest.mark.parametrize(("function", "error"), [(interrupt, KeyboardInterrupt), (fail, Fault)])
def test_a_function_that_does_not_return(
    model: TFGPTJForCausalLM, expected: np.ndarray, argument: str, function: Any, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        model.generate([[5, 6]], **{argument: function}, **OPTIONS)
    check_nothing_is_left(model, expected)


@pytest.mark.parametrize("close", [True, False])
def test_what_is_dropped_midway_is_gone(model: TFGPTJForCausalLM, expected: np.ndarray, close: bool) -> None:
    pieces = stream(model)
    chunks = new_run(model, [[5, 6]], parameters=OPTIONS).chunks(CHUNK)
    assert next(pieces)
    assert next(chunks).shape == (1, CHUNK)
    assert len(runs()) == 2
    if close:
        pieces.close()
    del pieces, chunks
    check_nothing_is_left(model, expected)
