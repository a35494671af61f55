"""Speculative decoding: the same text as without drafts, in fewer steps of the model."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import keras
import numpy as np
import pytest
from conftest import elsewhere, foremost
from generation_goldens import arrays, cases, load, parameters_of
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from successors import cycle, teach

from tfgptj import pipeline
from tfgptj.config import GPTJConfig
from tfgptj.errors import GenerationError, InputError, NonFiniteLogitsError, ResourceLimitError
from tfgptj.generation import memory, speculation
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.generate import generate
from tfgptj.generation.results import GenerationOutput
from tfgptj.generation.tokens import Context
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.tokenizer import GPTJTokenizer

TENSORFLOW = keras.backend.backend() == "tensorflow"
eager = pytest.mark.usefixtures("eager_generation")
CASES = {case["name"]: case for case in cases("strategies") if case["name"].startswith(("lookup", "assisted"))}
REPRESENTATIVE = ("lookup_10_3", "lookup_bad_words", "assisted_heuristic_3", "assisted_confidence")
LOOKUP = {"prompt_lookup_num_tokens": 5}
TWICE = [5, 9, 30, 41, 8, 17, 5, 9, 30]  # what comes next stood before


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return load()


@pytest.fixture(scope="module")
def draft() -> TFGPTJForCausalLM:
    return load("draft")


def taught(successors: list[int], **fields: Any) -> TFGPTJForCausalLM:
    given = {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 128, "eos_token_id": None}
    model = TFGPTJForCausalLM(GPTJConfig(vocab_size=len(successors), **{**given, **fields}))
    teach(model, successors)
    return model


@pytest.fixture(scope="module")
def counter() -> TFGPTJForCausalLM:
    """Counts to 39, and begins again."""
    return taught(cycle(40))


@pytest.fixture(scope="module")
def assistant() -> TFGPTJForCausalLM:
    """Another that counts."""
    return taught(cycle(40))


@pytest.fixture(scope="module")
def wrong() -> TFGPTJForCausalLM:
    """Counts downwards."""
    return taught(cycle(40)[::-1])


def details(model: TFGPTJForCausalLM, *args: Any, **options: Any) -> GenerationOutput:
    return model.generate(*args, return_dict_in_generate=True, **options)


# What Hugging Face makes


def test_there_are_cases() -> None:
    assert len(CASES) == 13


def with_drafts(draft: TFGPTJForCausalLM, name: str) -> dict[str, Any]:
    """The parameters of a case, with its assistant, whose own configuration says how much it drafts."""
    if "assistant" not in CASES[name]:
        return parameters_of(CASES[name])
    draft.generation_config = GenerationConfig(**CASES[name]["assistant"])
    return {**parameters_of(CASES[name]), "assistant_model": draft}


@pytest.mark.core
@pytest.mark.parametrize("name", elsewhere(foremost(CASES, *REPRESENTATIVE), "lookup_10_3", "assisted_confidence"))
@eager
def test_ids_and_steps_are_hugging_face_s(model: TFGPTJForCausalLM, draft: TFGPTJForCausalLM, name: str) -> None:
    found = arrays("strategies")
    inputs = (found[f"{name}/input_ids"], found[f"{name}/attention_mask"])
    output = details(model, *inputs, **with_drafts(draft, name))
    np.testing.assert_array_equal(output.sequences, found[f"{name}/sequences"])
    # There the first drafts are judged with the prompt, here after the first token: a step more at most.
    # Fewer drafts from the text after wrong ones are some steps more.
    more = 1 if "assistant" in CASES[name] else 5
    assert 0 <= output.model_steps - CASES[name]["steps"] <= more
    if "assistant" in CASES[name]:
        assert abs(output.draft_steps - CASES[name]["draft_steps"]) <= 2
    else:
        assert output.draft_steps is None


@eager
def test_everything_else_is_hugging_face_s(model: TFGPTJForCausalLM) -> None:
    wanted = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    found, name = arrays("strategies"), "lookup_full"
    output = details(model, found[f"{name}/input_ids"], **parameters_of(CASES[name]), **dict.fromkeys(wanted, True))
    assert output.model_steps == CASES[name]["steps"] < len(output.scores)
    for key in ("scores", "logits"):
        np.testing.assert_allclose(np.stack(getattr(output, key)), found[f"{name}/{key}"], rtol=1e-4, atol=1e-4)
    for key in ("hidden_states", "attentions"):
        steps = getattr(output, key)
        assert len(steps) == len(output.scores)
        for step, layers in enumerate(steps):
            for layer, values in enumerate(layers):
                expected = found[f"{name}/{key}/{step}/{layer}"]
                assert values.shape == expected.shape
                np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


# The same as without drafts

PROMPTS = (TWICE, [7, 7, 7, 7], [12], [3, 50, 3, 50, 3], [44, 9, 17, 23, 8, 61])
DRAWN = {"do_sample": True, "top_k": 0, "temperature": 0.7}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"eos_token_id": None},
    "drawn": DRAWN,
    "many processors": {
        **DRAWN,
        **{"top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 6},
        **{"sequence_bias": [[[17, 31], 2.0]], "forced_eos_token_id": 2, "exponential_decay_length_penalty": (8, 1.1)},
        **{"begin_suppress_tokens": [10], "frequency_penalty": 0.3, "renormalize_logits": True},
    },
    "guidance": {"guidance_scale": 1.6, "negative_prompt_ids": [[4, 11, 6, 2, 9, 30]]},
}


def same(model: TFGPTJForCausalLM, drafts: dict[str, Any], prompt: list[int], seed: int, **options: Any) -> bool:
    """Whether drafts change nothing; they must save something where the text repeats itself."""
    options = {"max_new_tokens": 24, "seed": seed, **options}
    plain, drafted = (model.generate([prompt], **options, **more) for more in ({}, drafts))
    return plain.shape == drafted.shape and bool((plain == drafted).all())


@pytest.mark.parametrize(
    ("name", "assisted"),
    foremost(
        product(SETTINGS, [False, True]),
        *(("many processors", False), ("many processors", True), ("guidance", False)),
    ),
)
def test_drafts_change_no_token(model: TFGPTJForCausalLM, draft: TFGPTJForCausalLM, name: str, assisted: bool) -> None:
    draft.generation_config = None
    for seed in range(4 if SETTINGS[name].get("do_sample") else 1):
        for index, prompt in enumerate(PROMPTS):
            drafts = {"prompt_lookup_num_tokens": 1 + 3 * index, "max_matching_ngram_size": 1 + index % 3}
            if assisted:
                schedule = ("constant", "heuristic", "heuristic_transient")[index % 3]
                drafts = {"assistant_model": draft, "num_assistant_tokens": 1 + 2 * index}
                drafts |= {"num_assistant_tokens_schedule": schedule, "assistant_confidence_threshold": 0.2 * index}
            assert same(model, drafts, prompt, seed, **SETTINGS[name]), (seed, prompt, drafts)


@pytest.mark.slow
@pytest.mark.parametrize("assisted", [False, True])
def test_drafts_change_no_drawn_token(model: TFGPTJForCausalLM, draft: TFGPTJForCausalLM, assisted: bool) -> None:
    draft.generation_config = None
    drafts = {"assistant_model": draft, "num_assistant_tokens": 5} if assisted else LOOKUP
    for seed in range(6):
        assert same(model, drafts, PROMPTS[seed % len(PROMPTS)], seed, **DRAWN)


@pytest.mark.skipif(not TENSORFLOW, reason="XLA is a choice on TensorFlow only")
def test_xla_gives_the_same(model: TFGPTJForCausalLM, draft: TFGPTJForCausalLM) -> None:
    expected = model.generate([TWICE], max_new_tokens=24, eos_token_id=None)
    for drafts in (LOOKUP, {"assistant_model": draft, "num_assistant_tokens": 4}):
        found = model.generate([TWICE], max_new_tokens=24, eos_token_id=None, jit_compile=True, **drafts)
        np.testing.assert_array_equal(found, expected)


def test_drawn_drafts_follow_the_distribution(model: TFGPTJForCausalLM, draft: TFGPTJForCausalLM) -> None:
    from test_sampling import chi_square

    found = arrays("sampling")
    case = next(case for case in cases("sampling") if f"{case['name']}/joint" in found)
    name, draws = case["name"], 300
    row = int(found[f"{name}/attention_mask"].sum(axis=1).argmax())
    for drafts in (LOOKUP, {"assistant_model": draft}):
        options = {**case["parameters"], "max_new_tokens": 2, "num_return_sequences": draws, "seed": 5, **drafts}
        drawn = model.generate(found[f"{name}/input_ids"][row : row + 1], **options)[:, -2:]
        pairs = np.bincount(drawn[:, 0] * 64 + drawn[:, 1], minlength=64 * 64)
        assert chi_square(pairs, found[f"{name}/joint"][row].astype("float64").reshape(-1)) < 4


def test_the_draft_draws_what_the_model_would(model: TFGPTJForCausalLM) -> None:
    # The model as its own assistant: with random numbers of its own a draft would be rejected now and then.
    options = {**DRAWN, "temperature": 3.0, "eos_token_id": None, "assistant_confidence_threshold": None}
    output = details(model, [TWICE], assistant_model=model, num_assistant_tokens=6, max_new_tokens=43, **options)
    assert output.model_steps == 7 and output.draft_steps == 37  # the prompt, and 6 times 7 tokens


# Steps


def test_repeated_text_takes_far_fewer_steps(counter: TFGPTJForCausalLM) -> None:
    prompt = [list(range(40))]
    plain = counter.generate(prompt, max_new_tokens=60)
    output = details(counter, prompt, max_new_tokens=60, prompt_lookup_num_tokens=10)
    np.testing.assert_array_equal(output.sequences, plain)
    assert output.model_steps == 1 + -(-59 // 11)  # the prompt, then ten drafts and one token more


@pytest.mark.parametrize("assisted", [False, True])
def test_drafts_beyond_the_last_token_change_nothing(counter: TFGPTJForCausalLM, assisted: bool) -> None:
    drafts = {"assistant_model": counter, "num_assistant_tokens": 9} if assisted else {"prompt_lookup_num_tokens": 9}
    for options in ({"max_new_tokens": 6}, {"max_length": 46}, {"max_new_tokens": 50, "eos_token_id": 6}):
        output = details(counter, [list(range(40))], **options, **drafts)
        assert output.sequences[0].tolist() == [*range(40), *range(7 if "eos_token_id" in options else 6)]
        assert output.model_steps == 2


def test_a_text_may_fill_all_positions(counter: TFGPTJForCausalLM) -> None:
    for jit, drafts in ((TENSORFLOW, {"prompt_lookup_num_tokens": 20}), (False, {"assistant_model": counter})):
        ids = counter.generate([list(range(40))], max_new_tokens=88, jit_compile=jit, **drafts)
        np.testing.assert_array_equal(ids[0], np.arange(128) % 40)


@pytest.mark.parametrize("schedule", ["constant", "heuristic", "heuristic_transient"])
@pytest.mark.parametrize("right", [True, False])
def test_schedules(counter: TFGPTJForCausalLM, wrong: TFGPTJForCausalLM, schedule: str, right: bool) -> None:
    assistant = counter if right else wrong
    options = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": schedule}
    output = details(
        counter, [[3]], max_new_tokens=60, assistant_model=assistant, assistant_confidence_threshold=0.0, **options
    )
    np.testing.assert_array_equal(output.sequences[0], np.arange(3, 64) % 40)
    width, done, steps, drafted = 4, 1, 1, 1
    while done < 60:
        count = min(width, 60 - done)
        steps, drafted = steps + 1, drafted + count
        count = min(count, 60 - done - 1)
        done += 1 + (count if right else 0)
        if schedule != "constant":
            width = min(width + 2, 16) if right or not count else max(width - 1, 1)
    assert (output.model_steps, output.draft_steps) == (steps, drafted)


def test_an_unsure_draft_model_stops_early(counter: TFGPTJForCausalLM, assistant: TFGPTJForCausalLM) -> None:
    sure, unsure = assistant, taught(cycle(40))
    teach(unsure, cycle(40), sharpness=0.01)  # as good, but the probabilities are all nearly the same
    steps = {}
    for name, assistant in (("sure", sure), ("unsure", unsure)):
        for threshold in (0.4, None):
            options = {"assistant_model": assistant, "assistant_confidence_threshold": threshold}
            output = details(counter, [[3]], max_new_tokens=31, num_assistant_tokens=9, **options)
            steps[name, threshold] = output.model_steps
    assert steps == {("sure", 0.4): 4, ("sure", None): 4, ("unsure", 0.4): 16, ("unsure", None): 4}


# Where drafts come from


def oracle(text: list[int], most: int, size: int) -> list[int]:
    """What followed the last tokens where they stood first; as many of them as possible."""
    for n in range(min(size, len(text) - 1), 0, -1):
        for start in range(len(text) - n):
            if text[start : start + n] == text[-n:]:
                return text[start + n : start + n + most]
    return []


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    most=st.integers(1, 6),
    size=st.integers(1, 5),
    padding=st.integers(0, 3),
    room=st.integers(0, 3),
)
def test_drafts_are_what_followed_before(text: list[int], most: int, size: int, padding: int, room: int) -> None:
    # What stands in front of the text and after it is like the text, and counts for nothing.
    ids = np.array([[*text[:padding], *[text[-1]] * (padding - len(text)), *text, *text[:room]]], "int32")
    before = ids.shape[1] - len(text) - len(text[:room])
    real = np.zeros(ids.shape, bool)
    real[:, before : before + len(text)] = True
    slot, length = before + len(text), np.array([len(text)], "int32")
    numbers = (ops.convert_to_tensor(x) for x in (ids, real, np.int32(slot), length, np.int32(0), np.int32(99)))
    context = Context(*numbers, eos=None)
    offsets = ops.convert_to_tensor(np.arange(most, dtype="int32"))
    drafts, count = speculation.look_up(context, ops.convert_to_tensor(np.int32(size)), offsets)
    assert ops.convert_to_numpy(drafts)[: int(count)].tolist() == oracle(text, most, size)


def test_wrong_drafts_become_few_and_right_ones_many(counter: TFGPTJForCausalLM) -> None:
    # The prompt has all tokens, and after each another than the one that follows: then it counts, as the model does.
    shuffled = [*range(39, 0, -2), *range(38, -1, -2)]
    output = details(counter, [shuffled], max_new_tokens=80, prompt_lookup_num_tokens=8, max_matching_ngram_size=3)
    np.testing.assert_array_equal(output.sequences[0, 40:], np.arange(1, 81) % 40)
    assert output.model_steps == steps_of(output.sequences[0].tolist(), 40, most=8, size=3)


def steps_of(text: list[int], prompt: int, most: int, size: int) -> int:
    """The model's steps for a text, with as many drafts as there may be."""
    done, steps, width = prompt + 1, 1, most
    while done < len(text):
        drafts = oracle(text[:done], most, size)[: min(width, len(text) - done - 1)]
        following = text[done : done + len(drafts)]
        right = next((i for i, (a, b) in enumerate(zip(drafts, following, strict=True)) if a != b), len(drafts))
        if drafts:
            width = min(2 * width, most) if right == len(drafts) else max(width // 2, right + 1)
        done, steps = done + right + 1, steps + 1
    return steps


def test_numbers_do_not_need_another_program() -> None:
    if not TENSORFLOW:
        pytest.skip("traces are counted on TensorFlow, whose graphs leave the shapes open")
    model, assistant = taught(cycle(20)), taught(cycle(20))
    for number in range(1, 5):
        options = {"max_new_tokens": 6 + number, "max_matching_ngram_size": number}
        model.generate([[1, 2, 3, 1][:number]], prompt_lookup_num_tokens=number, **options)
        sure = {"assistant_confidence_threshold": number / 8, "num_assistant_tokens_schedule": "heuristic"}
        model.generate([[1] * number], assistant_model=assistant, num_assistant_tokens=number, **sure)
    programs = model._generation_programs
    assert {(key[0], key[-1]): program.traces for key, program in programs.items()} == {
        (name, assisted): 1 for name in ("prefill", "decode") for assisted in (False, True)
    }


# Together with what else generation can do


@eager
def test_several_rows_come_out_as_together(model: TFGPTJForCausalLM, draft: TFGPTJForCausalLM) -> None:
    draft.generation_config = None
    ids, mask = np.array([[*TWICE], [0] * 6 + [3, 50, 3]]), np.array([[1] * 9, [0] * 6 + [1] * 3])
    options = {**DRAWN, "num_return_sequences": 2, "seed": 4, "max_new_tokens": 16, "eos_token_id": [2, 10]}
    plain = details(model, ids, mask, output_scores=True, output_logits=True, **options)
    steps = 0
    for drafts in (LOOKUP, {"assistant_model": draft}):
        output = details(model, ids, mask, output_scores=True, output_logits=True, **options, **drafts)
        np.testing.assert_array_equal(output.sequences, plain.sequences)
        assert len(output.scores) == len(plain.scores)
        ended = np.cumsum(np.isin(plain.sequences[:, 9:], [2, 10]), axis=1) > 0
        for key in ("scores", "logits"):
            for step, values in enumerate(getattr(output, key)):
                expected, alive = getattr(plain, key)[step], ~ended[:, step - 1] if step else slice(None)
                assert values.shape == expected.shape
                np.testing.assert_allclose(values[alive], expected[alive], rtol=1e-4, atol=1e-4)
        alone = [details(model, ids[1:, 6:], **{**options, "num_return_sequences": 1}, **drafts)]
        assert output.model_steps > alone[0].model_steps
        steps += output.model_steps
    assert steps < 2 * 4 * 16


@eager
def test_hidden_states_of_several_rows(model: TFGPTJForCausalLM) -> None:
    ids, mask = np.array([[*TWICE], [0] * 6 + [3, 50, 3]]), np.array([[1] * 9, [0] * 6 + [1] * 3])
    wanted = {"output_hidden_states": True, "output_attentions": True, "max_new_tokens": 6, "eos_token_id": None}
    plain, output = (details(model, ids, mask, **wanted, **drafts) for drafts in ({}, LOOKUP))
    for key in ("hidden_states", "attentions"):
        for step, layers in enumerate(getattr(plain, key)):
            for layer, expected in enumerate(layers):
                values = getattr(output, key)[step][layer]
                assert values.shape == expected.shape
                real = mask.astype(bool) if step == 0 else np.ones((2, 1), bool)
                if key == "attentions":
                    values, expected = (np.moveaxis(x, 1, 2) for x in (values, expected))
                np.testing.assert_allclose(values[real], expected[real], rtol=1e-4, atol=1e-5)


class Recorder:
    def __init__(self) -> None:
        self.given: list[np.ndarray] = []

    def put(self, ids: np.ndarray) -> None:
        self.given.append(ids)

    def end(self) -> None:
        self.given.append(np.array([-1]))


def test_a_streamer_gets_one_token_after_the_other(model: TFGPTJForCausalLM) -> None:
    for prompt in ([TWICE], [TWICE, TWICE[::-1]]):
        recorder, options = Recorder(), {"max_new_tokens": 20, "eos_token_id": None, **LOOKUP}
        ids = model.generate(prompt, streamer=recorder, **options)
        assert recorder.given[-1].tolist() == [-1] and len(recorder.given) == 22
        np.testing.assert_array_equal(recorder.given[0], prompt)
        np.testing.assert_array_equal(np.stack(recorder.given[1:-1], axis=1), ids[:, len(TWICE) :])


@pytest.fixture(scope="module")
def speller() -> tuple[TFGPTJForCausalLM, GPTJTokenizer]:
    """A model that writes the alphabet, letter by letter."""
    tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257)
    letters = tokenizer.encode("abcdefghijklmnopqrstuvwxyz ")
    successors = list(range(len(tokenizer)))
    for letter, following in pairwise([*letters, letters[0]]):
        successors[letter] = following
    return taught(successors), tokenizer


