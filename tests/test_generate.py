"""generate(): ids against Hugging Face's, and everything that a caller can ask of it or get wrong."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from conftest import CONFIGS, Golden, elsewhere, foremost

from tfgptj.config import GPTJConfig
from tfgptj.errors import GenerationError, InputError, NonFiniteLogitsError
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.prompts import bucket
from tfgptj.generation.run import Run
from tfgptj.generation.strategies import new_run
from tfgptj.heads import TFGPTJForCausalLM

OPTIMIZED = True  # graphs run as they do for users: see conftest.py

TENSORFLOW = keras.backend.backend() == "tensorflow"
PROMPT = np.array([[5, 9, 3], [8, 2, 4]], "int32")


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    keras.utils.set_random_seed(4)
    shape = {"vocab_size": 61, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
    return TFGPTJForCausalLM(GPTJConfig(**shape, bos_token_id=1, eos_token_id=None, initializer_range=0.3))


@pytest.mark.core
@pytest.mark.parametrize(
    "golden", elsewhere(foremost(CONFIGS, "base", "odd_sizes", "rotary_none", "tied"), "odd_sizes"), indirect=True
)
@pytest.mark.parametrize("jit", foremost([False, True], False))
def test_greedy_equals_hugging_face(golden: Golden, jit: bool) -> None:
    model = golden.load(TFGPTJForCausalLM)
    model.config.eos_token_id = model.generation_config = None
    for case in ("greedy", "greedy_eos"):
        eos = {"eos_token_id": int(golden[f"{case}/eos_token_id"])} if f"{case}/eos_token_id" in golden else {}
        ids = model.generate(
            golden[f"{case}/input_ids"],
            golden[f"{case}/attention_mask"],
            max_new_tokens=24,
            pad_token_id=int(golden[f"{case}/pad_token_id"]),
            jit_compile=jit,
            **eos,
        )
        np.testing.assert_array_equal(ids, golden[f"{case}/sequences"])


def test_rows_do_not_depend_on_neighbours_or_padding(model: TFGPTJForCausalLM) -> None:
    short, long = [8], [5, 9, 3, 7]
    for options in ({}, {"do_sample": True, "seed": 3}):
        alone = model.generate([short], max_new_tokens=6, **options)[0, 1:]
        for row, mask in (([0, 0, 0, 8], [0, 0, 0, 1]), ([8, 0, 0, 0], [1, 0, 0, 0])):
            together = model.generate([row, long], [mask, [1, 1, 1, 1]], max_new_tokens=6, **options)
            np.testing.assert_array_equal(together[0, 4:], alone)


@pytest.mark.core
def test_same_seed_same_tokens(model: TFGPTJForCausalLM) -> None:
    draw: Callable[..., np.ndarray] = lambda **kw: model.generate(PROMPT, do_sample=True, max_new_tokens=12, **kw)  # noqa: E731
    np.testing.assert_array_equal(draw(seed=7), draw(seed=7))
    assert (draw(seed=7) != draw(seed=8)).any()
    assert (draw() != draw()).any()


def test_steps_draw_different_numbers() -> None:
    keras.utils.set_random_seed(0)
    flat = TFGPTJForCausalLM(
        GPTJConfig(vocab_size=61, n_embd=8, n_layer=1, n_head=1, rotary_dim=4, initializer_range=0)
    )
    rows = flat.generate([[1], [1]], do_sample=True, top_k=0, max_new_tokens=40, seed=5, eos_token_id=None)[:, 1:]
    assert len(np.unique(rows[0])) > 20  # uniform logits: 40 draws of 61 tokens
    assert (rows[0] != rows[1]).any()


def test_zero_temperature_is_greedy(model: TFGPTJForCausalLM) -> None:
    np.testing.assert_array_equal(
        model.generate(PROMPT, do_sample=True, temperature=0), model.generate(PROMPT, do_sample=False)
    )


def test_top_k_one_and_tiny_top_p_are_greedy(model: TFGPTJForCausalLM) -> None:
    expected = model.generate(PROMPT, max_new_tokens=8)
    for option in ({"top_k": 1}, {"top_k": 0, "top_p": 1e-6}, {"top_k": 0, "top_p": 0}, {"temperature": 1e-4}):
        np.testing.assert_array_equal(model.generate(PROMPT, do_sample=True, max_new_tokens=8, **option), expected)


def test_several_sequences_per_prompt(model: TFGPTJForCausalLM) -> None:
    ids = model.generate(PROMPT, do_sample=True, num_return_sequences=3, max_new_tokens=10, seed=1)
    assert ids.shape == (6, 13)
    np.testing.assert_array_equal(ids[:, :3], np.repeat(PROMPT, 3, axis=0))
    assert len({tuple(row) for row in ids[:3]}) == 3


@pytest.mark.core
def test_any_of_several_eos_ends_a_row(model: TFGPTJForCausalLM) -> None:
    free = model.generate(PROMPT, max_new_tokens=10)[:, 3:]
    ends = [int(free[0, 2]), int(free[1, 4])]
    rows = model.generate(PROMPT, max_new_tokens=10, eos_token_id=ends, pad_token_id=60)[:, 3:]
    for row, unstopped in zip(rows, free, strict=True):
        stop = next(i for i, token in enumerate(unstopped) if token in ends)
        np.testing.assert_array_equal(row[: stop + 1], unstopped[: stop + 1])
        assert (row[stop + 1 :] == 60).all()
    assert rows.shape[1] == max(next(i for i, t in enumerate(row) if t in ends) for row in free) + 1  # ends early


def test_padding_defaults_to_the_first_eos(model: TFGPTJForCausalLM) -> None:
    free = model.generate(PROMPT, max_new_tokens=10)[:, 3:]
    rows = model.generate(PROMPT, max_new_tokens=10, eos_token_id=int(free[0, 0]))[:, 3:]
    assert (rows[0] == free[0, 0]).all()


def test_no_prompt_starts_from_bos(model: TFGPTJForCausalLM) -> None:
    np.testing.assert_array_equal(model.generate(max_new_tokens=4), model.generate([[1]], max_new_tokens=4))


def test_lengths(model: TFGPTJForCausalLM) -> None:
    assert model.generate(PROMPT).shape == (2, 23)  # 20 new tokens when nothing is said
    assert model.generate(PROMPT, max_length=5).shape == (2, 5)
    assert model.generate(PROMPT, max_length=5, max_new_tokens=4).shape == (2, 7)
    assert model.generate(np.ones((1, 60), int)).shape == (1, 64)  # as much as fits
    config = GenerationConfig(max_new_tokens=4)
    assert model.generate(PROMPT, generation_config=config).shape == (2, 7)
    assert model.generate(PROMPT, generation_config=config, max_length=4).shape == (2, 4)


class Recorder:
    def __init__(self) -> None:
        self.prompt: Any = None
        self.steps: list[np.ndarray] = []
        self.ended = False

    def put(self, ids: np.ndarray) -> None:
        if self.prompt is None:
            self.prompt = ids
        else:
            self.steps.append(ids)

    def end(self) -> None:
        self.ended = True


@pytest.mark.core
def test_a_streamer_gets_the_same_tokens(model: TFGPTJForCausalLM) -> None:
    for options in ({}, {"do_sample": True, "seed": 11}):
        recorder = Recorder()
        ids = model.generate(PROMPT, max_new_tokens=9, streamer=recorder, **options)
        np.testing.assert_array_equal(np.concatenate([recorder.prompt, np.stack(recorder.steps, axis=1)], axis=1), ids)
        np.testing.assert_array_equal(ids, model.generate(PROMPT, max_new_tokens=9, **options))
        assert recorder.ended


def test_long_generations_cross_chunks(model: TFGPTJForCausalLM) -> None:
    whole = model.generate(PROMPT, max_new_tokens=40)
    pieces = list(new_run(model, PROMPT, None, None, None, None, {"max_new_tokens": 40}).chunks(7))
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole[:, 3:])


@pytest.mark.skipif(not TENSORFLOW, reason="traces are counted on TensorFlow, whose graphs leave the shapes open")
def test_one_trace_serves_every_length_and_batch() -> None:
    model = TFGPTJForCausalLM(GPTJConfig(vocab_size=61, n_embd=8, n_layer=1, n_head=1, rotary_dim=4))
    for length in range(1, 50):
        model.generate(np.ones((1 + length % 3, length), int), max_new_tokens=1 + length % 4)
    assert {key[0]: program.traces for key, program in model._generation_programs.items()} == {
        "prefill": 1,
        "decode": 1,
    }


@pytest.mark.skipif(not TENSORFLOW, reason="XLA is a choice on TensorFlow only")
def test_xla_compiles_once_per_bucket() -> None:
    model = TFGPTJForCausalLM(GPTJConfig(vocab_size=61, n_embd=8, n_layer=1, n_head=1, rotary_dim=4))
    lengths = range(1, 50, 4)
    for length in lengths:
        model.generate(np.ones((1, length), int), max_new_tokens=3, jit_compile=True)
    buckets = {bucket(length) for length in lengths}
    assert buckets == {16, 24, 32, 48, 64}
    assert {p.traces for p in model._generation_programs.values()} == {len(buckets)}


def test_buckets_waste_under_a_third() -> None:
    for length in range(16, 5000):
        assert length <= bucket(length) < length * 1.5


@pytest.mark.parametrize("options", [{}, {"logits_processor": [lambda ids, logits: logits]}], ids=["loop", "steps"])
def test_nothing_of_a_generation_waits_for_garbage_to_be_collected(model: TFGPTJForCausalLM, options: Any) -> None:
    model.generate(PROMPT, max_new_tokens=2, **options)
    gc.collect()
    gc.disable()
    try:
        model.generate(PROMPT, max_new_tokens=2, **options)
        assert not [found for found in gc.get_objects() if isinstance(found, Run)]
    finally:
        gc.enable()


def test_numbers_that_are_not_finite_are_an_error(model: TFGPTJForCausalLM) -> None:
    broken = TFGPTJForCausalLM(model.config)
    broken.set_weights([np.full(w.shape, np.nan, "float32") for w in broken.get_weights()])
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite logits"):
        broken.generate(PROMPT, max_new_tokens=3)


def test_interruption_leaves_the_model_usable(model: TFGPTJForCausalLM) -> None:
    expected = model.generate(PROMPT, max_new_tokens=6)

    class Interrupt(Recorder):
        def put(self, ids: np.ndarray) -> None:
            super().put(ids)
            if len(self.steps) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT, max_new_tokens=6, streamer=Interrupt())
    np.testing.assert_array_equal(model.generate(PROMPT, max_new_tokens=6), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"input_ids": [[61]]}, InputError, r"input_ids\[0, 0\] is 61, outside 0…60"),
        ({"input_ids": [[-1]]}, InputError, r"input_ids\[0, 0\] is -1"),
        ({"input_ids": [[3, 61]], "jit_compile": True}, InputError, r"input_ids\[0, 1\] is 61, outside 0…60"),
        ({"input_ids": [[1] * 65]}, InputError, "input_ids holds 65 positions, but the model has n_positions=64"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, InputError, "row 0 of the prompt has no token"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, InputError, "attention_mask has shape"),
        ({"input_ids": [1, 2]}, InputError, r"must have the shape \[B, T\]"),
        ({"input_ids": [[1] * 60], "max_new_tokens": 5}, InputError, "at most 4"),
        ({"input_ids": [[1] * 64]}, InputError, "over n_positions=64"),
        ({"input_ids": [[1, 2]], "max_length": 2}, GenerationError, "max_length=2 leaves no room"),
        ({"input_ids": [[1]], "max_new_token": 2}, GenerationError, "did you mean max_new_tokens"),
        (
            {"input_ids": [[1]], "assistant_model": 1},
            GenerationError,
            "assistant_model must be a TFGPTJForCausalLM, got int",
        ),
        ({"input_ids": [[1]], "seed": -1}, GenerationError, "seed must be an integer"),
        ({"input_ids": [[1]], "seed": 1.5}, GenerationError, "seed must be an integer"),
        ({"input_ids": [[1]], "generation_config": {"top_k": 1}}, GenerationError, "must be a GenerationConfig"),
        ({"input_ids": [[1]], "num_return_sequences": 2}, GenerationError, "needs do_sample=True or num_beams > 1"),
    ],
)
def test_errors_come_before_any_work(
    model: TFGPTJForCausalLM, call: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.generate(**call)


def test_no_prompt_and_no_bos() -> None:
    model = TFGPTJForCausalLM(GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=1, rotary_dim=4, bos_token_id=None))
    with pytest.raises(GenerationError, match="neither a prompt nor a bos_token_id"):
        model.generate()


@pytest.mark.skipif(not TENSORFLOW, reason="tf.function belongs to TensorFlow")
def test_not_inside_a_compiled_function(model: TFGPTJForCausalLM) -> None:
    import tensorflow as tf

    @tf.function(autograph=False)
    def compiled(ids: tf.Tensor) -> Any:
        return model.generate(ids)

    with pytest.raises(GenerationError, match="inside a compiled function"):
        compiled(tf.constant(PROMPT))
