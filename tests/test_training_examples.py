"""Labelled texts for `fit`: padded, in buckets, with labels that the loss understands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgptj import GPTJConfig, GPTJTokenizer, TFGPTJForSequenceClassification
from tfgptj.errors import InputError
from tfgptj.training.data import Dataset
from tfgptj.training.examples import Example, classification_dataset, example_dataset, label_of
from tfgptj.training.readers import read_csv, read_jsonl
from tfgptj.training.rows import read_rows

SMALL_VOCAB = Path(__file__).parent / "fixtures" / "small_vocab"
ROWS = [("the king " * (1 + n % 7) + str(n), n % 2) for n in range(41)]


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.from_directory(SMALL_VOCAB)


@pytest.fixture(scope="module")
def config(tokenizer: GPTJTokenizer) -> GPTJConfig:
    return GPTJConfig(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4,
        id2label={0: "bad", 1: "good"},
    )  # fmt: skip


def several(problem_type: str | None = None, num_labels: int = 3) -> GPTJConfig:
    return GPTJConfig(problem_type=problem_type, id2label={n: f"label{n}" for n in range(num_labels)})


def texts(dataset: Dataset, tokenizer: GPTJTokenizer) -> list[tuple[str, int]]:
    """The texts of a dataset and their labels, as the mask has them."""
    found = []
    for inputs, labels in dataset.as_numpy_iterator():
        for ids, mask, label in zip(inputs["input_ids"], inputs["attention_mask"], labels, strict=True):
            assert sorted(mask.tolist(), reverse=True) == mask.tolist()  # padding on the right
            found.append((tokenizer.decode(ids[mask == 1]), int(label)))
    return found


def test_batches_are_padded_to_their_longest(tokenizer: GPTJTokenizer, config: GPTJConfig) -> None:
    dataset = classification_dataset(ROWS, tokenizer, config, batch_size=4, shuffle=False, pad_to_multiple_of=3)
    assert texts(dataset, tokenizer) == ROWS
    for (inputs, _), start in zip(dataset.as_numpy_iterator(), range(0, len(ROWS), 4), strict=True):
        longest = max(len(tokenizer.encode(text)) for text, _ in ROWS[start : start + 4])
        assert (
            inputs["input_ids"].shape
            == inputs["attention_mask"].shape
            == (len(ROWS[start : start + 4]), -(-longest // 3) * 3)
        )


def test_buckets_make_few_shapes(tokenizer: GPTJTokenizer, config: GPTJConfig) -> None:
    dataset = classification_dataset(ROWS, tokenizer, config, batch_size=4, length_buckets=[8, 16, 40])
    assert sorted(texts(dataset, tokenizer)) == sorted(ROWS)
    for inputs, _ in dataset.as_numpy_iterator():
        width, lengths = inputs["input_ids"].shape[1], inputs["attention_mask"].sum(axis=1)
        assert width in (8, 16, 40) and all(np.searchsorted([8, 16, 40], lengths) == [8, 16, 40].index(width))
    [shape] = {
        inputs["input_ids"].shape[1:]
        for inputs, _ in classification_dataset(ROWS, tokenizer, config, batch_size=4, length_buckets=[40])
    }
    assert shape == (40,)


def test_shapes_are_static_where_they_can_be(tokenizer: GPTJTokenizer, config: GPTJConfig) -> None:
    options: Any = {"batch_size": 4, "length_buckets": [40]}
    for known in ({"count_batches": True}, {"epochs": None}):
        dataset = classification_dataset(ROWS, tokenizer, config, drop_remainder=True, **options, **known)
        inputs, labels = dataset.element_spec
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (4, 40) and labels.shape == (4,)
    for unknown in ({}, {"drop_remainder": True}):
        inputs, labels = classification_dataset(ROWS, tokenizer, config, **options, **unknown).element_spec
        assert inputs["input_ids"].shape.as_list() == [None, 40] and labels.shape.as_list() == [None]


def test_order_and_resuming(tokenizer: GPTJTokenizer, config: GPTJConfig) -> None:
    options: Any = {"batch_size": 3, "length_buckets": [16, 40], "epochs": 3, "shuffle_buffer": 10}
    whole = texts(classification_dataset(ROWS, tokenizer, config, **options), tokenizer)
    epochs = [whole[i : i + len(ROWS)] for i in range(0, len(whole), len(ROWS))]
    assert all(sorted(epoch) == sorted(ROWS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for step in (1, 14, 15, 20):
        rest = texts(classification_dataset(ROWS, tokenizer, config, start_step=step, **options), tokenizer)
        assert rest == whole[-len(rest) :] and len(rest) < len(whole)
    assert texts(classification_dataset(ROWS, tokenizer, config, seed=1, **options), tokenizer) != whole


def test_workers_part_the_batches_of_a_single_one(tokenizer: GPTJTokenizer, config: GPTJConfig) -> None:
    options: Any = {"length_buckets": [16, 40], "drop_remainder": True}
    alone = list(classification_dataset(ROWS, tokenizer, config, batch_size=6, **options).as_numpy_iterator())
    parts = [
        classification_dataset(ROWS, tokenizer, config, batch_size=2, shard=(i, 3), **options).as_numpy_iterator()
        for i in range(3)
    ]
    for whole, *step in zip(alone, *parts, strict=True):
        for name in ("input_ids", "attention_mask"):
            assert np.array_equal(whole[0][name], np.concatenate([part[0][name] for part in step]))
    with pytest.raises(InputError, match="several workers need drop_remainder=True"):
        classification_dataset(ROWS, tokenizer, config, batch_size=2, shard=(0, 3))


def test_long_texts_are_an_error_unless_they_may_be_cut(tokenizer: GPTJTokenizer, config: GPTJConfig) -> None:
    for options, limit in (({"max_length": 12}, 12), ({"length_buckets": [8, 12]}, 12), ({}, 64)):
        rows = read_rows([("short", 0), ("the king " * 50, 1)])
        dataset = classification_dataset(rows, tokenizer, config, batch_size=4, **options)  # type: ignore[arg-type]
        with pytest.raises(
            tf.errors.InvalidArgumentError, match=rf"row 1: the text has \d+ tokens, more than {limit}: tr"
        ):
            list(dataset)
        dataset = classification_dataset(
            rows, tokenizer, config, batch_size=4, shuffle=False, truncation=True, **options
        )  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match=f"1 of 2 texts were cut to {limit} tokens"):
            found = texts(dataset, tokenizer)
        assert found[1] == (tokenizer.decode(tokenizer.encode("the king " * 50)[:limit]), 1)
        assert rows.report.truncated == 1


def test_rows_of_files(tokenizer: GPTJTokenizer, config: GPTJConfig, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("review,stars\nfine,good\nno,0\n")
    (tmp_path / "a.jsonl").write_text('{"review": "fine", "stars": 1}\n{"review": "no", "stars": "bad"}\n')
    for rows in (read_csv(tmp_path / "a.csv"), read_jsonl(tmp_path / "a.jsonl")):
        dataset = classification_dataset(
            rows, tokenizer, config, batch_size=2, shuffle=False, text_field="review", label_field="stars"
        )
        assert texts(dataset, tokenizer) == [("fine", 1), ("no", 0)]


def test_corrupt_rows(tokenizer: GPTJTokenizer, config: GPTJConfig) -> None:
    rows = [("fine", "good"), ("fine", "goood"), ("", 1), {"text": "no"}, 3]
    messages = (
        "the label is 'goood', expected one of bad, good, or a number below 2",
        "the field 'text' is empty",
        "there is no field 'label', only 'text'",
        "the row is of type int",
    )
    for row, message in zip(rows[1:], messages, strict=True):
        with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(f"row 0: {message}")):
            list(classification_dataset([row], tokenizer, config, batch_size=2))
    skipping = read_rows(rows, on_error="skip")
    with pytest.warns(UserWarning, match="4 of 5 rows are corrupt"):
        assert texts(classification_dataset(skipping, tokenizer, config, batch_size=2), tokenizer) == [("fine", 1)]


def test_rows_are_read_as_they_are_needed(tokenizer: GPTJTokenizer, config: GPTJConfig) -> None:
    read: list[int] = []

    def source() -> Iterator[tuple[str, int]]:
        for number in range(100_000):
            read.append(number)
            yield "the king", 1

    for _ in classification_dataset(source, tokenizer, config, batch_size=2, shuffle_buffer=100).take(3):
        pass
    assert len(read) < 2000


def test_counting_finds_the_length_and_what_is_wrong(tokenizer: GPTJTokenizer, config: GPTJConfig) -> None:
    options: Any = {"batch_size": 4, "length_buckets": [16, 40], "epochs": 3, "count_batches": True}
    for more in ({}, {"drop_remainder": True}, {"start_step": 5}):
        dataset = classification_dataset(ROWS, tokenizer, config, **options, **more)
        assert len(dataset) == len(list(dataset))
    endless = classification_dataset(ROWS, tokenizer, config, **{**options, "epochs": None})
    assert int(endless.cardinality()) == tf.data.INFINITE_CARDINALITY
    with pytest.raises(InputError, match="row 1: the label is 7"):
        classification_dataset([("a", 0), ("b", 7)], tokenizer, config, **options)
    with pytest.raises(InputError, match="start_step=6 leaves nothing: there are 6 steps in all"):
        classification_dataset(ROWS[:8], tokenizer, config, **{**options, "length_buckets": None}, start_step=6)


# Labels


@pytest.mark.parametrize(
    ("config_of", "value", "label"),
    [
        (several(), "label1", 1),
        (several(), 2, 2),
        (several(), np.int64(2), 2),
        (several(), "2", 2),
        (several("multi_label_classification"), ["label0", "label2"], [1, 0, 1]),
        (several("multi_label_classification"), [], [0, 0, 0]),
        (several("multi_label_classification"), (0, 1, 1.0), [0, 1, 1]),
        (several("multi_label_classification"), np.array([0, 1, 1]), [0, 1, 1]),
        (several(num_labels=1), 0.25, 0.25),
        (several(num_labels=1), "-3", -3.0),
        (several("regression"), [1, 2, 3.5], [1, 2, 3.5]),
    ],
)
def test_labels(config_of: GPTJConfig, value: Any, label: Any) -> None:
    found = label_of(value, config_of)
    assert np.asarray(found).tolist() == label and np.shape(found) == np.shape(label)


@pytest.mark.parametrize(
    ("config_of", "value", "message"),
    [
        (several(), 3, "the label is 3, expected one of label0, label1, label2, or a number below 3"),
        (several(), -1, "the label is -1"),
        (several(), True, "the label is True"),
        (several(), 1.0, "the label is 1.0"),
        (several(), None, "the label is None"),
        (several("multi_label_classification"), "label1", "expected a list of names, or of 3 zeros and ones"),
        (several("multi_label_classification"), [0, 1], "expected a list of names, or of 3 zeros and ones"),
        (several("multi_label_classification"), ["x"], "the label is 'x', expected one of label0"),
        (several(num_labels=1), "much", "the label is 'much', expected a number"),
        (several(num_labels=1), float("nan"), "the label is nan, expected 1 finite numbers"),
        (several("regression"), [1, 2], "the label is [1, 2], expected 3 finite numbers"),
    ],
)
def test_what_is_no_label(config_of: GPTJConfig, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        label_of(value, config_of)


@pytest.mark.parametrize(
    ("problem", "names", "values", "shape"),
    [
        (None, 1, [0.5, 1.5], (2,)),
        ("multi_label_classification", 3, [["label1"], [1, 0, 0]], (2, 3)),
        ("regression", 3, [[1, 2, 3], [4, 5, 6]], (2, 3)),
    ],
)
def test_labels_of_every_problem(
    tokenizer: GPTJTokenizer, problem: str | None, names: int, values: Any, shape: Any
) -> None:
    dataset = classification_dataset(
        list(zip(["fine", "no"], values, strict=True)), tokenizer, several(problem, names), batch_size=2
    )
    [(_, labels)] = dataset
    assert labels.shape == shape and labels.dtype == "float32"


def test_fit_takes_it_as_it_is(tokenizer: GPTJTokenizer, config: GPTJConfig) -> None:
    keras.utils.set_random_seed(1)
    model = TFGPTJForSequenceClassification(config)
    model.compile(keras.optimizers.Adam(1e-2))
    rows = [("the king", "good"), ("said he to all", "bad")] * 8
    dataset = classification_dataset(
        rows, tokenizer, config, batch_size=4, length_buckets=[16], epochs=8, count_batches=True
    )
    before = model.evaluate(dataset, verbose=0)
    model.fit(dataset, shuffle=False, verbose=0)
    assert model.evaluate(dataset, verbose=0) < before - 0.3


# Examples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected an integer from 1 on"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0, expected"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0, expected"),
        ({"max_length": 0}, "max_length is 0, expected"),
        ({"length_buckets": [8, 8]}, "length_buckets are [8, 8], expected rising lengths from 1 on"),
        ({"length_buckets": [0, 8]}, "length_buckets are [0, 8], expected rising lengths from 1 on"),
        ({"start_step": -1}, "start_step is -1"),
    ],
)
def test_arguments_are_checked(tokenizer: GPTJTokenizer, config: GPTJConfig, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        classification_dataset(ROWS, tokenizer, config, **{"batch_size": 2, **options})


def test_examples_longer_than_all_buckets() -> None:
    dataset = example_dataset(lambda: iter([Example([1] * 9, {})]), {}, batch_size=1, length_buckets=[4, 8])
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"an example has 9 tokens, more than the last of length_b"
    ):
        list(dataset)
