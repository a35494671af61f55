"""A checkpoint to LiteRT's graphs in few bits, matrix by matrix: the model is never in memory as a whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tfgptj.checkpoints.convert import StoredWeights, stored_weights
from tfgptj.checkpoints.directory import LITERT
from tfgptj.checkpoints.mapping import Entry, plan
from tfgptj.checkpoints.safetensors import write_safetensors
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorSpec
from tfgptj.checkpoints.write import Progress
from tfgptj.errors import CheckpointError, ConfigError
from tfgptj.files import json_bytes, replaced_file, staging_directory, sync_directory
from tfgptj.litert import blocks
from tfgptj.litert.layout import ATTENTION, BITS, BLOCK_SIZES, HEAD, OUTSIDE, Layout, segment_files
from tfgptj.litert.quantization import Matrix, quantized


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    bits: int = 8,
    block_size: int | None = None,
    head_bits: int | None = None,
    weights: str = "auto",
    progress: Progress | None = None,
    **hub_options: Any,
) -> None:
    """Write a language model as LiteRT's graphs, for :class:`tfgptj.litert.model.LiteRTGPTJForCausalLM`.

    A few matrices at a time are in memory. The directory takes its name when all is written and on disk.

    Args:
        source: a directory, the name of a packaged model, or a Hub id.
        destination: the directory to write, which must not exist or be empty.
        bits: of each number of the blocks' matrices: 8, 4, or 32 for float32.
        block_size: with 4 bits, inputs that share a scale: 32, 64, 128; or 0 for one scale for each output, which reads
            prompts faster and is less accurate. None for 32.
        head_bits: of the LM head's matrix; None for 8, or 32 where `bits` is.
        weights: which files to read, where there are several formats.
        progress: called with the bytes that are read and those that there will be.
        **hub_options: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        CheckpointError: if the source cannot be read, holds no language model, or NaN, or the destination not written.
        CheckpointFormatError, CheckpointMismatchError: if the source is damaged, or not what its configuration says.
        ConfigError: for numbers of bits that there are not, or that the model's sizes do not allow.
    """
    destination = Path(destination)
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise CheckpointError(f"{destination}: there is something already; choose another directory")
    block_size = 32 if block_size is None and bits == 4 else block_size or None
    head_bits = min(max(bits, 8), 32) if head_bits is None else head_bits
    with stored_weights(source, weights, **hub_options) as stored:
        _check(stored, bits, block_size, head_bits)
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            with staging_directory(destination.parent) as staging:
                directory = staging / "model"
                directory.mkdir()
                _Conversion(stored, directory, progress or (lambda done, total: None)).run(bits, block_size, head_bits)
                if destination.is_dir():
                    destination.rmdir()
                os.rename(directory, destination)
            sync_directory(destination.parent)
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{error.filename or destination}: could not be written: {error.strerror}") from error


def _check(stored: StoredWeights, bits: int, block_size: int | None, head_bits: int) -> None:
    config = stored.config
    if stored.head != "causal_lm":
        raise CheckpointError(f"the checkpoint has the head {stored.head!r}; only language models can be converted")
    if bits not in BITS or head_bits not in BITS:
        raise ConfigError(f"bits and head_bits must be one of {BITS}, got {bits!r} and {head_bits!r}")
    if block_size is not None and (block_size not in BLOCK_SIZES or bits != 4):
        raise ConfigError(f"block_size must be one of {BLOCK_SIZES}, and belongs to 4 bits; got {block_size!r}")
    for width in (config.n_embd, config.inner_dim):
        if bits == 4 and width % (block_size or 2):
            raise ConfigError(f"block_size={block_size or 0} does not divide {width}: choose another one, or 8 bits")
    if config.activation_function in ("prelu", "xielu"):
        raise ConfigError(
            f"activation_function {config.activation_function!r} has weights of its own, which no graph has room for"
        )


class _Conversion:
    """One conversion into an empty directory."""

    def __init__(self, stored: StoredWeights, directory: Path, progress: Progress) -> None:
        self.stored, self.config, self.directory = stored, stored.config, directory
        self.progress, self.done = progress, 0
        self.entries = {entry.variable: entry for entry in plan(stored.config, stored.head)}
        self.total = sum(4 * int(np.prod(entry.shape)) for entry in self.entries.values())

    def run(self, bits: int, block_size: int | None, head_bits: int) -> None:
        """Write all files, the one that tells of the others at the end."""
        self._write_segments(lambda matrix: quantized(matrix, bits, block_size))
        graph, outputs = blocks.attention_graph(self.config)
        graph.write(self.directory / ATTENTION, outputs)
        self._write_outside()
        self._write_head(head_bits)
        files = {path.name: _facts(path) for path in sorted(self.directory.iterdir())}
        layout = Layout(bits, block_size, head_bits, files)
        config = {**self.config.to_dict(), "architectures": ["GPTJForCausalLM"]}
        documents = {"config.json": json_bytes(config), **self.stored.documents, LITERT: json_bytes(layout.fields())}
        for name, content in documents.items():
            with replaced_file(self.directory / name) as file:
                file.write(content)

    def _write_segments(self, pack: Callable[[np.ndarray], Matrix]) -> None:
        before = None
        for layer, name in enumerate(segment_files(self.config.n_layer)):
            after = self._block(layer, pack) if layer < self.config.n_layer else None
            graph, outputs = blocks.segment_graph(self.config, before, after)
            graph.write(self.directory / name, outputs)
            before = after

    def _block(self, layer: int, pack: Callable[[np.ndarray], Matrix]) -> blocks.Block:
        names = [f"blocks.{layer}.{name}" for name in blocks.WEIGHTS]
        found = dict(zip(blocks.WEIGHTS, self._floats(names), strict=True))
        qkv = np.concatenate([found.pop(f"attn.{letter}_proj.kernel") for letter in "qkv"])
        matrices = {"qkv": pack(qkv)}
        for home, name in (("mlp", "fc_in"), ("attn", "out_proj"), ("mlp", "fc_out")):
            matrices[name] = pack(found.pop(f"{home}.{name}.kernel"))
        return blocks.Block(matrices, found)

    def _write_outside(self) -> None:
        """What is looked up and normalised outside of the graphs; the embedding in the dtype that it is stored in."""
        names = {"wte.weight": "embedding.wte.embeddings", "ln_f.weight": "ln_f.gamma", "ln_f.bias": "ln_f.beta"}
        specs = []
        for name, variable in names.items():
            entry = self.entries[variable]
            dtype = self.stored.dtype(entry) if name == "wte.weight" else FLOAT_DTYPES["float32"]
            specs.append(TensorSpec(name, entry.shape, FLOAT_DTYPES["float32"] if dtype.itemsize > 4 else dtype))
        values = self._values([(self.entries[names[spec.name]], spec) for spec in specs])
        write_safetensors(
            self.directory / OUTSIDE, specs, ((spec.name, next(values)) for spec in specs), {"format": "pt"}
        )

    def _write_head(self, bits: int) -> None:
        tied = self.config.tie_word_embeddings
        names = ["embedding.wte.embeddings", "lm_head.bias"] if tied else ["lm_head.dense.kernel", "lm_head.dense.bias"]
        kernel, bias = self._floats(names)
        graph, outputs = blocks.head_graph(self.config, quantized(kernel, bits), bias)
        graph.write(self.directory / HEAD, outputs)

    def _floats(self, names: list[str]) -> Any:
        """Weights in float32, one after the other."""
        entries = [self.entries[name] for name in names]
        return self._values(
            [(entry, TensorSpec(entry.variable, entry.shape, np.dtype("float32"))) for entry in entries]
        )

    def _values(self, wanted: list[tuple[Entry, TensorSpec]]) -> Any:
        values = self.stored.values([(entry, spec, False) for entry, spec in wanted])
        for (entry, _), value in zip(wanted, values, strict=True):
            if not np.isfinite(value.astype("float32", copy=False)).all():
                raise CheckpointError(f"{entry.variable}: holds NaN or infinite values; see tfgptj validate")
            self.done += 4 * value.size
            self.progress(min(self.done, self.total), self.total)
            yield value


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
