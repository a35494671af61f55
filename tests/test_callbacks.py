"""What watches training: it stops at NaN, saves adapters, and shows samples without a trace in the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import FIXTURES, numbers
from killed_runs import bits, new_model

from tfgptj import GPTJTokenizer
from tfgptj.errors import InputError, NonFiniteLossError
from tfgptj.training.callbacks import AdapterCheckpoint, Regular, SampleText, StopOnNaN
from tfgptj.training.checkpointing import Checkpointing

pytestmark = pytest.mark.usefixtures("eager_steps")
TOKENIZER = GPTJTokenizer.from_directory(FIXTURES / "small_vocab")
IDS = np.random.default_rng(0).integers(0, 48, (8, 8)).astype("int32")
FIT: dict[str, Any] = {"batch_size": 2, "shuffle": False, "verbose": 0}


def test_training_stops_at_the_first_loss_that_is_not_finite(tmp_path: Path) -> None:
    model = new_model()
    model.compile(keras.optimizers.SGD(1e30))
    checkpointing = Checkpointing(tmp_path, save_freq=1)
    message = r"the loss is (nan|inf) at epoch 1, batch 2 of this call of fit: lower the learning rate"
    with pytest.raises(NonFiniteLossError, match=message):
        model.fit(IDS, callbacks=[StopOnNaN(), checkpointing], **FIT)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_samples_leave_training_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    sample = SampleText("the king", TOKENIZER, every=3, do_sample=True, max_new_tokens=5)
    models = []
    for callbacks in ([], [sample]):
        models.append(new_model(vocab_size=len(TOKENIZER)))
        models[-1].fit(IDS, epochs=2, callbacks=callbacks, **FIT)
    expected, found = map(bits, models)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the king")]
    assert len(shown) == 2  # after the 3rd and the 6th of 8 batches
    assert all(len(line) > len("the king") for line in shown)


@pytest.mark.core
def test_adapters_are_saved_when_they_are_better(tmp_path: Path) -> None:
    model, losses = new_model(lora=True), iter([2.0, 1.0, 3.0])
    values = []

    class Scores(keras.callbacks.Callback):
        """Instead of validation."""

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            logs["val_loss"] = next(losses)
            values.append(numbers(self.model.transformer.blocks[0].attn.q_proj.lora_kernel_b.value))

    callback = AdapterCheckpoint(tmp_path, monitor="val_loss")
    model.fit(IDS[:2], epochs=3, callbacks=[Scores(), callback], **FIT)
    fresh = new_model()
    fresh.load_adapter(tmp_path)
    np.testing.assert_array_equal(numbers(fresh.transformer.blocks[0].attn.q_proj.lora_kernel_b.value), values[1])
    assert callback.best == 1.0
    with pytest.raises(InputError, match="monitor is 'val_loss', and the logs have only loss"):
        callback.act({"loss": 1.0})
    with pytest.raises(InputError, match="the model has no LoRA adapters"):
        unadapted = AdapterCheckpoint(tmp_path)
        unadapted.set_model(new_model())
        unadapted.act({})


class Acts(Regular):
    """Remembers when it acted."""

    def act(self, logs: dict[str, Any]) -> None:
        self.at.append(logs["now"])


@pytest.mark.parametrize(("freq", "expected"), [("epoch", ["a", "b"]), (2, [1, 3, 5]), (5, [4]), (1, [*range(6)])])
def test_regular_means_so_many_batches_whatever_the_epochs(freq: Any, expected: list[Any]) -> None:
    callback = Acts(freq, "every")
    callback.at = []
    for epoch, name in enumerate("ab"):
        callback.on_epoch_begin(epoch)
        for batch in range(3):
            callback.on_train_batch_end(batch, {"now": 3 * epoch + batch})
        callback.on_epoch_end(epoch, {"now": name})
    assert callback.at == expected


def test_arguments_are_checked() -> None:
    with pytest.raises(InputError, match="every is 0, expected an integer from 1 on"):
        SampleText("the king", TOKENIZER, every=0)
    with pytest.raises(InputError, match="save_freq is 'batch', expected an integer from 1 on"):
        AdapterCheckpoint("unused", save_freq="batch")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="abstract .*act"):
        Regular("epoch", "every")  # type: ignore[abstract]
