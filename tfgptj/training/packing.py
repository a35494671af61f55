"""Token streams as blocks without padding, and any items in random order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from tfgptj.losses import IGNORE_INDEX
from tfgptj.training.tokens import Tokens

Item = TypeVar("Item")


class Block(NamedTuple):
    """One row of a batch: ids int32 [T], and the numbers of the documents that they are from, int64 [T].

    Padding has the document -1.
    """

    ids: np.ndarray
    documents: np.ndarray


def block_at(tokens: Tokens, index: int, block_size: int) -> Block:
    """The block with a number; what the end of the stream leaves of it is padding."""
    positions = np.arange(index * block_size, min((index + 1) * block_size, len(tokens.ids)))
    ids, documents = np.zeros(block_size, "int32"), np.full(block_size, -1)
    ids[: len(positions)] = tokens.ids[positions[0] : positions[-1] + 1]
    documents[: len(positions)] = tokens.documents(positions)
    return Block(ids, documents)


def blocks_of(stream: Iterable[Tokens], block_size: int, drop_remainder: bool) -> Iterator[Block]:
    """Cut a stream into blocks as it comes.

    Args:
        stream: parts of a token stream, whose `ends` count from its beginning.
        block_size: tokens of a block (T).
        drop_remainder: whether to leave out the last block if it is not full; it is padded otherwise.
    """
    rest, start = Tokens(np.zeros(0, "int32"), np.zeros(0, "int64")), 0  # not given yet, and where that begins
    done = 0  # documents that ended before it
    for part in stream:
        rest = Tokens(np.concatenate([rest.ids, part.ids]), np.concatenate([rest.ends, part.ends - start]))
        full = len(rest.ids) // block_size
        for index in range(full):
            block = block_at(rest, index, block_size)
            yield Block(block.ids, block.documents + done)
        used = full * block_size
        ended = int(np.searchsorted(rest.ends, used, "right"))
        rest = Tokens(rest.ids[used:], rest.ends[ended:] - used)
        start, done = start + used, done + ended
    if len(rest.ids) and not drop_remainder:
        block = block_at(rest, 0, block_size)
        yield Block(block.ids, np.where(block.documents < 0, -1, block.documents + done))


def model_batch(
    blocks: list[Block], block_size: int, batch_size: int, separate: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Blocks as the inputs and labels of a model.

    Args:
        blocks: at most `batch_size`; missing ones are padding.
        block_size, batch_size: T and B.
        separate: whether documents are kept apart: with `segment_ids`, 1, 2, … in each row, and no label on the first
            token of a document, which would be predicted from another document.

    Returns:
        A dict of `input_ids` and perhaps `segment_ids`, and the labels, -100 where none counts; int32 [B, T] each.
    """
    missing = Block(np.zeros(block_size, "int32"), np.full(block_size, -1))
    blocks = blocks + [missing] * (batch_size - len(blocks))
    ids, documents = np.stack([block.ids for block in blocks]), np.stack([block.documents for block in blocks])
    labels = np.where(documents < 0, IGNORE_INDEX, ids).astype("int32")
    if not separate:
        return {"input_ids": ids}, labels
    # Every change begins a segment: to the next document, or to padding.
    changes = np.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)))  # [B, T]
    segments = 1 + np.cumsum(changes, axis=1)
    return {"input_ids": ids, "segment_ids": segments.astype("int32")}, np.where(changes, IGNORE_INDEX, labels)


def shuffled(items: Iterable[Item], buffer_size: int, random: np.random.Generator) -> Iterator[Item]:
    """Items in random order, as far as a buffer of so many of them reaches."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        place = int(random.integers(buffer_size))
        yield buffer[place]
        buffer[place] = item
    for place in random.permutation(len(buffer)).tolist():
        yield buffer[place]


def shares(
    items: Iterable[Item], batch_size: int, shard: tuple[int, int], drop_remainder: bool
) -> Iterator[list[Item]]:
    """The batches of one worker, of items that all workers go through.

    Args:
        items: all items, the same ones for every worker.
        batch_size: items of a batch.
        shard: index of the worker, and the number of workers.
        drop_remainder: whether to leave out the items at the end that do not fill a batch for every worker; otherwise
            the last batches of the workers may be smaller, or empty.
    """
    index, workers = shard
    step: list[Item] = []
    for item in items:
        step.append(item)
        if len(step) == batch_size * workers:
            yield step[index * batch_size : (index + 1) * batch_size]
            step = []
    if step and not drop_remainder:
        yield step[index * batch_size : (index + 1) * batch_size]


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of so many items; the last may have fewer."""
    return shares(items, size, (0, 1), drop_remainder=False)
