"""The weights of a checkpoint on their way into graphs: checked, read a few at a time, and rounded to few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tfgptj.checkpoints.convert import StoredWeights
from tfgptj.checkpoints.mapping import Entry, plan
from tfgptj.checkpoints.tensors import TensorSpec
from tfgptj.checkpoints.write import Progress
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, ConfigError
from tfgptj.litert import blocks
from tfgptj.litert.layout import BITS, BLOCK_SIZES
from tfgptj.litert.quantization import quantized


class Precision(NamedTuple):
    """How the matrices are rounded."""

    bits: int  # of each number of the blocks' matrices
    block_size: int | None  # inputs that share a scale; None for one scale for each output
    head_bits: int

    @classmethod
    def of(cls, bits: int, block_size: int | None, head_bits: int | None) -> Precision:
        """That of arguments as :func:`tfgptj.litert.convert.convert` takes them."""
        block_size = 32 if block_size is None and bits == 4 else block_size or None
        return cls(bits, block_size, min(max(bits, 8), 32) if head_bits is None else head_bits)

    def check(self, config: GPTJConfig) -> None:
        """Refuse what a model cannot be converted to.

        Raises:
            ConfigError: for numbers of bits that there are not, or that the model's sizes do not allow.
        """
        bits, block_size = self.bits, self.block_size
        if bits not in BITS or self.head_bits not in BITS:
            raise ConfigError(f"bits and head_bits must be one of {BITS}, got {bits!r} and {self.head_bits!r}")
        if block_size is not None and (block_size not in BLOCK_SIZES or bits != 4):
            raise ConfigError(f"block_size must be one of {BLOCK_SIZES}, and belongs to 4 bits; got {block_size!r}")
        for width in (config.n_embd, config.inner_dim):
            if bits == 4 and width % (block_size or 2):
                raise ConfigError(
                    f"block_size={block_size or 0} does not divide {width}: choose another one, or 8 bits"
                )
        if config.activation_function in ("prelu", "xielu"):
            name = config.activation_function
            raise ConfigError(f"activation_function {name!r} has weights of its own, which no graph has room for")


class WeightReader:
    """Reads weights, and tells how far it is.

    Args:
        stored: the checkpoint.
        progress: called with the bytes that are read and those that there will be, as float32.

    Raises:
        CheckpointError: if the checkpoint holds no language model.
    """

    def __init__(self, stored: StoredWeights, progress: Progress) -> None:
        if stored.head != "causal_lm":
            raise CheckpointError(f"the checkpoint has the head {stored.head!r}; only language models can be converted")
        self.stored, self.config = stored, stored.config
        self.entries = {entry.variable: entry for entry in plan(stored.config, stored.head)}
        self._progress, self._done = progress, 0
        self._total = sum(4 * int(np.prod(entry.shape)) for entry in self.entries.values())

    def block(
        self, layer: int, precision: Precision, arranged: Callable[[str, np.ndarray], np.ndarray] = lambda name, x: x
    ) -> blocks.Block:
        """The weights of a block.

        Args:
            layer: which.
            precision: of the matrices.
            arranged: what becomes of the kernels of queries, keys and values, by their letters.
        """
        kernels, vectors = self.kernels(layer, arranged)
        matrices = {name: quantized(kernels.pop(name), precision.bits, precision.block_size) for name in [*kernels]}
        return blocks.Block(matrices, vectors)

    def kernels(
        self, layer: int, arranged: Callable[[str, np.ndarray], np.ndarray] = lambda name, x: x
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The matrices of a block in float32, and its vectors."""
        names = [f"blocks.{layer}.{name}" for name in blocks.WEIGHTS]
        found = dict(zip(blocks.WEIGHTS, self.floats(names), strict=True))
        qkv = np.concatenate([arranged(letter, found.pop(f"attn.{letter}_proj.kernel")) for letter in "qkv"])
        kernels = {"qkv": qkv}
        for home, name in (("mlp", "fc_in"), ("attn", "out_proj"), ("mlp", "fc_out")):
            kernels[name] = found.pop(f"{home}.{name}.kernel")
        return kernels, found

    def head(self) -> Iterator[np.ndarray]:
        """The kernel [V, D] and the bias of the LM head."""
        tied = self.config.tie_word_embeddings
        return self.floats(
            ["embedding.wte.embeddings", "lm_head.bias"] if tied else ["lm_head.dense.kernel", "lm_head.dense.bias"]
        )

    def floats(self, names: list[str]) -> Iterator[np.ndarray]:
        """Weights in float32, one after the other."""
        entries = [self.entries[name] for name in names]
        return self.values([(entry, TensorSpec(entry.variable, entry.shape, np.dtype("float32"))) for entry in entries])

    def values(self, wanted: list[tuple[Entry, TensorSpec]]) -> Iterator[Any]:
        """Weights in the dtypes of their specs.

        Raises:
            CheckpointError: if one holds NaN or infinite values.
        """
        values = self.stored.values([(entry, spec, False) for entry, spec in wanted])
        for (entry, _), value in zip(wanted, values, strict=True):
            if not np.isfinite(value.astype("float32", copy=False)).all():
                raise CheckpointError(f"{entry.variable}: holds NaN or infinite values; see tfgptj validate")
            self._done += 4 * value.size
            self._progress(min(self._done, self._total), self._total)
            yield value
