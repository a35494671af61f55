"""Libraries that train a GPT-J, one class for each: what `train.py` compares.

    PYTHON tests/benchmarks/trainers.py CLASS CHECKPOINT MODE

runs a worker in the environment that has the library. CHECKPOINT is a directory with `config.json` and one
`model.safetensors`; MODE is a dtype, and perhaps "XLA": "float32", "float32 XLA", "mixed_bfloat16".
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import generators
from peers import Peer, processors, serve

LEARNING_RATE = 1e-4


class Trainer(Peer):
    """A loaded model with AdamW, and how long a step on one batch takes.

    Args:
        checkpoint: the directory.
        mode: dtype, and whether XLA compiles.
    """

    def __init__(self, checkpoint: Path, mode: str) -> None:
        self.checkpoint = checkpoint
        self.dtype, _, compiler = mode.partition(" ")
        self.jit_compile = compiler == "XLA"
        self.vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        self.load()

    def load(self) -> None:
        """Load the model."""
        raise NotImplementedError

    def step(self, ids: Any) -> float:
        """Train on int32 [B, T], which are inputs and labels, and return the loss before."""
        raise NotImplementedError

    def measure(self, rows: int, tokens: int) -> dict[str, float]:
        """Milliseconds of one step, and the loss that it began with."""
        import numpy as np

        ids = np.random.default_rng(0).integers(0, self.vocabulary, (rows, tokens)).astype("int32")
        start = time.perf_counter()
        loss = self.step(ids)
        return {"step": 1e3 * (time.perf_counter() - start), "loss": loss}


class Ours(Trainer):
    """tfgptj on TensorFlow, by Keras's `train_on_batch`."""

    def facts(self) -> dict[str, Any]:
        from tfgptj.benchmark.machine import versions

        return {**super().facts(), "versions": versions()}

    def load(self) -> None:
        from tfgptj.heads import TFGPTJForCausalLM
        from tfgptj.training.optimizers import AdamW

        self.model = TFGPTJForCausalLM.from_pretrained(self.checkpoint, dtype=self.dtype)
        self.model.compile(AdamW(LEARNING_RATE), jit_compile=self.jit_compile)

    def step(self, ids: Any) -> float:
        self.model.reset_metrics()
        return float(self.model.train_on_batch(ids, return_dict=True)["loss"])


class Peak(Peer):
    """How fast this machine multiplies: TensorFlow's product of two large matrices."""

    def __init__(self, checkpoint: Path, mode: str) -> None:
        import tensorflow as tf

        self.size = 4096
        dtype = mode.removeprefix("mixed_").partition(" ")[0]
        self.matrix = tf.cast(tf.random.stateless_normal((self.size, self.size), (0, 0)), dtype)
        self.product = tf.function(tf.matmul)

    def gigaflops(self) -> float:
        """Measure once."""
        start = time.perf_counter()
        self.product(self.matrix, self.matrix)[0, 0].numpy()
        return 2 * self.size**3 / (time.perf_counter() - start) / 1e9


class HFTorch(Trainer):
    """Hugging Face's PyTorch class; mixed precision by PyTorch's autocast."""

    packages = ("transformers", "torch", "numpy")

    def load(self) -> None:
        import torch
        from transformers import GPTJForCausalLM

        torch.set_num_threads(processors())
        self.model = GPTJForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE)

    def step(self, ids: Any) -> float:
        import torch

        ids = torch.as_tensor(ids).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype != "float32"):
            loss = self.model(ids, labels=ids).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss)


class HFTensorFlow(Trainer):
    """Hugging Face's TensorFlow class, by `train_on_batch` of Keras 2."""

    packages = ("transformers", "tf_keras", "numpy")

    def load(self) -> None:
        import tensorflow as tf
        import tf_keras
        from transformers import TFGPTJForCausalLM

        tf_keras.mixed_precision.set_global_policy(self.dtype)
        generators.HFTensorFlow.prepare(self.checkpoint)
        directory = str(generators.HFTensorFlow.converted(self.checkpoint))
        self.model = TFGPTJForCausalLM.from_pretrained(directory, from_pt=True, use_safetensors=False)
        self.model.compile(optimizer=tf_keras.optimizers.AdamW(LEARNING_RATE), jit_compile=self.jit_compile)
        self.version = tf.__version__

    def step(self, ids: Any) -> float:
        self.model.reset_metrics()
        return float(self.model.train_on_batch({"input_ids": ids, "labels": ids}, return_dict=True)["loss"])

    def facts(self) -> dict[str, Any]:
        found = super().facts()
        return {**found, "versions": {"tensorflow": self.version, **found["versions"]}}


CLASSES = {cls.__name__: cls for cls in (Ours, Peak, HFTorch, HFTensorFlow)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cls", choices=CLASSES)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("mode")
    options = parser.parse_args()
    serve(lambda: CLASSES[options.cls](options.checkpoint, options.mode))


if __name__ == "__main__":
    main()
