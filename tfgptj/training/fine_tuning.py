"""Fine-tune a model on files with Keras's `fit`: the program behind `tfgptj train`."""

from __future__ import annotations

import math
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from tfgptj.files import write_json
from tfgptj.training.adapters import save_adapter
from tfgptj.training.callbacks import SampleText, StopOnNaN
from tfgptj.training.checkpointing import Checkpointing
from tfgptj.training.devices import Devices, is_first_worker
from tfgptj.training.freezing import freeze
from tfgptj.training.lora import add_lora
from tfgptj.training.optimizers import Adafactor, AdamW
from tfgptj.training.schedules import learning_rate_schedule
from tfgptj.training.settings import RUN_FILE, SUMMARY_FILE, FineTuning, check_output
from tfgptj.training.tasks import TOKENS_DIRECTORY, Task, open_task

ADAPTER_DIRECTORY, CHECKPOINTS_DIRECTORY, LOGS_DIRECTORY = "adapter", "checkpoints", "logs"


def fine_tune(
    settings: FineTuning, *, callbacks: Sequence[keras.callbacks.Callback] = (), verbose: int | None = None
) -> dict[str, Any]:
    """Train a model on files, evaluate it, and save it with its tokenizer in `settings.output_dir`.

    With `save_freq` a run that is cut off goes on when it is started again with the same settings. At its end the
    directory holds what `from_pretrained` loads, `summary.json`, and of LoRA the adapters in `adapter`.

    Args:
        settings: :class:`FineTuning`.
        callbacks: more of them, for `fit`.
        verbose: as for `fit`; None is a bar on a terminal and a line for each epoch elsewhere.

    Returns:
        What stands in `summary.json`: `train` and `validation`, with `loss` and what else the task is measured by;
        `before`, the same before training; `baseline`, what the likeliest label is worth; and the run's sizes.

    Raises:
        InputError: if settings or data make no sense, or there is something in the directory.
        TFGPTJError: whatever else the model, the data or the training have against it.
    """
    settings.check()
    check_output(settings)
    directory, is_first = Path(settings.output_dir), is_first_worker(settings.strategy)
    if is_first:
        _prepare(directory, settings)
    devices = Devices(settings.strategy)
    keras.utils.set_random_seed(settings.seed)
    task = open_task(settings)
    run = _Run(settings, task, devices)
    summary = run.train(list(callbacks), (1 if sys.stdout.isatty() else 2) if verbose is None else verbose)
    if is_first:
        _save(directory, settings, run)
        write_json(directory / SUMMARY_FILE, summary)
        (directory / RUN_FILE).unlink()
        _remove(directory)
    return summary


