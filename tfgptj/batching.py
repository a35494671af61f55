"""A batch of texts checked, and its rows of token ids made equally long: truncated, padded, turned into arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfgptj.errors import InputError, InputTypeError
from tfgptj.vocabulary import SIDES, check_text

PADDINGS = (False, True, "longest", "max_length")
TENSOR_TYPES = (None, "np", "tf")


def texts_of(text: str | Sequence[str]) -> list[str]:
    """Return the checked texts of a batch, or of a single string."""
    if isinstance(text, str):
        check_text("text", text)
        return [text]
    if not isinstance(text, list | tuple):
        raise InputTypeError(f"text is of type {type(text).__name__}, expected a str or a list of str.")
    if not text:
        raise InputError("text is an empty list, expected at least one str.")
    for index, item in enumerate(text):
        check_text(f"text[{index}]", item)
    return list(text)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise an InputError that lists the choices, unless `value` is one of them."""
    # Compared with types: 1 is not True here.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise InputError(f"{name} is {value!r:.80}, expected one of {', '.join(map(repr, choices))}.")


def check_positive(name: str, value: object) -> None:
    """Raise an InputError unless `value` is None or an integer from 1 on."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
        raise InputError(f"{name} is {value!r:.80}, expected an integer from 1 on.")


def length_in_use(
    truncation: bool, padding: bool | str, max_length: int | None, model_max_length: int | None
) -> int | None:
    """Return the length that truncation and padding aim at, None if neither wants one.

    Raises:
        InputError: if an option is not one of its choices, or a length is missing, invalid, or without effect.
    """
    check_choice("truncation", truncation, (False, True))
    check_choice("padding", padding, PADDINGS)
    check_positive("max_length", max_length)
    check_positive("model_max_length", model_max_length)
    if not truncation and padding != "max_length":
        if max_length is not None:
            raise InputError(
                f"max_length={max_length} needs truncation=True or padding='max_length' to have an effect."
            )
        return None
    length = model_max_length if max_length is None else max_length
    if length is None:
        raise InputError("max_length is needed: this tokenizer has no model_max_length to use instead.")
    return length


def truncate(row: list[int], length: int, side: str) -> list[int]:
    """Return at most `length` ids of a row, the missing ones cut off on `side`."""
    check_choice("truncation_side", side, SIDES)
    return row[:length] if side == "right" else row[max(len(row) - length, 0) :]


def padded_width(rows: list[list[int]], shortest: int, multiple: int | None) -> int:
    """Return the width of all rows after padding: at least `shortest`, and a multiple of `multiple`."""
    check_positive("pad_to_multiple_of", multiple)
    width = max(shortest, *map(len, rows))
    return width + -width % (multiple or 1)


def pad(rows: list[list[int]], width: int, fill: int, side: str) -> tuple[list[list[int]], list[list[int]]]:
    """Return the rows filled up to `width` on `side`, and their masks: 1 for a token, 0 for padding."""
    check_choice("padding_side", side, SIDES)
    ids, masks = [], []
    for row in rows:
        gap = width - len(row)
        before, after = (gap, 0) if side == "left" else (0, gap)
        ids.append([fill] * before + row + [fill] * after)
        masks.append([0] * before + [1] * len(row) + [0] * after)
    return ids, masks


def as_tensors(batch: dict[str, list[list[int]]], tensor_type: str) -> dict[str, Any]:
    """Turn rows of equal length into int32 arrays [B, T] of NumPy ("np") or TensorFlow ("tf").

    Raises:
        InputError: if the rows differ in length.
    """
    lengths = {len(row) for rows in batch.values() for row in rows}
    if len(lengths) > 1:
        raise InputError(
            f"The rows have {min(lengths)} to {max(lengths)} tokens, and an array needs rows of one length. "
            "Pass padding=True, and truncation=True if they may be cut."
        )
    arrays = {name: np.array(rows, dtype=np.int32) for name, rows in batch.items()}
    if tensor_type == "np":
        return arrays
    import tensorflow as tf  # loaded only for those who ask for it

    return {name: tf.constant(array) for name, array in arrays.items()}
