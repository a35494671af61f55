"""A GPT-J in ggml's own format, the one before GGUF, which `ctransformers` reads: blocks of 32 numbers with one scale.

Written from a checkpoint some rows at a time. This module needs NumPy and safetensors and nothing else, so that it runs
where the rival is.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import safe_open

MAGIC = 0x67676D6C
QUANTIZATION_VERSION = 2  # since scales are float16; it stands in the file's type, times 1000
FLOAT32 = 0  # a tensor's type
BLOCK = 32
ROWS = 1024  # that are encoded at a time


def encode_q8_0(values: np.ndarray) -> np.ndarray:
    """Blocks of 8 bits: a float16 scale, and 32 whole numbers from -127 to 127 that it multiplies.

    Args:
        values: float32 [rows, columns]; the columns a multiple of 32.

    Returns:
        uint8 [blocks, 34].
    """
    blocks = values.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(1, keepdims=True) / 127
    numbers = np.rint(blocks * inverse(scales)).astype(np.int8)
    return np.concatenate([scales.astype("<f2").view(np.uint8), numbers.view(np.uint8)], 1)


def encode_q4_0(values: np.ndarray) -> np.ndarray:
    """Blocks of 4 bits: a float16 scale, and 32 numbers from 0 to 15, of which 8 is zero.

    The number that is farthest from zero becomes -8 times the scale, which so has its opposite sign. The first half of
    the block is in the lower halves of the bytes, the second half in the upper ones.

    Args:
        values: float32 [rows, columns]; the columns a multiple of 32.

    Returns:
        uint8 [blocks, 18].
    """
    blocks = values.reshape(-1, BLOCK)
    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    scales = farthest / -8
    numbers = np.minimum(np.floor(blocks * inverse(scales) + 8.5), 15).astype(np.uint8)
    packed = numbers[:, : BLOCK // 2] | numbers[:, BLOCK // 2 :] << 4
    return np.concatenate([scales.astype("<f2").view(np.uint8), packed], 1)


def inverse(scales: np.ndarray) -> np.ndarray:
    """One by each scale; of a block of zeros, zero."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


class Kind(NamedTuple):
    """How matrices are stored: ggml's number for the whole file, and for a tensor, and what writes blocks."""

    file_type: int
    tensor_type: int
    encode: Callable[[np.ndarray], np.ndarray]


KINDS = {"q8_0": Kind(7, 8, encode_q8_0), "q4_0": Kind(2, 2, encode_q4_0)}


def write_ggml(checkpoint: Path, path: Path, kind: str) -> None:
    """Write a checkpoint as one file; the tokens' texts are their ids in digits.

    Args:
        checkpoint: a directory with `config.json` and one `model.safetensors` of a causal language model.
        path: the new file.
        kind: of `KINDS`.

    Raises:
        ValueError: if rows of a matrix cannot be cut into blocks.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as weights, path.open("wb") as file:
        file.write(header(config, KINDS[kind].file_type))
        for name in weights.keys():  # noqa: SIM118  # the file is no mapping
            if not name.endswith((".attn.bias", ".attn.masked_bias")):  # buffers of old checkpoints
                write_tensor(file, name, weights.get_slice(name), KINDS[kind])


def header(config: dict[str, Any], file_type: int) -> bytes:
    """Sizes and vocabulary."""
    sizes = [config[name] for name in ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer", "rotary_dim")]
    fields = [MAGIC, *sizes, QUANTIZATION_VERSION * 1000 + file_type, config["vocab_size"]]
    return struct.pack(f"<{len(fields)}I", *fields) + b"".join(words(range(config["vocab_size"])))


def words(tokens: Iterable[int]) -> Iterable[bytes]:
    """The texts of tokens, each behind its length."""
    for text in map(str, tokens):
        yield struct.pack("<I", len(text)) + text.encode()


def write_tensor(file: BinaryIO, name: str, values: Any, kind: Kind) -> None:
    """One tensor; what has one dimension stays float32."""
    shape = tuple(values.get_shape())
    is_matrix = len(shape) > 1
    if is_matrix and shape[-1] % BLOCK:
        raise ValueError(f"{name}: rows of {shape[-1]} numbers cannot be cut into blocks of {BLOCK}")
    fields = [len(shape), len(name), kind.tensor_type if is_matrix else FLOAT32, *reversed(shape)]
    file.write(struct.pack(f"<{len(fields)}I", *fields) + name.encode())
    for start in range(0, shape[0], ROWS):
        rows = np.asarray(values[start : min(start + ROWS, shape[0])], "<f4")
        file.write((kind.encode(rows) if is_matrix else rows).tobytes())
