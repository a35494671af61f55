r"""GPT-2's cutting of a text into words, without its regular expression, by TensorFlow's operators.

The expression, `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`, looks ahead, which
TensorFlow's cannot, and knows the letters of another version of Unicode. It comes to this: a word begins wherever the
kind of character changes; but of the white space in front of a word the last character begins a word, and if that is
a space the word goes on with what follows; and contractions are words of their own.
"""

from __future__ import annotations

import tensorflow as tf

from tfgptj.serving.character_classes import OTHER, SPACE, character_classes

NOTHING = -1  # stands for the kind of character beyond either end
SHORT_ENDINGS = "stmd"  # behind an apostrophe
LONG_ENDINGS = (("r", "e"), ("v", "e"), ("l", "l"))


class WordSplitter(tf.Module):
    """Cuts bytes of UTF-8 into the words within which BPE merges."""

    def __init__(self) -> None:
        super().__init__(name="word_splitter")
        classes = character_classes()
        self._first, self._kind = tf.constant(classes.first), tf.constant(classes.kind)

    def split(self, data: tf.Tensor, piece: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Find the words.

        Args:
            data: uint8 [N], the UTF-8 of all pieces, one behind the other.
            piece: int32 [N], the piece that a byte belongs to; words end where a piece ends.

        Returns:
            int32 [N], the number of the word that a byte belongs to, and int64 [W], the byte with which each begins.
        """
        leads = (data & 0xC0) != 0x80
        places = tf.where(leads)[:, 0]  # [C], where the characters are
        starts = self._starts(_characters(data, places), tf.gather(piece, places))
        characters = tf.cumsum(tf.cast(leads, tf.int32)) - 1
        words = tf.cumsum(tf.cast(starts, tf.int32)) - 1
        return tf.gather(words, characters), tf.boolean_mask(places, starts)

    def _starts(self, chars: tf.Tensor, piece: tf.Tensor) -> tf.Tensor:
        """Whether a word begins with a character, [C]; from code points and the pieces that they belong to."""
        kind = tf.gather(self._kind, tf.searchsorted(self._first, chars, side="right") - 1)
        opens, closes = piece != before(piece, -1), piece != after(piece, -1)
        previous = tf.where(opens, NOTHING, before(kind, NOTHING))
        following = tf.where(closes, NOTHING, after(kind, NOTHING))
        joins = (previous == SPACE) & (before(chars, 0) == ord(" "))  # with the space in front of it
        is_space = kind == SPACE
        last_space = is_space & (following != SPACE) & (following != NOTHING)
        starts = tf.where(is_space, (previous != SPACE) | last_space, (kind != previous) & ~joins)

        next_char = tf.where(closes, 0, after(chars, 0))
        next_but_one = tf.where(closes, 0, after(next_char, 0))
        apostrophe = (chars == ord("'")) & (previous != OTHER) & ~joins
        short = apostrophe & _is_one_of(next_char, SHORT_ENDINGS)
        long = apostrophe & tf.reduce_any(
            [(next_char == ord(first)) & (next_but_one == ord(second)) for first, second in LONG_ENDINGS], axis=0
        )
        ends = before(before(short | before(long, False), False), False)
        return (starts & ~before(short | long, False)) | ends


def before(values: tf.Tensor, fill: object) -> tf.Tensor:
    """Each value's predecessor in a vector, `fill` for the first."""
    return tf.concat([tf.constant([fill], values.dtype), values], axis=0)[:-1]


def after(values: tf.Tensor, fill: object) -> tf.Tensor:
    """Each value's successor in a vector, `fill` for the last."""
    return tf.concat([values, tf.constant([fill], values.dtype)], axis=0)[1:]


def _characters(data: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Code points, int32 [C], of the characters that begin at `places`."""
    padded = tf.cast(tf.pad(data, [[0, 3]]), tf.int32)
    first, second, third, fourth = (tf.gather(padded, places + i) & (0xFF if i == 0 else 0x3F) for i in range(4))
    two = (first & 0x1F) * 2**6 + second
    three = (first & 0x0F) * 2**12 + second * 2**6 + third
    four = (first & 0x07) * 2**18 + second * 2**12 + third * 2**6 + fourth
    longer = tf.where(first < 0xE0, two, tf.where(first < 0xF0, three, four))
    return tf.where(first < 0x80, first, longer)


def _is_one_of(chars: tf.Tensor, letters: str) -> tf.Tensor:
    return tf.reduce_any([chars == ord(letter) for letter in letters], axis=0)
