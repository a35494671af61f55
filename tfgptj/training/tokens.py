"""Documents as one stream of token ids, made a few at a time, and kept on disk."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfgptj.errors import InputError
from tfgptj.files import json_bytes, parse_json, staging_directory, sync_directory
from tfgptj.tokenizer import GPTJTokenizer
from tfgptj.training.readers import PIECE
from tfgptj.training.rows import Rows, text_of

# Texts are handed to the tokenizer in batches, whose members it works on in parallel.
BATCH_TEXTS, BATCH_CHARACTERS = 1024, 16 * PIECE

# In front of white space that follows something else, GPT-2's pattern begins a word; and it looks back at nothing.
_SAFE_CUT = re.compile(r"(?<=\S)(?=[ \n])")

_VERSION = 1  # of what is kept on disk


class Tokens(NamedTuple):
    """A token stream, or a part of one.

    Attributes:
        ids: int [n].
        ends: int64 [documents], where in the stream documents end: behind their eos.
    """

    ids: np.ndarray
    ends: np.ndarray

    def documents(self, positions: np.ndarray) -> np.ndarray:
        """The numbers of the documents that tokens belong to, as int64 of the positions' shape."""
        return np.searchsorted(self.ends, positions, "right")


def token_stream(rows: Rows, tokenizer: GPTJTokenizer, field: str) -> Iterator[Tokens]:
    """Tokenise documents, at most BATCH_TEXTS of them or about BATCH_CHARACTERS ahead of what was asked for.

    Args:
        rows: documents.
        tokenizer: with an eos token.
        field: the field of a row that holds its text.

    Returns:
        An iterator over parts of the stream; `ends` count from the beginning of the stream. Each document ends with
        eos; empty ones are left out.

    Raises:
        InputError: for a corrupt row, or a tokenizer without eos.
    """
    bos, eos = tokenizer.encode(""), [eos_of(tokenizer)]
    position = 0
    for batch in _batches(_pieces(rows, field, _cuts_safely(tokenizer))):
        encoded = tokenizer([piece.text for piece in batch], add_special_tokens=False)["input_ids"]
        parts, ends = [], []
        for piece, ids in zip(batch, encoded, strict=True):
            ids = (bos if piece.begins else []) + ids + (eos if piece.ends else [])
            parts.append(np.asarray(ids, "int32"))
            position += len(ids)
            if piece.ends:
                ends.append(position)
        yield Tokens(np.concatenate(parts), np.asarray(ends, "int64"))


def eos_of(tokenizer: GPTJTokenizer) -> int:
    """The id that marks where documents end.

    Raises:
        InputError: if there is none.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos_token, which marks where documents end: set tokenizer.eos_token")
    return tokenizer.eos_token_id


class _Piece(NamedTuple):
    """A part of a document that is tokenised by itself."""

    text: str
    begins: bool
    ends: bool


def _pieces(rows: Rows, field: str, cut: bool) -> Iterator[_Piece]:
    """Documents in pieces of about PIECE characters, cut where that changes no token."""
    held, begins = "", True
    for row in rows.rows(lambda values: text_of(values, field)):
        held += row.values
        start = 0
        while cut and (match := _SAFE_CUT.search(held, start + PIECE)):
            yield _Piece(held[start : match.start()], begins, False)
            start, begins = match.start(), False
        held = held[start:]
        if row.ends:
            if held or not begins:
                yield _Piece(held, begins, True)
            held, begins = "", True


def _cuts_safely(tokenizer: GPTJTokenizer) -> bool:
    """Whether no token, and no setting, of a tokenizer reaches across the white space at which texts are cut."""
    added = tokenizer._vocabulary.added.values()
    inner = any(_SAFE_CUT.search(token.content) for token in added)
    return (
        not inner and not any(token.rstrip for token in added) and not tokenizer._vocabulary.settings.add_prefix_space
    )


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if len(batch) == BATCH_TEXTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def kept_tokens(
    rows: Rows, tokenizer: GPTJTokenizer, field: str, cache_dir: str | os.PathLike[str], cache_key: str | None = None
) -> Tokens:
    """The token stream of documents on disk, made there unless it is there already.

    What is kept bears the fingerprint of rows, tokenizer and settings, so that what was made of others is never used.

    Args:
        rows, tokenizer, field: as for `token_stream`.
        cache_dir: directory for token streams, made if needed.
        cache_key: names the rows' state, for rows that have no fingerprint.

    Returns:
        Tokens in memory-mapped files.

    Raises:
        InputError: as `token_stream`; if there is no token at all, if rows have no fingerprint and there is no
            `cache_key`, and if the files are damaged.
        OSError: if the files cannot be written.
    """
    if cache_key is None and rows.fingerprint is None:
        raise InputError(
            "cache_dir needs cache_key for these documents, a name that changes when they do: they have no "
            "fingerprint of their own"
        )
    state = rows.fingerprint if cache_key is None else cache_key
    facts = (_VERSION, state, field, rows.on_error, rows.max_errors, tokenizer.eos_token_id, tokenizer.encode(""))
    backend = tokenizer._backend.to_str()
    fingerprint = hashlib.sha256(f"{facts} {backend}".encode()).hexdigest()
    place = Path(cache_dir) / fingerprint[:32]
    if not place.exists():
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        with staging_directory(Path(cache_dir)) as staging:
            _write(staging, token_stream(rows, tokenizer, field), rows, "<u2" if len(tokenizer) <= 2**16 else "<i4")
            try:
                staging.rename(place)
            except OSError:  # another worker was faster
                if not place.exists():
                    raise
            sync_directory(Path(cache_dir))
    return _kept(place)


def _write(directory: Path, stream: Iterator[Tokens], rows: Rows, dtype: str) -> None:
    tokens = documents = 0
    with open(directory / "tokens.bin", "xb") as ids_file, open(directory / "ends.bin", "xb") as ends_file:
        for part in stream:
            part.ids.astype(dtype).tofile(ids_file)
            part.ends.astype("<i8").tofile(ends_file)
            tokens, documents = tokens + len(part.ids), documents + len(part.ends)
        for file in (ids_file, ends_file):
            file.flush()
            os.fsync(file.fileno())
    if not tokens:
        raise InputError("there is not one document with a text")
    facts = {"dtype": dtype, "tokens": tokens, "documents": documents, "skipped": rows.report.skipped}
    with open(directory / "tokens.json", "xb") as file:
        file.write(json_bytes(facts))
        file.flush()
        os.fsync(file.fileno())


def _kept(place: Path) -> Tokens:
    try:
        facts = parse_json((place / "tokens.json").read_bytes())
        shapes = {"tokens.bin": (facts["dtype"], facts["tokens"]), "ends.bin": ("<i8", facts["documents"])}
        for name, (dtype, size) in shapes.items():
            if (place / name).stat().st_size != np.dtype(dtype).itemsize * size:
                raise ValueError(f"{name} is not of the size that was written")
        ids, ends = (np.memmap(place / name, dtype, "r", shape=(size,)) for name, (dtype, size) in shapes.items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{place}: the kept tokens are damaged ({error}); delete the directory") from error
    return Tokens(ids, ends)
