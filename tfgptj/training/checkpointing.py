"""Runs that go on where they were cut off, as if nothing had happened."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from tfgptj.batching import check_positive
from tfgptj.errors import InputError
from tfgptj.files import remove_temporaries, sync_directory
from tfgptj.training.state import Position, TorchRandom, read_position, restore_state, torch_random, write_state
from tfgptj.workers import is_chief

_NAME = re.compile(r"step-(\d{8,})\.safetensors")

# What `stop_training` is set to where an epoch ends before its data do; anything true ends it.
_END_OF_EPOCH = "end of the epoch"


class Checkpointing(keras.callbacks.Callback):
    """Writes a run's whole state now and then, and goes on from there: the same program, started again, resumes.

    Weights, optimizer, loss scale and random seeds are restored to the last bit, so that a run which is killed at any
    moment ends with the very weights of one that is not. The data must begin where the run was: say so with
    `start_step=checkpointing.step` in the package's datasets, or with `dataset.repeat().skip(checkpointing.step)` and
    `steps_per_epoch`; an error tells of forgetting it. Where `fit` counts epochs, it gets
    `initial_epoch=checkpointing.epoch`.

    A file takes its name when all of it is on disk, and older ones are removed after that. So a crash, or a full disk,
    which ends training with an error, leaves the checkpoint before. Weights that are NaN or infinite are not written.
    What other callbacks remember, such as the patience of `EarlyStopping`, is not kept, and an epoch that is resumed
    reports its means over what was left of it.

    Give `fit` data of a known length, or `steps_per_epoch`: where TensorFlow does not know the length, parts of a step
    that finds no data are still executed, or are not: it may draw seeds, and count among the optimizer's iterations.

    Under a strategy of several workers the first one writes; all read, so the directory must be one that all see.

    Args:
        directory: for the checkpoints of this run, and of no other.
        save_freq: batches between two checkpoints, or "epoch". There is always one after the last epoch.
        keep: how many checkpoints to keep, the newest ones.

    Raises:
        InputError: if an argument is invalid.
        CheckpointFormatError: if the newest checkpoint is damaged.

    >>> import tempfile
    >>> import numpy as np, tensorflow as tf
    >>> from tfgptj import GPTJConfig, TFGPTJForCausalLM
    >>> data = tf.data.Dataset.from_tensors(np.ones((2, 8), "int32"))
    >>> model = TFGPTJForCausalLM(GPTJConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=1, rotary_dim=4))
    >>> model.compile("sgd")
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     for _ in range(2):  # the second time there is nothing left to do
    ...         checkpointing = Checkpointing(directory, save_freq=2)
    ...         print(checkpointing.step, checkpointing.epoch)
    ...         history = model.fit(
    ...             data.repeat().skip(checkpointing.step), steps_per_epoch=3, epochs=2, verbose=0,
    ...             shuffle=False, initial_epoch=checkpointing.epoch, callbacks=[checkpointing],
    ...         )
    0 0
    6 2
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, save_freq: int | Literal["epoch"] = "epoch", keep: int = 1
    ) -> None:
        super().__init__()
        check_positive("keep", keep)
        if save_freq != "epoch":
            check_positive("save_freq", save_freq)
        self.directory, self.save_freq, self.keep = Path(directory), save_freq, keep
        newest = max(self._files(), default=None)
        self._path = None if newest is None else newest[1]
        self._start = Position() if newest is None else read_position(newest[1])
        self._now = self._start  # while a run goes on
        self._saved = self._start.step
        self._told: set[str] = set()
        self._is_used = False
        self._random: list[tuple[TorchRandom, np.ndarray]] = []

    @property
    def step(self) -> int:
        """Batches that the run has behind it: those that the data must leave out."""
        self._told.add("step")
        return self._start.step

    @property
    def epoch(self) -> int:
        """Epochs that the run has behind it: `initial_epoch` of `fit`."""
        self._told.add("epoch")
        return self._start.epoch

    def on_train_begin(self, logs: Any = None) -> None:
        if self._is_used:
            raise InputError("a Checkpointing serves one call of fit: make another one, which reads the directory anew")
        self._is_used = True
        if self._path is not None:
            self._check_told()
            self._check_epochs()
            restore_state(self._path, self.model)
            if "step" in self._told:
                self._random = [(random, np.array(random)) for random in torch_random()]
        else:
            self._now = Position(steps_per_epoch=self.params["steps"] or 0)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch != self._now.epoch:
            raise InputError(
                f"{self.directory}: the run goes on in epoch {self._now.epoch}, and fit began with {epoch}: give it "
                "initial_epoch=checkpointing.epoch"
            )

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # PyTorch's data loader draws a random number when it starts, which it did before the checkpoint, too.
        while self._random:
            random, value = self._random.pop()
            random.assign(value)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        start, steps = self._start, self._now.steps_per_epoch
        offset = start.step_in_epoch if self._now.epoch == start.epoch else 0
        done = offset + batch + 1
        self._now = self._now._replace(step=self._now.step + done - self._now.step_in_epoch, step_in_epoch=done)
        if steps and done >= steps:  # the epoch ends here, and what is to be saved is saved then
            if offset:
                self.model.stop_training = _END_OF_EPOCH
        elif self.save_freq != "epoch" and self._is_due(self.save_freq):
            self._save()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.model.stop_training == _END_OF_EPOCH:  # nobody else wants to stop
            self.model.stop_training = False
        self._now = self._now._replace(epoch=epoch + 1, step_in_epoch=0)
        is_last = epoch + 1 == self.params["epochs"]
        if is_last or self.save_freq == "epoch" or self._is_due(self.save_freq):
            self._save()

    def _is_due(self, save_freq: int) -> bool:
        return self._now.step // save_freq > self._saved // save_freq

    def _files(self) -> list[tuple[int, Path]]:
        """Steps and paths of all checkpoints."""
        found = [(_NAME.fullmatch(path.name), path) for path in self.directory.glob("step-*.safetensors")]
        return sorted((int(match[1]), path) for match, path in found if match)

    def _save(self) -> None:
        self._saved = self._now.step
        if not is_chief(self.model):
            return
        write_state(self.directory / f"step-{self._now.step:08}.safetensors", self.model, self._now)
        for _, path in self._files()[: -self.keep]:
            path.unlink()
        remove_temporaries(self.directory)
        sync_directory(self.directory)

    def _check_told(self) -> None:
        if "step" in self._told or ("epoch" in self._told and not self._start.step_in_epoch):
            return
        raise InputError(
            f"{self.directory}: the run has {self._start.step} steps behind it, and nobody asked: make the data begin "
            "there, with start_step=checkpointing.step or dataset.repeat().skip(checkpointing.step), or choose another "
            "directory for a new run"
        )

    def _check_epochs(self) -> None:
        """Whether the epoch that was cut off can be completed, and those that follow are whole."""
        start, steps = self._start, self.params["steps"] or 0
        is_rest = steps == (start.steps_per_epoch - start.step_in_epoch if start.steps_per_epoch else 0)
        if start.step_in_epoch and is_rest and self.params["epochs"] > start.epoch + 1:
            raise InputError(
                f"{self.directory}: the data begin behind step {start.step}, and would do so in every epoch: give fit "
                "data without end, as of dataset.repeat().skip(checkpointing.step), and steps_per_epoch"
            )
        if steps != start.steps_per_epoch and not (start.step_in_epoch and is_rest):
            raise InputError(
                f"{self.directory}: the run has {start.steps_per_epoch or 'an unknown number of'} steps per epoch, and "
                f"now fit has {steps or 'an unknown number of them'}: give it data and steps_per_epoch as before"
            )
