"""Callbacks for `fit`: stop at NaN, save adapters, show what the model writes by now."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from typing import Any, Literal

import keras

from tfgptj.batching import check_positive
from tfgptj.errors import InputError, NonFiniteLossError
from tfgptj.tokenizer import GPTJTokenizer
from tfgptj.training.adapters import save_adapter


class StopOnNaN(keras.callbacks.Callback):
    """Ends training with an error at the first batch whose loss is NaN or infinite.

    Put it before callbacks that save. (`Checkpointing` writes no such weights wherever it stands.) What `fit` shows is
    the mean over an epoch, so with `steps_per_execution` the batch is known up to that number.

    >>> StopOnNaN().on_train_batch_end(3, {"loss": 0.5})
    """

    def __init__(self) -> None:
        super().__init__()
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {float(loss)} at epoch {self._epoch + 1}, batch {batch + 1} of this call of fit: lower "
                "the learning rate, clip gradients, or look at the data. The model in memory is of no use any more"
            )


class Regular(keras.callbacks.Callback, ABC):
    """What is done at the end of every epoch, or every so many batches.

    Args:
        freq: the batches, or "epoch".
        name: how the argument is called.

    Raises:
        InputError: if it is neither.
    """

    def __init__(self, freq: int | Literal["epoch"], name: str) -> None:
        super().__init__()
        if freq != "epoch":
            check_positive(name, freq)
        self.freq, self._batches, self._last = freq, 0, -1

    @abstractmethod
    def act(self, logs: dict[str, Any]) -> None:
        """Do it."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._last = -1

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        before, self._batches = self._batches, self._batches + batch - self._last
        self._last = batch
        if self.freq != "epoch" and self._batches // self.freq > before // self.freq:
            self.act(logs or {})

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.freq == "epoch":
            self.act(logs or {})


class AdapterCheckpoint(Regular):
    """Saves a model's LoRA adapters as :func:`tfgptj.training.adapters.save_adapter` does: a few MB each time.

    Args:
        directory: where to; the adapters there are replaced, in one step.
        save_freq: "epoch", or a number of batches.
        monitor: a name in the logs, such as "val_loss": adapters are saved when it is lower than it ever was.
        base_model, dtype: as for `save_adapter`.

    Raises:
        InputError: if `save_freq` is neither; in training, if the logs have nothing of the name `monitor`, or the model
            no adapters.
        CheckpointError: in training, if the files cannot be written.

    >>> callback = AdapterCheckpoint("my-adapter", monitor="val_loss")
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        save_freq: int | Literal["epoch"] = "epoch",
        monitor: str | None = None,
        base_model: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(save_freq, "save_freq")
        self.directory, self.monitor = directory, monitor
        self.options: dict[str, Any] = {"base_model": base_model, "dtype": dtype}
        self.best = math.inf

    def act(self, logs: dict[str, Any]) -> None:
        if self.monitor is not None:
            if self.monitor not in logs:
                raise InputError(f"monitor is {self.monitor!r}, and the logs have only {', '.join(logs) or 'nothing'}")
            value = float(logs[self.monitor])
            if not value < self.best:
                return
            self.best = value
        save_adapter(self.model, self.directory, **self.options)


class SampleText(Regular):
    """Prints how a causal language model goes on with a prompt by now; training goes on as if it had not.

    Args:
        prompt: what the text begins with.
        tokenizer: the model's.
        every: "epoch", or a number of batches.
        seed: of what is drawn, the same each time.
        **parameters: as for `model.generate`; without any, 40 tokens are added.

    Raises:
        InputError: if `every` is neither.

    >>> from tfgptj import GPTJTokenizer
    >>> callback = SampleText("ROMEO:", GPTJTokenizer.from_pretrained("shakespeare"), every=100, do_sample=True)
    """

    def __init__(
        self,
        prompt: str,
        tokenizer: GPTJTokenizer,
        *,
        every: int | Literal["epoch"] = "epoch",
        seed: int = 0,
        **parameters: Any,
    ) -> None:
        super().__init__(every, "every")
        self.prompt, self.tokenizer = prompt, tokenizer
        self.parameters = {"max_new_tokens": 40, "seed": seed, **parameters}

    def act(self, logs: dict[str, Any]) -> None:
        ids = self.model.generate([self.tokenizer.encode(self.prompt)], **self.parameters)
        print(f"\n{self.tokenizer.decode(ids[0], skip_special_tokens=True)}")
