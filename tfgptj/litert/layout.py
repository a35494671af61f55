"""How a converted model lies in a directory: its files, and the one that tells of them.

`litert.json` is written last, into a directory that bears a temporary name until then; without it nothing is loaded.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from tfgptj import limits
from tfgptj.checkpoints.directory import LITERT
from tfgptj.errors import CheckpointError, CheckpointFormatError
from tfgptj.files import parse_json

VERSION = 2

ATTENTION, HEAD, OUTSIDE = "attention.tflite", "head.tflite", "outside.safetensors"
BITS, BLOCK_SIZES = (4, 8, 32), (32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What `litert.json` says.

    Attributes:
        bits: of the numbers in the blocks' matrices.
        block_size: inputs that share a scale; None for one scale for each output.
        head_bits: of the head's matrix.
        files: bytes and SHA-256 of each file.
        calibration_tokens: of the text that the matrices were rounded for; 0 if there was none.
    """

    bits: int
    block_size: int | None
    head_bits: int
    files: dict[str, dict[str, Any]]
    calibration_tokens: int = 0

    @property
    def description(self) -> str:
        """The numbers of bits, for people."""
        blocks = f" in blocks of {self.block_size}" if self.block_size else ""
        calibrated = f", calibrated with {self.calibration_tokens:,} tokens" if self.calibration_tokens else ""
        return f"{self.bits} bits{blocks}, the head {self.head_bits} bits{calibrated}"

    def fields(self) -> dict[str, Any]:
        """As JSON holds them."""
        return {"format": "tfgptj-litert", "version": VERSION, **dataclasses.asdict(self)}


def segment_files(layers: int) -> list[str]:
    """The files of the graphs before, between and behind the attentions."""
    return [f"segment-{index:03d}.tflite" for index in range(layers + 1)]


def file_names(layers: int) -> list[str]:
    """All files that a model is made of."""
    return [*segment_files(layers), ATTENTION, HEAD, OUTSIDE]


def read_layout(directory: str | os.PathLike[str], layers: int) -> Layout:
    """Read and check `litert.json`, and that its files are there in their sizes.

    Args:
        directory: where it is.
        layers: of the model.

    Raises:
        CheckpointError: if the directory holds no such model.
        CheckpointFormatError: if it is damaged.
    """
    path = Path(directory) / LITERT
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: holds no LiteRT model, there is no {LITERT}; make one with tfgptj convert --format litert"
        )
    layout = _parsed(path)
    names = file_names(layers)
    if sorted(layout.files) != sorted(names):
        raise CheckpointFormatError(
            f"{path}: lists {len(layout.files):,} files, and a model of {layers:,} layers has {len(names):,}"
        )
    for name, said in layout.files.items():
        file = path.parent / name
        size = file.stat().st_size if file.is_file() else 0
        if size != said["bytes"]:
            raise CheckpointFormatError(
                f"{file}: has {size:,} bytes, expected {said['bytes']:,}: convert the checkpoint again"
            )
    return layout


def _parsed(path: Path) -> Layout:
    if path.stat().st_size > limits.MAX_INDEX_BYTES:
        raise CheckpointFormatError(f"{path}: {path.stat().st_size:,} bytes are too many for such a file")
    try:
        fields = parse_json(path.read_bytes(), limits.MAX_INDEX_VALUES)
    except ValueError as error:
        raise CheckpointFormatError(f"{path}: not valid JSON: {error}") from None
    fields = fields if isinstance(fields, dict) else {}
    if (fields.get("format"), fields.get("version")) != ("tfgptj-litert", VERSION):
        raise CheckpointFormatError(
            f"{path}: is of format {fields.get('format')!r:.80}, version {fields.get('version')!r:.80}; expected "
            f"'tfgptj-litert', version {VERSION}"
        )
    files = fields.get("files", {})
    sound = isinstance(files, dict) and all(
        isinstance(said, dict) and isinstance(said.get("bytes"), int) and isinstance(said.get("sha256"), str)
        for said in files.values()
    )
    block_size = fields.get("block_size")
    if not sound or fields.get("bits") not in BITS or fields.get("head_bits") not in BITS:
        raise CheckpointFormatError(f"{path}: lacks bits, head_bits or files: convert the checkpoint again")
    if block_size is not None and block_size not in BLOCK_SIZES:
        raise CheckpointFormatError(f"{path}: block_size must be null or one of {BLOCK_SIZES}, got {block_size!r:.80}")
    tokens = fields.get("calibration_tokens", 0)  # files of earlier versions have none
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise CheckpointFormatError(f"{path}: calibration_tokens must be a number of tokens, got {tokens!r:.80}")
    return Layout(fields["bits"], block_size, fields["head_bits"], files, tokens)
