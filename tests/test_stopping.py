"""When rows end: stop strings over token boundaries, criteria, time; and that no part of a stop string is shown."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES
from generation_goldens import cases

from tfgptj import GPTJTokenizer, TFGPTJForCausalLM, pipeline
from tfgptj.errors import GenerationError
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.stopping import Ends, StopText
from tfgptj.generation.streaming import TextStreamer

PACKAGED = GPTJTokenizer.from_pretrained("shakespeare")
SMALL = GPTJTokenizer.from_directory(FIXTURES / "small_vocab")
STRANGE = [token for token in range(len(SMALL)) if not SMALL.decode([token]).isascii()]  # parts of characters too
SAMPLED = {
    **{"do_sample": True, "temperature": 1.5, "seed": 2, "max_new_tokens": 40, "eos_token_id": None},
    **{"suppress_tokens": [*STRANGE, *SMALL.all_special_ids], "vocabulary_limit": len(SMALL)},
}


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return TFGPTJForCausalLM.from_pretrained(FIXTURES / "pipeline_goldens" / "causal_lm", dtype="float32")


def pieces(tokenizer: GPTJTokenizer, ids: list[int], stops: Any) -> tuple[list[str], int]:
    """The pieces of text, and the number of tokens after which a stop string was found; 0 for none."""
    text = StopText(tokenizer, stops)
    shown = []
    for count, token in enumerate(ids, start=1):
        shown.append(text.put([token]))
        if text.found:
            return [*shown, text.end()], count
    return [*shown, text.end()], 0


@pytest.mark.parametrize("case", cases("stop_strings"), ids=lambda case: case["text"])
def test_stop_strings_are_found_where_hugging_face_finds_them(case: dict[str, Any]) -> None:
    stops = [case["stop_strings"]] if isinstance(case["stop_strings"], str) else case["stop_strings"]
    text = case["text"]
    shown, count = pieces(PACKAGED, case.get("ids") or PACKAGED.encode(text), stops)
    if "error" in case:  # Hugging Face cannot find these: they are no text of whole tokens
        assert count > 0
    else:
        assert count == next(iter(case["stops"]), 0)
    start = min((text.index(stop) for stop in stops if stop in text), default=len(text))
    assert "".join(shown) == text[:start]


@pytest.mark.parametrize("text", ["naïve café 北京, 🎈 and 👩‍👩‍👧 too", "aababaabab abc", "ROMEO:\n\nI am\n"])
def test_no_part_of_a_stop_string_is_shown(text: str) -> None:
    ids = SMALL.encode(text)
    for start, length in itertools.product(range(len(text)), (1, 2, 3, 6)):
        stop = text[start : start + length]
        shown, count = pieces(SMALL, ids, [stop, "never this"])
        assert count > 0
        place = text.index(stop)
        for end in range(len(shown)):  # at no time
            assert text[:place].startswith("".join(shown[:end]))
        assert "".join(shown) == text[:place]


def test_what_was_held_back_comes_at_the_end() -> None:
    shown, count = pieces(SMALL, SMALL.encode("to be, or"), ["or not"])
    assert count == 0
    assert "".join(shown) == "to be, or"
    assert shown[-1]


def test_a_special_token_can_be_a_stop_string() -> None:
    shown, count = pieces(SMALL, [*SMALL.encode("ab"), SMALL.eos_token_id, *SMALL.encode("c")], ["<|endoftext|>"])
    assert "".join(shown) == "ab"
    assert count == len(SMALL.encode("ab")) + 1


def stop_of(model: TFGPTJForCausalLM, prompt: list[int], **options: Any) -> tuple[str, np.ndarray, int]:
    """A stop string that comes over a token boundary, the tokens without it, and how many there are with it."""
    free = model.generate([prompt], **options)[0, len(prompt) :]
    for count in range(4, len(free)):
        before, text = SMALL.decode(free[: count - 1]), SMALL.decode(free[:count])
        stop = text[len(before) - 2 :]
        if len(text) > len(before) >= 2 and text.index(stop) == len(before) - 2:
            return stop, free, count
    raise AssertionError("no such text: take another seed")


@pytest.mark.core
def test_ids_end_after_the_token_that_completes_a_stop_string(model: TFGPTJForCausalLM) -> None:
    prompt, other = SMALL.encode("The king"), SMALL.encode("So")
    stop, free, count = stop_of(model, prompt, **SAMPLED)
    options = {**SAMPLED, "stop_strings": stop, "tokenizer": SMALL, "pad_token_id": 3}
    ids = model.generate([prompt], **options)[0, len(prompt) :]
    np.testing.assert_array_equal(ids, free[:count])  # for one row nothing comes after
    mask = np.ones((2, len(prompt)), int)
    mask[1, len(other) :] = 0
    rows = np.array([prompt, other + [0] * (len(prompt) - len(other))])
    together = model.generate(rows, mask, **options)[:, len(prompt) :]
    np.testing.assert_array_equal(together[0, :count], free[:count])
    assert (together[0, count:] == 3).all()
    assert together.shape[1] > count


def test_streams_and_pipelines_end_before_a_stop_string(model: TFGPTJForCausalLM) -> None:
    stop, free, count = stop_of(model, SMALL.encode("The king"), **SAMPLED)
    options = {**SAMPLED, "stop_strings": [stop, "never this"]}
    expected = SMALL.decode(free[:count])
    expected = expected[: expected.index(stop)]
    generator = pipeline("text-generation", model, SMALL)
    assert generator("The king", return_full_text=False, **options) == [{"generated_text": expected}]
    assert "".join(generator.stream("The king", **options)) == expected
    assert "".join(model.stream("The king", tokenizer=SMALL, **options)) == expected
    tokens = generator("The king", return_tensors=True, **options)[0]["generated_token_ids"]
    assert tokens == [*SMALL.encode("The king"), *free[:count].tolist()]


def test_a_streamer_shows_no_part_of_a_stop_string(
    model: TFGPTJForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = SMALL.encode("The king")
    stop, free, count = stop_of(model, prompt, **SAMPLED)
    expected = SMALL.decode(free[:count])
    streamer = TextStreamer(SMALL, skip_special_tokens=True, stop_strings=[stop, "king"])  # one is in the prompt
    for _ in range(2):
        model.generate([prompt], streamer=streamer, stop_strings=[stop, "king"], tokenizer=SMALL, **SAMPLED)
        assert capsys.readouterr().out == "The king" + expected[: expected.index(stop)] + "\n"


def test_stop_strings_need_a_tokenizer(model: TFGPTJForCausalLM) -> None:
    with pytest.raises(GenerationError, match="stop_strings need the model's tokenizer: give tokenizer="):
        model.generate([[1]], stop_strings="a")


def test_criteria_end_rows_or_all(model: TFGPTJForCausalLM) -> None:
    options = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 3}
    prompts = [[5, 6], [7, 8]]
    free = model.generate(prompts, **options)
    seen: list[Any] = []

    def third_token(ids: np.ndarray, scores: Any) -> bool:
        seen.append((ids.copy(), scores))
        return ids.shape[1] >= 5

    np.testing.assert_array_equal(model.generate(prompts, stopping_criteria=third_token, **options), free[:, :5])
    assert len(seen) == 3
    for step, (ids, scores) in enumerate(seen):
        np.testing.assert_array_equal(ids, free[:, : 3 + step])
        assert scores is None
    first_row = [lambda ids, scores: False, lambda ids, scores: [ids.shape[1] == 4, False]]
    ids = model.generate(prompts, stopping_criteria=first_row, **options)
    np.testing.assert_array_equal(ids[1], free[1])
    np.testing.assert_array_equal(ids[0], [*free[0, :4], *[3] * 6])


def test_criteria_see_the_scores_when_there_are_any(model: TFGPTJForCausalLM) -> None:
    shapes = []

    def criterion(ids: np.ndarray, scores: Any) -> bool:
        shapes.append([step.shape for step in scores])
        return False

    size = model.config.vocab_size
    options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 3, "eos_token_id": None}
    model.generate([[5], [6]], stopping_criteria=[criterion], **options)
    assert shapes == [[(2, size)] * count for count in (1, 2, 3)]


def test_criteria_must_answer(model: TFGPTJForCausalLM) -> None:
    with pytest.raises(GenerationError, match=r"must return a bool, or one for each of 1 rows; got the shape \(3,\)"):
        model.generate([[5]], stopping_criteria=lambda ids, scores: [True] * 3)
    with pytest.raises(GenerationError, match="stopping_criteria must be a function or a list of functions, got 3"):
        model.generate([[5]], stopping_criteria=[3])


def test_an_interrupted_criterion_leaves_the_model_usable(model: TFGPTJForCausalLM) -> None:
    expected = model.generate([[5, 6]], max_new_tokens=6)

    def interrupt(ids: np.ndarray, scores: Any) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate([[5, 6]], max_new_tokens=6, stopping_criteria=interrupt)
    np.testing.assert_array_equal(model.generate([[5, 6]], max_new_tokens=6), expected)


def test_a_stream_that_is_dropped_leaves_the_model_usable(model: TFGPTJForCausalLM) -> None:
    expected = list(model.stream("The king", tokenizer=SMALL, **SAMPLED))
    started = model.stream("The king", tokenizer=SMALL, **SAMPLED)
    assert next(started) == expected[0]
    started.close()
    assert list(model.stream(SMALL.encode("The king"), tokenizer=SMALL, **SAMPLED)) == expected


def test_no_token_is_begun_after_the_time(model: TFGPTJForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_new_tokens": 8, "eos_token_id": None}
    free = model.generate([[5, 6]], **options)
    np.testing.assert_array_equal(model.generate([[5, 6]], max_time=0, **options), free[:, :3])
    np.testing.assert_array_equal(model.generate([[5, 6]], max_time=1e6, **options), free)
    clock = itertools.count()
    monkeypatch.setattr("tfgptj.generation.stopping.time.monotonic", lambda: next(clock))
    np.testing.assert_array_equal(model.generate([[5, 6]], max_time=2.5, **options), free[:, :5])


def test_the_first_end_counts() -> None:
    ends = Ends(GenerationConfig(eos_token_id=[7, 8]), 3, None, ())
    ends.look(np.array([[1, 2], [1, 7], [8, 7]]), 0)
    assert ends.lengths.tolist() == [-1, 2, 1]
    assert ends.padded(np.array([[1, 2], [1, 7], [8, 7]]), 9).tolist() == [[1, 2], [1, 7], [8, 9]]
    ends.look(np.array([[7, 1], [8, 1], [1, 1]]), 2)
    assert ends.lengths.tolist() == [3, 2, 1]
    assert ends.all_ended
