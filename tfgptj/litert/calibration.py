"""Rounding for what a model reads: a text goes through its blocks while they are converted.

What each matrix is multiplied with on the way says which errors of it count, and which make up for each other (see
`quantization.py`). The blocks are those of the checkpoint, not the rounded ones, which gives results as good, and their
order is that of the conversion, so that one block is in memory at a time, beside what it is given for the text [K, D].
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tfgptj import limits
from tfgptj.activations import activation_layer
from tfgptj.config import GPTJConfig
from tfgptj.errors import InputError
from tfgptj.generation.compiling import to_numpy
from tfgptj.litert.attention import attended, normalised, places, turned
from tfgptj.litert.blocks import Block
from tfgptj.litert.quantization import Matrix, input_factors, quantized
from tfgptj.litert.weights import Precision, WeightReader
from tfgptj.tokenizer import GPTJTokenizer

# Tokens that a piece of the text has, that all pieces have together, and without which inputs are known too little.
_PIECE, _MOST, LEAST_TOKENS = 512, 4096, 1024


def read_pieces(path: str | os.PathLike[str], tokenizer: GPTJTokenizer, config: GPTJConfig) -> np.ndarray:
    """Pieces of a text, int [B, T], from its beginning to its end and equally far from each other.

    Args:
        path: the text, in UTF-8.
        tokenizer: of the model.
        config: of the model.

    Raises:
        InputError: if it cannot be read, is no text in UTF-8, too long or too short, or the tokenizer another model's.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limits.MAX_CALIBRATION_BYTES:
            raise InputError(
                f"{path}: has {size:,} bytes, at most {limits.MAX_CALIBRATION_BYTES:,} are read: take a part of it"
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text in UTF-8: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: the text to calibrate with could not be read: {error.strerror}") from error
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), "int32")
    if len(ids) < LEAST_TOKENS:
        raise InputError(f"{path}: has {len(ids):,} tokens, and calibration takes at least {LEAST_TOKENS:,}")
    if ids.max() >= config.vocab_size:
        raise InputError(
            f"the tokenizer makes token {ids.max():,} of {path}, and the model has {config.vocab_size:,}: "
            "take the tokenizer that the model was trained with"
        )
    length = min(config.n_positions, _PIECE)
    starts = np.linspace(0, len(ids) - length, min(len(ids), _MOST) // length).astype(int)
    return np.stack([ids[start : start + length] for start in starts])


class Calibration:
    """A text on its way through a model.

    Args:
        reader: of the checkpoint.
        pieces: of the text, int [B, T].
        precision: of the matrices.

    Attributes:
        hidden: what the next block is given, float32 [K, D].
        tokens: of all pieces.
    """

    def __init__(self, reader: WeightReader, pieces: np.ndarray, precision: Precision) -> None:
        self.config, self.precision = reader.config, precision
        [embeddings] = reader.floats(["embedding.wte.embeddings"])
        self.hidden = embeddings[pieces.reshape(-1)]
        self._shape, self.tokens = pieces.shape, pieces.size
        self._activation = activation_layer(self.config.activation_function)
        positions = np.arange(pieces.shape[1])[None]
        seen = np.tri(pieces.shape[1], dtype=bool)[None, None]
        self._where = places(self.config, positions, seen, 0)
        self._scale = np.float32(1 / math.sqrt(self.config.head_dim))

    def block(self, kernels: dict[str, np.ndarray], vectors: dict[str, np.ndarray]) -> Block:
        """Round the matrices of the next block, and go through it.

        Args:
            kernels: float32, by the names of :class:`tfgptj.litert.blocks.Block`; emptied.
            vectors: likewise.
        """
        normal = self._normalised(vectors["ln_1.gamma"], vectors["ln_1.beta"])
        factors, matrices = input_factors(normal), {}

        def product(name: str, inputs: np.ndarray, factors: list[np.ndarray]) -> np.ndarray:
            kernel = kernels.pop(name)
            matrices[name] = self._rounded(kernel, factors)
            return inputs @ kernel.T

        mixed = self._mixed(product("qkv", normal, factors))
        middle = product("fc_in", normal, factors)
        middle += vectors["mlp.fc_in.bias"]
        for rows in self._rows():
            middle[rows] = to_numpy(self._activation(middle[rows]))
        self.hidden += product("out_proj", mixed, input_factors(mixed))
        self.hidden += product("fc_out", middle, input_factors(middle))
        self.hidden += vectors["mlp.fc_out.bias"]
        return Block(matrices, vectors)

    def head(self, kernel: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> Matrix:
        """The matrix of the LM head [V, D], rounded for what comes out of the last block."""
        return quantized(kernel, self.precision.head_bits, None, input_factors(self._normalised(gamma, beta)))

    def _rounded(self, kernel: np.ndarray, factors: list[np.ndarray]) -> Matrix:
        return quantized(kernel, self.precision.bits, self.precision.block_size, factors)

    def _normalised(self, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
        return normalised(self.hidden, gamma, beta, self.config.layer_norm_epsilon)

    def _rows(self) -> Iterator[slice]:
        """The tokens of each piece among those of all."""
        pieces, length = self._shape
        return (slice(i * length, (i + 1) * length) for i in range(pieces))

    def _mixed(self, projected: np.ndarray) -> np.ndarray:
        """Of queries, keys and values [K, 3 D], which are overwritten, the mixed values [K, D]."""
        mixed = np.empty_like(self.hidden)
        for rows in self._rows():
            heads = projected[rows].reshape(1, -1, 3, self.config.n_head, self.config.head_dim)
            query, key, value = turned(heads, self._where)
            found, _ = attended(query * self._scale, key, value, self._where.bias)  # [1, N, T, H]
            mixed[rows] = found.swapaxes(1, 2).reshape(self._shape[1], -1)
        return mixed
