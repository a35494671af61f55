"""GPTJTokenizer and TextStream against Hugging Face's results (``fixtures/make_tokenizer_goldens.py``), and properties.

Tests on the small vocabulary always run. Those on GPT-2's need its ``encoder.json`` and ``vocab.bpe``, in the folder
that ``TFGPTJ_GPT2_VOCAB`` names or in ``../shared/data/gpt2_vocab`` beside the repository.
"""

import copy
import json
import os
import pickle
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tfgptj.errors import InputError, InputTypeError, TokenizerError
from tfgptj.text_stream import TextStream
from tfgptj.tokenizer import GPTJTokenizer

FIXTURES = Path(__file__).parent / "fixtures"
SMALL_VOCAB = FIXTURES / "small_vocab"
GOLDENS = json.loads((FIXTURES / "tokenizer_goldens.json").read_text())
CORPUS = GOLDENS["corpus"]
GPT2_VOCAB = Path(
    os.environ.get("TFGPTJ_GPT2_VOCAB", Path(__file__).resolve().parents[2] / "shared" / "data" / "gpt2_vocab")
)
SMALL = GPTJTokenizer.from_directory(SMALL_VOCAB)
END = "<|endoftext|>"

deterministic = settings(derandomize=True, deadline=None, max_examples=300)
ids_of_small = st.lists(
    # Single bytes most of the time, so that broken and interrupted characters are common.
    st.one_of(st.integers(0, 255), st.integers(0, 255), st.integers(0, len(SMALL) - 1)),
    max_size=30,
)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> GPTJTokenizer:
    if not (GPT2_VOCAB / "encoder.json").is_file():
        pytest.skip("needs GPT-2's encoder.json and vocab.bpe, which are not in this repository; set TFGPTJ_GPT2_VOCAB")
    directory = tmp_path_factory.mktemp("gpt2")
    for name in ("encoder.json", "vocab.bpe"):  # OpenAI's names are readable as they are
        shutil.copyfile(GPT2_VOCAB / name, directory / name)
    added = {f"<|extratoken_{number}|>": 50256 + number for number in range(1, 144)}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    return GPTJTokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The small vocabulary as the `tokenizers` library itself reads it."""
    directory = tmp_path_factory.mktemp("saved")
    SMALL.save_pretrained(directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(params=["small", "gpt2"])
def case(request: pytest.FixtureRequest) -> tuple[GPTJTokenizer, dict[str, Any]]:
    """A tokenizer and its goldens."""
    tokenizer = SMALL if request.param == "small" else request.getfixturevalue("gpt2")
    return tokenizer, GOLDENS[request.param]


def with_settings(directory: Path, **config: Any) -> GPTJTokenizer:
    shutil.copytree(SMALL_VOCAB, directory, dirs_exist_ok=True)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return GPTJTokenizer.from_directory(directory)


def test_ids_equal_hugging_face(case: tuple[GPTJTokenizer, dict[str, Any]]) -> None:
    tokenizer, goldens = case
    assert len(CORPUS) >= 300
    for text, ids in zip(CORPUS, goldens["ids"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer(CORPUS)["input_ids"] == goldens["ids"]


def test_prefix_space_equals_hugging_face(tmp_path: Path) -> None:
    tokenizer = with_settings(tmp_path, add_prefix_space=True)
    for index, ids in enumerate(GOLDENS["small"]["ids"]):
        assert tokenizer.encode(CORPUS[index]) == GOLDENS["small"]["prefixed"].get(str(index), ids)


def test_batches_equal_hugging_face(case: tuple[GPTJTokenizer, dict[str, Any]]) -> None:
    tokenizer, goldens = case
    for golden in goldens["batches"]:
        batch = tokenizer(golden["texts"], **golden["options"])
        assert batch == {name: golden[name] for name in ("input_ids", "attention_mask")}, golden["options"]


def test_decoding_equals_hugging_face(case: tuple[GPTJTokenizer, dict[str, Any]]) -> None:
    tokenizer, goldens = case
    for golden in goldens["decoded"]:
        ids = golden["ids"]
        assert tokenizer.decode(ids) == golden["plain"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == golden["skipped"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == golden["cleaned"]


def test_sizes_and_special_ids_of_gptj(gpt2: GPTJTokenizer) -> None:
    assert (len(gpt2), gpt2.vocab_size, len(gpt2.get_vocab()), len(gpt2.merges)) == (50400, 50257, 50400, 50000)
    assert (gpt2.bos_token_id, gpt2.eos_token_id, gpt2.unk_token_id, gpt2.pad_token_id) == (50256, 50256, 50256, None)
    assert gpt2.convert_tokens_to_ids(["<|extratoken_1|>", "<|extratoken_143|>"]) == [50257, 50399]
    assert gpt2.all_special_ids == [50256]


def test_tokens_and_ids_convert_both_ways() -> None:
    assert SMALL.convert_ids_to_tokens(SMALL.encode(" the<|endoftext|>")) == ["Ġthe", END]
    assert SMALL.convert_ids_to_tokens(583) == END
    assert SMALL.convert_tokens_to_ids(END) == 583
    tokens = SMALL.convert_ids_to_tokens(np.arange(len(SMALL)))
    assert SMALL.convert_tokens_to_ids(tokens) == list(range(len(SMALL)))
    assert SMALL.get_added_vocab()["<|extratoken_16|>"] == len(SMALL) - 1
    with pytest.raises(TokenizerError, match=r"'<pad>' is not one of the 600 tokens"):
        SMALL.convert_tokens_to_ids(["a", "<pad>"])


@deterministic
@given(st.text())
def test_decoding_undoes_encoding(text: str) -> None:
    assert SMALL.decode(SMALL.encode(text)) == text


def test_every_character_survives() -> None:
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert SMALL.decode(SMALL.encode(text)) == text


@pytest.mark.parametrize("unit", ["a", " ", "\n", "é", END])
def test_a_megabyte_of_one_character_is_encoded(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    assert SMALL.decode(SMALL.encode(text)) == text


@deterministic
@given(ids=ids_of_small, skip_special_tokens=st.booleans())
def test_decoding_equals_the_tokenizers_library(library: Tokenizer, ids: list[int], skip_special_tokens: bool) -> None:
    assert SMALL.decode(ids, skip_special_tokens) == library.decode(ids, skip_special_tokens=skip_special_tokens)


@deterministic
@given(st.lists(ids_of_small, max_size=8), st.booleans())
def test_streamed_pieces_add_up_to_decode(chunks: list[list[int]], skip_special_tokens: bool) -> None:
    stream = TextStream(SMALL, skip_special_tokens)
    for _ in range(2):  # end() makes the stream ready for another text
        pieces = [stream.put(chunk) for chunk in chunks] + [stream.end()]
        assert "".join(pieces) == SMALL.decode(sum(chunks, []), skip_special_tokens)


@deterministic
@given(st.text())
def test_streamed_pieces_are_whole_characters(text: str) -> None:
    stream = TextStream(SMALL)
    ids = SMALL.encode(text, add_special_tokens=False)
    pieces = [stream.put(token_id) for token_id in ids]
    assert "".join(pieces) == text
    assert stream.end() == ""
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_added_tokens_keep_characters_of_the_byte_alphabet(tmp_path: Path) -> None:
    # "é" alone is the alphabet's name for the byte 0xE9; inside an added token it is the letter.
    tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257, extra_tokens=["<été>"])
    ids = tokenizer.encode("a<été>b")
    assert ids[1] == 257
    assert tokenizer.decode(ids) == "a<été>b"


def test_ids_may_come_from_any_array_library() -> None:
    import tensorflow as tf

    ids = SMALL.encode("the mill")
    for form in (
        tuple(ids),
        np.array(ids, np.int64),
        np.array(ids, np.uint16),
        tf.constant(ids),
        [np.int32(i) for i in ids],
    ):
        assert SMALL.decode(form) == "the mill"
    for batch in ([ids, ids], (ids, np.array(ids)), np.array([ids, ids]), tf.constant([ids, ids])):
        assert SMALL.batch_decode(batch) == ["the mill", "the mill"]
    assert (SMALL.decode([]), SMALL.decode(ids[0]), SMALL.batch_decode([])) == ("", SMALL.decode(ids[:1]), [])


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        ([0, 600], TokenizerError, r"Token id 600 is not one of the 600 tokens \(0 to 599\)"),
        ([-100, 0], TokenizerError, "Token id -100 is not one"),
        ([2**63], TokenizerError, "Token id 9223372036854775808 is not one"),
        ([2**64], InputTypeError, "ids have 1 axes and dtype object"),
        ([1.0], InputTypeError, "dtype float64, expected integers along one axis"),
        ([True], InputTypeError, "dtype bool"),
        (None, InputTypeError, "dtype object"),
        ("abc", InputTypeError, "dtype <U3"),
        ([[1, 2]], InputTypeError, "ids have 2 axes .* use batch_decode"),
        ([[1], [2, 3]], InputTypeError, "ids cannot be read as an array of integers"),
    ],
)
def test_bad_ids_are_refused(ids: Any, error: type[Exception], text: str) -> None:
    for method in (SMALL.decode, SMALL.convert_ids_to_tokens, TextStream(SMALL).put):
        with pytest.raises(error, match=text):
            method(ids)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, InputTypeError, "text is of type NoneType, expected a str"),
        (b"bytes", InputTypeError, "text is of type bytes, expected a str"),
        ({"a"}, InputTypeError, "text is of type set, expected a str or a list of str"),
        ([], InputError, "text is an empty list, expected at least one str"),
        (["a", None], InputTypeError, r"text\[1\] is of type NoneType, expected a str"),
        (["a", ["b"]], InputTypeError, r"text\[1\] is of type list"),
        ("ab\ud800", TokenizerError, r"text holds the lone surrogate '\\ud800' at position 2"),
        (["a", "\udfff"], TokenizerError, r"text\[1\] holds the lone surrogate '\\udfff' at position 0"),
    ],
)
def test_bad_texts_are_refused(text: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SMALL(text)
    if not isinstance(text, list | set):
        with pytest.raises(error, match=message):
            SMALL.encode(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "left"}, "padding is 'left', expected one of False, True, 'longest', 'max_length'"),
        ({"padding": 1}, "padding is 1, expected one of"),
        ({"truncation": "longest_first"}, "truncation is 'longest_first', expected one of False, True"),
        ({"truncation": True, "max_length": 0}, "max_length is 0, expected an integer from 1 on"),
        ({"truncation": True, "max_length": True}, "max_length is True, expected an integer"),
        ({"truncation": True}, "max_length is needed: this tokenizer has no model_max_length"),
        ({"padding": "max_length"}, "max_length is needed"),
        ({"max_length": 5}, "max_length=5 needs truncation=True or padding='max_length' to have an effect"),
        ({"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of is 0, expected an integer from 1 on"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of needs padding=True or padding='max_length'"),
        ({"padding": True, "padding_side": "up"}, "padding_side is 'up', expected one of 'left', 'right'"),
        (
            {"truncation": True, "max_length": 2, "truncation_side": "up"},
            "truncation_side is 'up', expected one of 'left', 'right'",
        ),
        ({"return_tensors": "pt"}, "return_tensors is 'pt', expected one of None, 'np', 'tf'"),
        (
            {"return_tensors": "np"},
            "The rows have 1 to 2 tokens, and an array needs rows of one length. Pass padding=True",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SMALL(["a", "b c"], **options)


def test_results_have_the_form_that_was_asked_for() -> None:
    import tensorflow as tf

    flat = SMALL("the mill")
    assert flat == {"input_ids": SMALL.encode("the mill"), "attention_mask": [1] * len(flat["input_ids"])}
    assert type(flat) is dict
    assert list(SMALL(["a"], return_attention_mask=False)) == ["input_ids"]
    for kind, array_type in (("np", np.ndarray), ("tf", tf.Tensor)):
        batch = SMALL(["the mill", "a"], padding=True, return_tensors=kind)
        assert all(isinstance(array, array_type) and array.dtype == np.int32 for array in batch.values())
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, len(flat["input_ids"]))
        assert SMALL("the mill", return_tensors=kind)["input_ids"].shape == (1, len(flat["input_ids"]))
    assert SMALL("", padding=True, return_tensors="np")["input_ids"].shape == (1, 0)


def test_model_max_length_and_sides_come_from_the_files(tmp_path: Path) -> None:
    tokenizer = with_settings(tmp_path, model_max_length=3, padding_side="left", truncation_side="left")
    assert tokenizer.encode("abcdef", truncation=True) == SMALL.encode("abcdef")[-3:]
    end = tokenizer.eos_token_id
    assert tokenizer("!", padding="max_length")["input_ids"] == [end, end, 0]
    tokenizer.padding_side = "right"
    assert tokenizer("!", padding="max_length")["input_ids"] == [0, end, end]
    tokenizer.model_max_length = 1.5  # type: ignore[assignment]
    with pytest.raises(InputError, match="model_max_length is 1.5, expected an integer from 1 on"):
        tokenizer("!", padding="max_length")


def test_bos_is_added_only_when_the_files_say_so(tmp_path: Path) -> None:
    tokenizer = with_settings(tmp_path, add_bos_token=True)
    bos, a = tokenizer.bos_token_id, SMALL.encode("a")[0]
    assert (tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)) == ([bos, a], [a])
    for side in ("left", "right"):
        assert tokenizer("aaaa", truncation=True, max_length=2, truncation_side=side)["input_ids"] == [bos, a]
        assert tokenizer("aaaa", truncation=True, max_length=1, truncation_side=side)["input_ids"] == [bos]
    tokenizer.bos_token = None
    assert tokenizer.encode("a") == [a]


def test_special_tokens_may_be_set_to_added_tokens(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(SMALL)
    tokenizer.pad_token = "<|extratoken_2|>"
    pad = tokenizer.pad_token_id
    assert tokenizer(["!", "!!!"], padding=True)["input_ids"][0][-1] == pad == 585
    assert tokenizer.decode([0, pad], skip_special_tokens=True) == "!"
    with pytest.raises(
        TokenizerError, match=r"pad_token '!' is not an added token of this tokenizer; use one of <\|end"
    ):
        tokenizer.pad_token = "!"
    with pytest.raises(AttributeError, match="pad_token_id cannot be set; set pad_token"):
        tokenizer.pad_token_id = 3  # type: ignore[misc]
    tokenizer.pad_token = tokenizer.eos_token = None
    assert tokenizer.pad_token_id is tokenizer.eos_token_id is None
    with pytest.raises(TokenizerError, match="neither a pad_token nor an eos_token to pad with"):
        tokenizer(["a", "b c"], padding=True)


def test_training_is_deterministic_and_puts_the_end_last() -> None:
    texts = ["one two two three three three", f"two{END}one"]
    tokenizer = GPTJTokenizer.train(iter(texts), vocab_size=270, extra_tokens=["<pad>"], model_max_length=64)
    again = GPTJTokenizer.train(texts, vocab_size=270, extra_tokens=["<pad>"])
    assert (tokenizer.get_vocab(), tokenizer.merges) == (again.get_vocab(), again.merges)
    assert (tokenizer.eos_token_id, len(tokenizer)) == (tokenizer.vocab_size - 1, tokenizer.vocab_size + 1)
    assert (tokenizer.model_max_length, again.model_max_length) == (64, None)
    assert tokenizer.vocab_size <= 270
    # The characters of the end of text are not learnt from.
    assert not any("|" in first + second for first, second in tokenizer.merges)
    assert sorted(tokenizer.decode_bytes([token_id])[0] for token_id in range(256)) == list(range(256))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": "text"}, InputTypeError, "texts is one str, whose characters would be the texts"),
        ({"texts": [None]}, InputTypeError, "An item of texts is of type NoneType, expected a str"),
        ({"texts": ["\ud800"]}, TokenizerError, "An item of texts holds the lone surrogate"),
        ({"vocab_size": 256}, InputError, "vocab_size is 256, expected an integer from 257 to 524288"),
        ({"vocab_size": 10**9}, InputError, "vocab_size is 1000000000, expected an integer from 257 to 524288"),
        ({"min_frequency": None}, InputError, "min_frequency is None, expected an integer from 0 to 524288"),
        ({"eos_token": None}, InputTypeError, "eos_token is of type NoneType, expected a str"),
        ({"extra_tokens": ["<a>", "\udc00"]}, TokenizerError, r"extra_tokens\[1\]: '\\udc00' cannot be a token"),
        ({"extra_tokens": [None]}, TokenizerError, r"extra_tokens\[0\]: expected a token's text, got None"),
        ({"eos_token": ""}, InputError, "eos_token is empty"),
        ({"eos_token": "!"}, InputError, "eos_token '!' is also learnt as a part of words"),
        ({"extra_tokens": ["<a>", "<a>"]}, TokenizerError, "train: the added token '<a>' or its id 258 comes twice"),
        ({"model_max_length": 0}, TokenizerError, "train: model_max_length is 0, expected a whole number from 1 on"),
    ],
)
def test_bad_training_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GPTJTokenizer.train(**({"texts": ["abc"], "vocab_size": 257} | arguments))


def test_dropout_skips_merges_in_a_copy_only(tmp_path: Path) -> None:
    text = "the miller says that the river bends before the mill"
    plain = SMALL.encode(text)
    assert SMALL.with_dropout(0).encode(text) == plain
    bytes_only = SMALL.with_dropout(1.0)
    assert [SMALL.convert_ids_to_tokens(token_id) for token_id in bytes_only.encode("the")] == ["t", "h", "e"]
    some = SMALL.with_dropout(0.5)
    variants = {tuple(some.encode(text)) for _ in range(20)}
    assert len(variants) > 1
    assert {SMALL.decode(ids) for ids in variants} == {text}
    assert SMALL.encode(text) == plain
    bytes_only.save_pretrained(tmp_path)
    assert GPTJTokenizer.from_directory(tmp_path).encode(text) == plain
    for dropout in (-0.1, 1.1, float("nan"), None):
        with pytest.raises(InputError, match=f"dropout is {dropout}, expected a probability from 0 to 1"):
            SMALL.with_dropout(dropout)


def test_tokenizers_can_be_pickled_and_copied() -> None:
    for twin in (pickle.loads(pickle.dumps(SMALL)), copy.deepcopy(SMALL)):
        assert [twin.encode(text) for text in CORPUS[:50]] == GOLDENS["small"]["ids"][:50]


def test_from_pretrained_resolves_names_through_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def resolve_directory(name: str, **options: Any) -> Path:
        calls.append((name, options))
        return SMALL_VOCAB

    hub = types.ModuleType("tfgptj.checkpoints.hub")
    monkeypatch.setattr(hub, "resolve_directory", resolve_directory, raising=False)
    monkeypatch.setitem(sys.modules, "tfgptj.checkpoints.hub", hub)
    assert len(GPTJTokenizer.from_pretrained("some/model", revision="float16")) == 600
    assert calls == [("some/model", {"files": "tokenizer", "revision": "float16"})]


def test_saved_tokenizer_json_works_in_the_tokenizers_library(library: Tokenizer) -> None:
    for text, ids in zip(CORPUS, GOLDENS["small"]["ids"], strict=True):
        assert library.encode(text).ids == ids
        assert library.decode(ids, skip_special_tokens=False) == text
