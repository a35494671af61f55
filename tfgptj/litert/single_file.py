"""A checkpoint to one `.tflite` file that is the whole model, for phones: LiteRT alone runs it.

Its graph can be called as `prefill` and as `decode`, which is the same but for the number of tokens. The cache of keys
and values comes in and goes out. Behind the graph stands a ZIP archive, as LiteRT's metadata tools have it, with the
configuration and the tokenizer.
"""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tfgptj import limits
from tfgptj.checkpoints.convert import stored_weights
from tfgptj.checkpoints.write import Progress
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, ConfigError
from tfgptj.files import json_bytes, replaced_file
from tfgptj.litert.blocks import GELUS, Block, entered, fed
from tfgptj.litert.graph import Tensor
from tfgptj.litert.quantization import Matrix, quantized
from tfgptj.litert.sequences import ACTIVATIONS, SequenceGraph
from tfgptj.litert.weights import Precision, WeightReader
from tfgptj.rotary import BASE

SIGNATURES = ("prefill", "decode")


def convert_to_file(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    bits: int = 8,
    block_size: int | None = None,
    head_bits: int | None = None,
    positions: int | None = None,
    weights: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    **hub_options: Any,
) -> None:
    """Write a language model as one file, that LiteRT runs without this package. It is in memory until it is written.

    Both signatures, `prefill` and `decode`, take `tokens` int32 [1, T]; their places `input_pos` int32 [T], which
    follow each other; and the cache, `kv_cache_k_0`, `kv_cache_v_0`, … float32 [1, N, S, H]: zeros at first, then what
    came out. They give `logits` float32 [1, V] after the last token, and the cache. T is 1 unless the input is resized.
    Tokens and places that there are not are errors of the interpreter.

    Args:
        source: a directory, the name of a packaged model, or a Hub id.
        destination: the file.
        bits, block_size, head_bits: as for :func:`tfgptj.litert.convert.convert`. The embedding has 8 bits, or 32 where
            `bits` is 32.
        positions: tokens of a text at most (S), which the cache has room for; None for `n_positions`. Each step looks
            at all of them, so that fewer are faster.
        weights: which files to read, where there are several formats.
        overwrite: replace a file that is there, in one step.
        progress: called with the bytes that are read and those that there will be.
        **hub_options: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        CheckpointError: if the source cannot be read, holds no language model, or NaN, or the destination not written.
        CheckpointFormatError, CheckpointMismatchError: if the source is damaged, or not what its configuration says.
        ConfigError: for numbers of bits or positions that there are not, an activation that graphs have not, or a file
            of 2 GiB or more, which phones cannot map.
    """
    destination = Path(destination)
    if destination.is_dir() or destination.exists() and not overwrite:
        raise CheckpointError(f"{destination}: there is something already; choose another file, or overwrite a file")
    precision = Precision.of(bits, block_size, head_bits)
    # Before the weights, which may have to be downloaded.
    config = GPTJConfig.from_pretrained(source, **hub_options)
    slots = _checked_positions(config, positions)
    precision.check(config)
    _check_size(config, precision, slots)
    with stored_weights(source, weights, **hub_options) as stored:
        _check_size(stored.config, precision, slots, sum(map(len, stored.documents.values())))
        conversion = _Conversion(WeightReader(stored, progress or (lambda done, total: None)), precision, slots)
        conversion.run()
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(destination) as file:
                conversion.write_to(file)
        except OSError as error:
            raise CheckpointError(f"{error.filename or destination}: could not be written: {error.strerror}") from error


def _checked_positions(config: GPTJConfig, positions: int | None) -> int:
    name = config.activation_function
    if name not in GELUS and name not in ACTIVATIONS:
        known = ", ".join([*GELUS, *ACTIVATIONS])
        raise ConfigError(f"activation_function {name!r} is no operator of such a graph; {known} are")
    if positions is None:
        return config.n_positions
    if isinstance(positions, bool) or not isinstance(positions, int) or not 1 <= positions <= config.n_positions:
        raise ConfigError(
            f"positions must be an integer from 1 to n_positions={config.n_positions:,}, got {positions!r}"
        )
    return positions


def _check_size(config: GPTJConfig, precision: Precision, slots: int, documents: int = 0) -> None:
    """Refuse what would be too large, by arithmetic; `documents` are bytes of the files that go along."""
    width, middle, vocabulary = config.n_embd, config.inner_dim, config.vocab_size
    kernels = [(3 * width, width), (width, width), (middle, width), (width, middle)]
    size = sum(_bytes(*shape, precision.bits, precision.block_size) for shape in kernels) + 4 * (3 * width + middle)
    size = config.n_layer * (size + _HEAD_BYTES) + 4 * (2 * width + vocabulary)
    size += 4 * slots * (2 * config.rotary_width + 2)  # tables
    shared = config.tie_word_embeddings and precision.head_bits == _embedding_bits(precision)
    size += 0 if shared else _bytes(vocabulary, width, precision.head_bits, None)
    size += _bytes(vocabulary, width, _embedding_bits(precision), None)
    size += 2 * _HEAD_BYTES + documents
    if size > limits.MAX_TFLITE_BYTES:
        raise ConfigError(
            f"the file would have about {size:,} bytes, and phones map at most {limits.MAX_TFLITE_BYTES:,}: choose "
            "fewer bits, or convert with --format litert"
        )


_HEAD_BYTES = 2**15  # the most that the operators of a block take in the file's head


