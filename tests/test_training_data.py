"""Blocks of text for `fit`: nothing lost, nothing padded, resumed and sharded exactly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import numbers, run_python

from tfgptj import GPTJConfig, GPTJTokenizer, TFGPTJForCausalLM
from tfgptj.errors import InputError
from tfgptj.losses import causal_lm_loss
from tfgptj.training import tokens
from tfgptj.training.data import Dataset, block_dataset, evaluation_windows, language_modeling_dataset
from tfgptj.training.packing import block_at, blocks_of, shares, shuffled
from tfgptj.training.readers import read_jsonl
from tfgptj.training.tokens import Tokens

SMALL_VOCAB = Path(__file__).parent / "fixtures" / "small_vocab"
TEXTS = [f"the king number {n} and all his {n * n} men of war\n" * (n % 5) for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.from_directory(SMALL_VOCAB)


@pytest.fixture(scope="module")
def stream(tokenizer: GPTJTokenizer) -> list[int]:
    return sum(([*tokenizer.encode(text), tokenizer.eos_token_id] for text in TEXTS if text), [])


@pytest.fixture(params=["cache", "no cache"])
def cached(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options with and without a cache."""
    if request.param == "no cache":
        return {"shuffle_buffer": 7}
    return {"cache_dir": tmp_path_factory.getbasetemp() / "tokens", "cache_key": "v1"}


