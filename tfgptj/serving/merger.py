"""The merges of byte-level BPE by TensorFlow's operators, in all words of a batch at once."""

from __future__ import annotations

import tensorflow as tf

from tfgptj.serving.merge_table import NEVER, MergeTable
from tfgptj.serving.word_splitter import after, before


class Merger(tf.Module):
    """Merges as the `tokenizers` library does, but in each round all pairs whose turn cannot be taken from them."""

    def __init__(self, table: MergeTable) -> None:
        super().__init__(name="merger")
        self._base = table.base
        self._keys, self._bounds = tf.constant(table.keys), tf.constant(table.bounds)
        self._joined = tf.constant(table.joined)

    def merge(self, symbols: tf.Tensor, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Merge until nothing is left to merge.

        Args:
            symbols: int32 [N], tokens of single bytes, and others that stand alone in their words.
            words: int32 [N], ascending, the word of each.

        Returns:
            The tokens that remain, and the word of each.
        """
        symbols, words, _ = tf.while_loop(
            lambda symbols, words, bounds: tf.reduce_any(bounds[:, 0] < NEVER),
            self._merge_once,
            (symbols, words, self._look_up(symbols, words)),
            shape_invariants=(tf.TensorShape([None]), tf.TensorShape([None]), tf.TensorShape([None, 3])),
            parallel_iterations=1,
        )
        return symbols, words

    def _look_up(self, symbols: tf.Tensor, words: tf.Tensor) -> tf.Tensor:
        """Rank and bounds, [N, 3], of each symbol with the next one, `NEVER` at the end of a word."""
        first, second = tf.cast(symbols, tf.int64), tf.cast(after(symbols, 0), tf.int64)
        keys = first * self._base + second
        place = tf.searchsorted(self._keys, keys)
        found = (words == after(words, -1)) & (tf.gather(self._keys, place) == keys)
        return tf.where(found[:, None], tf.gather(self._bounds, place), NEVER)

    def _merge_once(
        self, symbols: tf.Tensor, words: tf.Tensor, bounds: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        rank, left_bound, right_bound = tf.unstack(bounds, axis=1)
        # Pairs that overlap and have the same rank, "aa" in "aaa", are taken from the left, every second one.
        run_starts = rank != before(rank, -1)
        places = tf.range(tf.size(rank))
        start = tf.gather(tf.boolean_mask(places, run_starts), tf.cumsum(tf.cast(run_starts, tf.int32)) - 1)
        in_turn = (places - start) % 2 == 0
        # Of equal ranks the left one is first, so what may still come to be at the left must not even be equal.
        free = (tf.gather(before(left_bound, NEVER), start) > rank) & (after(right_bound, NEVER) >= rank)
        lowest = tf.gather(tf.math.segment_min(rank, words), words) == rank
        merged = (rank < NEVER) & in_turn & (free | lowest)

        symbols = tf.where(merged, tf.gather(self._joined, tf.where(merged, rank, 0)), symbols)
        kept = ~before(merged, False)
        symbols, words = tf.boolean_mask(symbols, kept), tf.boolean_mask(words, kept)
        return symbols, words, self._look_up(symbols, words)
