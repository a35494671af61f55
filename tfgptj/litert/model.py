"""LiteRTGPTJForCausalLM: a GPT-J in few bits that generates like the Keras class."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfgptj.activations import activation_layer
from tfgptj.checkpoints.safetensors import SafetensorsFile
from tfgptj.config import GPTJConfig
from tfgptj.errors import ConfigError
from tfgptj.generation.compiling import to_numpy
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.stepping import Shapes
from tfgptj.generative import Generative
from tfgptj.litert.attention import Attention, Cache, normalised, places
from tfgptj.litert.blocks import GELUS, segment_shapes
from tfgptj.litert.engine import LargePages, Program, Room, default_threads
from tfgptj.litert.layout import ATTENTION, HEAD, OUTSIDE, Layout, read_layout, segment_files

# Rows that the graphs take at once, and bytes that all blocks may keep for them.
_MOST_ROWS, _LEAST_ROWS, _ROWS_BYTES = 128, 16, 2**28


class LiteRTTransformer:
    """The blocks of a converted model, with the interface that generation has to the Keras one.

    Args:
        directory: where the model is.
        config: its configuration.
        threads: that the kernels may take.
        pages: for their weights.
    """

    weights = ()  # no variables: what is in the files does not change

    def __init__(self, directory: Path, config: GPTJConfig, threads: int, pages: LargePages) -> None:
        self.config = config
        self.lock = threading.Lock()  # a graph has one place for what goes through it
        name, room = config.activation_function, Room()
        self._activation = None if name in GELUS else activation_layer(name)
        self._segments = []
        for file, (takes, gives) in zip(segment_files(config.n_layer), segment_shapes(config), strict=True):
            self._segments.append(Program(directory / file, threads, takes, gives, room))
            pages.take()
        self._last = self._segments.pop()
        heads = (-1, config.n_head, -1, config.head_dim)
        graph = Program(directory / ATTENTION, threads, (heads, heads, heads, (-1, 1, -1, -1)), (heads,))
        self._attention = Attention(config, graph, threads)
        self._outside = SafetensorsFile(directory / OUTSIDE)
        weakref.finalize(self, self._outside.close)
        self._norm = self._outside.read("ln_f.weight"), self._outside.read("ln_f.bias")
        held = 4 * config.n_layer * (6 * config.n_embd + 3 * config.inner_dim)  # for one row
        self.rows_at_once = min(max(_ROWS_BYTES // held, _LEAST_ROWS), _MOST_ROWS)

    def step(
        self,
        input_ids: Any,
        positions: Any,
        mask: Any,
        caches: Sequence[Any] | None = None,
        slot: Any = None,
        record: list[Any] | None = None,
    ) -> tuple[np.ndarray, tuple[Cache, ...]]:
        """The forward pass over new tokens: see :meth:`tfgptj.backbone.TFGPTJModel.step`.

        Caches that are NumPy arrays are written in place, tensors are copied first. No token may look at slots after
        the last new one.
        """
        ids, positions, mask = to_numpy(input_ids), to_numpy(positions), to_numpy(mask)
        rows, count = ids.shape
        if caches is None:
            shape, slot = (rows, self.config.n_head, count, self.config.head_dim), 0
            caches = [(np.zeros(shape, "float32"), np.zeros(shape, "float32")) for _ in self._segments]
        own = tuple((_writable(key), _writable(value)) for key, value in caches)
        with self.lock, self._attention.alone():
            return self._read_in_parts(ids, positions, mask, own, int(slot), record), own

    def _read_in_parts(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        mask: np.ndarray,
        caches: tuple[Cache, ...],
        first: int,
        record: list[Any] | None,
    ) -> np.ndarray:
        """Last hidden states float32 [B, T, D]."""
        rows, count = ids.shape
        width = max(self.rows_at_once // rows, 1)
        hidden, records = [], []
        for start in range(0, count, width):
            part = slice(start, start + width)
            kept: list[Any] | None = None if record is None else []
            hidden.append(self._read(ids[:, part], positions[:, part], mask[:, :, part], caches, first + start, kept))
            records.append(kept or [])
        if record is not None:
            record += [
                np.concatenate(each, axis=2 if i % 2 else 1) for i, each in enumerate(zip(*records, strict=True))
            ]
        return np.concatenate(hidden, axis=1)

    def _read(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        mask: np.ndarray,
        caches: tuple[Cache, ...],
        slot: int,
        record: list[np.ndarray] | None,
    ) -> np.ndarray:
        """Last hidden states float32 [B, T, D] of few enough tokens."""
        rows, count = ids.shape
        x = self._embedded(ids.reshape(-1))  # [B · T, D]
        where = places(self.config, positions, mask, slot)
        given = [x]
        for segment, cache in zip(self._segments, caches, strict=True):
            projected, *passed = segment(*given, wanted=2 if self._activation is None and record is None else None)
            heads = projected.reshape(rows, count, 3, self.config.n_head, self.config.head_dim)
            mixed, weights = self._attention(heads, where, cache, record is not None)
            if record is not None and weights is not None:
                unseen = mask.shape[-1] - weights.shape[-1]
                x = passed[1] if self._activation is None else passed[0]
                record += [x.reshape(rows, count, -1).copy(), np.pad(weights, ((0, 0), (0, 0), (0, 0), (0, unseen)))]
            given = [passed[0], mixed.reshape(rows * count, -1)]
            if self._activation is not None:
                given.append(to_numpy(self._activation(passed[1])))
        [x] = self._last(*given)
        x = normalised(x, *self._norm, self.config.layer_norm_epsilon).reshape(rows, count, -1)
        if record is not None:
            record.append(x)
        return x

    def _embedded(self, ids: np.ndarray) -> np.ndarray:
        """The embedding's rows for int [K]; they are read from the file, so that it is in memory nowhere."""
        x = np.empty((len(ids), self.config.n_embd), "float32")
        for row, token in enumerate(ids.tolist()):
            [x[row]] = next(self._outside.blocks("wte.weight", token, token + 1))
        return x