class _Run:
    """A model with its data, ready to be trained."""

    def __init__(self, settings: FineTuning, task: Task, devices: Devices) -> None:
        self.settings, self.task, self.devices = settings, task, devices
        whole = task.steps_per_epoch
        self.steps = settings.epochs * whole if settings.steps is None else settings.steps
        self.steps_per_epoch, self.epochs = min(whole, self.steps), math.ceil(self.steps / whole)
        with devices.scope():
            self.model = _load(settings, task)
            self.model.compile(
                _optimizer(settings, self.steps), metrics=task.metrics() or None, micro_batches=settings.micro_batches
            )

    def train(self, callbacks: list[Any], verbose: int) -> dict[str, Any]:
        """Fit, and measure before and after."""
        task, settings, start = self.task, self.settings, time.monotonic()
        validation = self._validation_data()
        before = self._evaluate(validation)
        checkpointing = None
        if settings.save_freq is not None:
            place = Path(settings.output_dir) / CHECKPOINTS_DIRECTORY
            checkpointing = Checkpointing(place, save_freq=settings.save_freq)  # type: ignore[arg-type]
        step, epoch = (checkpointing.step, checkpointing.epoch) if checkpointing else (0, 0)
        data = self.devices.feed(
            lambda size, shard: task.training_data(size, shard, start_step=step), settings.batch_size
        )
        history = self.model.fit(
            data, steps_per_epoch=self.steps_per_epoch, epochs=self.epochs, shuffle=False, verbose=verbose,
            initial_epoch=epoch if step < self.steps else self.epochs,
            validation_data=validation, validation_steps=task.validation_steps,
            callbacks=[*self._callbacks(checkpointing, self.steps - step), *callbacks],
        ).history  # fmt: skip
        found = {
            "train": {name: values[-1] for name, values in history.items() if not name.startswith("val_")},
            "validation": self._evaluate(validation),
            "before": before,
            "baseline": task.baseline() if task.has_validation else {},
        }
        facts = {
            "task": settings.task,
            "model": settings.model,
            "steps": self.steps,
            "epochs": self.steps / task.steps_per_epoch,
            "trainable": self.model.num_parameters(only_trainable=True),
            "parameters": self.model.num_parameters(),
            "seconds": round(time.monotonic() - start, 1),
        }
        scores = {
            part: {name: _plain(value) for name, value in values.items()} for part, values in found.items() if values
        }
        return {**scores, **facts}

    def _validation_data(self) -> Any:
        if not self.task.has_validation:
            return None
        return self.devices.feed(self.task.validation_data, self.settings.batch_size)

    def _evaluate(self, validation: Any) -> dict[str, float]:
        """All scores on the validation data; of the model as it is."""
        if validation is None:
            return {}
        found = self.model.evaluate(validation, steps=self.task.validation_steps, return_dict=True, verbose=0)
        return {**found, **self.task.scores(self.model, found)}

    def _callbacks(self, checkpointing: Checkpointing | None, steps: int) -> list[Any]:
        settings = self.settings
        found: list[Any] = [StopOnNaN(), _StopAt(steps)]
        if checkpointing is not None:
            found.append(checkpointing)
        if not is_first_worker(settings.strategy):
            return found
        if settings.tensorboard or settings.logs is not None:
            logs = settings.logs or str(Path(settings.output_dir) / LOGS_DIRECTORY)
            found.append(keras.callbacks.TensorBoard(logs, write_graph=False))
        if settings.sample_prompt is not None:
            found.append(SampleText(settings.sample_prompt, self.task.tokenizer))
        return found


class _StopAt(keras.callbacks.Callback):
    """Ends training after so many steps, in the midst of an epoch too."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._left -= 1
        if not self._left:
            self.model.stop_training = True


def _prepare(directory: Path, settings: FineTuning) -> None:
    """The directory as a run of these settings has it that has just begun, or was cut off."""
    directory.mkdir(parents=True, exist_ok=True)
    if settings.overwrite:
        for name in (SUMMARY_FILE, RUN_FILE):
            (directory / name).unlink(missing_ok=True)
        _remove(directory)
    write_json(directory / RUN_FILE, settings.fixed())


def _remove(directory: Path) -> None:
    """What only a run that goes on needs."""
    for name in (CHECKPOINTS_DIRECTORY, TOKENS_DIRECTORY):
        shutil.rmtree(directory / name, ignore_errors=True)


def _load(settings: FineTuning, task: Task) -> Any:
    with warnings.catch_warnings():
        # A head that begins at random is what this is for.
        warnings.filterwarnings("ignore", ".*They were initialised at random; train the model before you use it.")
        model = task.model_class.from_pretrained(
            settings.model, revision=settings.revision, dtype=settings.dtype, **task.overrides
        )
    if settings.remat:
        model.gradient_checkpointing_enable()
    if settings.freeze:
        freeze(model, settings.freeze)
    if settings.lora is not None:
        add_lora(model, settings.lora, settings.lora_alpha, settings.lora_targets, dropout=settings.lora_dropout)
    return model


def _optimizer(settings: FineTuning, steps: int) -> keras.optimizers.Optimizer:
    optimizers: dict[str, Any] = {"adamw": AdamW, "adafactor": Adafactor}
    kind: Any = settings.schedule
    rates = learning_rate_schedule(kind, settings.learning_rate, warmup_steps=settings.warmup_steps, total_steps=steps)
    return optimizers[settings.optimizer](
        rates, weight_decay=settings.weight_decay, global_clipnorm=settings.global_clipnorm or None
    )


def _save(directory: Path, settings: FineTuning, run: _Run) -> None:
    run.task.tokenizer.save_pretrained(directory)
    if settings.lora is not None:
        save_adapter(run.model, directory / ADAPTER_DIRECTORY, base_model=settings.model)
    if not settings.adapter_only:
        run.model.save_pretrained(directory)


def _plain(value: Any) -> float | str:
    """A number as JSON can hold it."""
    return float(value) if math.isfinite(value) else str(float(value))
