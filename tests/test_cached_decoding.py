"""The first test of any cache: step by step equals all at once, at every position, however the rows are padded."""

from __future__ import annotations

import functools
import itertools

import keras
import numpy as np
import pytest
from conftest import assert_near, elsewhere, foremost, numbers
from keras import ops

from tfgptj.config import GPTJConfig
from tfgptj.generation import loop
from tfgptj.generation.compiling import Compiled
from tfgptj.generation.prompts import Rows, align_right
from tfgptj.heads import TFGPTJForCausalLM

CONFIG = GPTJConfig(vocab_size=61, n_positions=40, n_embd=24, n_layer=2, n_head=3, rotary_dim=4, initializer_range=0.3)
LENGTHS = {"none": (5, 5, 5, 5), "ragged": (5, 1, 3, 4)}
STEPS = 6
POLICIES = {"float32": 1e-5, "bfloat16": 2**-6}  # and their tolerance
XLA = (
    list(itertools.product(("none", "left", "right"), POLICIES, [(1, True), (4, True)]))
    if keras.backend.backend() == "tensorflow"
    else []
)


def layout(prompts: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of differing lengths as ids and mask [B, P], padded with a token that must not matter."""
    width = max(map(len, prompts)) + (2 if side != "none" else 0)
    ids, mask = np.full((len(prompts), width), 7, "int32"), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        where = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        ids[row, where], mask[row, where] = prompt, True
    return ids, mask


@functools.cache
def model_of(policy: str) -> TFGPTJForCausalLM:
    return TFGPTJForCausalLM(CONFIG, dtype=policy)


@functools.cache
def programs(policy: str, jit: bool) -> tuple[Compiled, Compiled]:
    """What reads a prompt, and what makes a step."""
    model = model_of(policy)
    return (
        Compiled(model, lambda model, room, ids, real: loop.read_prompt(model, ids, real, room), jit),
        Compiled(model, lambda model, static, state: loop.forward(model, state), jit),
    )


def forced(policy: str, ids: np.ndarray, mask: np.ndarray, continuation: np.ndarray, jit: bool) -> list[np.ndarray]:
    """Next-token logits after each token of a given continuation [B, STEPS], computed one step at a time."""
    read_prompt, forward = programs(policy, jit)
    ids, mask = align_right(Rows(ids, mask))
    room = ((0, 0), (0, STEPS + 1))
    given = ops.convert_to_tensor(np.pad(ids, room)), ops.convert_to_tensor(np.pad(mask, room))
    _, state = read_prompt(STEPS + 1, *given)
    none = ops.convert_to_tensor(np.zeros(0, "int32"))
    controls = loop.Controls((), none, ops.convert_to_tensor(0), ops.convert_to_tensor(STEPS), none)
    logits = []
    for step in range(STEPS):
        state = loop.write(ops.convert_to_tensor(continuation[:, step]), state, controls)
        result, state = forward(None, state)
        logits.append(numbers(result))
    return logits


@pytest.mark.core
@pytest.mark.parametrize(
    ("side", "policy", "way"),
    [
        *elsewhere(
            foremost(
                itertools.product(("none", "left", "right"), POLICIES, [(rows, False) for rows in (1, 2, 3, 4)]),
                *itertools.product(("none", "left", "right"), POLICIES, [(2, False)]),
                *itertools.product(("none", "right"), ["float32"], [(1, False)]),
                ("left", "float32", (4, False)),
            ),
            *(("none", "bfloat16", (2, False)), ("left", "float32", (2, False)), ("right", "float32", (2, False))),
        ),
        *foremost(XLA, *XLA[-1:]),
    ],
)
def test_each_step_equals_the_whole_text(side: str, policy: str, way: tuple[int, bool]) -> None:
    rows, jit = way
    model = model_of(policy)
    random = np.random.default_rng(rows)
    lengths = LENGTHS["none" if side == "none" else "ragged"][:rows]
    texts = [random.integers(1, 61, length + STEPS).astype("int32") for length in lengths]
    ids, mask = layout([text[:length] for text, length in zip(texts, lengths, strict=True)], side)
    continuation = np.stack([text[length:] for text, length in zip(texts, lengths, strict=True)])
    alone = [numbers(model(text[None]))[0] for text in texts]  # each row by itself, all positions at once
    for step, logits in enumerate(forced(policy, ids, mask, continuation, jit)):
        for row, length in enumerate(lengths):
            assert_near(logits[row], alone[row][length + step], POLICIES[policy])


@pytest.mark.parametrize("length", range(1, 8))
def test_any_split_between_prompt_and_steps(length: int) -> None:
    model = model_of("float32")
    text = np.random.default_rng(3).integers(1, 61, (1, length + STEPS)).astype("int32")
    whole = numbers(model(text))
    steps = forced("float32", text[:, :length], np.ones((1, length), bool), text[:, length:], jit=False)
    for step, logits in enumerate(steps):
        assert_near(logits, whole[:, length + step], 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_reads_the_last_real_token(side: str) -> None:
    model = model_of("float32")
    prompts = [np.array([5, 9, 3], "int32"), np.array([8], "int32")]
    ids, mask = layout(prompts, side)
    together = model.generate(ids, mask, max_new_tokens=5, eos_token_id=None)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], max_new_tokens=5, eos_token_id=None)
        np.testing.assert_array_equal(together[row, -5:], alone[0, -5:])
