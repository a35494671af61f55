"""What a served graph is asked, checked within it: there is no Python before it, and nobody else to say no."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfgptj.config import GPTJConfig
from tfgptj.limits import MAX_SERVED_ROWS, MAX_SERVED_TOKENS

Rows = tuple[Any, Any]  # token ids int32 [B, T], filled up on the right; and how many each row has, int32 [B]


def texts(name: str) -> tf.TensorSpec:
    """Texts of a request, string [B]."""
    return tf.TensorSpec([None], tf.string, name)


def numbers(name: str, dtype: str) -> tf.TensorSpec:
    """One number for each row, [B]."""
    return tf.TensorSpec([None], dtype, name)


def id_rows() -> tuple[tf.TensorSpec, tf.TensorSpec]:
    """Token ids int32 [B, T], and how many of each row count, int32 [B].

    Lengths, and not a mask: servers that merge requests of different lengths fill rows up with their first element.
    """
    return tf.TensorSpec([None, None], "int32", "token_ids"), numbers("lengths", "int32")


@dataclass(frozen=True)
class Caps:
    """What a request may ask for.

    Args:
        config: of the model.
        rows: how many at once (B).
        tokens: rows times the slots of each.
    """

    config: GPTJConfig
    rows: int = MAX_SERVED_ROWS
    tokens: int = MAX_SERVED_TOKENS

    def check_texts(self, name: str, given: Any, longest_token: int) -> Any:
        """Texts, string [B]: none is certain to have too many tokens, for longer ones are not even cut into tokens."""
        given = tf.ensure_shape(given, [None])
        most = self.config.n_positions * longest_token
        with tf.control_dependencies(self._row_count(given)):
            sizes = tf.strings.length(given)
        message = (
            f"{name}: a text of more than {most:,} bytes has more than n_positions={self.config.n_positions} tokens"
        )
        given = checked(given, lambda: [tf.debugging.assert_less_equal(sizes, most, message)])
        replaced = tf.strings.unicode_transcode(given, "UTF-8", "UTF-8")
        sound = tf.reduce_all(given == replaced)
        return checked(given, lambda: [tf.debugging.assert_equal(sound, True, f"{name}: a text is not valid UTF-8")])

    def check_rows(self, ids: Any, lengths: Any, new: Any = 0, what: str = "token_ids", beams: int = 1) -> Rows:
        """Token ids and their lengths.

        Args:
            ids: int32 [B, T].
            lengths: int32 [B].
            new: int32 [B], tokens that will be added.
            what: the rows' name in messages.
            beams: how many texts are written at once for each row.

        Returns:
            The ids without columns that no row needs, 0 where there is no token; and the lengths.
        """
        ids, lengths = tf.ensure_shape(ids, [None, None]), tf.ensure_shape(lengths, [None])
        with tf.control_dependencies(self._row_count(ids)):
            same = tf.debugging.assert_equal(
                tf.shape(lengths)[0], tf.shape(ids)[0], f"{what}: lengths are of other rows"
            )
        with tf.control_dependencies([same]):
            lengths = checked(lengths, lambda: self._lengths(ids, lengths, new, what, beams))
        width = tf.reduce_max(lengths)
        ids = ids[:, :width]
        ids = tf.where(tf.range(width)[None] < lengths[:, None], ids, 0)
        vocabulary = self.config.vocab_size
        ids = checked(
            ids,
            lambda: [
                tf.debugging.assert_non_negative(ids, f"{what}: there is no token below 0"),
                tf.debugging.assert_less(ids, vocabulary, f"{what}: the model has the tokens 0…{vocabulary - 1:,}"),
            ],
        )
        return ids, lengths

    def _row_count(self, rows: Any) -> list[Any]:
        count = tf.shape(rows)[0]
        return [
            tf.debugging.assert_positive(count, "the request has no rows"),
            tf.debugging.assert_less_equal(count, self.rows, f"a request has at most {self.rows:,} rows"),
        ]

    def _lengths(self, ids: Any, lengths: Any, new: Any, what: str, beams: int) -> list[Any]:
        limit, width = self.config.n_positions, tf.shape(ids)[1]
        # In 64 bits, where nothing overflows.
        rows, longest, most = (
            tf.cast(x, "int64") for x in (tf.shape(ids)[0], tf.reduce_max(lengths), tf.reduce_max(new))
        )
        total = rows * (longest + beams * most)
        return [
            tf.debugging.assert_positive(lengths, f"{what}: each row needs at least one token"),
            tf.debugging.assert_less_equal(lengths, width, f"{what}: a length is more than the columns that there are"),
            tf.debugging.assert_less_equal(
                tf.cast(lengths, "int64") + tf.cast(new, "int64"),
                tf.constant(limit, "int64"),
                f"{what}: a row and the tokens to add to it are more than n_positions={limit:,}",
            ),
            tf.debugging.assert_less_equal(
                total,
                tf.constant(self.tokens, "int64"),
                f"{what}: rows times tokens, the longest row's and what is added to it, are more than {self.tokens:,}",
            ),
        ]


def checked(tensor: Any, assertions: Callable[[], list[Any]]) -> Any:
    """A tensor that nothing reads before it was found to be right."""
    with tf.control_dependencies(assertions()):
        return tf.identity(tensor)


def of_each_row(name: str, values: Any, rows: Any) -> Any:
    """One number [B] for each of some rows."""
    values = tf.ensure_shape(values, [None])
    message = f"{name}: there must be one for each row"
    return checked(values, lambda: [tf.debugging.assert_equal(tf.shape(values)[0], tf.shape(rows)[0], message)])


def within(name: str, values: Any, low: float, high: float) -> Any:
    """Numbers that are in a range, which NaN is not."""
    inside = tf.reduce_all((values >= low) & (values <= high))
    assertion = tf.debugging.Assert(inside, [f"{name} must be between {low:,} and {high:,}, got", values], summarize=8)
    return checked(values, lambda: [assertion])


def aligned_right(ids: Any, lengths: Any) -> tuple[Any, Any]:
    """Rows [B, T] moved to the right end, and where they have tokens, bool [B, T]."""
    width = tf.shape(ids)[1]
    columns = tf.range(width)[None] - (width - lengths[:, None])  # [B, T]
    return tf.gather(ids, tf.maximum(columns, 0), batch_dims=1), columns >= 0
