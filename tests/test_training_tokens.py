"""Documents as a token stream: the same tokens whatever the pieces, and kept on disk for what made them alone."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tfgptj import GPTJTokenizer
from tfgptj.errors import InputError
from tfgptj.training import tokens
from tfgptj.training.readers import read_text
from tfgptj.training.rows import Row, Rows, read_rows
from tfgptj.training.tokens import Tokens, kept_tokens, token_stream

SMALL_VOCAB = Path(__file__).parent / "fixtures" / "small_vocab"


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.from_directory(SMALL_VOCAB)


def whole(parts: Iterator[Tokens]) -> tuple[list[int], list[int]]:
    ids, ends = zip(*parts, strict=True)
    return np.concatenate(ids).tolist(), np.concatenate(ends).tolist()


def expected(texts: list[str], tokenizer: GPTJTokenizer) -> tuple[list[int], list[int]]:
    documents = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts if text]
    return sum(documents, []), np.cumsum([len(ids) for ids in documents]).tolist()


ALPHABET = [
    "king",
    "queen's",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\x1c",
    "\u2028",
    "\u3000",
    "ä",
    "北京",
    "!",
    "12",
    "'s",
    "<|endoftext|>",
]


@pytest.mark.parametrize("piece", [1, 5, 40])
def test_pieces_change_no_token(tokenizer: GPTJTokenizer, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", piece)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 3 * piece)
    generator = random.Random(piece)
    texts = ["".join(generator.choices(ALPHABET, k=generator.randrange(60))) for _ in range(60)]

    def rows() -> Iterator[Row]:
        for text in texts:
            while len(text) > 7:
                yield Row("", text[:7], ends=False)
                text = text[7:]
            yield Row("", text)

    assert whole(token_stream(Rows(rows), tokenizer, "text")) == expected(texts, tokenizer)


@pytest.mark.parametrize("extra", ["two words", "end\n"])
def test_tokens_with_white_space_inside_are_not_cut(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 3)
    tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257, extra_tokens=[extra])
    text = f"some {extra} and {extra}"
    assert whole(token_stream(read_rows([text]), tokenizer, "text")) == expected([text], tokenizer)


def test_bos_stands_in_front_of_documents(tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 4)
    monkeypatch.setattr(type(tokenizer), "_leading_ids", lambda self: [7])
    ids, ends = whole(token_stream(read_rows(["the king and the queen", "a"]), tokenizer, "text"))
    eos = tokenizer.eos_token_id
    assert [ids[0], ids[ends[0] - 1], ids[ends[0]], ids[-1]] == [7, eos, 7, eos]
    assert ids.count(7) == tokenizer.encode("the king and the queen").count(7) + tokenizer.encode("a").count(7)


def test_only_a_part_of_the_corpus_is_in_memory(tokenizer: GPTJTokenizer) -> None:
    read: list[int] = []

    def source() -> Iterator[str]:
        for number in range(100_000):
            read.append(number)
            yield "the king " * 100

    stream = token_stream(read_rows(source), tokenizer, "text")
    next(stream)
    assert len(read) == 1024
    next(stream)
    assert len(read) == 2048


def test_documents_of_positions() -> None:
    stream = Tokens(np.arange(9), np.array([3, 4, 9]))
    assert stream.documents(np.arange(9)).tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]


def test_a_tokenizer_without_eos_is_refused(tokenizer: GPTJTokenizer) -> None:
    without = tokenizer.with_dropout(0)
    without.eos_token = None
    with pytest.raises(InputError, match="the tokenizer has no eos_token, which marks where documents end"):
        next(token_stream(read_rows(["a"]), without, "text"))


# Kept on disk


def test_kept_tokens_are_those_of_the_stream(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    texts = ["the king", "", "and the queen 北京"]
    kept = kept_tokens(read_rows(texts), tokenizer, "text", tmp_path / "made", "v1")
    assert (kept.ids.tolist(), kept.ends.tolist()) == expected(texts, tokenizer)
    assert isinstance(kept.ids, np.memmap) and kept.ids.dtype == "uint16"


def test_kept_tokens_are_not_made_again(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    passes: list[int] = []

    def source() -> list[str]:
        passes.append(1)
        return ["the king"]

    for _ in range(3):
        kept_tokens(read_rows(source), tokenizer, "text", tmp_path, "v1")
    assert len(passes) == 1


def test_stale_tokens_are_never_used(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("the king")
    first = kept_tokens(read_text(path), tokenizer, "text", cache)
    path.write_text("the queen!")
    second = kept_tokens(read_text(path), tokenizer, "text", cache)
    assert tokenizer.decode(first.ids) == "the king<|endoftext|>"  # still there for who reads it
    assert tokenizer.decode(second.ids) == "the queen!<|endoftext|>"
    other = GPTJTokenizer.train(["abc"], vocab_size=257)
    assert kept_tokens(read_text(path), other, "text", cache).ids[-1] == 256
    options = [{}, {"on_error": "skip"}, {"separator": "e"}]
    places = {kept_tokens(read_text(path, **o), tokenizer, "text", cache).ids.filename for o in options}  # type: ignore[attr-defined, arg-type]
    keyed = {kept_tokens(read_rows(["a"]), tokenizer, "text", cache, key).ids.filename for key in ("1", "2")}  # type: ignore[attr-defined]
    assert len(places) == 3 and len(keyed) == 2


def test_rows_without_fingerprint_need_a_key(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cache_dir needs cache_key for these documents, a name that changes when"):
        kept_tokens(read_rows(["a"]), tokenizer, "text", tmp_path)


def test_nothing_is_kept_of_a_corpus_that_cannot_be_read(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 1: the row is of type int"):
        kept_tokens(read_rows(["a", 3]), tokenizer, "text", tmp_path, "v1")
    with pytest.raises(InputError, match="there is not one document with a text"):
        kept_tokens(read_rows(["", ""]), tokenizer, "text", tmp_path, "v1")
    assert list(tmp_path.iterdir()) == []


def test_what_was_skipped_is_written_down(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        kept = kept_tokens(read_rows(["a", 3], on_error="skip"), tokenizer, "text", tmp_path, "v1")
    facts = json.loads((Path(kept.ids.filename).parent / "tokens.json").read_text())  # type: ignore[attr-defined]
    assert facts["documents"] == 1 and facts["skipped"] == ["row 1: the row is of type int, expected a text"]


@pytest.mark.parametrize("name", ["tokens.bin", "ends.bin", "tokens.json"])
def test_damaged_files_are_an_error(tokenizer: GPTJTokenizer, tmp_path: Path, name: str) -> None:
    kept_tokens(read_rows(["the king"]), tokenizer, "text", tmp_path, "v1")
    [path] = tmp_path.rglob(name)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=re.escape(f"{path.parent}: the kept tokens are damaged")):
        kept_tokens(read_rows(["the king"]), tokenizer, "text", tmp_path, "v1")


def test_two_workers_make_the_same_files_at_once(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def source() -> Iterator[str]:
        both.wait(30)
        yield "the king"

    found: list[list[int]] = []

    def work() -> None:
        found.append(kept_tokens(read_rows(source), tokenizer, "text", tmp_path, "v1").ids.tolist())

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert found[0] == found[1] == expected(["the king"], tokenizer)[0]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_directory_that_cannot_be_renamed_into_place(
    tokenizer: GPTJTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError, match="read-only"):
        kept_tokens(read_rows(["the king"]), tokenizer, "text", tmp_path, "v1")
