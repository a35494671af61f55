"""Labelled texts as tf.data: padded batches of similar length."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from tfgptj import batching
from tfgptj.config import GPTJConfig
from tfgptj.errors import InputError
from tfgptj.tokenizer import GPTJTokenizer
from tfgptj.training.data import INFINITE, SHUFFLE_BUFFER, Dataset, as_dataset, check_steps, replayed
from tfgptj.training.packing import batched, shuffled
from tfgptj.training.rows import Row, Rows, read_rows, text_of, value_of

ENCODED_AT_ONCE = 256  # texts, in parallel


class Example(NamedTuple):
    """One row of a batch: its tokens, and its labels by name ("" for the only one)."""

    ids: list[int]
    labels: dict[str, Any]


def classification_dataset(
    rows: Any,
    tokenizer: GPTJTokenizer,
    config: GPTJConfig,
    *,
    batch_size: int,
    text_field: str = "text",
    label_field: str = "label",
    max_length: int | None = None,
    truncation: bool = False,
    **options: Any,
) -> Dataset:
    """Labelled texts for `fit` of a `TFGPTJForSequenceClassification`.

    Labels follow `config.problem_type`; None means regression for one label, else one label for a text. Such a label is
    a name in `config.label2id` or a number from 0 on, which may be written as text, as in CSV. For several labels it is
    a list of names, or of `num_labels` zeros and ones; for regression a number, or a list of `num_labels` numbers.

    Args:
        rows: rows of `read_jsonl`, `read_csv`, … or anything that `read_rows` takes: dicts, or pairs of text and label.
        tokenizer: the model's.
        config: the model's :class:`GPTJConfig`.
        batch_size: texts of a batch (B).
        text_field, label_field: where a row has them.
        max_length: tokens of a text at most; None: what tokenizer, model and `length_buckets` allow.
        truncation: whether longer texts are cut. They are counted in `rows.report`, and there is a warning.
        **options: of `example_dataset`: `length_buckets`, `pad_to_multiple_of`, `shuffle`, `shuffle_buffer`, `seed`,
            `epochs`, `drop_remainder`, `shard`, `start_step`, `count_batches`.

    Returns:
        A dataset of `(inputs, labels)`: a dict of `input_ids` and `attention_mask`, int32 [B, T] each, padded on the
        right, and labels int32 [B], or float32 [B] or [B, num_labels].

    Raises:
        InputError: as `example_dataset`. An unknown label makes a row corrupt.

    >>> tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257)
    >>> config = GPTJConfig(vocab_size=257, id2label={0: "bad", 1: "good"})
    >>> rows = [("fine", "good"), ("no", "bad")]
    >>> [(inputs, labels)] = classification_dataset(rows, tokenizer, config, batch_size=2, shuffle=False)
    >>> inputs["attention_mask"].numpy().sum(axis=1).tolist(), labels.numpy().tolist()
    ([4, 2], [1, 0])
    """
    batching.check_positive("max_length", max_length)
    buckets = options.get("length_buckets") or [config.n_positions]
    limit = min(n for n in (max_length, tokenizer.model_max_length, config.n_positions, buckets[-1]) if n is not None)
    source = read_rows(rows)

    def convert(values: Any) -> tuple[str, Any]:
        if isinstance(values, tuple | list) and len(values) == 2:
            values = dict(zip((text_field, label_field), values, strict=True))
        if not (text := text_of(values, text_field)):
            raise InputError(f"the field {text_field!r} is empty")
        return text, label_of(value_of(values, label_field), config)

    def examples() -> Iterator[Example]:
        for batch in batched(source.rows(convert), ENCODED_AT_ONCE):
            for row, ids in zip(batch, tokenizer([row.values[0] for row in batch])["input_ids"], strict=True):
                yield Example(_fitted(row, ids, tokenizer, limit, source if truncation else None), {"": row.values[1]})
        if source.report.truncated:
            counts = f"{source.report.truncated} of {source.report.read}"
            warnings.warn(f"{counts} texts were cut to {limit} tokens", stacklevel=1)

    several = config.num_labels > 1 and problem_of(config) != "single_label_classification"
    dtype = "int32" if problem_of(config) == "single_label_classification" else "float32"
    signature = {"": ((config.num_labels,) if several else (), dtype)}
    return example_dataset(examples, signature, batch_size=batch_size, **options)


def _fitted(row: Row, ids: list[int], tokenizer: GPTJTokenizer, limit: int, cutting: Rows | None) -> list[int]:
    """The ids of a text, cut to the limit if the rows are given that count it."""
    if len(ids) <= limit:
        return ids
    if cutting is None:
        raise InputError(
            f"{row.place}: the text has {len(ids)} tokens, more than {limit}: truncation=True cuts such texts"
        )
    cutting.report.truncated += 1
    return tokenizer.encode(row.values[0], truncation=True, max_length=limit)


def problem_of(config: GPTJConfig) -> str:
    """What a classifier is for, as its loss infers it from integer labels."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def label_of(value: Any, config: GPTJConfig) -> Any:
    """A label as the loss wants it: an int, a float, or float32 [num_labels].

    Raises:
        InputError: if it is none of the model's.
    """
    problem = problem_of(config)
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if problem == "single_label_classification":
        return _label_id(value, config)
    if problem == "multi_label_classification" and isinstance(value, list | tuple):
        if all(isinstance(name, str) for name in value):
            return np.isin(range(config.num_labels), [_label_id(name, config) for name in value]).astype("float32")
        if len(value) == config.num_labels and all(number in (0, 1) for number in value):
            return np.asarray(value, "float32")
    if problem == "multi_label_classification":
        raise InputError(
            f"the label is {value!r:.80}, expected a list of names, or of {config.num_labels} zeros and ones"
        )
    try:
        numbers = np.asarray(value, "float32")
    except (TypeError, ValueError):
        raise InputError(f"the label is {value!r:.80}, expected a number") from None
    if numbers.size != config.num_labels or not np.isfinite(numbers).all():
        raise InputError(f"the label is {value!r:.80}, expected {config.num_labels} finite numbers")
    return numbers.reshape((config.num_labels,) if config.num_labels > 1 else ())