def test_streams_stop_strings_and_pipelines(speller: tuple[TFGPTJForCausalLM, GPTJTokenizer]) -> None:
    model, tokenizer = speller
    alphabet = "abcdefghijklmnopqrstuvwxyz "
    prompt = alphabet + "abc"
    for drafts in ({"prompt_lookup_num_tokens": 12}, {"assistant_model": model, "num_assistant_tokens": 12}):
        pieces = list(model.stream(prompt, tokenizer=tokenizer, max_new_tokens=50, **drafts))
        assert "".join(pieces) == (alphabet * 3)[3:53] and len(pieces) < 10
        pieces = model.stream(prompt, tokenizer=tokenizer, max_new_tokens=50, stop_strings="opq", **drafts)
        assert "".join(pieces) == "defghijklmn"
        ids = model.generate(
            [tokenizer.encode(prompt)], max_new_tokens=50, stop_strings="opq", tokenizer=tokenizer, **drafts
        )
        assert tokenizer.decode(ids[0]) == prompt + "defghijklmnopq"
        write = pipeline("text-generation", model, tokenizer, max_new_tokens=30, **drafts)
        assert write([prompt, "ab"], return_full_text=False) == [
            [{"generated_text": (alphabet * 2)[3:33]}], [{"generated_text": (alphabet * 2)[2:32]}]
        ]  # fmt: skip
        assert "".join(write.stream(prompt, stop_strings="z")) == "defghijklmnopqrstuvwxy"


