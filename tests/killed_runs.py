"""A small run that is always the same, and a program that begins it and is killed again and again: test_killed_runs.py.

    python killed_runs.py DIRECTORY SEED

The kills come by a signal that cannot be caught, at random moments: after a batch, or while its checkpoint is written.
"""

from __future__ import annotations

import json
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
EPOCHS, STEPS, KILLS = 3, 6, 5
SIZES: dict[str, Any] = {"vocab_size": 48, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 16}
DROPOUT: dict[str, Any] = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}


def new_model(
    dtype: str = "float32",
    lora: bool = False,
    quantized: str | None = None,
    run_eagerly: bool = keras.backend.backend() == "tensorflow",
    **fields: Any,
) -> Any:
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
    model.compile(optimizer, run_eagerly=run_eagerly)
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


def main(directory: str, seed: str) -> None:
    """Start the run, and start it anew, as often as it is to be killed.

    Each start is a process forked from this one, which has imported everything and computed nothing, so that no thread
    is lost. That saves five imports of TensorFlow.
    """
    random = np.random.default_rng(int(seed))
    for _ in range(KILLS):
        # Which batch is completed, or which file or directory is written to disk, counted from the start.
        moment, at = ("batch", random.integers(1, 4)) if random.random() < 0.4 else ("sync", random.integers(1, 5))
        child = os.fork()
        if not child:
            doomed(Path(directory), moment, int(at))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = sorted(path.name for path in Path(directory).iterdir())
        print(json.dumps({"status": status, "moment": moment, "at": int(at), "left": left}), flush=True)


def doomed(directory: Path, moment: str, at: int) -> None:
    """Go on with the run until it kills itself."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    sync, count = os.fsync, iter(range(1, at))

    def killed(descriptor: int) -> None:
        if next(count, None) is None:
            kill()
        sync(descriptor)

    if moment == "sync":
        os.fsync = killed  # the file is written, and has no name yet; or has it, and the old one is there too
    train(directory, new_model(), *([Stop(at, kill)] if moment == "batch" else []), save_freq=2)


if __name__ == "__main__":
    main(*sys.argv[1:])
