"""`prefill_chunk_size`: a prompt that is read in pieces gives what it gives at once, and takes less memory."""

from __future__ import annotations

import signal
from typing import Any

import keras
import numpy as np
import pytest
from conftest import assert_near, elsewhere, foremost, numbers

from tfgptj.config import GPTJConfig
from tfgptj.errors import GenerationError, ResourceLimitError
from tfgptj.generation import memory
from tfgptj.generation.compiling import Compiled
from tfgptj.generation.reading import reading_of
from tfgptj.heads import TFGPTJForCausalLM

TENSORFLOW = keras.backend.backend() == "tensorflow"
CONFIG = GPTJConfig(
    vocab_size=61,
    n_positions=64,
    n_embd=24,
    n_layer=2,
    n_head=3,
    rotary_dim=4,
    eos_token_id=None,
    initializer_range=0.3,
)
WIDTH = 9  # columns of the prompts
RANDOM = np.random.default_rng(7)
IDS = RANDOM.integers(1, 61, (3, WIDTH)).astype("int32")
MASKS = {
    "none": np.ones((3, WIDTH), "int32"),
    "left": np.array([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]]),
    "right": np.array([[1] * 5 + [0] * 4, [1] * 8 + [0], [1] * 2 + [0] * 7]),  # no row fills all columns
}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "seed": 5, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "contrastive": {"penalty_alpha": 0.5, "top_k": 4},
    "guidance": {"guidance_scale": 1.5, "negative_prompt_ids": [[3, 4, 5, 6]]},
    "drafts": {"prompt_lookup_num_tokens": 3},
    "step by step": {"logits_processor": lambda ids, scores: -scores},
    "beams step by step": {"num_beams": 2, "logits_processor": lambda ids, scores: -scores},
    "contrastive step by step": {"penalty_alpha": 0.5, "top_k": 4, "logits_processor": lambda ids, scores: -scores},
}
STEPPED = [name for name in SEARCHES if name.endswith("step by step")]
COMPILED = [name for name in SEARCHES if name not in STEPPED]


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    keras.utils.set_random_seed(4)
    return TFGPTJForCausalLM(CONFIG)


@pytest.mark.core
@pytest.mark.parametrize("piece", elsewhere([1, 3, WIDTH - 1, WIDTH, 50], 3))
def test_each_step_equals_the_whole_text(model: TFGPTJForCausalLM, piece: int) -> None:
    wanted = dict.fromkeys(("return_dict_in_generate", "output_logits"), True)
    output = model.generate(IDS[:1], prefill_chunk_size=piece, max_new_tokens=7, **wanted)
    whole = numbers(model(output.sequences))[0]
    for step, logits in enumerate(output.logits):
        assert_near(logits[0], whole[WIDTH - 1 + step], 1e-5)


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("search", foremost(COMPILED, "greedy", "beams", "contrastive", "drafts"))
def test_pieces_change_no_token(model: TFGPTJForCausalLM, search: str, side: str) -> None:
    def generate(**options: Any) -> np.ndarray:
        return model.generate(IDS, MASKS[side], max_new_tokens=8, **SEARCHES[search], **options)

    expected = generate()
    for piece in (1, 3, WIDTH, WIDTH + 1):
        np.testing.assert_array_equal(generate(prefill_chunk_size=piece), expected)


@pytest.mark.parametrize("search", foremost(STEPPED, "step by step", "beams step by step"))
def test_pieces_change_no_token_step_by_step(model: TFGPTJForCausalLM, search: str) -> None:
    expected = model.generate(IDS, MASKS["right"], max_new_tokens=4, **SEARCHES[search])
    pieces = model.generate(IDS, MASKS["right"], max_new_tokens=4, prefill_chunk_size=3, **SEARCHES[search])
    np.testing.assert_array_equal(pieces, expected)


@pytest.mark.core
@pytest.mark.parametrize("search", elsewhere(["greedy", "beams", "contrastive"], "greedy"))
def test_pieces_change_no_token_on_any_backend(model: TFGPTJForCausalLM, search: str) -> None:
    # Of 20 columns the other backends' programs have 24: the first of three pieces of 7 begins within padding.
    ids = np.random.default_rng(1).integers(1, 61, (2, 20))
    options = {"attention_mask": [[1] * 20, [1] * 6 + [0] * 14], "max_new_tokens": 8, **SEARCHES[search]}
    expected = model.generate(ids, **options)
    np.testing.assert_array_equal(model.generate(ids, prefill_chunk_size=7, **options), expected)