@eager
def test_criteria_see_each_token(counter: TFGPTJForCausalLM) -> None:
    seen: list[list[int]] = []

    def until_twelve(ids: np.ndarray, scores: Any) -> bool:
        seen.append(ids[0].tolist())
        return bool(ids[0, -1] == 12)

    for drafts in ({}, {"prompt_lookup_num_tokens": 10}):
        seen.clear()
        ids = counter.generate([list(range(40))], stopping_criteria=until_twelve, max_new_tokens=30, **drafts)
        assert ids[0].tolist() == [*range(40), *range(13)]
        assert seen == [[*range(40), *range(n + 1)] for n in range(13)]


@eager
def test_functions_are_called_as_without_drafts(model: TFGPTJForCausalLM, draft: TFGPTJForCausalLM) -> None:
    draft.generation_config = None
    calls: list[Any] = []

    def allowed(row: int, ids: np.ndarray) -> list[int]:
        calls.append((row, ids.tolist()))
        return list(range(row, 64, 2))

    def favour(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        calls.append(ids.tolist())
        return scores + np.arange(64) % 3

    options = {"max_new_tokens": 6, "eos_token_id": None, **DRAWN, "seed": 1}
    for functions in ({"prefix_allowed_tokens_fn": allowed}, {"logits_processor": favour}):
        results = []
        for drafts in ({}, LOOKUP, {"assistant_model": draft}):
            calls.clear()
            ids = model.generate([TWICE, TWICE[::-1]], **options, **functions, **drafts)
            results.append((ids.tolist(), sorted(map(str, calls))))
        assert results[0] == results[1] == results[2]


def test_time_counts_for_all_rows_together(model: TFGPTJForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_new_tokens": 20, "eos_token_id": None, **LOOKUP}
    free = model.generate([TWICE, TWICE], **options)
    np.testing.assert_array_equal(model.generate([TWICE, TWICE], max_time=0, **options), free[:, : len(TWICE) + 1])
    np.testing.assert_array_equal(model.generate([TWICE, TWICE], max_time=1e6, **options), free)
    hours = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: 3600.0 * next(hours))
    ids = model.generate([TWICE, TWICE], max_time=4.5 * 3600, pad_token_id=63, **options)
    assert ids[1].tolist() == [*free[1, : len(TWICE) + 1], *[63] * (ids.shape[1] - len(TWICE) - 1)]
    assert ids.shape[1] > len(TWICE) + 1  # the first row had more time


def test_the_call_the_configuration_and_the_assistant(counter: TFGPTJForCausalLM, assistant: TFGPTJForCausalLM) -> None:
    assistant.generation_config = GenerationConfig(num_assistant_tokens=3, assistant_confidence_threshold=0.0)

    def steps(*config: GenerationConfig, **options: Any) -> int | None:
        return details(
            counter, [[1]], None, *config, max_new_tokens=25, assistant_model=assistant, **options
        ).model_steps

    assert steps() == 1 + 6
    assert steps(GenerationConfig(num_assistant_tokens=5)) == 1 + 4
    assert steps(GenerationConfig(num_assistant_tokens=5), num_assistant_tokens=11) == 1 + 2
    counter.generation_config = GenerationConfig(num_assistant_tokens=7)
    assert steps() == 1 + 6
    assistant.generation_config = None
    assert steps() == 1 + 3
    counter.generation_config = None
    assert assistant.generation_config is None  # nothing is kept from call to call


def test_another_assistant_is_asked_after_the_first(
    counter: TFGPTJForCausalLM, assistant: TFGPTJForCausalLM, wrong: TFGPTJForCausalLM
) -> None:
    for each, steps in ((assistant, 3), (wrong, 21), (assistant, 3)):
        output = details(counter, [[1]], max_new_tokens=21, assistant_model=each, num_assistant_tokens=9)
        assert output.model_steps == steps


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": 1}, "assistant_model must be a TFGPTJForCausalLM, got int"),
        ({"assistant_model": "self", "num_beams": 2}, "assistant_model cannot be combined with beam search"),
        ({"assistant_model": "self", **LOOKUP}, "assistant_model cannot be combined with prompt_lookup search"),
        ({"assistant_model": "self", "penalty_alpha": 0.6}, "assistant_model cannot be combined with contrastive"),
        ({"assistant_model": "other"}, "assistant_model has 41 tokens and the model 40: both must have the same token"),
        ({"num_beams": 2, **LOOKUP}, "prompt_lookup_num_tokens cannot be combined with beam search"),
        ({"num_return_sequences": 2, **LOOKUP}, "num_return_sequences > 1 needs do_sample=True"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens must be between 1 and"),
    ],
)
def test_what_does_not_go_together_is_refused(counter: TFGPTJForCausalLM, options: Any, message: str) -> None:
    if "assistant_model" in options:
        models = {"self": counter, "other": taught(cycle(41))}
        options = {**options, "assistant_model": models.get(options["assistant_model"], options["assistant_model"])}
    with pytest.raises(GenerationError, match=message):
        counter.generate([[1]], **options)
    with pytest.raises(GenerationError, match=message):
        generate(counter, [[1]], None, None, **options)