class LiteRTGPTJForCausalLM(Generative):
    """A GPT-J language model in few bits on LiteRT's CPU kernels; made by `tfgptj convert --format litert`.

    It generates, streams and scores as :class:`tfgptj.heads.TFGPTJForCausalLM` does, with the same parameters, and
    cannot be trained. Weights of 32 bits give the same results, fewer bits those of slightly other weights.

    Args:
        directory: where the model is.
        threads: processors that it may take; None for all that the process has.

    Raises:
        CheckpointError: if there is no such model in the directory, or it cannot be read.
        CheckpointFormatError: if a file is damaged.
        ConfigError: if the configuration is invalid, or `threads` is.

    Attributes:
        config: :class:`tfgptj.config.GPTJConfig`.
        generation_config: :class:`tfgptj.generation.config.GenerationConfig` from its file, or None.
        layout: the numbers of bits, and the files.
    """

    runs_itself = True  # for the programs of generation: it is no part of them
    compute_dtype = "float32"
    variables = ()

    def __init__(self, directory: str | os.PathLike[str], *, threads: int | None = None) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ConfigError(f"threads must be an integer of at least 1, got {threads!r}")
        directory = Path(directory)
        self.config = GPTJConfig.from_json_file(directory / "config.json")
        self.layout: Layout = read_layout(directory, self.config.n_layer)
        path = directory / "generation_config.json"
        self.generation_config = GenerationConfig.from_json_file(path) if path.is_file() else None
        self.shapes = Shapes(self.config)
        threads = threads or default_threads()
        with LargePages() as pages:
            self.transformer = LiteRTTransformer(directory, self.config, threads, pages)
            outer = (-1, self.config.n_embd), (-1, self.config.vocab_size)
            self._head = Program(directory / HEAD, threads, outer[:1], outer[1:])

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, threads: int | None = None) -> LiteRTGPTJForCausalLM:
        """Load a converted model: see the class."""
        return cls(directory, threads=threads)

    @property
    def dtype_policy(self) -> keras.DTypePolicy:
        """Of what is computed beside the matrices."""
        return keras.DTypePolicy("float32")

    def lm_head(self, hidden: Any) -> np.ndarray:
        """Logits float32 [B, T, V] of last hidden states [B, T, D]."""
        x = to_numpy(hidden)
        rows = x.reshape(-1, self.config.n_embd)
        step = self.transformer.rows_at_once
        with self.transformer.lock:
            logits = [self._head(rows[start : start + step])[0] for start in range(0, len(rows), step)]
        return np.concatenate(logits).reshape(*x.shape[:-1], -1)

    def num_parameters(self) -> int:
        """Number of weights."""
        return self.config.num_parameters("causal_lm")

    def read_per_step(self, rows: int) -> tuple[int, int]:
        """Parameters that a step of decoding reads at least, and their bytes; of the embedding some rows."""
        width, size = self.config.n_embd, self.config.vocab_size
        looked_up = 0 if self.config.tie_word_embeddings else (rows - size) * width
        bytes_read = sum(said["bytes"] for name, said in self.layout.files.items() if name != OUTSIDE)
        return self.num_parameters() + looked_up, bytes_read + 4 * rows * width


def _writable(cache: Any) -> np.ndarray:
    """A cache as an array that may be written to."""
    return cache if isinstance(cache, np.ndarray) and cache.flags.writeable else np.array(to_numpy(cache))
