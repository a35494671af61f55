"""GraphTokenizer against GPTJTokenizer, id for id, and its merges against those of the `tokenizers` library."""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from tfgptj.errors import InputError, TokenizerError
from tfgptj.serving.graph_tokenizer import GraphTokenizer
from tfgptj.serving.merge_table import make_merge_table
from tfgptj.serving.merger import Merger
from tfgptj.serving.word_splitter import WordSplitter
from tfgptj.tokenizer import GPTJTokenizer
from tfgptj.vocabulary import checked_vocabulary

FIXTURES = Path(__file__).parent / "fixtures"
CORPUS = json.loads((FIXTURES / "tokenizer_goldens.json").read_text())["corpus"]
# Another vocabulary, such as GPT-2's, may be named to compare by hand.
VOCABULARY = Path(os.environ.get("TFGPTJ_GRAPH_VOCAB", FIXTURES / "small_vocab"))
TOKENIZER = GPTJTokenizer.from_directory(VOCABULARY)
SMALL = GPTJTokenizer.from_directory(FIXTURES / "small_vocab")
END = "<|endoftext|>"

Encode = Callable[[Any], tf.RaggedTensor]


@pytest.fixture(scope="module")
def graph() -> GraphTokenizer:
    return GraphTokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def encode(graph: GraphTokenizer) -> Encode:
    return tf.function(graph.encode, input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)


def vocabulary_with(added: list[AddedToken], **config: Any) -> GPTJTokenizer:
    known = SMALL.current_vocabulary()
    more = [(len(known.base) + number, token) for number, token in enumerate(added)]
    return GPTJTokenizer(checked_vocabulary("test", known.base, known.merges, more, config))


def assert_equal(encode: Encode, tokenizer: GPTJTokenizer, texts: list[str]) -> None:
    for text, found, expected in zip(texts, encode(texts).to_list(), tokenizer(texts)["input_ids"], strict=True):
        assert found == expected, text


def random_texts(count: int) -> list[str]:
    """Texts that mix scripts, kinds of white space, controls, emoji, marks, contractions and added tokens."""
    chosen = random.Random(20260101)
    ranges = [(0x20, 0x7F), (0, 0x20), (0x80, 0x250), (0x300, 0x370), (0x370, 0x530), (0x5D0, 0x700), (0x900, 0xE00)]
    ranges += [
        (0x2000, 0x2070),
        (0x2070, 0x2C00),
        (0x3000, 0x3100),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A4),
        (0xFE00, 0xFE10),
    ]
    ranges += [(0x1F300, 0x1FAFF), (0x10000, 0x1FFFF), (0x20000, 0x323B0), (0xE000, 0xF900), (0x110000 - 300, 0x110000)]
    pieces = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\xa0", "\u3000", "\u2028", "\x85", "'", "''", "a", "1", "½", "٣"]
    pieces += ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'r", "'l", " '", "’s", END, "<|endoftext", "|>"]
    pieces += [
        "<|extratoken_1|>",
        "<|extratoken_10|>",
        "\0",
        "e\u0301",
        "👩‍🌾",
        "\ufeff",
        "\ufffd",
        "the",
        " the",
        "12",
    ]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(chosen.randrange(24)):
            parts.append(
                chosen.choice(pieces) if chosen.random() < 0.6 else chr(chosen.randrange(*chosen.choice(ranges)))
            )
        texts.append("".join(parts))
    return texts


# Text to ids


def test_ids_of_the_corpus_equal(encode: Encode) -> None:
    assert_equal(encode, TOKENIZER, CORPUS)


def test_ids_of_ten_thousand_random_texts_equal(encode: Encode) -> None:
    texts = random_texts(10_000)
    for start in range(0, len(texts), 1000):
        assert_equal(encode, TOKENIZER, texts[start : start + 1000])


def test_every_code_point_is_of_the_library_s_kind() -> None:
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    data = np.frombuffer(text.encode(), np.uint8)
    _, starts = WordSplitter().split(tf.constant(data), tf.zeros(data.shape, tf.int32))
    places = np.flatnonzero((data & 0xC0) != 0x80)
    pieces = ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    np.testing.assert_array_equal(starts, places[[start for _, (start, _) in pieces]])