def _bytes(outputs: int, inputs: int, bits: int, block_size: int | None) -> int:
    """The most that a matrix and its scales take."""
    scales = 0 if bits == 32 else 2 * outputs * inputs // block_size if block_size else 12 * outputs
    return outputs * inputs * bits // 8 + scales


def _embedding_bits(precision: Precision) -> int:
    return 32 if precision.bits == 32 else 8


class _Conversion:
    """The graph of a model, made block by block."""

    def __init__(self, reader: WeightReader, precision: Precision, slots: int) -> None:
        self.reader, self.config, self.precision, self.slots = reader, reader.config, precision, slots
        self.graph = SequenceGraph()
        self.outputs: list[Tensor] = []

    def run(self) -> None:
        """Read all weights."""
        tokens, places = (self.graph.input(name, *shape, kind="int32") for name, shape in _GIVEN)
        [embeddings] = self.reader.floats(["embedding.wte.embeddings"])
        embedding = quantized(embeddings, _embedding_bits(self.precision))
        x = self.graph.embedded(self.graph.flat(tokens), embedding)
        attention = _Attention(self.config, self.graph, places, self.slots)
        for layer in range(self.config.n_layer):
            x = self._block(x, attention, self.reader.block(layer, self.precision, attention.arranged))
        self.outputs.insert(0, self._logits(x, embedding))

    def write_to(self, file: BinaryIO) -> None:
        """Write the graph, and the archive behind it."""
        self.graph.write_to(file, self.outputs, SIGNATURES)
        config = json_bytes({**self.config.to_dict(), "architectures": ["GPTJForCausalLM"]})
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in {"config.json": config, **self.reader.stored.documents}.items():
                archive.writestr(zipfile.ZipInfo(name), content)  # of no date: equal models are equal files

    def _block(self, x: Tensor, attention: _Attention, block: Block) -> Tensor:
        graph = self.graph
        projected, middle = entered(graph, x, self.config, block)
        mixed, cache = attention(projected)
        self.outputs += cache
        attended = graph.product("out_proj", mixed, block.matrices["out_proj"])
        return graph.add(graph.add(x, attended), fed(graph, self._activated(middle), block))

    def _activated(self, middle: Tensor) -> Tensor:
        name = self.config.activation_function
        return self.graph.gelu(middle, GELUS[name]) if name in GELUS else self.graph.activated(middle, name)

    def _logits(self, x: Tensor, embedding: Matrix) -> Tensor:
        gamma, beta = self.reader.floats(["ln_f.gamma", "ln_f.beta"])
        x = self.graph.normalised(self.graph.last(x), gamma, beta, self.config.layer_norm_epsilon)
        kernel, bias = self.reader.head()
        is_same = self.config.tie_word_embeddings and embedding.bits == self.precision.head_bits
        return self.graph.product(
            "logits", x, embedding if is_same else quantized(kernel, self.precision.head_bits), bias
        )


_GIVEN = (("tokens", (1, -1)), ("input_pos", (-1,)))


class _Attention:
    """Attention in the graph of a model, and what all blocks share of it."""

    def __init__(self, config: GPTJConfig, graph: SequenceGraph, places: Tensor, slots: int) -> None:
        self.config, self.graph, self.slots = config, graph, slots
        width = config.rotary_width
        frequencies = (1.0 / BASE ** (np.arange(0, width, 2) / width)).astype("float32")  # [R / 2]
        angles = np.arange(slots, dtype="float32")[:, None] * frequencies  # [S, R / 2]
        sin, cos = np.sin(angles), np.cos(angles)
        self.sin, self.cos = (
            graph.reshaped(graph.rows(places, np.concatenate(pair, axis=1)), 1, 1, -1, width)
            for pair in ((-sin, sin), (cos, cos))
        )  # [1, 1, T, R]
        self.mask = graph.unseen(graph.rows(places, np.arange(slots, dtype="float32")[:, None]), slots)
        self.start, self.blocks = graph.first(places), 0

    def arranged(self, letter: str, kernel: np.ndarray) -> np.ndarray:
        """Queries that are scaled already; and the second ones of pairs after the first ones, where slices find them.

        Scores are the same for any order of dimensions that queries and keys have in common.
        """
        if letter == "v":
            return kernel
        width, size = self.config.rotary_width, self.config.head_dim
        order = [*range(0, width, 2), *range(1, width, 2), *range(width, size)]
        heads = kernel.reshape(self.config.n_head, size, -1)[:, order].reshape(kernel.shape)
        return heads * np.float32(1 / math.sqrt(size)) if letter == "q" else heads

    def __call__(self, projected: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of the next block's [T, 3 D] the mixed values [T, D], and its cache with the new keys and values."""
        graph, heads, size = self.graph, self.config.n_head, self.config.head_dim
        projected = graph.swapped(graph.reshaped(projected, 1, -1, 3 * heads, size))  # [1, 3 N, T, H]
        turning, value = graph.parts(projected, 1, 2 * heads, heads)
        query, key = graph.parts(graph.turned(turning, self.sin, self.cos), 1, heads, heads)
        cache = []
        for letter, new in (("k", key), ("v", value)):
            name = f"kv_cache_{letter}_{self.blocks}"
            cache.append(graph.written(name, graph.input(name, 1, heads, self.slots, size), new, self.start))
        self.blocks += 1
        weights = graph.softmax(graph.add(graph.scores(query, cache[0]), self.mask))
        mixed = graph.swapped(graph.mixed(weights, cache[1]))  # [1, T, N, H]
        return graph.reshaped(mixed, -1, self.config.n_embd), cache
