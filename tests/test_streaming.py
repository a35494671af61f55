"""Text as it is generated: whole characters, the same text as without streaming, errors before the first piece."""

import itertools
import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import foremost

from tfgptj import GPTJConfig, GPTJTokenizer, TFGPTJForCausalLM, pipeline
from tfgptj.errors import GenerationError, InputError
from tfgptj.generation.streaming import TextIteratorStreamer, TextStreamer, end_of_text, stream_text, text_pieces

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = GPTJTokenizer.from_directory(FIXTURES / "small_vocab")
TEXT = "naïve café 北京, 🎈 and 👩‍👩‍👧 too"
PROMPTS = ["The king", "", "naïve café 北京", "To be, or not to be, that is the", "So"]
SAMPLED = {"do_sample": True, "temperature": 2.0, "seed": 3, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return TFGPTJForCausalLM.from_pretrained(FIXTURES / "pipeline_goldens" / "causal_lm", dtype="float32")


@pytest.fixture(scope="module")
def generator(model: TFGPTJForCausalLM) -> Any:
    return pipeline("text-generation", model, SMALL)


def pieces_of(ids: list[int], eos: tuple[int, ...] = (), stops: tuple[str, ...] = ()) -> list[str]:
    """The pieces of a generation that yields these tokens, one at a time."""
    run: Any = SimpleNamespace(
        streams=True,
        prompt=SimpleNamespace(ids=np.zeros((1, 1))),
        config=SimpleNamespace(eos_token_ids=eos, stops=stops),
        chunks=lambda size: (np.array([ids[start : start + size]]) for start in range(0, len(ids), size)),
    )
    return list(text_pieces(run, SMALL))


def test_pieces_are_whole_characters() -> None:
    ids = SMALL.encode(TEXT)
    pieces = pieces_of(ids)
    assert "".join(pieces) == TEXT
    assert "�" not in TEXT
    assert 10 < len(pieces) < len(ids)  # some tokens are parts of characters
    assert "" not in pieces


def test_what_has_no_text_is_left_out() -> None:
    assert "".join(pieces_of([*SMALL.encode("ab"), len(SMALL) + 1, SMALL.eos_token_id])) == "ab"
    assert "".join(pieces_of([*SMALL.encode("ab"), 7], eos=(7,))) == "ab"
    half = SMALL.encode("北")[:1]
    assert pieces_of([*SMALL.encode("ab"), *half])[-1] == "�"
    assert pieces_of([7], eos=(7,)) == []


def test_ids_without_a_token_have_no_text() -> None:
    model = TFGPTJForCausalLM(GPTJConfig.from_pretrained(FIXTURES / "pipeline_goldens" / "causal_lm"))
    beyond = len(SMALL) + 2
    model.lm_head.dense.bias.assign(np.eye(model.config.vocab_size)[beyond] * 1e4)
    silent = pipeline("text-generation", model, SMALL)
    assert silent("The king", max_new_tokens=3) == [{"generated_text": "The king"}]
    assert list(silent.stream("The king", max_new_tokens=3)) == []
    assert silent("a", max_new_tokens=1, return_tensors=True)[0]["generated_token_ids"][-1] == beyond


@pytest.mark.parametrize(
    ("row", "eos", "end"), [([5, 7, 7], (7,), 1), ([5, 6], (7,), 2), ([5, 6], (), 2), ([8], (7, 8), 0)]
)
def test_end_of_text(row: list[int], eos: tuple[int, ...], end: int) -> None:
    assert end_of_text(np.array(row), eos) == end


@pytest.mark.parametrize(
    ("prompt", "parameters"),
    foremost(
        itertools.product(["The king", "", "naïve"], [{}, {"max_new_tokens": 30}, SAMPLED]),
        *(("The king", {}), ("", {"max_new_tokens": 30}), ("naïve", SAMPLED)),
    ),
)
def test_the_stream_is_what_generate_gives(model: TFGPTJForCausalLM, prompt: str, parameters: dict[str, Any]) -> None:
    ids = SMALL.encode(prompt) or [model.config.bos_token_id]
    whole = model.generate([ids], **parameters)[0, len(ids) :]
    text = SMALL.decode(whole[whole < len(SMALL)], skip_special_tokens=True)
    assert "".join(stream_text(model, SMALL, prompt, **parameters)) == text


def test_stream_of_a_pipeline_adds_up_to_the_text(generator: Any) -> None:
    sampled = {"do_sample": True, "seed": 2, "temperature": 1.5, "max_new_tokens": 30}
    for options in ({}, sampled, {"max_new_tokens": 12, "prefix": "Once "}):
        for prompt in PROMPTS:
            pieces = list(generator.stream(prompt, **options))
            assert "".join(pieces) == generator(prompt, return_full_text=False, **options)[0]["generated_text"]
            assert "" not in pieces
    pieces = list(generator.stream("The king", max_new_tokens=20, return_full_text=True))
    assert pieces[0] == "The king" and len(pieces) > 5


def test_stream_of_a_list_of_prompts(generator: Any) -> None:
    options = {"do_sample": True, "seed": 2, "temperature": 1.5, "max_length": 25}
    streamed = ["".join(pieces) for pieces in generator.stream(PROMPTS, **options)]
    assert [[{"generated_text": text}] for text in streamed] == generator(PROMPTS, return_full_text=False, **options)


def test_stream_refuses_what_needs_the_whole_text(generator: Any) -> None:
    with pytest.raises(InputError, match="return_tensors cannot be streamed"):
        generator.stream("a", return_tensors=True)
    with pytest.raises(InputError, match="clean_up_tokenization_spaces cannot be streamed"):
        generator.stream("a", clean_up_tokenization_spaces=True)
    with pytest.raises(GenerationError, match="only one text can be streamed, not 2"):
        generator.stream("a", do_sample=True, num_return_sequences=2)


def test_errors_come_from_the_call(model: TFGPTJForCausalLM) -> None:
    with pytest.raises(GenerationError, match="only one text can be streamed, not 3: leave num_return_sequences at 1"):
        stream_text(model, SMALL, "a", do_sample=True, num_return_sequences=3)
    with pytest.raises(GenerationError, match="did you mean temperature"):
        stream_text(model, SMALL, "a", temperatur=1.0)
    with pytest.raises(InputError, match="n_positions=64"):
        stream_text(model, SMALL, "word " * 50)


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_printing_streamer(model: TFGPTJForCausalLM, skip_prompt: bool, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(SMALL, skip_prompt=skip_prompt, skip_special_tokens=True)
    ids = SMALL("The king", return_tensors="np")
    for _ in range(2):  # a streamer can be used again
        row = model.generate(**ids, streamer=streamer, **SAMPLED)[0]
        start = ids["input_ids"].shape[1] if skip_prompt else 0
        row = row[start:]
        assert capsys.readouterr().out == SMALL.decode(row[row < len(SMALL)], skip_special_tokens=True) + "\n"


def test_streamer_shows_special_tokens_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(SMALL)
    streamer.put(np.array(SMALL.encode("a<|endoftext|>b")))
    streamer.end()
    assert capsys.readouterr().out == "a<|endoftext|>b\n"


def test_streamer_takes_one_row() -> None:
    with pytest.raises(InputError, match="TextStreamer streams one text, got 2 rows: generate one at a time"):
        TextStreamer(SMALL).put(np.zeros((2, 3), int))
    streamer = TextIteratorStreamer(SMALL)
    streamer.put(np.zeros((1, 3), int))
    with pytest.raises(InputError, match="TextIteratorStreamer streams one text, got 2 rows"):
        streamer.put(np.zeros(2, int))


def test_iterating_streamer(model: TFGPTJForCausalLM) -> None:
    streamer = TextIteratorStreamer(SMALL, skip_prompt=True, skip_special_tokens=True)
    ids = SMALL("The king", return_tensors="np")
    thread = threading.Thread(target=lambda: model.generate(**ids, streamer=streamer, **SAMPLED))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 3
    assert "".join(pieces) == "".join(stream_text(model, SMALL, "The king", **SAMPLED))


def test_iterating_streamer_does_not_wait_for_ever() -> None:
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(SMALL, timeout=0.01))
