"""Files as rows, read one at a time: plain text, JSON lines, CSV, and SQuAD's JSON."""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from tfgptj.errors import InputError
from tfgptj.files import parse_json
from tfgptj.limits import MAX_ROW_BYTES
from tfgptj.training.rows import MAX_ERRORS, Row, Rows

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# A long text is read in pieces; the tokenizer makes of them what it would make of the whole.
PIECE = 2**16  # bytes or characters

_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


def read_text(
    paths: Paths, *, separator: str | None = None, on_error: str = "raise", max_errors: int = MAX_ERRORS
) -> Rows:
    """Plain text in UTF-8. A document is a file, or what stands between separators.

    A long document comes as several rows. Line ends stay as they are, a byte order mark is dropped, and so are
    documents of white space alone. Of a document with a corrupt line, the other lines are kept.

    Args:
        paths: a file, a pattern such as "corpus/*.txt", or a list of these; names that end in .gz are decompressed.
        separator: what stands between documents, such as "\\n\\n" (blank lines) or "<|endoftext|>"; None: a file is a
            document.
        on_error: "raise", or "skip" to leave corrupt lines out: those that are not UTF-8.
        max_errors: corrupt lines above which there is an error nevertheless.

    Returns:
        Rows `{"text": str}`.

    Raises:
        InputError: if there is no such file; while iterating, for a corrupt line.
    """
    if separator == "":
        raise InputError("separator is empty; None makes a document of a file")

    def read(path: Path) -> Iterator[Row]:
        return _documents(_text_pieces(path), separator)

    return file_rows(read, paths, f"text {separator!r}", on_error, max_errors)


def read_jsonl(paths: Paths, *, on_error: str = "raise", max_errors: int = MAX_ERRORS) -> Rows:
    """JSON lines: an object, or a text, on each line. Blank lines are passed over.

    Args:
        paths: a file, a pattern such as "corpus/*.jsonl.gz", or a list of these; .gz is decompressed.
        on_error: "raise", or "skip" to leave corrupt lines out.
        max_errors: corrupt lines above which there is an error nevertheless.

    Returns:
        Rows as the lines have them.

    Raises:
        InputError: if there is no such file; while iterating, for a corrupt line.
    """

    def read(path: Path) -> Iterator[Row]:
        for row in _lines(path):
            if row.error is None and not row.values.strip():
                continue
            yield row if row.error is not None else _json_row(row)

    return file_rows(read, paths, "jsonl", on_error, max_errors)


def read_csv(paths: Paths, *, delimiter: str = ",", on_error: str = "raise", max_errors: int = MAX_ERRORS) -> Rows:
    """CSV files in UTF-8 with a header line; quoted values may hold line ends.

    Args:
        paths: a file, a pattern such as "corpus/*.csv", or a list of these; .gz is decompressed.
        delimiter: what parts values, such as "\\t".
        on_error: "raise", or "skip" to leave corrupt rows out: with too few or too many values, wrongly quoted, or not
            UTF-8.
        max_errors: corrupt rows above which there is an error nevertheless.

    Returns:
        Rows as dicts from the header's names to texts.

    Raises:
        InputError: if there is no such file, or `delimiter` is not one character; while iterating, for a corrupt row.
    """
    if not isinstance(delimiter, str) or len(delimiter) != 1:
        raise InputError(f"delimiter is {delimiter!r}, expected one character")

    def read(path: Path) -> Iterator[Row]:
        return _csv_rows(path, delimiter)

    return file_rows(read, paths, f"csv {delimiter!r}", on_error, max_errors)


def read_squad(paths: Paths, *, on_error: str = "raise", max_errors: int = MAX_ERRORS) -> Rows:
    """Questions in SQuAD's JSON (version 1.1 or 2.0), one file at a time in memory.

    Args:
        paths: a file, a pattern, or a list of these; .gz is decompressed.
        on_error: "raise", or "skip" to leave corrupt questions out.
        max_errors: corrupt questions above which there is an error nevertheless.

    Returns:
        Rows `{"id", "question", "context", "answers": {"text": [...], "answer_start": [...]}}`, as in Hugging Face's
        data sets.

    Raises:
        InputError: if there is no such file; while iterating, for a corrupt question.
    """
    return file_rows(_squad_rows, paths, "squad", on_error, max_errors)


def file_rows(read: Callable[[Path], Iterator[Row]], paths: Paths, kind: str, on_error: str, max_errors: int) -> Rows:
    """Rows of files in their order.

    Args:
        read: function of a file that gives its rows.
        paths: a file, a pattern, or a list of these.
        kind: what else the rows depend on, for their fingerprint.
        on_error, max_errors: as for :class:`Rows`.
    """
    files = files_of(paths)

    def rows() -> Iterator[Row]:
        for path in files:
            try:
                yield from read(path)
            except _GZIP_ERRORS as error:
                yield _damaged(path, error)

    # As `make` does: who changes a file and leaves both its size and its time of change as they were is not noticed.
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return Rows(rows, hashlib.sha256(repr((kind, facts)).encode()).hexdigest(), on_error, max_errors)


