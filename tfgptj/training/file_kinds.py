"""Files as rows, by what their names end in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tfgptj.errors import InputError
from tfgptj.training.readers import files_of, read_csv, read_jsonl, read_squad, read_text
from tfgptj.training.rows import Rows
from tfgptj.training.settings import ANSWERING, GENERATION

KINDS = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".tfrecord": "TFRecord",
    ".tfrecords": "TFRecord",
}
TEXT = "text"


def kind_of(paths: Sequence[str], task: str) -> str:
    """The one kind that all files are of; without any of the known endings that is text.

    Raises:
        InputError: if a file is missing, there are several kinds, or the kind has no rows for the task.
    """
    kinds = {KINDS.get(_suffix(path), TEXT): path for path in files_of(paths)}
    if len(kinds) > 1:
        raise InputError(f"{' and '.join(map(str, kinds.values()))} are of different kinds: {' and '.join(kinds)}")
    (kind, path), *_ = kinds.items()
    known = ("JSON", "JSON lines") if task == ANSWERING else tuple(KINDS.values())
    if kind not in known and (kind, task) != (TEXT, GENERATION):
        raise InputError(f"{path}: is {kind} by its name, and {task} needs {', '.join(dict.fromkeys(known))}")
    return kind


def read_files(paths: Sequence[str], task: str) -> Rows:
    """Rows of files for a task: with `.json` SQuAD's questions for question answering, and JSON lines otherwise.

    Raises:
        InputError: as :func:`kind_of`; while iterating, for a corrupt row.
    """
    readers: dict[str, Callable[[Any], Rows]] = {
        TEXT: read_text,
        "JSON lines": read_jsonl,
        "JSON": read_squad if task == ANSWERING else read_jsonl,
        "CSV": read_csv,
        "TSV": partial(read_csv, delimiter="\t"),
    }
    kind = kind_of(paths, task)
    if kind == "TFRecord":
        from tfgptj.training.tfrecord import read_tfrecord  # which alone needs TensorFlow

        return read_tfrecord(paths)
    return readers[kind](paths)


def _suffix(path: Path) -> str:
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()
