"""Limits of generation: an error that names the numbers, before any work; and how often a model is compiled.

What can go wrong, and which tests show that it does not:

G1  ids that no model has          test_inputs, test_generate::test_errors_come_before_any_work; here
                                   test_finished_rows_may_be_filled_with_a_token_that_there_is_not
G2  no rows, no tokens, padding    here test_there_must_be_a_prompt; test_models::test_a_row_of_padding_poisons_nothing
G3  NaN, or no token allowed       here test_broken_weights_are_an_error, test_every_token_forbidden
G4  too long, no length at all     test_generation_config::test_values_out_of_range_are_refused, test_generate
G5  numbers that make no sense     test_generation_config, test_generate; here
                                   test_more_beams_than_tokens_find_the_best_of_all
G6  the cache at every position    test_cached_decoding
G7  neighbours and padding         test_rows_do_not_depend_on_neighbours_or_padding, of beams, contrastive, scores too
G8  a seed and its text            test_sampling, test_streaming; here test_another_process_draws_the_same
G9  Ctrl-C, dropped streams        test_interruptions
G10 memory                         here, from test_too_much_memory_is_refused_with_the_numbers on
G11 threads and compilations       here, from test_two_threads_may_generate_at_once on
G12 parts of characters and stops  test_streaming, test_stopping
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import elsewhere, numbers, run_python
from generation_goldens import load

from tfgptj.config import GPTJConfig
from tfgptj.errors import GenerationError, InputError, NonFiniteLogitsError, ResourceLimitError
from tfgptj.generation import memory
from tfgptj.generation.prompts import Rows, check_seed, negative_rows, random_rows
from tfgptj.heads import TFGPTJForCausalLM

eager = pytest.mark.usefixtures("eager_generation")
TENSORFLOW = keras.backend.backend() == "tensorflow"


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return load()


def small() -> TFGPTJForCausalLM:
    return TFGPTJForCausalLM(GPTJConfig(vocab_size=61, n_embd=8, n_layer=1, n_head=1, rotary_dim=4, eos_token_id=7))


@pytest.mark.parametrize(
    "parameters",
    [
        {"suppress_tokens": list(range(64))},
        {"suppress_tokens": list(range(1, 64)), "no_repeat_ngram_size": 1},  # after one token none is left
        {"sequence_bias": {(token,): -np.inf for token in range(64)}},
        {"forced_bos_token_id": 5, "suppress_tokens": [5], "do_sample": True},
    ],
)
@eager
def test_every_token_forbidden(model: TFGPTJForCausalLM, parameters: dict[str, Any]) -> None:
    with pytest.raises(NonFiniteLogitsError, match="every token of the vocabulary was forbidden: loosen the"):
        model.generate([[9]], max_new_tokens=4, **parameters)


def broken_model() -> TFGPTJForCausalLM:
    broken = small()
    broken.lm_head.dense.bias.assign(np.where(np.arange(61) == 5, np.nan, 0).astype("float32"))
    return broken


DRAWN = {"do_sample": True, "seed": 0}
SEARCHES: list[dict[str, Any]] = [
    DRAWN,
    {"num_beams": 2},
    {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"guidance_scale": 1.5},
    {"return_dict_in_generate": True, "output_scores": True},
]


@pytest.mark.core
@pytest.mark.parametrize("options", elsewhere(SEARCHES, DRAWN))
@eager
def test_broken_weights_are_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite logits within 1 new tokens"):
        broken_model().generate([[1]], max_new_tokens=1, **options)


@eager
def test_invalid_logits_can_be_removed() -> None:
    broken = broken_model()
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite logits within 1 new tokens"):
        broken.generate([[1]], max_new_tokens=1)
    for options in ({}, {"return_dict_in_generate": True, "output_scores": True}):
        assert broken.generate([[1]], max_new_tokens=2, remove_invalid_values=True, **options) is not None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"sequence_bias": {(1, 64): 1}}, GenerationError, "sequence_bias has the token 64, and the model has only 64"),
        ({"bad_words_ids": [[70]]}, GenerationError, "bad_words_ids has the token 70, and the model has only 64"),
        ({"forced_bos_token_id": 64}, GenerationError, "forced_bos_token_id has the token 64"),
        ({"forced_eos_token_id": [1, 64]}, GenerationError, "forced_eos_token_id has the token 64"),
        (
            {"negative_prompt_ids": [[1]]},
            GenerationError,
            "negative_prompt_ids have no effect without a guidance_scale",
        ),
        (
            {"guidance_scale": 2, "negative_prompt_ids": [[1]] * 3},
            InputError,
            "there are 3 negative prompts for 1 prompts: give as many, or one",
        ),
        (
            {"guidance_scale": 2, "negative_prompt_attention_mask": [[1]]},
            InputError,
            "negative_prompt_attention_mask was given without negative_prompt_ids",
        ),
        ({"guidance_scale": 2, "negative_prompt_ids": [[1] * 60]}, InputError, "a prompt of 60 tokens and 20 new ones"),
        ({"guidance_scale": 2, "negative_prompt_ids": [[1, 64]]}, InputError, r"\[0, 1\] is 64, outside 0…63"),
    ],
)
def test_errors_come_before_any_work(
    model: TFGPTJForCausalLM, call: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.generate([[1, 2]], **{"max_new_tokens": 20, **call})


@pytest.mark.parametrize("ids", [[], [[]], np.zeros((0, 3), int), np.zeros((2, 0), int)])
def test_there_must_be_a_prompt(model: TFGPTJForCausalLM, ids: Any) -> None:
    with pytest.raises(InputError, match="input_ids is empty: shape .* give at least one row of one token"):
        model.generate(ids)


def test_one_negative_prompt_serves_all() -> None:
    prompt = Rows(np.array([[5, 6], [7, 0]]), np.array([[1, 1], [1, 0]], bool))
    config = GPTJConfig(vocab_size=64)
    assert negative_rows(config, None, None, prompt).ids.tolist() == [[6], [7]]
    assert negative_rows(config, [[3, 4]], None, prompt).ids.tolist() == [[3, 4], [3, 4]]


# What rows go on with once they have ended

ENDING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "step by step": {"return_dict_in_generate": True, "output_scores": True},
    "a criterion": {"eos_token_id": None, "stopping_criteria": lambda ids, scores: [ids.shape[1] > 2, False]},
    "contrastive": {"penalty_alpha": 0.4, "top_k": 4},
    "beams": {"num_beams": 2, "eos_token_id": [39, 42]},
    "guidance": {"guidance_scale": 1.001},
    "drafts": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("name", ENDING)
@eager
def test_finished_rows_may_be_filled_with_a_token_that_there_is_not(model: TFGPTJForCausalLM, name: str) -> None:
    def rows(pad: int) -> np.ndarray:
        options = {"max_new_tokens": 6, "eos_token_id": 39, "pad_token_id": pad, **ENDING[name]}
        ids = model.generate([[5, 6], [7, 8]], **options)
        return ids if isinstance(ids, np.ndarray) else ids.sequences

    expected = rows(63)
    assert (expected[0] == 63).sum() > 1
    for pad in (64, 2**31 - 1):
        np.testing.assert_array_equal(rows(pad), np.where(expected == 63, pad, expected))


@eager
def test_more_beams_than_tokens_find_the_best_of_all(model: TFGPTJForCausalLM) -> None:
    prompt = [8, 20]
    texts = np.array([[*prompt, token] for token in range(64)])
    first, second = (numbers(keras.ops.log_softmax(model(x)[:, -1])).astype("float64") for x in ([prompt], texts))
    both = (first[0][:, None] + second).reshape(-1)
    best = np.argsort(-both)[:100]
    options = {"num_beams": 100, "num_return_sequences": 100, "max_new_tokens": 2, "eos_token_id": None}
    found = model.generate([prompt], return_dict_in_generate=True, **options)
    np.testing.assert_allclose(found.sequences_scores, both[best] / 2, rtol=1e-5)
    np.testing.assert_array_equal(found.sequences[:, 2:], np.stack(np.divmod(best, 64), axis=1))


# Memory


@pytest.mark.core
@eager
def test_too_much_memory_is_refused_with_the_numbers(model: TFGPTJForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 2**20)
    assert model.generate([[1, 2]], max_new_tokens=4).shape[0] == 1
    with pytest.raises(ResourceLimitError, match=r"400 sequences of \d+ tokens need about 0.\d GiB .* 0.0 GiB"):
        model.generate([[1, 2]] * 400, max_new_tokens=60)
    with pytest.raises(ResourceLimitError, match=r"1 sequences of 6\d{4} tokens need about \d.\d GiB"):
        model.generate([[1, 2]], max_new_tokens=60, num_beams=1000)


def test_the_cache_of_the_estimate_is_the_cache() -> None:
    config = GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=64)
    cache = 2 * 2 * 3 * 20 * 4 * 8 * 4  # keys and values, layers, rows, slots, heads, width, bytes
    assert memory.needed_memory(config, 3, 0, 20, 4) == 2 * cache
    memory.check_memory(10**30, None, 1, 1)


@pytest.mark.core
def test_memory_is_what_the_machine_and_the_container_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:  500 kB\n")
    assert memory.available_memory() == 500 * 1024
    for name, text in (("max", "300000\n"), ("current", "200000\n"), ("stat", "anon 5\ninactive_file 50000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.available_memory() == 150000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() == 500 * 1024


# Seeds and threads


@pytest.mark.parametrize("seed", [-1, 1.5, True, "1"])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(GenerationError, match="seed must be an integer of at least 0"):
        check_seed(seed)


@pytest.mark.core
def test_random_rows_do_not_depend_on_their_number() -> None:
    np.testing.assert_array_equal(random_rows(3, 5, 7)[:2], random_rows(3, 2, 7))
    np.testing.assert_array_equal(random_rows(3, 2, 7)[:, :4], random_rows(3, 2, 4))
    assert len(np.unique(random_rows(3, 5, 7))) == 35


def test_two_threads_may_generate_at_once(model: TFGPTJForCausalLM) -> None:
    options = {"max_new_tokens": 20, "eos_token_id": None, "repetition_penalty": 1.3}
    prompts = [[[5, 6, 7]], [[8, 9]]]
    expected = [model.generate(prompt, **options) for prompt in prompts]
    results: dict[int, Any] = {}

    def work(index: int) -> None:
        results[index] = [model.generate(prompts[index], **options) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        for ids in results[index]:
            np.testing.assert_array_equal(ids, expected[index])


def test_threads_may_compile_at_once() -> None:
    first, second = small(), small()
    second.set_weights(first.get_weights())
    options = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": True}
    expected = [first.generate([[5, 6, 7]], seed=seed, **options) for seed in range(3)]
    results: dict[int, Any] = {}
    together = threading.Barrier(3)

    def work(seed: int) -> None:
        together.wait()
        results[seed] = second.generate([[5, 6, 7]], seed=seed, **options)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        np.testing.assert_array_equal(results[seed], expected[seed])


DRAW = """
from generation_goldens import load
print(load().generate([[5, 6, 7]], do_sample=True, seed=2**64 + 5, max_new_tokens=12, eos_token_id=None).tolist())
"""


@pytest.mark.skipif(not TENSORFLOW, reason="random numbers are NumPy's on every backend")
def test_another_process_draws_the_same(model: TFGPTJForCausalLM) -> None:
    done = run_python("-c", DRAW, PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr[-3000:]
    options = {"do_sample": True, "seed": 2**64 + 5, "max_new_tokens": 12, "eos_token_id": None}
    for jit in (False, True):
        assert model.generate([[5, 6, 7]], jit_compile=jit, **options).tolist() == json.loads(done.stdout)
    assert model.generate([[5, 6, 7]], **{**options, "seed": 5}).tolist() != json.loads(done.stdout)


# Compilations


def traces(model: TFGPTJForCausalLM) -> dict[str, int]:
    return {name: program.traces for (name, *_), program in model._generation_programs.items()}


@pytest.mark.skipif(not TENSORFLOW, reason="traces are counted on TensorFlow, whose graphs leave the shapes open")
def test_numbers_do_not_need_another_trace() -> None:
    model = small()
    for index in range(1, 20):
        model.generate(
            np.ones((1 + index % 3, index), int),
            max_new_tokens=1 + index % 4,
            do_sample=True,
            temperature=0.55 + index / 10,
            top_p=1 - index / 100,
            repetition_penalty=1 + index / 10,
            no_repeat_ngram_size=index,
            min_new_tokens=index,
            bad_words_ids=[[3 + i] * (1 + i % 4) for i in range(index)],
            suppress_tokens=list(range(20, 20 + index)),
            sequence_bias={(index, 2): -1.0},
            exponential_decay_length_penalty=(index, 1 + index / 10),
        )
    assert traces(model) == {"prefill": 1, "decode": 1}


@pytest.mark.skipif(not TENSORFLOW, reason="traces are counted on TensorFlow, whose graphs leave the shapes open")
def test_steps_on_the_host_do_not_need_another_trace() -> None:
    model = small()
    for index in range(1, 10):
        options = {"temperature": 0.5 + index, "repetition_penalty": 1 + index, "do_sample": True}
        wanted = dict.fromkeys(("return_dict_in_generate", "output_scores", "output_hidden_states"), True)
        model.generate(np.ones((1 + index % 3, index), int), max_new_tokens=1 + index % 4, **options, **wanted)
    assert traces(model) == {"begin": 1, "proceed": 1, "part": 1, "pick": 1}


@pytest.mark.core
@pytest.mark.skipif(TENSORFLOW or keras.backend.backend() == "torch", reason="JAX compiles for each size")
def test_jax_compiles_once_per_bucket() -> None:
    model = small()
    for length in range(1, 33):
        model.generate(np.ones((1, length), int), max_new_tokens=3, repetition_penalty=1 + length, min_new_tokens=2)
    assert traces(model) == {"prefill": 3, "decode": 3}  # 16, 24 and 32 slots
