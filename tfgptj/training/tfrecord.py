"""TFRecord files of `tf.train.Example` as rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfgptj.errors import InputError
from tfgptj.training.readers import Paths, file_rows
from tfgptj.training.rows import MAX_ERRORS, Row, Rows


def read_tfrecord(paths: Paths, *, on_error: str = "raise", max_errors: int = MAX_ERRORS) -> Rows:
    """TFRecord files whose records are `tf.train.Example`.

    Args:
        paths: a file, a pattern such as "corpus/*.tfrecord", or a list of these; .gz is decompressed.
        on_error: "raise", or "skip" to leave corrupt records out: those that are no Example, and with a record whose
            checksum is wrong all that follow it in its file, as nobody knows where they begin.
        max_errors: corrupt records above which there is an error nevertheless.

    Returns:
        Rows as dicts from the features' names to their values: bytes, int or float, or a list where there is not
        exactly one.

    Raises:
        InputError: if there is no such file; while iterating, for a corrupt record.
    """
    return file_rows(_records, paths, "tfrecord", on_error, max_errors)


def _records(path: Path) -> Iterator[Row]:
    records = iter(tf.data.TFRecordDataset(str(path), "GZIP" if path.suffix == ".gz" else ""))
    number = 0
    while True:
        place = f"{path}, record {number}"
        try:
            record = next(records).numpy()
        except StopIteration:
            return
        except tf.errors.OpError as error:
            reason = error.message.split("}} ")[-1].split(" [Op:")[0]  # without the graph's names around it
            yield Row(place, error=f"is damaged, and so is all that follows: {reason}")
            return
        try:
            yield Row(place, _features(record))
        except InputError as error:
            yield Row(place, error=str(error))
        number += 1


def _features(record: bytes) -> dict[str, Any]:
    try:
        example = tf.train.Example.FromString(record)
    except Exception as error:  # DecodeError of protobuf, which is TensorFlow's dependency and not ours
        raise InputError(f"is not a tf.train.Example: {error}") from None
    return {name: _value(feature) for name, feature in example.features.feature.items()}


def _value(feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    return values[0] if len(values) == 1 else values
