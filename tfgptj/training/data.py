"""Text as tf.data: blocks of token ids for `fit`, windows for evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from tfgptj.batching import check_positive
from tfgptj.errors import InputError
from tfgptj.losses import IGNORE_INDEX
from tfgptj.tokenizer import GPTJTokenizer
from tfgptj.training.packing import block_at, blocks_of, model_batch, shares, shuffled
from tfgptj.training.rows import read_rows
from tfgptj.training.tokens import Tokens, eos_of, kept_tokens, token_stream

Dataset: TypeAlias = tf.data.Dataset

SHUFFLE_BUFFER = 4096  # blocks or examples
INFINITE = -1  # tf.data's cardinality of what does not end


def language_modeling_dataset(
    documents: Any,
    tokenizer: GPTJTokenizer,
    *,
    block_size: int,
    batch_size: int,
    field: str = "text",
    separate_documents: bool = False,
    shuffle: bool = True,
    shuffle_buffer: int = SHUFFLE_BUFFER,
    seed: int = 0,
    epochs: int | None = 1,
    drop_remainder: bool = True,
    shard: tuple[int, int] = (0, 1),
    start_step: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_key: str | None = None,
) -> Dataset:
    """Documents as blocks of tokens without padding, for `fit` of a `TFGPTJForCausalLM` on every Keras backend.

    Documents are tokenised, in parallel, and put one behind the other, each ended by eos; blocks are cut from that.
    Nothing needs more than a part of the corpus in memory. What a dataset gives depends on its arguments alone: going
    through it again gives the same again, and all epochs are in it, so `fit` gets no `epochs`, or
    `steps_per_epoch` beside it.

    With `cache_dir` the tokens are written to disk before this function returns, and found there the next time. Then
    blocks are shuffled over the whole corpus, a run resumes without delay, and the dataset knows its length. Without,
    every epoch tokenises anew, blocks are shuffled in a buffer, and a run resumes by going through all that it skips.
    Keras warns where data of unknown length end: `epochs=None` here and `steps_per_epoch` in `fit` spare that. It also
    warns that it does not shuffle datasets, unless `fit` gets `shuffle=False`.

    For several workers, each gives `shard`. At each step they have different parts of what a single one with
    `batch_size` times their number would have, in the same number of steps. Without a cache each tokenises everything.
    Under `tf.distribute` on one host no `shard` is needed: the strategy parts each batch between its replicas. On
    several hosts, use `strategy.distribute_datasets_from_function(lambda context: language_modeling_dataset(...,
    shard=(context.input_pipeline_id, context.num_input_pipelines)))`.

    Args:
        documents: rows of `read_text`, `read_jsonl`, `read_csv`, `read_tfrecord` or `read_rows`; or a list of texts, a
            Hugging Face data set, or a function that returns an iterable, as for `read_rows`.
        tokenizer: the model's, with an eos token.
        block_size: tokens of a block (T), at most the model's `n_positions`.
        batch_size: blocks of a batch (B).
        field: where a row has its text.
        separate_documents: whether attention keeps to each document: the inputs have `segment_ids` too, and a
            document's first token no label.
        shuffle: whether blocks come in random order, another one in every epoch.
        shuffle_buffer: blocks that are shuffled at a time, when there is no cache.
        seed: of the order.
        epochs: passes over the documents; None: without end.
        drop_remainder: whether to leave out, in each epoch, what does not fill a block or a batch. False fills up with
            padding that has the label -100, for evaluation.
        shard: index of this worker, and the number of workers.
        start_step: batches to leave out at the beginning, to resume a run: what comes is what would have come then.
        cache_dir: directory for the tokens. Each set of documents, tokenizer and settings has files of its own there:
            what was made of other ones is never used. (A file counts as unchanged while size and time of change are.)
        cache_key: with `cache_dir`, for documents that are no files and no Hugging Face data set, a name that changes
            when they do.

    Returns:
        A dataset of `(inputs, labels)`: a dict of `input_ids`, and perhaps `segment_ids`, and the labels, equal to the
        ids, as the causal loss shifts by itself; int32 [B, T] each.

    Raises:
        InputError: if an argument is invalid; with a cache, for corrupt documents, too few tokens, and a `start_step`
            behind the end. Without, TensorFlow gives the latter as `tf.errors.InvalidArgumentError` with the same text
            while it reads.

    >>> tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257)
    >>> dataset = language_modeling_dataset(["abcd", "efg"], tokenizer, block_size=4, batch_size=2, shuffle=False)
    >>> [(inputs, labels)] = dataset
    >>> print(inputs["input_ids"].numpy())
    [[ 64  65  66  67]
     [256  68  69  70]]
    """
    for name, value in (("block_size", block_size), ("batch_size", batch_size), ("shuffle_buffer", shuffle_buffer)):
        check_positive(name, value)
    check_steps(seed, epochs, start_step, shard)
    if cache_key is not None and cache_dir is None:
        raise InputError("cache_key needs cache_dir to have an effect")
    rows = read_rows(documents)
    eos_of(tokenizer)
    common: dict[str, Any] = {
        "block_size": block_size,
        "batch_size": batch_size,
        "separate_documents": separate_documents,
        "seed": seed,
        "epochs": epochs,
        "drop_remainder": drop_remainder,
        "shard": shard,
        "start_step": start_step,
    }
    if cache_dir is None:
        buffer = shuffle_buffer if shuffle else 0
        return block_dataset(lambda epoch: token_stream(rows, tokenizer, field), shuffle_buffer=buffer, **common)
    return token_dataset(kept_tokens(rows, tokenizer, field, cache_dir, cache_key), shuffle=shuffle, **common)


def block_dataset(
    stream: Callable[[int], Iterable[Tokens]],
    *,
    block_size: int,
    batch_size: int,
    separate_documents: bool = False,
    shuffle_buffer: int = SHUFFLE_BUFFER,
    seed: int = 0,
    epochs: int | None = 1,
    drop_remainder: bool = True,
    shard: tuple[int, int] = (0, 1),
    start_step: int = 0,
) -> Dataset:
    """Blocks of a token stream that may differ between epochs.

    Args:
        stream: gives the parts of the token stream of epoch 0, 1, …, always the same ones.
        shuffle_buffer: blocks that are shuffled at a time; 0 keeps their order.
        block_size, batch_size, separate_documents, seed, epochs, drop_remainder, shard, start_step: as for
            :func:`language_modeling_dataset`.

    Returns:
        What that gives.
    """

    def epoch_batches(epoch: int) -> Iterator[Any]:
        blocks = blocks_of(stream(epoch), block_size, drop_remainder)
        if shuffle_buffer:
            blocks = shuffled(blocks, shuffle_buffer, np.random.default_rng((seed, epoch)))
        return shares(blocks, batch_size, shard, drop_remainder)

    def batches() -> Iterator[Any]:
        for blocks in replayed(epoch_batches, epochs, start_step):
            yield model_batch(blocks, block_size, batch_size, separate_documents)

    length = INFINITE if epochs is None else None
    return as_dataset(batches, _signature(block_size, batch_size, separate_documents), length)


def token_dataset(
    tokens: Tokens,
    *,
    block_size: int,
    batch_size: int,
    separate_documents: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int | None = 1,
    drop_remainder: bool = True,
    shard: tuple[int, int] = (0, 1),
    start_step: int = 0,
) -> Dataset:
    """Blocks of tokens that can be read at any place; the dataset knows its length.

    Args:
        tokens: the whole token stream.
        block_size, batch_size, separate_documents, shuffle, seed, epochs, drop_remainder, shard, start_step: as for
            :func:`language_modeling_dataset`.

    Returns:
        What that gives.

    Raises:
        InputError: if there are too few tokens, or `start_step` is behind the end.
    """
    index, workers = shard
    up = 0 if drop_remainder else 1  # a part of a block or of a step counts for a whole one
    size = (len(tokens.ids) + up * (block_size - 1)) // block_size
    steps = (size + up * (batch_size * workers - 1)) // (batch_size * workers)
    if not steps:
        raise InputError(
            f"{len(tokens.ids):,} tokens are {size} blocks of {block_size}, fewer than one batch of {batch_size} for "
            f"{workers} workers: take smaller ones, or drop_remainder=False"
        )
    if epochs is not None and 0 < steps * epochs <= start_step:
        raise InputError(f"start_step={start_step} leaves nothing: there are {steps * epochs} steps in all")

    def batches() -> Iterator[Any]:
        first = start_step // steps
        for epoch in count(first) if epochs is None else range(first, epochs):
            order = np.random.default_rng((seed, epoch)).permutation(size) if shuffle else np.arange(size)
            for step in range(start_step % steps if epoch == first else 0, steps):
                begin = (step * workers + index) * batch_size
                blocks = [block_at(tokens, int(i), block_size) for i in order[begin : begin + batch_size]]
                yield model_batch(blocks, block_size, batch_size, separate_documents)

    length = INFINITE if epochs is None else steps * epochs - start_step
    return as_dataset(batches, _signature(block_size, batch_size, separate_documents), length)


def _signature(block_size: int, batch_size: int, separate: bool) -> Any:
    spec = keras.InputSpec("int32", (batch_size, block_size))
    return {"input_ids": spec, **({"segment_ids": spec} if separate else {})}, spec


def as_dataset(batches: Callable[[], Iterator[Any]], signature: Any, length: int | None = None) -> Dataset:
    """A dataset of batches that are made, ahead of time, while a model works on those before.

    Args:
        batches: starts a pass.
        signature: dtype and shape of what is in a batch, each as `keras.InputSpec`.
        length: number of batches, `INFINITE` if there is no end, None if it is not known.
    """

    def tensor_spec(spec: Any) -> Any:
        # Keras finds the end of data of unknown length in a step that fails. What of it depends on no data is computed
        # all the same: with a batch size that the graph knows, that batch was counted in the mean of the loss.
        shape = (None, *spec.shape[1:]) if length is None else spec.shape
        return tf.TensorSpec(shape, spec.dtype)

    signature = tf.nest.map_structure(tensor_spec, signature)
    dataset = Dataset.from_generator(batches, output_signature=signature)
    if length is not None:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(length))
    options = tf.data.Options()
    # Workers part the batches by `shard`: TensorFlow, which would take every n-th batch of a generator, must not.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)


def replayed(epoch_batches: Callable[[int], Iterator[Any]], epochs: int | None, start_step: int) -> Iterator[Any]:
    """The batches of all epochs but the first `start_step`, which are made and passed over.

    Raises:
        InputError: if an epoch has no batch, or there are no more than `start_step`.
    """
    step = 0
    for epoch in count() if epochs is None else range(epochs):
        before = step
        for batch in epoch_batches(epoch):
            if step >= start_step:
                yield batch
            step += 1
        if step == before:
            raise InputError(f"epoch {epoch} has not one whole batch: take smaller batches, or drop_remainder=False")
    if step <= start_step:
        raise InputError(f"start_step={start_step} leaves nothing: there are {step} steps in all")


def check_steps(seed: int, epochs: int | None, start_step: int, shard: tuple[int, int]) -> None:
    """Refuse a seed, and numbers of epochs, steps and workers, that make no sense.

    Raises:
        InputError: saying which.
    """
    check_positive("epochs", epochs)
    for name, value in (("seed", seed), ("start_step", start_step)):
        if not isinstance(value, int) or value < 0:
            raise InputError(f"{name} is {value!r}, expected an integer from 0 on")
    if len(shard) != 2 or not 0 <= shard[0] < shard[1]:
        raise InputError(f"shard is {shard!r}, expected (index, number of workers), the index below the number")


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