def _label_id(value: Any, config: GPTJConfig) -> int:
    if isinstance(value, str) and value in config.label2id:
        return config.label2id[value]
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, int | np.integer) and not isinstance(number, bool) and 0 <= number < config.num_labels:
        return int(number)
    names = ", ".join(list(config.label2id)[:10])
    raise InputError(f"the label is {value!r:.80}, expected one of {names}, or a number below {config.num_labels}")


def example_dataset(
    examples: Callable[[], Iterator[Example]],
    labels: Mapping[str, tuple[tuple[int, ...], str]],
    *,
    batch_size: int,
    length_buckets: Sequence[int] | None = None,
    pad_to_multiple_of: int = 8,
    shuffle: bool = True,
    shuffle_buffer: int = SHUFFLE_BUFFER,
    seed: int = 0,
    epochs: int | None = 1,
    drop_remainder: bool = False,
    shard: tuple[int, int] = (0, 1),
    start_step: int = 0,
    count_batches: bool = False,
) -> Dataset:
    """Batches of examples, padded on the right.

    Examples are made as they are needed, in every epoch anew.

    Args:
        examples: starts a pass.
        labels: shape and dtype of each label of an example.
        batch_size: examples of a batch (B).
        length_buckets: rising lengths. Examples up to the same one of these are batched together and padded to it, so
            that a compiler meets as many shapes as there are buckets. None: batches as examples come, padded to the
            longest of them.
        pad_to_multiple_of: what that is rounded up to.
        shuffle: whether examples come in random order, another one in every epoch.
        shuffle_buffer: examples that are shuffled at a time.
        seed: of the order.
        epochs: passes over the examples; None: without end.
        drop_remainder: whether to leave out, in each epoch, examples that do not fill a batch.
        shard: index of this worker, and the number of workers: as for `language_modeling_dataset`.
        start_step: batches to leave out at the beginning; they are made and passed over.
        count_batches: whether to go through all examples once, before this function returns. Then what is wrong with
            them is found at once, and the dataset knows its length: else Keras warns at its end that data ran out.

    Raises:
        InputError: if an argument is invalid; with `count_batches`, for a corrupt row, one that is too long, too few of
            them, and a `start_step` behind the end. Without, TensorFlow gives the latter as
            `tf.errors.InvalidArgumentError` with the same text while it reads.
    """
    for name, value in (("batch_size", batch_size), ("shuffle_buffer", shuffle_buffer)):
        batching.check_positive(name, value)
    batching.check_positive("pad_to_multiple_of", pad_to_multiple_of)
    check_steps(seed, epochs, start_step, shard)
    buckets = list(length_buckets or [])
    if any(b < 1 for b in buckets) or any(a >= b for a, b in zip(buckets, buckets[1:], strict=False)):
        raise InputError(f"length_buckets are {buckets}, expected rising lengths from 1 on")
    index, workers = shard
    if workers > 1 and not drop_remainder:
        raise InputError("several workers need drop_remainder=True: the last batch may not be enough for all")

    def epoch_batches(epoch: int) -> Iterator[tuple[list[Example], int]]:
        found = examples()
        if shuffle:
            found = shuffled(found, shuffle_buffer, np.random.default_rng((seed, epoch)))
        for step, width in _groups(found, buckets, batch_size * workers, drop_remainder):
            yield step[index * batch_size : (index + 1) * batch_size], width or _longest(step, pad_to_multiple_of)

    def batches() -> Iterator[Any]:
        for batch, width in replayed(epoch_batches, epochs, start_step):
            yield _arrays(batch, width, labels)

    length = INFINITE if epochs is None else None
    if count_batches:
        steps = sum(1 for _ in replayed(epoch_batches, 1, 0))
        if epochs is not None:
            length = steps * epochs - start_step
            if length <= 0:
                raise InputError(f"start_step={start_step} leaves nothing: there are {steps * epochs} steps in all")
    rows = batch_size if drop_remainder else None
    inputs = keras.InputSpec("int32", (rows, buckets[0] if len(buckets) == 1 else None))
    specs = {name: keras.InputSpec(dtype, (rows, *shape)) for name, (shape, dtype) in labels.items()}
    signature = {"input_ids": inputs, "attention_mask": inputs}, specs.get("", specs)
    return as_dataset(batches, signature, length)


