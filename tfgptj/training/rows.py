"""Rows of a source of examples or documents, each with its place; corrupt ones are named."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tfgptj.errors import InputError, InputTypeError, TokenizerError
from tfgptj.vocabulary import check_text

ON_ERROR = ("raise", "skip")
MAX_ERRORS = 100
_NAMED = 3  # of the corrupt rows, in a warning


class Row(NamedTuple):
    """One row: where it stands, what it holds, or why it holds nothing."""

    place: str  # "reviews.csv, line 12"
    values: Any = None
    ends: bool = True  # False: the document goes on in the next row
    error: str | None = None


@dataclasses.dataclass
class Report:
    """What one pass over rows met.

    Attributes:
        read: rows, corrupt ones included.
        skipped: places and reasons of the corrupt rows that were left out.
        truncated: texts that were cut.
    """

    read: int = 0
    skipped: list[str] = dataclasses.field(default_factory=list)
    truncated: int = 0


class Rows:
    """Rows that can be read again and again, one at a time. Made by the functions of `readers` and by `read_rows`.

    Iterating gives the rows' values. A corrupt row is an error, or is left out, counted and named.

    Args:
        read: starts a pass.
        fingerprint: changes when the rows do; None if nobody can tell.
        on_error: "raise", or "skip" to leave corrupt rows out.
        max_errors: corrupt rows above which there is an error nevertheless.

    Attributes:
        report: :class:`Report` of the latest pass.

    Raises:
        InputError: if an argument is invalid; while iterating, for a corrupt row.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[Row]],
        fingerprint: str | None = None,
        on_error: str = "raise",
        max_errors: int = MAX_ERRORS,
    ) -> None:
        if on_error not in ON_ERROR:
            raise InputError(f"on_error is {on_error!r}, expected one of {', '.join(map(repr, ON_ERROR))}")
        if not isinstance(max_errors, int) or max_errors < 0:
            raise InputError(f"max_errors is {max_errors!r}, expected an integer from 0 on")
        self._read, self.fingerprint, self.on_error, self.max_errors = read, fingerprint, on_error, max_errors
        self.report = Report()

    def __iter__(self) -> Iterator[Any]:
        return (row.values for row in self.rows())

    def rows(self, convert: Callable[[Any], Any] = lambda values: values) -> Iterator[Row]:
        """One pass over the good rows, their values converted.

        Args:
            convert: function of a row's values; an InputError of its makes the row corrupt.

        Raises:
            InputError: at a corrupt row with `on_error="raise"`, or at one too many.
        """
        report = self.report = Report()
        for row in self._read():
            report.read += 1
            try:
                if row.error is not None:
                    raise InputError(row.error)
                good = row._replace(values=convert(row.values))
            except InputError as error:
                self._reject(f"{row.place}: {error}", report)
            else:
                yield good
        if report.skipped:
            named = "; ".join(report.skipped[:_NAMED]) + (" …" if len(report.skipped) > _NAMED else "")
            counts = f"{len(report.skipped)} of {report.read}"
            warnings.warn(f"{counts} rows are corrupt and were left out: {named}", stacklevel=1)

    def _reject(self, message: str, report: Report) -> None:
        if self.on_error == "raise":
            raise InputError(f"{message} (on_error='skip' leaves such rows out)") from None
        report.skipped.append(message)
        if len(report.skipped) > self.max_errors:
            raise InputError(
                f"{len(report.skipped)} of the first {report.read} rows are corrupt, more than max_errors="
                f"{self.max_errors}; the last is {message}"
            ) from None


