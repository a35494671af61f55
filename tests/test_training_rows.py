"""Rows of files and of what else can be iterated over; corrupt ones are named, and an error unless skipped."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from tfgptj import limits
from tfgptj.errors import InputError, InputTypeError
from tfgptj.training import readers
from tfgptj.training.readers import files_of, read_csv, read_jsonl, read_squad, read_text
from tfgptj.training.rows import Rows, read_rows, text_of, value_of
from tfgptj.training.tfrecord import read_tfrecord


def documents(rows: Rows) -> list[str]:
    """The documents that rows are parts of."""
    whole, part = [], ""
    for row in rows.rows():
        part += row.values["text"]
        if row.ends:
            whole.append(part)
            part = ""
    assert not part
    return whole


def file(tmp_path: Path, content: str | bytes, name: str = "a.txt") -> Path:
    path = tmp_path / name
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def refused(rows: Rows, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        list(rows)


# Anything that can be iterated over


def test_rows_are_read_again_and_one_at_a_time() -> None:
    read: list[int] = []

    def source() -> Iterator[dict[str, int]]:
        for number in range(1000):
            read.append(number)
            yield {"n": number}

    rows = read_rows(source)
    for _ in range(2):
        read.clear()
        iterator = iter(rows)
        assert [next(iterator)["n"] for _ in range(3)] == [0, 1, 2]
        assert len(read) == 3
    assert list(read_rows(["a", "b"])) == ["a", "b"]
    assert read_rows(rows) is rows


class HuggingFaceDataset:
    """What of a `datasets.Dataset` is used."""

    _fingerprint = "9f2c"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from ({"text": "a", "label": 0}, {"text": "b", "label": 1})

    def __len__(self) -> int:
        return 2


def test_hugging_face_datasets() -> None:
    rows = read_rows(HuggingFaceDataset())
    assert [row["text"] for row in rows] == ["a", "b"] == [row["text"] for row in rows]
    assert rows.fingerprint == "9f2c"
    assert read_rows(["a"]).fingerprint is None


@pytest.mark.parametrize("source", ["a text", b"bytes", {"text": "a"}])
def test_single_things_are_no_sources(source: Any) -> None:
    with pytest.raises(
        InputTypeError, match=f"a {type(source).__name__} is not a source of rows: give a list of texts"
    ):
        read_rows(source)


def test_what_cannot_be_read_twice_is_refused() -> None:
    with pytest.raises(InputError, match="a generator can be read only once"):
        read_rows(text for text in ("a", "b"))
    with pytest.raises(InputTypeError, match="a int is not a source of rows: nothing to iterate over"):
        read_rows(3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "a"}, "there is no field 'text', only 'body'"),
        ({}, "there is no field 'text', only an empty row"),
        ({"text": None}, "the field 'text' is of type NoneType, expected a text"),
        ({"text": b"\xff"}, "the field 'text' is not text in UTF-8"),
        ({"text": "\ud800"}, "the field 'text'"),
        (3, "the row is of type int, expected a text"),
    ],
)
def test_rows_without_text_are_corrupt(row: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        text_of(row, "text")


def test_texts_of_rows() -> None:
    assert [text_of(row, "x") for row in ({"x": "a"}, {"x": "ä".encode()}, "b")] == ["a", "ä", "b"]
    with pytest.raises(InputError, match="the row is of type int, expected a dict with the field 'x'"):
        value_of(3, "x")


# Corrupt rows


def test_corrupt_rows_are_named_and_an_error_by_default() -> None:
    rows = read_rows(["a", 3, "c"])
    with pytest.raises(InputError, match=r"^row 1: the row is of type int, expected a text \(on_error='skip' leaves"):
        list(rows.rows(lambda row: text_of(row, "text")))


def test_skipped_rows_are_counted_and_named() -> None:
    rows = read_rows(["a", 3, "c", None, 4, 5], on_error="skip")
    for _ in range(2):
        with pytest.warns(
            UserWarning, match="4 of 6 rows are corrupt and were left out: row 1: .*; row 3: .*; row 4: .* …"
        ):
            assert [row.values for row in rows.rows(lambda row: text_of(row, "text"))] == ["a", "c"]
        assert rows.report.read == 6
        assert [entry.split(":")[0] for entry in rows.report.skipped] == ["row 1", "row 3", "row 4", "row 5"]


def test_too_many_corrupt_rows_are_an_error() -> None:
    rows = read_rows([1, 2, 3, 4], on_error="skip", max_errors=2)
    with pytest.raises(
        InputError, match="3 of the first 3 rows are corrupt, more than max_errors=2; the last is row 2: "
    ):
        list(rows.rows(lambda row: text_of(row, "text")))


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="on_error is 'ignore', expected one of 'raise', 'skip'"):
        read_rows([], on_error="ignore")
    with pytest.raises(InputError, match="max_errors is -1, expected an integer from 0 on"):
        read_rows([], max_errors=-1)


# Files


def test_files_are_found(tmp_path: Path) -> None:
    b, a, c = (file(tmp_path, "", name) for name in ("b.txt", "a.txt", "c[1].txt"))
    assert files_of(tmp_path / "*.txt") == [a, b, c]
    assert files_of([c, str(a)]) == [c, a]
    for missing in (tmp_path / "d.txt", tmp_path / "*.csv", tmp_path):
        with pytest.raises(InputError, match=re.escape(f"{missing}: there is no such file")):
            files_of([a, missing])
    with pytest.raises(InputError, match="the list of files is empty"):
        files_of([])


def test_fingerprints_follow_files_and_options(tmp_path: Path) -> None:
    path = file(tmp_path, "one")
    first = read_text(path).fingerprint
    assert first == read_text(str(path)).fingerprint != read_text(path, separator="\n").fingerprint
    assert first != read_jsonl(path).fingerprint
    os.utime(path, ns=(1, 1))
    assert read_text(path).fingerprint != first


# Plain text


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_a_document(tmp_path: Path, name: str) -> None:
    text = "\ufeffFirst line\r\n\nnaïve 北京\n"
    paths = [file(tmp_path, text, name), file(tmp_path, " \n", f"blank {name}"), file(tmp_path, "end", f"z {name}")]
    assert documents(read_text(paths)) == [text[1:], "end"]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50, 2**16])
def test_separators_are_found_wherever_pieces_end(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE", piece)
    generator = random.Random(piece)
    for separator in ("<|>", "\n\n", "\n", "x"):
        text = "".join(generator.choices(["<", "|", ">", "\n", " ", "ä", "北", separator, separator], k=300))
        path = file(tmp_path, text)
        expected = [part for part in text.split(separator) if part.strip()]
        assert documents(read_text(path, separator=separator)) == expected
        assert documents(read_text(path)) == [text]


def test_long_texts_come_in_pieces(tmp_path: Path) -> None:
    text = "word and word\n" * 50_000
    rows = list(read_text(file(tmp_path, text)).rows())
    assert len(rows) > 5 and max(len(row.values["text"]) for row in rows) < 2**18
    assert [row.ends for row in rows] == [False] * (len(rows) - 1) + [True]
    assert "".join(row.values["text"] for row in rows) == text


def test_corrupt_lines_of_texts(tmp_path: Path) -> None:
    path = file(tmp_path, b"one\n\xff two\nthree \xe4\nfour \xe5")
    refused(read_text(path), f"{path}, line 2: is not text in UTF-8: invalid start byte (on_error='skip'")
    with pytest.warns(UserWarning, match="3 of 4 rows are corrupt"):
        assert documents(rows := read_text(path, on_error="skip")) == ["one\nfour "]
    assert [re.search(r"line \d", entry)[0] for entry in rows.report.skipped] == ["line 2", "line 3", "line 4"]  # type: ignore[index]


def test_a_damaged_gzip_file_keeps_what_can_be_read(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f"{random.Random(0).random()} line {n}\n" for n in range(9000)).encode())
    path = tmp_path / "a.txt.gz"
    path.write_bytes(whole[: len(whole) // 2])
    other = file(tmp_path, "other", "b.txt")
    refused(read_text(path), f"{path}: is damaged, and its rest cannot be read: Compressed file ended")
    with pytest.warns(UserWarning, match="is damaged"):
        first, second = documents(read_text([path, other], on_error="skip"))
    assert "line 0" in first and second == "other"


def test_an_empty_separator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="separator is empty; None makes a document of a file"):
        read_text(file(tmp_path, "a"), separator="")


# JSON lines


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    values = [{"text": "a\nb", "n": 1}, "naïve", {"text": "北京"}]
    content = "\n\n".join(json.dumps(value, ensure_ascii=n == 1) for n, value in enumerate(values))
    assert list(read_jsonl(file(tmp_path, content, name))) == values


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "is not JSON"),
        (b'{"text": NaN}', "is not JSON: NaN is not a JSON number"),
        (b'{"a": 1, "a": 2}', "is not JSON: the key 'a' comes twice"),
        (b'{"text": "\xff"}', "is not JSON"),
    ],
)
def test_corrupt_json_lines(tmp_path: Path, line: bytes, message: str) -> None:
    path = file(tmp_path, b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    refused(read_jsonl(path), f"{path}, line 2: {message}")
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        assert [row["text"] for row in read_jsonl(path, on_error="skip")] == ["a", "b"]


def test_lines_that_never_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 100)
    path = file(tmp_path, '"' + "a" * 97 + '"\n"' + "a" * 350 + '"\n"b"')
    refused(read_jsonl(path), f"{path}, line 2: is longer than 100 bytes")
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        assert list(read_jsonl(path, on_error="skip")) == ["a" * 97, "b"]
    assert limits.MAX_ROW_BYTES == 64 * 2**20


# CSV


def test_csv(tmp_path: Path) -> None:
    values = [["text", "label"], ['say "no",\nthen\u2028go', "1"], ["x" * 200_000, ""], ["naïve", "0"]]
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as opened:
        csv.writer(opened).writerows(values)
    expected = [dict(zip(values[0], row, strict=True)) for row in values[1:]]
    assert list(read_csv(path)) == expected
    path.write_bytes(b"text\tlabel\na,b\t1\n\nc\t2\n")
    assert list(read_csv(path, delimiter="\t")) == [{"text": "a,b", "label": "1"}, {"text": "c", "label": "2"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"only one", "line 3: has 1 values, but the header has 2"),
        (b"one,two,three", "line 3: has 3 values, but the header has 2"),
        (b"\xff,1", "line 3: is not text in UTF-8"),
        (b'"a"b,1', "line 3: is not CSV: ',' expected after '\"'"),
    ],
)
def test_corrupt_csv_rows(tmp_path: Path, line: bytes, message: str) -> None:
    path = file(tmp_path, b"text,label\na,1\n" + line + b"\nb,2\n", "a.csv")
    refused(read_csv(path), f"{path}, {message}")
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        assert [row["text"] for row in read_csv(path, on_error="skip")] == ["a", "b"]


def test_a_quotation_without_end(tmp_path: Path) -> None:
    path = file(tmp_path, 'text,label\na,1\n"b,2\nc,3\n', "a.csv")
    refused(read_csv(path), f"{path}, line 3: is not CSV: unexpected end of data")


@pytest.mark.parametrize("header", ["a,a", "", "\n"])
def test_headers_are_checked_whatever_on_error(tmp_path: Path, header: str) -> None:
    path = file(tmp_path, header + "\n1,2\n", "a.csv")
    refused(read_csv(path, on_error="skip"), f"{path}, line 1: ")
    with pytest.raises(InputError, match="delimiter is ', ', expected one character"):
        read_csv(path, delimiter=", ")


# TFRecord


def example(**features: Any) -> bytes:
    kinds = {bytes: ("bytes_list", tf.train.BytesList), int: ("int64_list", tf.train.Int64List)}
    made = {}
    for name, values in features.items():
        kind, cls = kinds.get(type(values[0]), ("float_list", tf.train.FloatList))
        made[name] = tf.train.Feature(**{kind: cls(value=values)})
    return tf.train.Example(features=tf.train.Features(feature=made)).SerializeToString()


@pytest.fixture
def write_records(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: bytes, compression: str = "") -> Path:
        path = tmp_path / f"a.tfrecord{'.gz' if compression else ''}"
        with tf.io.TFRecordWriter(str(path), compression) as writer:
            for record in records:
                writer.write(record)
        return path

    return write


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_tfrecord(write_records: Callable[..., Path], compression: str) -> None:
    records = [example(text=["naïve".encode()], label=[3], score=[0.5]), example(text=[b"a", b"b"])]
    rows = read_tfrecord(write_records(*records, compression=compression))
    assert list(rows) == [{"text": "naïve".encode(), "label": 3, "score": 0.5}, {"text": [b"a", b"b"]}]


def test_records_with_wrong_checksums(write_records: Callable[..., Path]) -> None:
    path = write_records(*(example(text=[f"text {n}".encode()]) for n in range(4)))
    content = bytearray(path.read_bytes())
    content[content.index(b"text 2")] ^= 1
    path.write_bytes(content)
    refused(read_tfrecord(path), f"{path}, record 2: is damaged, and so is all that follows: corrupted record at ")
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        assert [row["text"] for row in read_tfrecord(path, on_error="skip")] == [b"text 0", b"text 1"]


def test_records_that_are_no_examples(write_records: Callable[..., Path]) -> None:
    path = write_records(example(text=[b"a"]), b"\xff\xff", example(text=[b"b"]))
    refused(read_tfrecord(path), f"{path}, record 1: is not a tf.train.Example: ")
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        assert [row["text"] for row in read_tfrecord(path, on_error="skip")] == [b"a", b"b"]


# SQuAD


QUESTION = {"id": "1", "question": "Who?", "answers": [{"text": "I", "answer_start": 7}]}


def squad(tmp_path: Path, *questions: Any) -> Path:
    return file(tmp_path, json.dumps({"data": [{"paragraphs": [{"context": "It was I.", "qas": questions}]}]}))


def test_squad(tmp_path: Path) -> None:
    impossible = {"id": "2", "question": "Why?", "answers": [], "is_impossible": True}
    one, two = read_squad(squad(tmp_path, QUESTION, impossible))
    assert one == {**QUESTION, "context": "It was I.", "answers": {"text": ["I"], "answer_start": [7]}}
    assert two["answers"] == {"text": [], "answer_start": []}


def test_corrupt_squad(tmp_path: Path) -> None:
    path = squad(tmp_path, QUESTION, {"id": "2", "question": "Why?"}, QUESTION)
    refused(read_squad(path), f"{path}, data[0].paragraphs[0].qas[1]: is not a question in SQuAD's form: KeyError")
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        assert len(list(read_squad(path, on_error="skip"))) == 2
    for content in ("[", "[]", '{"data": [{}]}'):
        refused(read_squad(path := file(tmp_path, content)), f"{path}: is not in SQuAD's form, and its rest cannot be")
