"""Added tokens, such as the end of a text, found by TensorFlow's operators before a text is cut into words."""

from __future__ import annotations

import re
from typing import NamedTuple

import tensorflow as tf
from tokenizers import AddedToken

from tfgptj.errors import TokenizerError

CPU = "/device:CPU:0"  # strings are nowhere else
PLAIN = -1  # stands for the token of a piece that is not an added token
MARK = b"\xff"  # a byte that no UTF-8 text has
HASHES = 2**62  # enough that the hashes of the tokens differ


class Pieces(NamedTuple):
    """P pieces of the texts of a batch, in their order.

    Attributes:
        texts: string [P].
        tokens: int32 [P], the id of the added token that a piece is, or `PLAIN`.
        rows: int64 [P], the text that it comes from.
    """

    texts: tf.Tensor
    tokens: tf.Tensor
    rows: tf.Tensor


class AddedTokens(tf.Module):
    """The added tokens of a vocabulary; the longest at the leftmost place counts, as in the `tokenizers` library.

    Raises:
        TokenizerError: if a token takes in the spaces beside it or must be a word of its own, or if there are too many.
    """

    def __init__(self, added: dict[int, AddedToken]) -> None:
        super().__init__(name="added_tokens")
        self._patterns = []
        # The library looks for those that a normalizer would leave alone before it looks for the others.
        for normalized in (False, True):
            contents = [token.content for token in added.values() if token.normalized == normalized]
            if contents:
                # The first alternative that fits counts.
                self._patterns.append("|".join(map(re.escape, sorted(contents, key=len, reverse=True))))
        for token in added.values():
            flags = [name for name in ("lstrip", "rstrip", "single_word") if getattr(token, name)]
            if flags:
                raise TokenizerError(
                    f"The added token {token.content!r:.80} has the flag {flags[0]}, which a graph cannot obey. "
                    "Clear it in the tokenizer's files, if the model was not trained with it."
                )
        for pattern in self._patterns:
            _check_pattern(pattern, len(added))
        ids = sorted(added)
        with tf.device(CPU):
            hashes = _hashed(tf.constant([added[token_id].content for token_id in ids], tf.string))
            order = tf.argsort(hashes)
            self._hashes, self._ids = tf.gather(hashes, order), tf.gather(tf.constant(ids, tf.int32), order)

    def cut(self, texts: tf.Tensor) -> Pieces:
        """Cut texts, string [B] of valid UTF-8, before and behind every added token."""
        pieces = Pieces(texts, tf.fill(tf.shape(texts), PLAIN), tf.range(tf.size(texts, tf.int64)))
        for pattern in self._patterns:
            marked = tf.strings.regex_replace(pieces.texts, pattern, MARK + rb"\0" + MARK)
            parts = tf.strings.split(tf.where(pieces.tokens == PLAIN, marked, pieces.texts), MARK)
            parent = parts.value_rowids()
            place = tf.range(tf.size(parent, tf.int64)) - tf.gather(parts.row_starts(), parent)
            tokens = tf.where(place % 2 == 1, self._ids_of(parts.values), tf.gather(pieces.tokens, parent))
            pieces = Pieces(parts.values, tokens, tf.gather(pieces.rows, parent))
        return pieces

    def _ids_of(self, texts: tf.Tensor) -> tf.Tensor:
        """The ids of texts that are added tokens; anything for other texts."""
        place = tf.searchsorted(self._hashes, _hashed(texts))
        return tf.gather(self._ids, tf.minimum(place, tf.size(self._ids) - 1))


def _hashed(texts: tf.Tensor) -> tf.Tensor:
    return tf.strings.to_hash_bucket_fast(texts, HASHES)


def _check_pattern(pattern: str, count: int) -> None:
    try:
        with tf.init_scope():
            tf.strings.regex_replace([""], pattern, "")
    except tf.errors.InvalidArgumentError as error:
        raise TokenizerError(f"The {count} added tokens are too many or too long for a graph: {error}") from error