def read_rows(source: Any, *, on_error: str = "raise", max_errors: int = MAX_ERRORS) -> Rows:
    """Rows of anything that can be iterated over, read one at a time.

    Args:
        source: a list, a Hugging Face `datasets.Dataset` or `IterableDataset`, any iterable of dicts (or of texts), or
            a function without arguments that returns one, such as a generator function.
        on_error: "raise", or "skip" to leave corrupt rows out.
        max_errors: corrupt rows above which there is an error nevertheless.

    Raises:
        InputError: for an iterator, which could be read only once.
        InputTypeError: for a single text or dict, and what cannot be iterated over.

    >>> rows = read_rows([{"text": "a"}, {"text": "b"}])
    >>> [row["text"] for row in rows]
    ['a', 'b']
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, str | bytes | Mapping):
        raise InputTypeError(
            f"a {type(source).__name__} is not a source of rows: give a list of texts, or read files with read_text, "
            "read_jsonl, read_csv or read_tfrecord"
        )
    if isinstance(source, Iterator):
        raise InputError(
            f"a {type(source).__name__} can be read only once, and training reads several times: give the function "
            "that makes it, or a list"
        )
    if not callable(source) and not hasattr(source, "__iter__"):
        raise InputTypeError(f"a {type(source).__name__} is not a source of rows: nothing to iterate over")

    def read() -> Iterator[Row]:
        values = source() if callable(source) else source
        return (Row(f"row {number}", value) for number, value in enumerate(values))

    # Hugging Face's datasets bear a hash of all that made them.
    fingerprint = getattr(source, "_fingerprint", None)
    return Rows(read, fingerprint if isinstance(fingerprint, str) else None, on_error, max_errors)


def derived_rows(rows: Rows, change: Callable[[Iterable[Row]], Iterable[Row]]) -> Rows:
    """Rows made of others, pass by pass; they reject corrupt rows as those do.

    Args:
        rows: the others.
        change: makes a pass over the new rows of one over the old ones.
    """
    return Rows(lambda: change(rows._read()), None, rows.on_error, rows.max_errors)


def renamed_rows(rows: Rows, names: Mapping[str, str]) -> Rows:
    """Rows with other names for some fields.

    Args:
        rows: dicts.
        names: new names, each with the old one; a row without that is corrupt.
    """
    if all(new == old for new, old in names.items()):
        return rows

    def rename(passed: Iterable[Row]) -> Iterator[Row]:
        for row in passed:
            try:
                fields = row.values if row.error else {new: value_of(row.values, old) for new, old in names.items()}
            except InputError as error:
                yield row._replace(values=None, error=str(error))
            else:
                yield row._replace(values=fields)

    return derived_rows(rows, rename)


def split_rows(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Rows in two parts, drawn at random: the larger one, and one with a share of them, but at least one row.

    Each pass over a part is one over all rows.

    Raises:
        InputError: if there are fewer than two rows, or a row is corrupt.
    """
    count = sum(1 for _ in rows.rows())
    if count < 2:
        raise InputError(f"{count} rows cannot be split into two parts")
    chosen = np.random.default_rng(seed).permutation(count)[: max(1, int(count * share))]
    held_out = np.isin(np.arange(count), chosen)

    def part(wanted: bool) -> Callable[[Iterable[Row]], Iterator[Row]]:
        def select(passed: Iterable[Row]) -> Iterator[Row]:
            number = 0
            for row in passed:
                if row.error is not None:  # counted by neither part, and told by both
                    yield row
                    continue
                if held_out[number] == wanted:
                    yield row
                number += 1

        return select

    return derived_rows(rows, part(False)), derived_rows(rows, part(True))


def text_of(row: Any, field: str) -> str:
    """The text of a row: the row itself, or what stands in one of its fields; bytes are UTF-8.

    Raises:
        InputError: if there is no such text.
    """
    value = value_of(row, field) if isinstance(row, Mapping) else row
    what = f"the field {field!r}" if isinstance(row, Mapping) else "the row"
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{what} is not text in UTF-8: {error}") from None
    if not isinstance(value, str):
        raise InputError(f"{what} is of type {type(value).__name__}, expected a text")
    try:
        check_text(what, value)
    except TokenizerError as error:  # lone surrogates
        raise InputError(str(error)) from None
    return value


def value_of(row: Any, field: str) -> Any:
    """What stands in a field of a row.

    Raises:
        InputError: if the row has no such field.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"the row is of type {type(row).__name__}, expected a dict with the field {field!r}")
    if field not in row:
        raise InputError(f"there is no field {field!r}, only {', '.join(map(repr, row))[:200] or 'an empty row'}")
    return row[field]