def _groups(
    examples: Iterator[Example], buckets: list[int], size: int, drop_remainder: bool
) -> Iterator[tuple[list[Example], int]]:
    """Examples of the same bucket together, with its length; 0 without buckets."""
    waiting: dict[int, list[Example]] = {length: [] for length in buckets or [0]}
    for example in examples:
        length = next((length for length in buckets if len(example.ids) <= length), None if buckets else 0)
        if length is None:
            raise InputError(
                f"an example has {len(example.ids)} tokens, more than the last of length_buckets={buckets}"
            )
        waiting[length].append(example)
        if len(waiting[length]) == size:
            yield waiting[length], length
            waiting[length] = []
    for length, rest in waiting.items():
        if rest and not drop_remainder:
            yield rest, length


def _longest(examples: list[Example], multiple: int) -> int:
    return batching.padded_width([example.ids for example in examples], 1, multiple)


def _arrays(batch: list[Example], width: int, labels: Mapping[str, tuple[tuple[int, ...], str]]) -> Any:
    # Any id in the vocabulary may fill the gaps: the mask hides it.
    ids, mask = batching.pad([example.ids for example in batch], width, 0, "right")
    inputs = {"input_ids": np.asarray(ids, "int32"), "attention_mask": np.asarray(mask, "int32")}
    columns = {name: np.asarray([e.labels[name] for e in batch], dtype) for name, (_, dtype) in labels.items()}
    return inputs, columns.get("", columns)
