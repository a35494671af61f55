"""Checkpoints of any size with random weights, written one tensor at a time.

python tests/benchmarks/random_checkpoint.py DIRECTORY [--width 2048] [--layers 8] [--heads 16] [--dtype float32]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfgptj.checkpoints.mapping import Entry
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorSpec
from tfgptj.checkpoints.write import write_checkpoint
from tfgptj.config import GPTJConfig


class RandomWeights:
    """What `write_checkpoint` takes weights from: normally distributed, of the size that a trained model's have.

    Every tensor is made of the same few million random numbers, begun at another place; to draw six billion would take
    longer than to write them.
    """

    head = "causal_lm"

    def __init__(self, config: GPTJConfig, dtype: str) -> None:
        self.config, self.documents = config, dict[str, bytes]()
        self._dtype = FLOAT_DTYPES[dtype]
        self._generator = np.random.default_rng(0)
        self._numbers = (0.02 * self._generator.standard_normal(2**23, np.float32)).astype(self._dtype)

    def dtype(self, entry: Entry) -> np.dtype[Any]:
        """The dtype of all weights."""
        return self._dtype

    def values(self, wanted: Sequence[tuple[Entry, TensorSpec, bool]]) -> Iterator[np.ndarray]:
        """Random numbers; those that scale are about 1."""
        for entry, spec, _ in wanted:
            start = int(self._generator.integers(self._numbers.size))
            array = np.resize(np.roll(self._numbers, start), spec.shape)
            yield array + self._dtype.type(1) if entry.variable.endswith("gamma") else array


def write_random_checkpoint(
    directory: Path, config: GPTJConfig, *, dtype: str = "float32", format: str = "safetensors", shard: str = "10GB"
) -> None:
    """A causal language model with random weights, in any format; "bin" needs PyTorch."""
    source = RandomWeights(config, dtype)
    if format != "bin":
        write_checkpoint(directory, source, format=format, max_shard_size=shard)
        return
    import torch
    from safetensors.torch import load_file

    write_checkpoint(directory, source, max_shard_size="1TB")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    for name, value in {"width": 2048, "layers": 8, "heads": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32", choices=FLOAT_DTYPES)
    options = parser.parse_args()
    rotary = min(64, options.width // options.heads)
    shape = {"n_embd": options.width, "n_layer": options.layers, "n_head": options.heads, "rotary_dim": rotary}
    write_random_checkpoint(options.directory, GPTJConfig(**shape), dtype=options.dtype)


if __name__ == "__main__":
    main()
