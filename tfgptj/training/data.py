"""Text as tf.data: blocks of token ids for `fit`, windows for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from tfgptj.errors import InputError
from tfgptj.losses import IGNORE_INDEX


def block_dataset(
    epoch_ids: Callable[[int], np.ndarray], *, block_size: int, batch_size: int, epochs: int, seed: int = 0
) -> tf.data.Dataset:
    """Blocks of a token stream in random order, their borders elsewhere in every epoch.

    Args:
        epoch_ids: gives the token stream, int [n], of epoch 0, 1, …; it may differ between epochs.
        block_size: tokens of one block (T).
        batch_size: blocks of one batch (B); an incomplete last batch of an epoch is left out.
        epochs: passes over the stream.
        seed: of borders and order.

    Returns:
        A dataset of `(input_ids, labels)`, int32 [B, T] each and equal: the causal loss shifts by itself.

    Raises:
        InputError: if the stream is shorter than one batch.
    """

    def blocks() -> Iterator[np.ndarray]:
        for epoch in range(epochs):
            random = np.random.default_rng((seed, epoch))
            ids = np.asarray(epoch_ids(epoch), "int32")
            if len(ids) < block_size * (batch_size + 1):
                raise InputError(f"{len(ids)} tokens are fewer than one batch of {batch_size} blocks of {block_size}")
            ids = ids[random.integers(block_size) :]
            rows = ids[: len(ids) // block_size * block_size].reshape(-1, block_size)  # [n / T, T]
            rows = rows[random.permutation(len(rows))][: len(rows) // batch_size * batch_size]
            yield from rows.reshape(-1, batch_size, block_size)

    signature = tf.TensorSpec((batch_size, block_size), tf.int32)
    dataset = tf.data.Dataset.from_generator(blocks, output_signature=signature)
    return dataset.map(lambda ids: (ids, ids)).prefetch(4)


def evaluation_windows(ids: np.ndarray, *, window: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping windows in which every token but the first is scored once, with at least window - stride before it.

    Args:
        ids: int [n], the whole text.
        window: tokens of one window (T).
        stride: tokens by which windows advance, and that each but the first scores.

    Returns:
        `(input_ids, labels)`, int32 [W, T] each. Labels are -100 where a token was scored before, and in the padding
        at the right end of the last window.
    """
    starts = range(0, max(len(ids) - window, 0) + stride, stride)
    inputs = np.zeros((len(starts), window), "int32")
    labels = np.full((len(starts), window), IGNORE_INDEX, "int32")
    scored = 0
    for row, start in enumerate(starts):
        piece = ids[start : start + window]
        inputs[row, : len(piece)] = piece
        labels[row, scored - start : len(piece)] = piece[scored - start :]
        scored = start + len(piece)
    return inputs, labels