def files_of(paths: Paths) -> list[Path]:
    """The files that names and patterns stand for: in the order given, those of a pattern sorted.

    Raises:
        InputError: if a name or a pattern stands for no file, or there is none at all.
    """
    files = []
    for name in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = Path(name)
        found = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        found = [path for path in found if path.is_file()]
        if not found:
            raise InputError(f"{name}: there is no such file")
        files += found
    if not files:
        raise InputError("the list of files is empty")
    return files


def _damaged(path: Path, error: Exception) -> Row:
    return Row(str(path), error=f"is damaged, and its rest cannot be read: {error}")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")


def _text_pieces(path: Path) -> Iterator[Row]:
    """A file's text in pieces of about PIECE bytes, the last of which ends; corrupt lines come as errors."""
    line, held = 1, ""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as file:
        corrupt = False  # the rest of a corrupt line is passed over
        try:
            while piece := file.readline(PIECE):
                piece = piece.removeprefix(codecs.BOM_UTF8) if file.tell() == len(piece) else piece
                ends = piece.endswith(b"\n")
                if not corrupt:
                    try:
                        held += decoder.decode(piece, final=ends)
                    except UnicodeDecodeError as error:
                        yield Row(f"{path}, line {line}", error=f"is not text in UTF-8: {error.reason}")
                        corrupt = True
                if ends:
                    line, corrupt = line + 1, False
                    decoder.reset()
                if len(held) >= PIECE:
                    yield Row(f"{path}, line {line}", held, ends=False)
                    held = ""
        except _GZIP_ERRORS as error:
            yield _damaged(path, error)
        if not corrupt and decoder.getstate()[0]:
            yield Row(f"{path}, line {line}", error="is not text in UTF-8: unexpected end of file")
    yield Row(f"{path}, line {line}", held)


def _documents(pieces: Iterator[Row], separator: str | None) -> Iterator[Row]:
    """The pieces of one file as rows of documents."""
    held, begun = "", False  # text not given yet; whether some of its document was
    for row in pieces:
        if row.error is not None:
            yield row
            continue
        held += row.values
        *whole, held = held.split(separator) if separator is not None else [held]
        for text in whole:
            if begun or text.strip():
                yield row._replace(values={"text": text}, ends=True)
            begun = False
        # What might be the beginning of a separator waits for the rest of it.
        kept = 0 if separator is None or row.ends else len(separator) - 1
        cut = max(len(held) - kept, 0)
        if (begun and row.ends) or held[:cut].strip():
            yield row._replace(values={"text": held[:cut]}, ends=row.ends)
            held, begun = held[cut:], not row.ends


def _lines(path: Path) -> Iterator[Row]:
    """A file's lines as bytes; one that is too long comes as an error."""
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES):
            number += 1
            place = f"{path}, line {number}"
            if len(line) < MAX_ROW_BYTES or line.endswith(b"\n"):
                yield Row(place, line)
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES)
            yield Row(place, error=f"is longer than {MAX_ROW_BYTES:,} bytes")


def _json_row(row: Row) -> Row:
    try:
        return row._replace(values=parse_json(row.values))
    except ValueError as error:
        return row._replace(values=None, error=f"is not JSON: {error}")


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    # The limit is Python's, one for the whole process, and 128 KiB by default: many a document is longer.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    # Bytes that are not UTF-8 become surrogates, which shows in which row they stand.
    with io.TextIOWrapper(_open(path), "utf-8-sig", "surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            place = f"{path}, line {reader.line_num + 1}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(place, error=f"is not CSV: {error}")
                continue
            if header is None:
                header = _header(place, values)
            elif values:  # a blank line gives none
                yield _csv_row(place, header, values)


def _header(place: str, values: list[str]) -> list[str]:
    if not values or len(set(values)) < len(values) or not all(map(_is_text, values)):
        raise InputError(f"{place}: {values} are not the names of columns: there must be some, and none twice")
    return values


def _csv_row(place: str, header: list[str], values: list[str]) -> Row:
    if len(values) != len(header):
        return Row(place, error=f"has {len(values)} values, but the header has {len(header)}")
    if not all(map(_is_text, values)):
        return Row(place, error="is not text in UTF-8")
    return Row(place, dict(zip(header, values, strict=True)))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _squad_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        content = file.read()
    try:
        articles = parse_json(content)["data"]
        for article_number, article in enumerate(articles):
            for paragraph_number, paragraph in enumerate(article["paragraphs"]):
                for number, question in enumerate(paragraph["qas"]):
                    place = f"{path}, data[{article_number}].paragraphs[{paragraph_number}].qas[{number}]"
                    yield _squad_row(place, paragraph["context"], question)
    except (ValueError, KeyError, TypeError) as error:
        yield Row(str(path), error=f"is not in SQuAD's form, and its rest cannot be read: {error!r:.200}")


def _squad_row(place: str, context: Any, question: Any) -> Row:
    try:
        given = question["answers"]
        answers = {name: [answer[name] for answer in given] for name in ("text", "answer_start")}
        values = {"id": question["id"], "question": question["question"], "context": context, "answers": answers}
    except (KeyError, TypeError) as error:
        return Row(place, error=f"is not a question in SQuAD's form: {error!r:.200}")
    return Row(place, values)