def batches(dataset: Dataset) -> list[np.ndarray]:
    """All that a dataset gives: inputs and labels of each batch in one array."""
    return [np.stack([*inputs.values(), labels]) for inputs, labels in dataset.as_numpy_iterator()]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_blocks_are_the_stream_without_padding(tokenizer: GPTJTokenizer, stream: list[int], cached: Any) -> None:
    dataset = language_modeling_dataset(TEXTS, tokenizer, block_size=16, batch_size=4, shuffle=False, **cached)
    ids = np.concatenate([inputs["input_ids"] for inputs, _ in dataset.as_numpy_iterator()])
    assert ids.reshape(-1).tolist() == stream[: len(stream) // 64 * 64]
    for inputs, labels in dataset:
        assert np.array_equal(inputs["input_ids"], labels) and labels.dtype == "int32" and labels.shape == (4, 16)
    spec = dataset.element_spec
    rows = 4 if "cache_dir" in cached else None  # of data of unknown length a mean would count one batch too many
    assert spec[1] == spec[0]["input_ids"] == tf.TensorSpec((rows, 16), tf.int32)


def test_nothing_is_lost_when_the_remainder_is_kept(tokenizer: GPTJTokenizer, stream: list[int], cached: Any) -> None:
    dataset = language_modeling_dataset(TEXTS, tokenizer, block_size=16, batch_size=4, drop_remainder=False, **cached)
    ids, labels = (np.concatenate(rows) for rows in zip(*((x["input_ids"], y) for x, y in dataset), strict=True))
    assert len(ids) % 4 == 0 and len(stream) % 64  # so that something is filled up
    assert (labels != -100).sum() == len(stream)
    assert np.array_equal(ids[labels != -100], labels[labels != -100])
    in_order = np.pad(stream, (0, -len(stream) % 16)).reshape(-1, 16).tolist()
    assert sorted(row for row in ids.tolist() if any(row)) == sorted(in_order)


def test_every_epoch_has_all_blocks_in_another_order(tokenizer: GPTJTokenizer, stream: list[int], cached: Any) -> None:
    options: Any = {"block_size": 16, "batch_size": 1, "epochs": 3, **cached}
    rows = [
        tuple(x["input_ids"][0].tolist())
        for x, _ in language_modeling_dataset(TEXTS, tokenizer, **options).as_numpy_iterator()
    ]
    in_order = [tuple(row) for row in np.array(stream[: len(stream) // 16 * 16]).reshape(-1, 16).tolist()]
    epochs = [rows[i : i + len(in_order)] for i in range(0, len(rows), len(in_order))]
    assert len(epochs) == 3 and all(sorted(epoch) == sorted(in_order) for epoch in epochs)
    assert len({tuple(epoch) for epoch in (*epochs, in_order)}) == 4
    first, again, other = (
        batches(language_modeling_dataset(TEXTS, tokenizer, seed=seed, **options)) for seed in (0, 0, 1)
    )
    assert same(first, again) and not same(first, other)


def test_a_cache_shuffles_over_the_whole_corpus() -> None:
    """As np.random.permutation does; the buffer reaches as far as its size."""
    order = list(shuffled(range(1000), 10, np.random.default_rng(0)))
    assert sorted(order) == list(range(1000))
    assert all(item < place + 10 for place, item in enumerate(order))  # none comes before it was read
    assert order != sorted(order)


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"shard": (1, 3)}, {"drop_remainder": False}])
def test_runs_resume_exactly(tokenizer: GPTJTokenizer, cached: Any, options: Any) -> None:
    options = {"block_size": 16, "batch_size": 2, "epochs": 3, "separate_documents": True, **cached, **options}
    whole = batches(language_modeling_dataset(TEXTS, tokenizer, **options))
    per_epoch = len(whole) // 3
    assert len(whole) == 3 * per_epoch > 12
    for step in (1, 3, per_epoch - 1, per_epoch, per_epoch + 2, 2 * per_epoch, len(whole) - 1):
        assert same(whole[step:], batches(language_modeling_dataset(TEXTS, tokenizer, start_step=step, **options)))


def test_endless_datasets(tokenizer: GPTJTokenizer, cached: Any) -> None:
    options: Any = {"block_size": 16, "batch_size": 4, **cached}
    three = batches(language_modeling_dataset(TEXTS, tokenizer, epochs=3, **options))
    endless = language_modeling_dataset(TEXTS, tokenizer, epochs=None, **options)
    assert same(three, batches(endless.take(len(three))))
    resumed = language_modeling_dataset(TEXTS, tokenizer, epochs=None, start_step=5, **options)
    assert same(three[5:], batches(resumed.take(len(three) - 5)))


@pytest.mark.parametrize("drop_remainder", [True, False])
def test_workers_part_the_batches_of_a_single_one(tokenizer: GPTJTokenizer, cached: Any, drop_remainder: bool) -> None:
    options: Any = {"block_size": 16, "epochs": 2, "drop_remainder": drop_remainder, **cached}
    alone = batches(language_modeling_dataset(TEXTS, tokenizer, batch_size=6, **options))
    parts = [
        batches(language_modeling_dataset(TEXTS, tokenizer, batch_size=2, shard=(i, 3), **options)) for i in range(3)
    ]
    assert same(alone, [np.concatenate(step, axis=1) for step in zip(*parts, strict=True)])


def test_the_length_is_known_with_a_cache(tokenizer: GPTJTokenizer, tmp_path: Path, stream: list[int]) -> None:
    options: Any = {"block_size": 16, "batch_size": 4, "cache_dir": tmp_path, "cache_key": "v1"}
    steps = len(stream) // 64
    assert len(language_modeling_dataset(TEXTS, tokenizer, epochs=2, **options)) == 2 * steps
    assert len(language_modeling_dataset(TEXTS, tokenizer, epochs=2, start_step=steps + 1, **options)) == steps - 1


def test_the_corpus_is_read_as_it_is_needed(tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BATCH_TEXTS", 4)
    read: list[int] = []

    def source() -> Iterator[str]:
        for number in range(100_000):
            read.append(number)
            yield TEXTS[4]

    dataset = language_modeling_dataset(source, tokenizer, block_size=64, batch_size=2, shuffle_buffer=8)
    for _ in dataset.take(3):
        pass
    assert len(read) < 1000  # the buffer, and what is made ahead of time


def test_files_larger_than_all_buffers(tokenizer: GPTJTokenizer, tmp_path: Path, cached: Any) -> None:
    path = tmp_path / "a.jsonl"
    line = '{"body": "' + "the king and the queen " * 400 + '"}\n'
    path.write_text(line * 400)  # 3.7 MB, where BATCH_CHARACTERS is 1 MiB
    options = {name: value for name, value in cached.items() if name != "cache_key"}
    dataset = language_modeling_dataset(
        read_jsonl(path), tokenizer, block_size=512, batch_size=8, shuffle=False, field="body", **options
    )
    document = [*tokenizer.encode("the king and the queen " * 400), tokenizer.eos_token_id]
    found = np.concatenate([labels.reshape(-1) for _, labels in dataset.as_numpy_iterator()])
    assert np.array_equal(found, np.resize(document, len(found)))
    assert len(found) == 400 * len(document) // 4096 * 4096


# Documents apart


def test_separate_documents(tokenizer: GPTJTokenizer, stream: list[int], cached: Any) -> None:
    dataset = language_modeling_dataset(
        TEXTS,
        tokenizer,
        block_size=48,
        batch_size=2,
        shuffle=False,
        separate_documents=True,
        drop_remainder=False,
        **cached,
    )
    found = [
        np.concatenate(parts)
        for parts in zip(*((x["input_ids"], x["segment_ids"], y) for x, y in dataset), strict=True)
    ]
    eos = tokenizer.eos_token_id
    for row, (ids, segments, labels) in enumerate(zip(*found, strict=True)):
        size = max(min(48, len(stream) - 48 * row), 0)
        expected = 1 + np.cumsum([0, *(ids[: size - 1] == eos)])[:size]  # a new one behind each eos
        assert segments[:size].tolist() == expected.tolist()
        assert segments[0] == 1 and len(set(segments[size:].tolist())) <= 1  # padding is one segment,
        assert not set(segments[:size]) & set(segments[size:])  # and one of its own
        begins = np.flatnonzero(np.diff(segments)) + 1
        assert (labels[begins] == -100).all() and (labels[size:] == -100).all()
        rest = np.setdiff1d(np.arange(size), begins)
        assert np.array_equal(labels[rest], ids[rest])


def test_packed_documents_are_learnt_as_if_alone(tokenizer: GPTJTokenizer) -> None:
    keras.utils.set_random_seed(1)
    config = GPTJConfig(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    model = TFGPTJForCausalLM(config)
    texts = ["the king", "and the queen of old", "said"]
    dataset = language_modeling_dataset(
        texts, tokenizer, block_size=40, batch_size=1, shuffle=False, separate_documents=True, drop_remainder=False
    )
    [(inputs, labels)] = dataset.as_numpy_iterator()
    packed = float(numbers(causal_lm_loss(labels, model(inputs))))
    documents = [np.array([[*tokenizer.encode(text), tokenizer.eos_token_id]]) for text in texts]
    alone = [float(numbers(causal_lm_loss(ids, model(ids)))) * (ids.shape[1] - 1) for ids in documents]
    assert packed == pytest.approx(sum(alone) / sum(ids.shape[1] - 1 for ids in documents), rel=1e-5)


# With Keras


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_the_loss_is_the_mean_of_all_batches(tokenizer: GPTJTokenizer, stream: list[int]) -> None:
    model = TFGPTJForCausalLM(GPTJConfig(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    model.compile("sgd")
    dataset = language_modeling_dataset(TEXTS, tokenizer, block_size=16, batch_size=4, shuffle=False)
    ids = np.reshape(stream[: len(stream) // 64 * 64], (-1, 16))
    assert model.evaluate(dataset, verbose=0) == pytest.approx(model.evaluate(ids, ids, batch_size=4, verbose=0))


@pytest.mark.core
def test_fit_takes_it_as_it_is(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    config = GPTJConfig(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    model = TFGPTJForCausalLM(config)
    model.compile(keras.optimizers.Adam(1e-2))
    options: Any = {"block_size": 16, "batch_size": 8, "separate_documents": True}
    kept = language_modeling_dataset(TEXTS, tokenizer, cache_dir=tmp_path, cache_key="v1", **options)
    streamed = language_modeling_dataset(TEXTS, tokenizer, epochs=None, **options)
    before = model.evaluate(kept, verbose=0)
    history = model.fit(streamed, epochs=3, steps_per_epoch=len(kept), shuffle=False, verbose=0).history
    assert len(history["loss"]) == 3
    assert model.evaluate(kept, verbose=0) < before - 0.3


PROGRAM = """
import tensorflow as tf

[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

import keras
import numpy as np
from test_training_data import SMALL_VOCAB, TEXTS, language_modeling_dataset
from tfgptj import GPTJConfig, GPTJTokenizer, TFGPTJForCausalLM

tokenizer = GPTJTokenizer.from_directory(SMALL_VOCAB)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
config = GPTJConfig(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)


def dataset(context=None):
    shard = (context.input_pipeline_id, context.num_input_pipelines) if context else (0, 1)
    size = context.get_per_replica_batch_size(8) if context else 8
    return language_modeling_dataset(TEXTS, tokenizer, block_size=16, batch_size=size, epochs=None, shard=shard)


alone = TFGPTJForCausalLM(config)
with strategy.scope():
    mirrored = TFGPTJForCausalLM(config)
    mirrored.compile(keras.optimizers.SGD(0.1))
mirrored.set_weights(alone.get_weights())
alone.compile(keras.optimizers.SGD(0.1))
options = {"steps_per_epoch": 4, "epochs": 2, "shuffle": False, "verbose": 0}
one, two = (model.fit(dataset(), **options).history["loss"] for model in (alone, mirrored))
np.testing.assert_allclose(two, one, rtol=1e-4)
for a, b in zip(alone.get_weights(), mirrored.get_weights()):
    np.testing.assert_allclose(b, a, atol=1e-4)
replicas = next(iter(strategy.experimental_distribute_dataset(dataset())))[1].values
whole = next(iter(dataset()))[1]
np.testing.assert_array_equal(np.concatenate([r.numpy() for r in replicas]), whole.numpy())
replicas = next(iter(strategy.distribute_datasets_from_function(dataset)))[1].values
np.testing.assert_array_equal(np.concatenate([r.numpy() for r in replicas]), whole.numpy())
print("equal")
"""


def test_two_replicas_part_each_batch() -> None:
    done = run_python("-c", PROGRAM)
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]
    assert "sharding" not in done.stderr.lower()  # TensorFlow warns of datasets that it cannot part


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size is 0, expected an integer from 1 on"),
        ({"batch_size": 2.0}, "batch_size is 2.0, expected an integer"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0, expected an integer"),
        ({"epochs": 0}, "epochs is 0, expected an integer from 1 on"),
        ({"start_step": -1}, "start_step is -1, expected an integer from 0 on"),
        ({"seed": -1}, "seed is -1, expected an integer from 0 on"),
        ({"shard": (2, 2)}, "shard is (2, 2), expected (index, number of workers), the index below the number"),
        ({"cache_key": "v1"}, "cache_key needs cache_dir to have an effect"),
        ({"cache_dir": "unused"}, "cache_dir needs cache_key for these documents"),
    ],
)
def test_arguments_are_checked(tokenizer: GPTJTokenizer, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        language_modeling_dataset(TEXTS, tokenizer, **{"block_size": 16, "batch_size": 2, **options})


def test_too_little_is_an_error_at_once_with_a_cache(
    tokenizer: GPTJTokenizer, tmp_path: Path, stream: list[int]
) -> None:
    options: Any = {"cache_dir": tmp_path, "cache_key": "v1"}
    with pytest.raises(InputError, match=r"tokens are \d+ blocks of 16, fewer than one batch of 5000 for 1 workers"):
        language_modeling_dataset(TEXTS, tokenizer, block_size=16, batch_size=5000, **options)
    steps = len(stream) // 64
    with pytest.raises(InputError, match=f"start_step={steps} leaves nothing: there are {steps} steps in all"):
        language_modeling_dataset(TEXTS, tokenizer, block_size=16, batch_size=4, start_step=steps, **options)
    with pytest.raises(InputError, match="row 1: the row is of type int"):
        language_modeling_dataset(["a", 3], tokenizer, block_size=16, batch_size=4, cache_dir=tmp_path, cache_key="v2")


def test_and_while_it_is_read_without(tokenizer: GPTJTokenizer, stream: list[int]) -> None:
    steps = len(stream) // 64
    for texts, options, message in (
        (TEXTS, {"batch_size": 5000}, "epoch 0 has not one whole batch: take smaller batches"),
        (TEXTS, {"start_step": steps}, f"start_step={steps} leaves nothing: there are {steps} steps in all"),
        (["a", 3], {}, "row 1: the row is of type int, expected a text"),
    ):
        dataset = language_modeling_dataset(texts, tokenizer, **{"block_size": 16, "batch_size": 4, **options})  # type: ignore[arg-type]
        with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
            batches(dataset)


# Parts


def test_blocks_of_any_parts(stream: list[int], tokenizer: GPTJTokenizer) -> None:
    ends = np.flatnonzero(np.array(stream) == tokenizer.eos_token_id) + 1
    whole = Tokens(np.array(stream, "int32"), ends)
    for step in (1, 5, 16, 100, len(stream)):
        parts = [
            Tokens(whole.ids[i : i + step], ends[(ends > i) & (ends <= i + step)]) for i in range(0, len(stream), step)
        ]
        for drop in (True, False):
            found = list(blocks_of(parts, 16, drop))
            assert len(found) == (len(stream) + (0 if drop else 15)) // 16
            for index, block in enumerate(found):
                expected = block_at(whole, index, 16)
                assert np.array_equal(block.ids, expected.ids) and np.array_equal(block.documents, expected.documents)


def test_shares() -> None:
    assert list(shares(range(11), 2, (1, 2), True)) == [[2, 3], [6, 7]]
    assert list(shares(range(11), 2, (0, 2), False)) == [[0, 1], [4, 5], [8, 9]]
    assert list(shares(range(11), 2, (1, 2), False)) == [[2, 3], [6, 7], [10]]


def test_streams_may_differ_between_epochs() -> None:
    def stream(epoch: int) -> list[Tokens]:
        return [Tokens(np.arange(8, dtype="int32") + 100 * epoch, np.array([8]))]

    dataset = block_dataset(stream, block_size=4, batch_size=2, shuffle_buffer=0, epochs=2)
    assert [labels[0, 0] for _, labels in dataset.as_numpy_iterator()] == [0, 100]


@pytest.mark.parametrize("size", [1, 5, 16, 17, 30, 48])
def test_evaluation_windows_score_each_token_once(size: int) -> None:
    ids = np.arange(100, 100 + size)
    inputs, labels = evaluation_windows(ids, window=16, stride=4)
    assert sorted(labels[labels != -100].tolist()) == ids.tolist()
    rows, columns = np.nonzero(labels != -100)
    assert np.array_equal(inputs[rows, columns], labels[rows, columns])
    assert all(column >= 12 for row, column in zip(rows, columns, strict=True) if row)