@eager
def test_an_assistant_with_too_few_positions(counter: TFGPTJForCausalLM) -> None:
    assistant = taught(cycle(40), n_positions=30)
    assert counter.generate([[1, 2]], max_new_tokens=28, assistant_model=assistant).shape == (1, 30)
    with pytest.raises(InputError, match="a prompt of 2 tokens and 29 new ones are 31, over n_positions=30 of the ass"):
        counter.generate([[1, 2]], max_new_tokens=29, assistant_model=assistant)


@eager
def test_a_broken_assistant_is_named(counter: TFGPTJForCausalLM) -> None:
    assistant = taught(cycle(40))
    assistant.lm_head.dense.bias.assign(np.full(40, np.nan, "float32"))
    with pytest.raises(NonFiniteLogitsError, match="the assistant_model produced NaN or infinite logits within"):
        counter.generate([[1, 2]], max_new_tokens=5, assistant_model=assistant)
    with pytest.raises(NonFiniteLogitsError, match="the model produced NaN or infinite logits"):
        assistant.generate([[1, 2]], max_new_tokens=5, assistant_model=counter)


@eager
def test_memory_is_counted_for_both_models(counter: TFGPTJForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(memory, "check_memory", lambda needed, *rest: sizes.append(needed))
    for drafts in ({}, LOOKUP, {"assistant_model": counter}):
        counter.generate([[1, 2]], max_new_tokens=8, **drafts)
    assert sizes[1] >= sizes[0] and sizes[2] >= 2 * sizes[0]
    monkeypatch.undo()
    monkeypatch.setattr(memory, "available_memory", lambda: sizes[0] + 1)
    with pytest.raises(ResourceLimitError, match="1 sequences of"):
        counter.generate([[1, 2]], max_new_tokens=8, assistant_model=counter)
