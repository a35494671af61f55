"""Runs that are interrupted and resumed: the same bits as without; damaged files, full disks, forgotten arguments."""

from __future__ import annotations

import errno
import os
import re
import resource
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import elsewhere
from killed_runs import EPOCHS, STEPS, Stop, bits, new_model, train

from tfgptj.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    InputError,
    NonFiniteLossError,
)
from tfgptj.training.checkpointing import Checkpointing
from tfgptj.training.state import Position, read_position, restore_state, write_state

IDS = np.random.default_rng(0).integers(0, 48, (4, 8)).astype("int32")


class Interruption(Exception):
    """Instead of a power cut."""


def interrupt() -> None:
    raise Interruption


def interrupted(directory: Path, model: Any, at: int, **options: Any) -> None:
    with pytest.raises(Interruption):
        train(directory, model, Stop(at, interrupt), **options)


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


CASES: dict[str, dict[str, Any]] = {
    "loss scale": {"dtype": "mixed_float16"},
    "QLoRA": {"lora": True, "quantized": "int8", "dtype": "mixed_bfloat16", "run_eagerly": False},
}


@pytest.mark.core
@pytest.mark.parametrize("case", elsewhere(CASES, "QLoRA"))
def test_a_run_in_three_pieces_has_the_bits_of_a_whole_one(tmp_path: Path, case: str) -> None:
    whole = new_model(**CASES[case])
    train(tmp_path / "whole", whole)
    interrupted(tmp_path / "pieces", new_model(**CASES[case]), 10)  # in the second epoch; saved at 8
    assert names(tmp_path / "pieces") == ["step-00000008.safetensors"]
    interrupted(tmp_path / "pieces", new_model(**CASES[case]), 6)  # in the third; saved at 12
    last = new_model(**CASES[case])
    assert train(tmp_path / "pieces", last).step == 12
    assert_same(bits(last), bits(whole))
    seeds = [value for name, value in bits(last).items() if name.endswith("seed_generator_state")]
    drawn = 0 if keras.backend.backend() == "torch" else EPOCHS * STEPS  # there dropout has PyTorch's own state
    assert seeds and all(value[1] == drawn for value in seeds)
    if case == "loss scale":
        [scale] = [value for name, value in bits(last).items() if name.endswith("dynamic_scale")]
        assert 2.0**4 < scale < 2.0**40
    again = new_model(**CASES[case])  # when all is done nothing more is
    train(tmp_path / "pieces", again)
    assert_same(bits(again), bits(whole))


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # so Keras says where an unknown length ends
def test_an_epoch_may_be_all_there_is(tmp_path: Path) -> None:
    """Data that end by themselves, of a known length and of an unknown one."""
    finite = tf.data.Dataset.from_tensor_slices(IDS).batch(2).repeat(3)
    model = new_model()
    model.fit(finite, verbose=0, shuffle=False, callbacks=[Checkpointing(tmp_path / "whole")])
    for data in (finite, finite.filter(lambda ids: True)):
        directory, resumed = tmp_path / str(data.cardinality().numpy()), new_model()
        with pytest.raises(Interruption):
            new_model().fit(
                data, verbose=0, shuffle=False, callbacks=[Checkpointing(directory, save_freq=2), Stop(5, interrupt)]
            )
        checkpointing = Checkpointing(directory, save_freq=2)
        resumed.fit(data.skip(checkpointing.step), verbose=0, shuffle=False, callbacks=[checkpointing])
        if data is finite:
            assert_same(bits(resumed), bits(model))
        assert read_position(directory / "step-00000006.safetensors")[:3] == (6, 1, 0)


