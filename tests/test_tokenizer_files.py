"""Reading and writing tokenizer files: forms that are accepted, damage that is refused, and safe replacement."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfgptj import tokenizer_files, vocabulary
from tfgptj.errors import InputError, TokenizerError
from tfgptj.tokenizer import GPTJTokenizer

SMALL_VOCAB = Path(__file__).parent / "fixtures" / "small_vocab"
SMALL = GPTJTokenizer.from_directory(SMALL_VOCAB)
TEXT = "the miller says: été, 河流! <|extratoken_3|>"
FILES = [
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]
Json = dict[str, Any]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A directory with vocab.json, merges.txt and added_tokens.json."""
    return shutil.copytree(SMALL_VOCAB, tmp_path / "plain")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with tokenizer.json alone."""
    SMALL.save_pretrained(tmp_path / "all")
    (tmp_path / "saved").mkdir()
    shutil.copyfile(tmp_path / "all" / "tokenizer.json", tmp_path / "saved" / "tokenizer.json")
    return tmp_path / "saved"


def edit(path: Path, change: Callable[[Json], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def assert_refused(directory: Path, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        GPTJTokenizer.from_directory(directory)
    assert str(directory) in str(caught.value)


def assert_same(first: GPTJTokenizer, second: GPTJTokenizer) -> None:
    assert first._vocabulary.base == second._vocabulary.base
    assert first.merges == second.merges
    assert {i: repr(token) for i, token in first._vocabulary.added.items()} == {
        i: repr(token) for i, token in second._vocabulary.added.items()
    }
    assert first._vocabulary.settings == second._vocabulary.settings
    assert first.encode(TEXT) == second.encode(TEXT)


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    SMALL.save_pretrained(tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == FILES
    assert_same(GPTJTokenizer.from_directory(tmp_path / "a" / "b"), SMALL)
    (tmp_path / "a" / "b" / "tokenizer.json").unlink()  # the other files say the same
    assert_same(GPTJTokenizer.from_directory(str(tmp_path / "a" / "b")), SMALL)


def test_changed_settings_are_saved(plain: Path, tmp_path: Path) -> None:
    edit(plain / "tokenizer_config.json", lambda config: config.update(add_bos_token=True, add_prefix_space=True))
    tokenizer = GPTJTokenizer.from_directory(plain)
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token = "<|extratoken_2|>", "<|extratoken_1|>", None
    tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length = "left", "left", 77
    tokenizer.save_pretrained(tmp_path / "again")
    again = GPTJTokenizer.from_directory(tmp_path / "again")
    assert (again.pad_token, again.eos_token, again.unk_token) == ("<|extratoken_2|>", "<|extratoken_1|>", None)
    assert (again.padding_side, again.truncation_side, again.model_max_length) == ("left", "left", 77)
    assert again.encode("the") == tokenizer.encode("the") == [583, *SMALL.encode(" the")]
    assert 585 in again.all_special_ids
    tokenizer.bos_token = None  # then there is nothing to add, and the files must not claim it
    tokenizer.save_pretrained(tmp_path / "again")
    assert GPTJTokenizer.from_directory(tmp_path / "again").encode("the") == SMALL.encode(" the")
    tokenizer.padding_side = "up"
    with pytest.raises(InputError, match="padding_side is 'up'"):
        tokenizer.save_pretrained(tmp_path / "again")


def test_flags_of_added_tokens_are_kept_and_obeyed(saved: Path, tmp_path: Path) -> None:
    edit(saved / "tokenizer.json", lambda content: content["added_tokens"][3].update(lstrip=True, rstrip=True))
    tokenizer = GPTJTokenizer.from_directory(saved)
    assert tokenizer.encode("a  <|extratoken_3|>  b") == [64, 586, 65]
    tokenizer.save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "nothing"):
        (tmp_path / "again" / name).unlink(missing_ok=True)
        assert_same(GPTJTokenizer.from_directory(tmp_path / "again"), tokenizer)


def test_line_ends_byte_order_marks_and_missing_headers_are_tolerated(plain: Path) -> None:
    merges = (plain / "merges.txt").read_text(encoding="utf-8")
    for text in (merges.replace("\n", "\r\n"), "\ufeff" + merges, merges.partition("\n")[2], merges + "\n\n"):
        (plain / "merges.txt").write_bytes(text.encode())
        assert_same(GPTJTokenizer.from_directory(plain), SMALL)


def test_openai_names_are_read(plain: Path) -> None:
    (plain / "vocab.json").rename(plain / "encoder.json")
    (plain / "merges.txt").rename(plain / "vocab.bpe")
    assert_same(GPTJTokenizer.from_directory(plain), SMALL)


def test_merges_may_be_pairs(saved: Path) -> None:
    edit(
        saved / "tokenizer.json", lambda content: content["model"].update(merges=[list(pair) for pair in SMALL.merges])
    )
    assert_same(GPTJTokenizer.from_directory(saved), SMALL)


def test_special_tokens_may_be_text_or_objects(plain: Path) -> None:
    def change(config: Json) -> None:
        config["eos_token"] = {"__type": "AddedToken", "content": "<|extratoken_1|>", "lstrip": False, "special": True}
        config.update(unk_token=None, model_max_length=10**30, additional_special_tokens=["<|extratoken_9|>"])

    edit(plain / "special_tokens_map.json", change)
    tokenizer = GPTJTokenizer.from_directory(plain)
    assert (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token_id) == ("<|extratoken_1|>", None, 583)
    assert tokenizer.model_max_length is None
    assert tokenizer.all_special_ids == [583, 584, 592]


def test_the_config_wins_over_the_older_file_once_it_holds_the_flags(plain: Path) -> None:
    edit(plain / "special_tokens_map.json", lambda content: content.update(pad_token="<|extratoken_1|>"))
    assert GPTJTokenizer.from_directory(plain).pad_token == "<|extratoken_1|>"
    edit(plain / "tokenizer_config.json", lambda content: content.update(added_tokens_decoder={}))
    assert GPTJTokenizer.from_directory(plain).pad_token is None


def test_without_an_end_of_text_there_are_no_special_tokens(plain: Path) -> None:
    edit(plain / "vocab.json", lambda content: content.update({"<end>": content.pop("<|endoftext|>")}))
    tokenizer = GPTJTokenizer.from_directory(plain)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.all_special_ids) == (None, None, [])
    assert len(tokenizer.encode("<end>")) > 1


def template(*single: Json) -> Callable[[Json], None]:
    return lambda content: content.update(post_processor={"type": "TemplateProcessing", "single": list(single)})


BOS, TEXT_STEP = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}


def test_a_template_with_one_leading_bos_means_add_bos_token(saved: Path) -> None:
    edit(saved / "tokenizer.json", template(BOS, TEXT_STEP))
    assert GPTJTokenizer.from_directory(saved).encode("a") == [583, 64]


def set_in(*path: Any, to: Any) -> Callable[[Json], None]:
    def change(content: Json) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


REGEX = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
DAMAGED_TOKENIZER_JSON = {
    "other model": (set_in("model", "type", to="Unigram"), "model.type is 'Unigram', expected 'BPE' or None"),
    "no model": (set_in("model", to=None), "model: expected a JSON object, got None"),
    "dropout": (set_in("model", "dropout", to=0.1), "model.dropout is 0.1, expected None or 0"),
    "prefix": (set_in("model", "continuing_subword_prefix", to="##"), "model.continuing_subword_prefix is '##'"),
    "suffix": (set_in("model", "end_of_word_suffix", to="</w>"), "model.end_of_word_suffix is '</w>'"),
    "fallback": (set_in("model", "byte_fallback", to=True), "model.byte_fallback is True, expected False or None"),
    "ignoring": (set_in("model", "ignore_merges", to=True), "model.ignore_merges is True, expected False or None"),
    "regex": (set_in("pre_tokenizer", to=REGEX), "pre_tokenizer is 'Split', expected 'ByteLevel': only GPT-2's"),
    "no cut": (set_in("pre_tokenizer", to=None), "pre_tokenizer is None, expected 'ByteLevel'"),
    "no words": (set_in("pre_tokenizer", "use_regex", to=False), "pre_tokenizer.use_regex is False, expected True"),
    "normalizer": (set_in("normalizer", to={"type": "NFKC"}), "normalizer is 'NFKC', expected None"),
    "decoder": (set_in("decoder", to={"type": "Replace"}), "decoder is 'Replace', expected 'ByteLevel' or None"),
    "step": (set_in("decoder", to="ByteLevel"), "decoder: expected a JSON object, got 'ByteLevel'"),
    "processor": (set_in("post_processor", to={"type": "BertProcessing"}), "post_processor is 'BertProcessing'"),
    "template": (template(BOS, TEXT_STEP, BOS), "the post_processor adds tokens to texts; only one bos_token in front"),
    "vocab": (set_in("model", "vocab", to=[]), r"model.vocab: expected a JSON object, got \[\]"),
    "merges": (set_in("model", "merges", to="a b"), "model.merges: expected a JSON list, got 'a b'"),
    "merge": (set_in("model", "merges", 1, to=["a", "b", "c"]), "merge 2: expected two tokens and one space, got"),
    "spaced merge": (set_in("model", "merges", 1, to=["a b", "c"]), "merge 2: expected two tokens and one space"),
    "number merge": (set_in("model", "merges", 1, to=[1, 2]), "merge 2: expected two tokens and one space"),
    "unknown merge": (set_in("model", "merges", 0, to="q q"), "merge 1: the merge of 'q' and 'q' needs the token 'qq'"),
    "added list": (set_in("added_tokens", to={"a": 1}), "added_tokens: expected a JSON list, got {'a': 1}"),
    "added entry": (set_in("added_tokens", 1, to="x"), "added token 2: expected a JSON object, got 'x'"),
    "added text": (set_in("added_tokens", 1, "content", to=5), "added token 2: expected a token's text, got 5"),
    "added flag": (
        set_in("added_tokens", 1, "lstrip", to="no"),
        "added token 2: lstrip is 'no', expected true or false",
    ),
    "added id": (set_in("added_tokens", 1, "id", to="7"), "the id of '<|extratoken_1|>' is '7', expected an integer"),
    "no id": (set_in("added_tokens", 1, "id", to=None), "is None, expected an integer from 0 to 2147483647"),
    "id of another": (set_in("added_tokens", 1, "id", to=7), "has the id 7, expected 584 or more"),
    "id of itself": (set_in("added_tokens", 0, "id", to=600), "'<|endoftext|>' has the id 600, expected 583"),
    "id twice": (set_in("added_tokens", 1, "id", to=585), "'<|extratoken_2|>' or its id 585 comes twice"),
    "text twice": (set_in("added_tokens", 1, "content", to="<|extratoken_2|>"), "or its id 585 comes twice"),
    "gap in added": (set_in("added_tokens", 16, "id", to=9999), "no token has the id 599, but there are tokens with"),
    "empty token": (set_in("added_tokens", 16, "content", to=""), "'' cannot be a token: it is empty or holds a lone"),
    "surrogate": (set_in("added_tokens", 16, "content", to="\ud800"), r"'\\ud800' cannot be a token"),
    "prefix space": (
        set_in("pre_tokenizer", "add_prefix_space", to=1),
        "add_prefix_space is 1, expected true or false",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED_TOKENIZER_JSON.values(), ids=DAMAGED_TOKENIZER_JSON)
def test_a_damaged_tokenizer_json_is_refused(saved: Path, change: Callable[[Json], None], message: str) -> None:
    edit(saved / "tokenizer.json", change)
    assert_refused(saved, message.replace("|", r"\|"))


DAMAGED_VOCABULARIES = {
    "id twice": ({"!": 1}, "'!' and '\"' both have the id 1"),
    "negative id": ({"!": -1}, "the id of '!' is -1, expected an integer from 0 to 2147483647"),
    "large id": ({"!": 2**31}, "the id of '!' is 2147483648"),
    "true as id": ({"!": True}, "the id of '!' is True"),
    "fraction as id": ({"!": 0.5}, "the id of '!' is 0.5"),
    "gap": ({"new": 2000}, "no token has the id 584, but there are tokens with higher ids"),
    "empty token": ({"": 584}, "'' cannot be a token"),
    "lone surrogate": ({"a\udc00": 584}, r"'a\\udc00' cannot be a token"),
}


@pytest.mark.parametrize(("entries", "message"), DAMAGED_VOCABULARIES.values(), ids=DAMAGED_VOCABULARIES)
def test_a_damaged_vocabulary_is_refused(plain: Path, entries: Json, message: str) -> None:
    edit(plain / "vocab.json", lambda content: content.update(entries))
    assert_refused(plain, message)


def test_a_vocabulary_without_all_bytes_is_refused(plain: Path) -> None:
    edit(plain / "vocab.json", lambda content: content.update({"new": content.pop("!")}))
    assert_refused(plain, r"1 of the 256 bytes have no token in the vocabulary \(first 0x21\)")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_token": "[PAD]"}, r"pad_token is '\[PAD\]', which is not a token of the vocabulary"),
        ({"additional_special_tokens": ["<x>"]}, "additional_special_tokens is '<x>', which is not a token"),
        ({"additional_special_tokens": "<x>"}, "additional_special_tokens: expected a JSON list, got '<x>'"),
        ({"eos_token": 5}, "eos_token: expected a token's text, got 5"),
        ({"eos_token": {"text": "x"}}, "eos_token: expected a token's text, got None"),
        ({"model_max_length": 0}, "model_max_length is 0, expected a whole number from 1 on"),
        ({"model_max_length": "2048"}, "model_max_length is '2048'"),
        ({"model_max_length": 20.5}, "model_max_length is 20.5"),
        ({"model_max_length": float("nan")}, "NaN is not a JSON number"),
        ({"model_max_length": float("inf")}, "Infinity is not a JSON number"),
        ({"padding_side": "middle"}, "padding_side is 'middle', expected 'left' or 'right'"),
        ({"truncation_side": None}, "truncation_side is None, expected 'left' or 'right'"),
        ({"add_prefix_space": "true"}, "add_prefix_space is 'true', expected true or false"),
        ({"add_bos_token": True, "bos_token": None}, "add_bos_token is true, but there is no bos_token to add"),
        ({"added_tokens_decoder": []}, r"added_tokens_decoder: expected a JSON object, got \[\]"),
        ({"added_tokens_decoder": {"-1": FLAGS}}, "added_tokens_decoder: '-1' is not a token id"),
        ({"added_tokens_decoder": {"9" * 99: FLAGS}}, "added_tokens_decoder: '99999.* is not a token id"),
        ({"added_tokens_decoder": {"²": FLAGS}}, "added_tokens_decoder: '²' is not a token id"),
        ({"added_tokens_decoder": {"584": FLAGS}}, "added_tokens_decoder: expected a token's text, got None"),
    ],
)
def test_a_damaged_config_is_refused(plain: Path, config: Json, message: str) -> None:
    edit(plain / "tokenizer_config.json", lambda content: content.update(config))
    assert_refused(plain, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b"", "vocab.json: not valid JSON: Expecting value"),
        ("vocab.json", b"[1]", r"vocab.json: expected a JSON object, got \[1\]"),
        ("vocab.json", b'{"a": 1, "a": 2}', "vocab.json: not valid JSON: the key 'a' comes twice in one object"),
        ("vocab.json", b'{"a": ' + b"9" * 5000 + b"}", "vocab.json: not valid JSON: Exceeds the limit"),
        ("vocab.json", b'{"a": ' + b"[" * 100_000, "vocab.json: not valid JSON: nested too deeply"),
        ("vocab.json", b"\xff\xfe{}", "vocab.json: not UTF-8 text: .*invalid start byte"),
        ("added_tokens.json", b'{"<|extratoken_1|>": "584"}', "the id of '<.extratoken_1.>' is '584'"),
        ("merges.txt", b"#version: 0.2\na n\nt\n", "merges.txt: line 3: expected two tokens and one space, got 't'"),
        ("merges.txt", b"a n\na  n\n", "merges.txt: line 2: expected two tokens and one space"),
        (
            "merges.txt",
            b"a n\n#version: 0.2\n",
            "merges.txt: line 2: the merge of '#version:' and '0.2' needs the token",
        ),
        (
            "merges.txt",
            b"#version\n\n\nq q\n",
            "line 4: the merge of 'q' and 'q' needs the token 'qq', which is not in",
        ),
    ],
)
def test_damaged_files_are_refused(plain: Path, name: str, content: bytes, message: str) -> None:
    (plain / name).write_bytes(content)
    assert_refused(plain, message)


def test_missing_files_are_listed(plain: Path, tmp_path: Path) -> None:
    (plain / "merges.txt").unlink()
    assert_refused(plain, "found no merges.txt or vocab.bpe")
    wanted = "A tokenizer is a tokenizer.json, or a vocab.json or encoder.json together with a merges.txt or vocab.bpe"
    assert_refused(tmp_path / "nowhere", f"found no vocab.json or encoder.json. {wanted}")


def test_more_than_the_caps_is_refused(plain: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_files, "MAX_FILE_BYTES", 100)
        assert_refused(plain, "vocab.json: 8257 bytes are more than the 100 that a tokenizer file may have")
    monkeypatch.setattr(vocabulary, "MAX_TOKENS", 590)
    for directory in (plain, saved):
        assert_refused(directory, "600 tokens are more than the 590 that tfgptj accepts")
    monkeypatch.setattr(vocabulary, "MAX_TOKENS", 500)
    assert_refused(plain, "584 tokens are more than the 500")
    monkeypatch.setattr(vocabulary, "MAX_TOKENS", 300)
    assert_refused(plain, "merges.txt: 327 merges are more than the 300")


@settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_to_tokenizer_json_is_harmless(saved: Path, data: st.DataObject) -> None:
    """A flipped byte or a cut leaves a tokenizer that still round-trips, or raises TokenizerError; nothing else."""
    original = json.dumps(json.loads((saved.parent / "all" / "tokenizer.json").read_text(encoding="utf-8"))).encode()
    position = data.draw(st.integers(0, len(original) - 1))
    damaged = original[:position] + data.draw(st.binary(max_size=1))
    if data.draw(st.booleans()):
        damaged += original[position + 1 :]
    (saved / "tokenizer.json").write_bytes(damaged)
    try:
        tokenizer = GPTJTokenizer.from_directory(saved)
    except TokenizerError:
        return
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_failed_save_leaves_the_old_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (saved / "tokenizer.json").read_bytes()
    synced = []

    def fail(*paths: object) -> None:
        assert synced  # the content must be on the disk before the name moves
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        SMALL.with_dropout(0).save_pretrained(saved)
    assert os.listdir(saved) == ["tokenizer.json"]
    assert (saved / "tokenizer.json").read_bytes() == before


def test_saving_removes_added_tokens_of_an_earlier_tokenizer(plain: Path) -> None:
    GPTJTokenizer.train(["abc"], vocab_size=257).save_pretrained(plain)
    assert "added_tokens.json" not in os.listdir(plain)
    (plain / "tokenizer.json").unlink()
    assert len(GPTJTokenizer.from_directory(plain)) == 257
