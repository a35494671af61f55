"""A small run that is always the same, and a program that is killed at a batch of it: see test_killed_runs.py.

    python killed_runs.py DIRECTORY BATCH before|within|after

kills itself, by a signal that cannot be caught, at the batch: before it is written, while it is written, or after.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj import GPTJConfig, GPTJTokenizer, TFGPTJForCausalLM
from tfgptj.training.checkpointing import Checkpointing
from tfgptj.training.data import language_modeling_dataset

SMALL_VOCAB = Path(__file__).parent / "fixtures" / "small_vocab"
TEXTS = [f"the king number {n} and all his {n * n} men of war\n" * (n % 5) for n in range(40)]
EPOCHS, STEPS = 3, 6
SIZES: dict[str, Any] = {"vocab_size": 48, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 16}
DROPOUT: dict[str, Any] = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}


def new_model(dtype: str = "float32", lora: bool = False, quantized: str | None = None, **fields: Any) -> Any:
    """A model with dropout, always with the same weights and seeds."""
    keras.utils.set_random_seed(0)
    model = TFGPTJForCausalLM(GPTJConfig(**{**SIZES, **DROPOUT, **fields}, eos_token_id=None), dtype=dtype)
    if quantized is not None:
        model.quantize(quantized, filters="q_proj")
    if lora:
        model.add_lora(rank=2, targets=["q_proj", "fc_in"], dropout=0.1, bias="lora_only")
    optimizer = keras.optimizers.AdamW(1e-2, use_ema=True, ema_overwrite_frequency=5)
    if dtype == "mixed_float16":  # a scale that grows, and is too large at first
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**40, dynamic_growth_steps=4)
    model.compile(optimizer)
    return model


def train(directory: Path, model: Any, *callbacks: Any, save_freq: Any = 4, **options: Any) -> Checkpointing:
    """From where the directory's checkpoint is to the end."""
    checkpointing = Checkpointing(directory, save_freq=save_freq, **options)
    data = language_modeling_dataset(
        TEXTS,
        GPTJTokenizer.from_directory(SMALL_VOCAB),
        block_size=16,
        batch_size=2,
        epochs=None,
        start_step=checkpointing.step,
        separate_documents=True,
    ).map(lambda x, y: ({**x, "input_ids": x["input_ids"] % 48}, y % 48))
    model.fit(
        data,
        epochs=EPOCHS,
        steps_per_epoch=STEPS,
        initial_epoch=checkpointing.epoch,
        callbacks=[checkpointing, *callbacks],
        shuffle=False,
        verbose=0,
    )
    return checkpointing


def bits(model: Any) -> dict[str, np.ndarray]:
    """All that a model and its optimizer hold, random seeds too."""
    variables = [*model.variables, *model.optimizer.variables]
    return {
        f"{number} {variable.path.rpartition('/')[2]}": np.array(ops.convert_to_numpy(ops.convert_to_tensor(variable)))
        for number, variable in enumerate(variables)
    }


class Stop(keras.callbacks.Callback):
    """Calls a function after the batch with a number, counted from 1."""

    def __init__(self, at: int, function: Any) -> None:
        super().__init__()
        self.left, self.function = at, function

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if not self.left:
            self.function()


def main(directory: str, batch: str, when: str) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if when == "within":
        sync, count = os.fsync, iter(range(1, int(batch)))

        def killed(descriptor: int) -> None:
            if next(count, None) is None:
                kill()
            sync(descriptor)

        os.fsync = killed  # the file is written, and has no name yet; or has it, and the old one is there too
    model = new_model()
    train(Path(directory), model, *([] if when == "within" else [Stop(int(batch), kill)]), save_freq=2)
    np.savez(Path(directory) / "end.npz", **bits(model))


if __name__ == "__main__":
    main(*sys.argv[1:])
