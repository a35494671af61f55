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
        bounds = self._look_up(symbols, words, tf.range(tf.size(symbols)))
        symbols, words, _ = tf.while_loop(
            lambda symbols, words, bounds: tf.reduce_any(bounds[:, 0] < NEVER),
            self._merge_once,
            (symbols, words, bounds),
            shape_invariants=(tf.TensorShape([None]), tf.TensorShape([None]), tf.TensorShape([None, 3])),
            parallel_iterations=1,
        )
        return symbols, words

    def _look_up(self, symbols: tf.Tensor, words: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """Rank and bounds, [P, 3], of the symbols at P places with those behind them, `NEVER` at the end of a word."""
        first, second = tf.gather(symbols, places), tf.gather(after(symbols, 0), places)
        keys = tf.cast(first, tf.int64) * self._base + tf.cast(second, tf.int64)
        row = tf.searchsorted(self._keys, keys)
        within = tf.gather(words == after(words, -1), places)
        found = within & (tf.gather(self._keys, row) == keys)
        return tf.where(found[:, None], tf.gather(self._bounds, row), NEVER)

    def _merge_once(
        self, symbols: tf.Tensor, words: tf.Tensor, bounds: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        merged = _merged_now(bounds)
        symbols = tf.where(merged, tf.gather(self._joined, tf.where(merged, bounds[:, 0], 0)), symbols)
        kept = tf.where(~before(merged, False))[:, 0]
        symbols, words, merged, bounds = (tf.gather(values, kept) for values in (symbols, words, merged, bounds))
        # Only pairs with a new symbol are looked up again, so that a merge costs the same in a text of any length.
        changed = tf.where(merged | after(merged, False))
        found = self._look_up(symbols, words, changed[:, 0])
        return symbols, words, tf.tensor_scatter_nd_update(bounds, changed, found)


def _merged_now(bounds: tf.Tensor) -> tf.Tensor:
    """Whether a symbol is merged with the next one in this round, [N]."""
    rank, left_bound, right_bound = tf.unstack(bounds, axis=1)
    # Pairs that overlap and have the same rank, "aa" in "aaa", are taken from the left, every second one.
    run_starts = rank != before(rank, -1)
    start = tf.gather(tf.where(run_starts)[:, 0], tf.cumsum(tf.cast(run_starts, tf.int32)) - 1)
    in_turn = (tf.range(tf.size(rank, tf.int64)) - start) % 2 == 0
    # Of equal ranks the left one is first, so what may still come to be at the left must not even be equal.
    free = (tf.gather(before(left_bound, NEVER), start) > rank) & (after(right_bound, NEVER) >= rank)
    # Where nothing can be merged across a gap with what is at it now, the lowest rank at each side is free, too.
    apart = (left_bound == NEVER) & (right_bound == NEVER)
    part = tf.cumsum(tf.cast(before(apart, False), tf.int32))
    lowest = tf.gather(tf.math.segment_min(rank, part), part) == rank
    return (rank < NEVER) & in_turn & (free | lowest)