@pytest.mark.skipif(not TENSORFLOW, reason="XLA is a choice on TensorFlow only")
def test_pieces_change_no_token_with_xla(model: TFGPTJForCausalLM) -> None:
    expected = model.generate(IDS, MASKS["right"], max_new_tokens=8)
    pieces = model.generate(IDS, MASKS["right"], max_new_tokens=8, prefill_chunk_size=3, jit_compile=True)
    np.testing.assert_array_equal(pieces, expected)


def test_pieces_in_bfloat16() -> None:
    model = TFGPTJForCausalLM(CONFIG, dtype="bfloat16")
    wanted = dict.fromkeys(("return_dict_in_generate", "output_logits"), True)
    output = model.generate(IDS[:1], prefill_chunk_size=4, max_new_tokens=3, **wanted)
    whole = numbers(model(output.sequences))[0]
    for step, logits in enumerate(output.logits):
        assert_near(logits[0], whole[WIDTH - 1 + step], 2**-6)


@pytest.mark.parametrize(
    ("columns", "prompt", "piece", "starts", "width"),
    [
        (12, 12, None, (0,), 12),
        (12, 12, 12, (0,), 12),
        (12, 12, 4, (0, 4, 8), 4),
        (12, 12, 5, (0, 2, 7), 5),  # the second piece reads again what the first has read of it
        (12, 16, 5, (1, 6, 11), 5),
        (3, 12, 5, (9,), 3),
        (1, 12, None, (11,), 1),
    ],
)
def test_pieces_cover_all_columns(
    columns: int, prompt: int, piece: int | None, starts: tuple[int, ...], width: int
) -> None:
    reading = reading_of(columns, prompt, piece, lambda length: length, None, False)
    assert (reading.starts, reading.width) == (starts, width)
    covered = {column for start in starts for column in range(start, start + width)}
    assert covered >= set(range(prompt - columns, prompt))


def traces_of(options: dict[str, Any], lengths: range) -> dict[str, int]:
    model = TFGPTJForCausalLM(GPTJConfig(vocab_size=61, n_embd=8, n_layer=1, n_head=1, rotary_dim=4, eos_token_id=None))
    for length in lengths:
        model.generate(np.ones((1, length), int), max_new_tokens=3, **options)
    return {name: program.traces for (name, *_), program in model._generation_programs.items()}


@pytest.mark.skipif(not TENSORFLOW, reason="traces are counted on TensorFlow, whose graphs leave the shapes open")
def test_no_more_programs_than_needed() -> None:
    # One reads a prompt at once, one the last piece.
    assert traces_of({"prefill_chunk_size": 5}, range(1, 24)) == {"prefill": 2, "read_piece": 1, "decode": 1}


@pytest.mark.skipif(not TENSORFLOW, reason="XLA is a choice on TensorFlow only")
def test_xla_compiles_one_piece_for_each_size() -> None:
    traces = traces_of({"prefill_chunk_size": 8, "jit_compile": True}, range(9, 25, 3))
    assert traces == {"prefill": 2, "read_piece": 2, "decode": 2}  # prompts of 16 and of 24 slots


# Memory


def test_pieces_take_less_memory(model: TFGPTJForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.needed_memory(GPTJConfig(), 1, 2000, 48, 2)
    pieces = memory.needed_memory(GPTJConfig(), 1, 2000, 48, 2, queries=100)
    cache = memory.needed_memory(GPTJConfig(), 1, 0, 2048, 2)
    assert (whole - cache, pieces - cache) == (2 * 4 * 16 * 2000**2, 2 * 4 * 16 * 100 * 2048)

    prompt = np.ones((1, 40), int)
    cache = memory.needed_memory(CONFIG, 1, 0, 64, 4)
    monkeypatch.setattr(memory, "available_memory", lambda: cache + 2 * 4 * 3 * 8 * 64)
    with pytest.raises(ResourceLimitError, match="a lower max_new_tokens or a prefill_chunk_size"):
        model.generate(prompt, max_new_tokens=8)
    assert model.generate(prompt, max_new_tokens=8, prefill_chunk_size=8).shape == (1, 48)


# Interruption


def test_an_interruption_is_heard_between_pieces(model: TFGPTJForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.generate(IDS, max_new_tokens=4)
    call, calls = Compiled.__call__, []

    def interrupted(self: Compiled, *arguments: Any) -> Any:
        result = call(self, *arguments)
        calls.append(self.function.__name__)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(Compiled, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS, max_new_tokens=4, prefill_chunk_size=2)
    assert calls == ["read_piece", "read_piece"]  # of four, and the last before the first new token
    np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=4, prefill_chunk_size=2), expected)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_pieces_cannot_give(model: TFGPTJForCausalLM, name: str) -> None:
    with pytest.raises(GenerationError, match=f"{name} cannot be combined with prefill_chunk_size: they are kept of"):
        model.generate(IDS, prefill_chunk_size=4, return_dict_in_generate=True, **{name: True})