def test_others_may_stop_a_run(tmp_path: Path) -> None:
    data = tf.data.Dataset.from_tensor_slices(IDS).batch(2).repeat()
    options: Any = {"steps_per_epoch": 2, "epochs": 5, "shuffle": False, "verbose": 0}
    with pytest.raises(Interruption):
        new_model().fit(data, callbacks=[Checkpointing(tmp_path, save_freq=1), Stop(1, interrupt)], **options)
    for place in (0, 1):
        checkpointing, model = Checkpointing(tmp_path, save_freq=100, keep=9), new_model()
        stopping = keras.callbacks.EarlyStopping("loss", start_from_epoch=0, patience=0, min_delta=100.0)
        callbacks: list[Any] = [checkpointing]
        callbacks.insert(place, stopping)
        assert checkpointing.step == 1
        history = model.fit(data.skip(1), initial_epoch=checkpointing.epoch, callbacks=callbacks, **options)
        assert history.epoch == [0, 1]  # the rest of the first, and one that is no better


def test_steps_that_are_executed_together(tmp_path: Path) -> None:
    model = new_model()
    model.compile("sgd", steps_per_execution=2)
    data = tf.data.Dataset.from_tensor_slices(IDS).batch(2).repeat()
    model.fit(
        data,
        steps_per_epoch=4,
        epochs=2,
        verbose=0,
        shuffle=False,
        callbacks=[Checkpointing(tmp_path, save_freq=3, keep=9)],
    )
    assert names(tmp_path) == ["step-00000004.safetensors", "step-00000006.safetensors", "step-00000008.safetensors"]
    assert read_position(tmp_path / "step-00000006.safetensors") == Position(6, 1, 2, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_dtype_comes_back_as_it_was(tmp_path: Path, dtype: str) -> None:
    models = [new_model(dtype=dtype) for _ in range(2)]
    for model in models:
        model.optimizer.build(model.trainable_variables)
    random = np.random.default_rng(0)
    for variable in [*models[0].variables, *models[0].optimizer.variables]:
        variable.assign(random.integers(0, 100, variable.shape))
    write_state(tmp_path / "state.safetensors", models[0], Position())
    restore_state(tmp_path / "state.safetensors", models[1])
    assert_same(bits(models[1]), bits(models[0]))


# Faults


@pytest.fixture(scope="module")
def built() -> Any:
    """A model with an optimizer that has state."""
    model = new_model()
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture
def saved(tmp_path: Path, built: Any) -> Path:
    """A directory with a checkpoint in the middle of the second of three epochs."""
    write_state(tmp_path / "step-00000008.safetensors", built, Position(8, 1, 2, 6))
    return tmp_path


def resume(directory: Path, model: Any, *, ask: bool = True, **options: Any) -> None:
    checkpointing = Checkpointing(directory)
    data = tf.data.Dataset.from_tensor_slices(IDS).batch(2).repeat().skip(checkpointing.step if ask else 0)
    fit = {"epochs": 3, "steps_per_epoch": 6, "initial_epoch": 1, "shuffle": False, "verbose": 0, **options}
    model.fit(data, callbacks=[checkpointing], **fit)


def test_nothing_that_was_forgotten_goes_unseen(saved: Path, built: Any) -> None:
    for message, options in {
        "the run has 8 steps behind it, and nobody asked: make the data begin there, with start_step=": {"ask": False},
        "the run goes on in epoch 1, and fit began with 0: give it initial_epoch=": {"initial_epoch": 0},
        "the run has 6 steps per epoch, and now fit has 7: give it data and steps_per_epoch as": {"steps_per_epoch": 7},
        "the data begin behind step 8, and would do so in every epoch: give fit data": {"steps_per_epoch": 4},
    }.items():
        with pytest.raises(InputError, match=re.escape(message)):
            resume(saved, built, **options)
    twice = Checkpointing(saved / "new")
    twice.set_model(built)
    twice.set_params({"steps": None, "epochs": 1})
    twice.on_train_begin()
    with pytest.raises(InputError, match="a Checkpointing serves one call of fit: make another one"):
        twice.on_train_begin()
    for arguments in ({"keep": 0}, {"save_freq": 0}, {"save_freq": 1.5}):
        with pytest.raises(InputError, match="expected an integer from 1 on"):
            Checkpointing(saved, **arguments)  # type: ignore[arg-type]


def test_the_epoch_alone_is_enough_where_one_begins(tmp_path: Path, built: Any) -> None:
    write_state(tmp_path / "step-00000012.safetensors", built, Position(12, 3, 0, 4))
    checkpointing = Checkpointing(tmp_path)
    history = built.fit(
        IDS, batch_size=1, epochs=3, initial_epoch=checkpointing.epoch, callbacks=[checkpointing], verbose=0
    )
    assert history.epoch == []


def test_another_model_or_optimizer_is_refused_and_nothing_changes(saved: Path) -> None:
    other = new_model(n_embd=8)
    with pytest.raises(CheckpointMismatchError) as caught:
        resume(saved, other)
    message = str(caught.value)
    assert "was saved by another model or another optimizer than these" in message
    assert "model.0.embeddings is float32 [48, 16] in the file, and float32 [48, 8] here" in message
    assert re.search(r"and \d+ more$", message)
    adapted = new_model(lora=True)
    with pytest.raises(CheckpointMismatchError, match="lora_kernel_a is not in the file"):
        resume(saved, adapted)
    plain = new_model()
    plain.compile("sgd")
    before = bits(plain)
    with pytest.raises(CheckpointMismatchError, match=r"optimizer is AdamW in the file, and SGD here(.|\n)*file alone"):
        resume(saved, plain)
    assert_same(bits(plain), before)


def test_damage_is_seen_before_anything_is_assigned(saved: Path) -> None:
    [path] = saved.iterdir()
    whole, model = path.read_bytes(), new_model()
    model.optimizer.build(model.trainable_variables)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    before = bits(model)
    for place, message in {-1000: "is damaged: its checksum is another. Delete the file", -1: "is damaged"}.items():
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointFormatError, match=message):
            resume(saved, model)
        assert_same(bits(model), before)
    content = bytearray(whole)
    content[8 + int.from_bytes(whole[:8], "little")] ^= 1  # the step, which comes first
    for damaged, message in {
        bytes(content): "position is damaged",
        whole[:-1]: "cut short",
        whole.replace(b"training state 1", b"training state 2"): "is no training state of this version of tfgptj",
        whole.replace(b"checksums", b"checkfums"): "is no training state of this version of tfgptj",
        whole[:100]: "cut short",
        b"": "the file is empty",
    }.items():
        path.write_bytes(damaged)
        with pytest.raises(CheckpointFormatError, match=message):
            Checkpointing(saved)


