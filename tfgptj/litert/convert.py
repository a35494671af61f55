"""A checkpoint to LiteRT's graphs in few bits, matrix by matrix: the model is never in memory as a whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfgptj.checkpoints.convert import stored_weights
from tfgptj.checkpoints.directory import DOCUMENTS, LITERT, TOKENIZER_FILES, is_converted
from tfgptj.checkpoints.safetensors import write_safetensors
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorSpec
from tfgptj.checkpoints.write import Progress
from tfgptj.errors import CheckpointError, ConfigError
from tfgptj.files import exchange, json_bytes, replaced_file, staging_directory, sync_directory
from tfgptj.litert import blocks
from tfgptj.litert.layout import ATTENTION, HEAD, OUTSIDE, Layout, segment_files
from tfgptj.litert.quantization import quantized
from tfgptj.litert.weights import Precision, WeightReader
from tfgptj.tokenizer import GPTJTokenizer

if TYPE_CHECKING:
    from tfgptj.litert.calibration import Calibration


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    bits: int = 8,
    block_size: int | None = None,
    head_bits: int | None = None,
    calibration: str | os.PathLike[str] | None = None,
    weights: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    **hub_options: Any,
) -> None:
    """Write a language model as LiteRT's graphs, for :class:`tfgptj.litert.model.LiteRTGPTJForCausalLM`.

    A few matrices at a time are in memory. The directory takes its name when all is written and on disk.

    Args:
        source: a directory, the name of a packaged model, or a Hub id.
        destination: the directory to write.
        bits: of each number of the blocks' matrices: 8, 4, or 32 for float32.
        block_size: with 4 bits, inputs that share a scale: 32, 64, 128; or 0 for one scale for each output, which reads
            prompts faster and is less accurate. None for 32.
        head_bits: of the LM head's matrix; None for 8, or 32 where `bits` is.
        calibration: a text in UTF-8, such as the model will read: the matrices are rounded so that what they make of it
            changes least, see :mod:`tfgptj.litert.calibration`. None to round each number for itself.
        weights: which files to read, where there are several formats.
        overwrite: replace a converted model in `destination` in one step; without this there must be nothing.
        progress: called with the bytes that are read and those that there will be.
        **hub_options: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        CheckpointError: if the source cannot be read, holds no language model, or NaN, or the destination not written.
        CheckpointFormatError, CheckpointMismatchError: if the source is damaged, or not what its configuration says.
        ConfigError: for numbers of bits that there are not, or that the model's sizes do not allow.
        InputError: if the text to calibrate with cannot be read, or is too short.
        TokenizerError: if the source has no tokenizer to read it with.
    """
    destination = Path(destination).resolve() if overwrite else Path(destination)
    replacing = _is_replaced(destination, overwrite)
    precision = Precision.of(bits, block_size, head_bits)
    if calibration is not None and precision.bits == 32:
        raise ConfigError("calibration belongs to 8 or 4 bits; with 32 nothing is rounded")
    with stored_weights(source, weights, **hub_options) as stored:
        precision.check(stored.config)
        reader = WeightReader(stored, progress or (lambda done, total: None))
        calibrated = None if calibration is None else _calibration(calibration, source, hub_options, reader, precision)
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            with staging_directory(destination.parent) as staging:
                directory = staging / "model"
                directory.mkdir()
                _Conversion(reader, directory, precision, calibrated).run()
                if replacing:
                    exchange(directory, destination)
                else:
                    if destination.is_dir():
                        destination.rmdir()
                    os.rename(directory, destination)
                sync_directory(destination.parent)  # before the old model is removed
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{error.filename or destination}: could not be written: {error.strerror}") from error


def _is_replaced(destination: Path, overwrite: bool) -> bool:
    """Whether there is a converted model, that may be replaced; all else must not be there."""
    if not destination.exists() or destination.is_dir() and not any(destination.iterdir()):
        return False
    if not overwrite:
        raise CheckpointError(f"{destination}: there is something already; choose another directory, or overwrite it")
    if not is_converted(destination):
        raise CheckpointError(f"{destination}: holds no LiteRT model, and nothing else is overwritten")
    own = {LITERT, OUTSIDE, *DOCUMENTS, *TOKENIZER_FILES}
    other = [path.name for path in destination.iterdir() if path.name not in own and path.suffix != ".tflite"]
    if other:
        raise CheckpointError(f"{destination}: holds other files, too, which would be lost: {', '.join(other[:5])}")
    return True


def _calibration(
    file: str | os.PathLike[str],
    source: str | os.PathLike[str],
    hub_options: dict[str, Any],
    reader: WeightReader,
    precision: Precision,
) -> Calibration:
    """A text on its way through the model."""
    from tfgptj.litert.calibration import Calibration, read_pieces  # Keras is slow to import

    tokenizer = GPTJTokenizer.from_pretrained(source, **hub_options)
    return Calibration(reader, read_pieces(file, tokenizer, reader.config), precision)


class _Conversion:
    """One conversion into an empty directory."""

    def __init__(
        self, reader: WeightReader, directory: Path, precision: Precision, calibration: Calibration | None
    ) -> None:
        self.reader, self.config, self.directory = reader, reader.config, directory
        self.precision, self.calibration = precision, calibration

    def run(self) -> None:
        """Write all files, the one that tells of the others at the end."""
        self._write_segments()
        graph, outputs = blocks.attention_graph(self.config)
        graph.write(self.directory / ATTENTION, outputs)
        self._write_outside()
        self._write_head()
        files = {path.name: _facts(path) for path in sorted(self.directory.iterdir())}
        layout = Layout(*self.precision, files, 0 if self.calibration is None else self.calibration.tokens)
        config = {**self.config.to_dict(), "architectures": ["GPTJForCausalLM"]}
        documents = self.reader.stored.documents
        contents = {"config.json": json_bytes(config), **documents, LITERT: json_bytes(layout.fields())}
        for name, content in contents.items():
            with replaced_file(self.directory / name) as file:
                file.write(content)

    def _write_segments(self) -> None:
        before = None
        for layer, name in enumerate(segment_files(self.config.n_layer)):
            after = self._block(layer) if layer < self.config.n_layer else None
            graph, outputs = blocks.segment_graph(self.config, before, after)
            graph.write(self.directory / name, outputs)
            before = after

    def _block(self, layer: int) -> blocks.Block:
        if self.calibration is None:
            return self.reader.block(layer, self.precision)
        return self.calibration.block(*self.reader.kernels(layer))

    def _write_outside(self) -> None:
        """What is looked up and normalised outside of the graphs; the embedding in the dtype that it is stored in."""
        names = {"wte.weight": "embedding.wte.embeddings", "ln_f.weight": "ln_f.gamma", "ln_f.bias": "ln_f.beta"}
        specs = []
        for name, variable in names.items():
            entry = self.reader.entries[variable]
            dtype = self.reader.stored.dtype(entry) if name == "wte.weight" else FLOAT_DTYPES["float32"]
            specs.append(TensorSpec(name, entry.shape, FLOAT_DTYPES["float32"] if dtype.itemsize > 4 else dtype))
        values = self.reader.values([(self.reader.entries[names[spec.name]], spec) for spec in specs])
        write_safetensors(
            self.directory / OUTSIDE, specs, ((spec.name, next(values)) for spec in specs), {"format": "pt"}
        )

    def _write_head(self) -> None:
        kernel, bias = self.reader.head()
        if self.calibration is None:
            matrix = quantized(kernel, self.precision.head_bits)
        else:
            matrix = self.calibration.head(kernel, *self.reader.floats(["ln_f.gamma", "ln_f.beta"]))
        graph, outputs = blocks.head_graph(self.config, matrix, bias)
        graph.write(self.directory / HEAD, outputs)


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