@pytest.mark.parametrize("unit", ["a", " ", "\n", "'s", "🙂", END, "<|endoftext", "ab1 "])
def test_long_texts_are_encoded(encode: Encode, unit: str) -> None:
    assert_equal(encode, TOKENIZER, [unit * (100_000 // len(unit)), "x"])


def test_a_long_word_is_encoded(encode: Encode) -> None:
    letters = [char for char in "".join(CORPUS) if char.isalpha()]
    assert_equal(encode, TOKENIZER, ["".join(letters), "".join(random.Random(0).choices("abcdeos", k=3000))])


@pytest.mark.parametrize("texts", [[], [""], ["", "a", ""]])
def test_empty_batches_and_texts(encode: Encode, texts: list[str]) -> None:
    ragged = encode(tf.constant(texts, tf.string))
    assert ragged.to_list() == [TOKENIZER.encode(text) for text in texts]
    assert (ragged.dtype, ragged.shape.rank, ragged.nrows()) == (tf.int32, 2, len(texts))


def test_bytes_that_are_not_utf8_are_replaced_as_python_does(encode: Encode) -> None:
    chosen = random.Random(7)
    edges = [0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xDF, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF]
    texts = [bytes(chosen.choices(edges, k=chosen.randrange(9))) for _ in range(2000)]
    expected = TOKENIZER([text.decode("utf-8", "replace") for text in texts])["input_ids"]
    assert encode(texts).to_list() == expected


def test_a_text_over_the_cap_is_refused() -> None:
    graph = GraphTokenizer(SMALL, max_bytes=4)
    assert graph.encode(["abcd", "é"]).to_list() == [SMALL.encode("abcd"), SMALL.encode("é")]
    with pytest.raises(tf.errors.InvalidArgumentError, match="more than 4 bytes, the most that this graph takes"):
        graph.encode(["a", "abcé"])


@pytest.mark.parametrize("max_bytes", [0, True, 1.0, 2**31])
def test_a_bad_cap_is_refused(max_bytes: Any) -> None:
    with pytest.raises(InputError, match=f"max_bytes is {max_bytes}, expected an integer from 1 to 2147483647"):
        GraphTokenizer(SMALL, max_bytes=max_bytes)


# Added tokens and settings


def test_added_tokens_are_found_in_the_library_s_order() -> None:
    plain = ["<a", "<a>", "<a><b", "bx", "é+", "\n", ".*", "x y", "\\w"]
    added = [AddedToken(content, normalized=number % 2 == 0) for number, content in enumerate(plain)]
    added += [AddedToken("b><", special=True), AddedToken("><", normalized=True)]
    tokenizer = vocabulary_with(added)
    chosen = random.Random(3)
    texts = ["".join(chosen.choices([*plain, "b", "<", ">", "x", " ", "é", "+", "."], k=8)) for _ in range(500)]
    assert_equal(GraphTokenizer(tokenizer).encode, tokenizer, texts)


def test_prefix_space_and_bos_are_added() -> None:
    tokenizer = vocabulary_with([], add_prefix_space=True, add_bos_token=True)
    assert tokenizer.encode("the")[0] == tokenizer.bos_token_id
    assert_equal(GraphTokenizer(tokenizer).encode, tokenizer, ["", "the", " the", f"a{END}b{END}", "\n", f"{END} c"])


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_change_their_surroundings_are_refused(flag: str) -> None:
    with pytest.raises(TokenizerError, match=f"'<m>' has the flag {flag}, which a graph cannot obey"):
        GraphTokenizer(vocabulary_with([AddedToken("<m>", **{flag: True})]))


def test_too_many_added_tokens_are_refused() -> None:
    tokenizer = vocabulary_with([AddedToken(f"<{number}{'漢' * 200}>") for number in range(2000)])
    with pytest.raises(TokenizerError, match="The 2001 added tokens are too many or too long for a graph: .*too large"):
        GraphTokenizer(tokenizer)


# Merges


@pytest.mark.parametrize("alphabet", ["ab", "abc", "abcde"])
def test_merges_equal_the_library_s_for_any_vocabulary(alphabet: str) -> None:
    chosen = random.Random(alphabet)
    for _ in range(25):
        tokens, merges = list(alphabet), []
        for _ in range(chosen.randrange(40)):
            pair = (chosen.choice(tokens), chosen.choice(tokens))
            if len("".join(pair)) <= 9 and "".join(pair) not in tokens:
                tokens.append("".join(pair))
                merges.append(pair)
        ids = {token: number for number, token in enumerate(tokens)}
        library = Tokenizer(BPE(ids, merges))
        words = ["".join(chosen.choices(alphabet, k=chosen.randrange(1, 60))) for _ in range(100)]
        symbols = tf.constant([ids[char] for word in words for char in word])
        numbers = tf.constant([number for number, word in enumerate(words) for _ in word])
        found, numbers = Merger(make_merge_table(merges, ids)).merge(symbols, numbers)
        found = tf.RaggedTensor.from_value_rowids(found, numbers, len(words))
        assert found.to_list() == [library.encode(word).ids for word in words], merges


def test_merges_in_another_order_are_refused() -> None:
    ids = {token: number for number, token in enumerate(["a", "b", "ab", "abb"])}
    with pytest.raises(TokenizerError, match="Merge 2 makes 'ab', which merge 1 uses already. A graph needs merges in"):
        make_merge_table([("ab", "b"), ("a", "b")], ids)


# Ids to text


def test_text_of_random_ids_equals(graph: GraphTokenizer) -> None:
    random_ids = np.random.default_rng(5)
    ids = random_ids.integers(0, len(TOKENIZER), [400, 12])
    ids[:200] = random_ids.integers(0, 256, [200, 12])  # bytes, so that broken characters are common
    ids[::7, 3] = TOKENIZER.eos_token_id
    lengths = random_ids.integers(0, 13, [400])
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    for skip in (False, True):
        expected = [TOKENIZER.decode_bytes(row, skip) for row in rows]
        assert graph.decode_bytes(ids, lengths, skip).numpy().tolist() == expected
        assert [text.decode() for text in graph.decode(ids, lengths, skip).numpy()] == TOKENIZER.batch_decode(
            rows, skip
        )


def test_only_ids_within_the_lengths_count(graph: GraphTokenizer) -> None:
    assert graph.decode([[0, -100], [1, 10**6]], [1, 1]).numpy().tolist() == [b"!", b'"']
    assert graph.decode(tf.zeros([0, 4], tf.int32), []).shape == [0]
    for wrong in (-1, len(TOKENIZER)):
        message = rf"A token id is not one of the tokenizer's {len(TOKENIZER)} tokens \(0 to {len(TOKENIZER) - 1}\)"
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            graph.decode([[0], [wrong]], [1, 1])


# Elsewhere


def test_a_saved_model_gives_the_same_and_is_small(graph: GraphTokenizer, tmp_path: Path) -> None:
    module = tf.Module()
    module.graph = graph

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")], autograph=False)
    def round_trip(text: tf.Tensor) -> dict[str, tf.Tensor]:
        ids = graph.encode(text)
        return {"ids": ids.to_tensor(), "text": graph.decode(ids.to_tensor(), tf.cast(ids.row_lengths(), tf.int32))}

    module.round_trip = round_trip
    tf.saved_model.save(module, tmp_path / "1", signatures=round_trip)
    operators = {node.op for node in round_trip.get_concrete_function().graph.as_graph_def().node}
    assert not {name for name in operators if "Py" in name or "Table" in name or "VarHandle" in name}
    assert (tmp_path / "1" / "saved_model.pb").stat().st_size < 4_000_000
    loaded = tf.saved_model.load(tmp_path / "1").signatures["serving_default"]
    texts = [*CORPUS[:50], "a" * 500, "\xa0é"]
    result = loaded(text=tf.constant(texts))
    assert [text.decode() for text in result["text"].numpy()] == texts
    for row, ids in zip(result["ids"].numpy().tolist(), TOKENIZER(texts)["input_ids"], strict=True):
        assert row == ids + [0] * (len(row) - len(ids))


def test_it_maps_a_dataset(graph: GraphTokenizer) -> None:
    dataset = tf.data.Dataset.from_tensor_slices(CORPUS).batch(64).map(graph.encode)
    assert [row for batch in dataset for row in batch.to_list()] == TOKENIZER(CORPUS)["input_ids"]


def test_it_needs_nothing_but_tensorflow() -> None:
    assert "tensorflow_text" not in sys.modules