def test_a_full_disk_leaves_the_checkpoint_before(saved: Path, built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [path] = saved.iterdir()
    before, position = path.read_bytes(), Position(9, 1, 3, 6)
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, allowed[1]))
    try:
        with pytest.raises(
            CheckpointError, match="could not be written: File too large; the checkpoint before is whole"
        ):
            write_state(saved / "step-00000009.safetensors", built, position)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
        write_state(path, built, position)
    assert names(saved) == [path.name] and path.read_bytes() == before


def test_weights_that_are_not_finite_are_not_written(saved: Path) -> None:
    [path] = saved.iterdir()
    before, model = path.read_bytes(), new_model()
    model.optimizer.build(model.trainable_variables)
    model.trainable_variables[1].assign(np.full(16, np.nan, "float32"))
    with pytest.raises(NonFiniteLossError, match="gamma holds NaN or infinite values after this step: training failed"):
        write_state(path, model, Position(9, 1, 3, 6))
    assert names(saved) == [path.name] and path.read_bytes() == before


def test_what_a_crash_left_is_cleared_away(tmp_path: Path, built: Any) -> None:
    left = tmp_path / ".tfgptj-0123.tmp"
    left.write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    built.compile("sgd")
    built.fit(IDS, batch_size=2, verbose=0, shuffle=False, callbacks=[Checkpointing(tmp_path, save_freq=1)])
    assert names(tmp_path) == ["notes.txt", "step-00000002.safetensors"]
