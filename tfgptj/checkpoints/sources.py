"""The weights in a directory as one collection of tensors, whatever files they are spread over."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from tfgptj.checkpoints import hdf5
from tfgptj.checkpoints.flax_msgpack import FlaxFile
from tfgptj.checkpoints.hdf5 import HDF5File
from tfgptj.checkpoints.mapping import Layout
from tfgptj.checkpoints.safetensors import SafetensorsFile
from tfgptj.checkpoints.tensors import TensorFile, TensorSpec
from tfgptj.checkpoints.torch_zip import TorchZipFile
from tfgptj.config import read_json
from tfgptj.errors import CheckpointError, CheckpointFormatError, ConfigError

_LOG = logging.getLogger("tfgptj")


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of weight file. Where a directory has both a whole file and an index of shards, the whole file counts."""

    whole: str  # name of the file that holds all weights
    suffix: str
    open: Callable[[Path], TensorFile]
    index_name: Callable[[str], str] = str  # from a key of the index to the tensor's name in its shard

    @property
    def index(self) -> str:
        """Name of the JSON file that says which shard holds which tensor."""
        return f"{self.whole}.index.json"

    def shard(self, number: int, count: int, mark: str = "") -> str:
        """Name of a shard, counted from 1; a mark tells the shards of one save from those of another."""
        stem = self.whole.removesuffix(self.suffix) + (mark and f"-{mark}")
        return f"{stem}-{number:05d}-of-{count:05d}{self.suffix}"

    def is_shard(self, name: str) -> bool:
        """Whether a file name is one that :meth:`shard` gives."""
        stem, suffix = re.escape(self.whole.removesuffix(self.suffix)), re.escape(self.suffix)
        return re.fullmatch(rf"{stem}(-{MARK.pattern})?-\d{{5}}-of-\d{{5}}{suffix}", name) is not None


# What tells one save from another where both are in one directory for a while.
MARK = re.compile("[0-9a-f]{8}")

# In the order in which `weights="auto"` looks for them.
FORMATS = {
    "safetensors": Format("model.safetensors", ".safetensors", SafetensorsFile),
    "bin": Format("pytorch_model.bin", ".bin", TorchZipFile),
    "h5": Format("tf_model.h5", ".h5", HDF5File, index_name=hdf5.index_name),
    "msgpack": Format("flax_model.msgpack", ".msgpack", FlaxFile),
}

# The `format` that Hugging Face writes into a file's metadata, and whose names and layout it stands for.
_LAYOUTS: dict[str, Layout] = {"pt": "torch", "tf": "tensorflow", "flax": "flax"}

# The metadata key under which a save that replaces a configuration too notes its mark: see `save.py`.
SAVE_MARK = "tfgptj_save"


class Checkpoint:
    """The open weight files of a directory.

    All files are opened at once, so that later changes of the directory do not reach this checkpoint: files that are
    replaced or removed stay readable until they are closed.

    Args:
        directory: where the files are.
        weights: a key of :data:`FORMATS`, or "auto" for the first of them that is there.

    Raises:
        CheckpointError: if there are no such weights.
        CheckpointFormatError: if a file is damaged, or the index does not agree with the shards.
    """

    def __init__(self, directory: Path, weights: str = "auto") -> None:
        self.path, form = find_weights(directory, weights)
        _LOG.info("reading weights from %s", self.path)
        self._files: dict[str, TensorFile] = {}  # by tensor name
        self._opened: list[TensorFile] = []
        self.shards: list[str] = []  # names of the files that hold the tensors
        self.metadata: Mapping[str, Any]
        try:
            if self.path.name == form.index:
                self._open_shards(form)
            else:
                self._add_file(self.path, form)
                self.metadata = self._opened[0].metadata
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for file in self._opened:
            file.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._files)

    @property
    def layout(self) -> Layout:
        """Whose names the tensors bear, and whose layout they have.

        Raises:
            CheckpointFormatError: if the file's metadata tell of a framework that is none of the three.
        """
        label = self._opened[0].metadata.get("format", "pt") if self._opened else "pt"
        if label not in _LAYOUTS:
            known = ", ".join(_LAYOUTS)
            raise CheckpointFormatError(f"{self.path}: the metadata name the format {label!r:.80}; known are {known}")
        return _LAYOUTS[label]

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        return self._files[name].spec(name)

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, in an array of their own."""
        return self._files[name].read(name)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The values of a tensor, some rows at a time; each block is overwritten by the next."""
        return self._files[name].blocks(name)

    @property
    def mark(self) -> str:
        """What a save that replaced another configuration noted in its weights; empty for all others."""
        mark = self.metadata.get(SAVE_MARK)
        return mark if isinstance(mark, str) and MARK.fullmatch(mark) else ""  # it becomes part of a file name

    def companion(self, name: str) -> Path:
        """The path of a JSON file that belongs to these weights, such as "config.json".

        After a save that was cut off between its weights and its configuration that is not yet the file of that name.
        """
        pending = pending_path(self.path.parent, name, self.mark)
        return pending if self.mark and pending.is_file() else self.path.parent / name

    def _add_file(self, path: Path, form: Format) -> TensorFile:
        file = form.open(path)
        self._opened.append(file)
        self._files.update(dict.fromkeys(file.names, file))
        self.shards.append(path.name)
        return file

    def _open_shards(self, form: Format) -> None:
        self.metadata, weight_map = _read_index(self.path, form)
        for shard in sorted(set(weight_map.values())):
            path = self.path.parent / shard
            if not path.is_file():
                raise CheckpointError(f"{path}: this shard is named in {self.path.name}, but there is no such file")
            file = self._add_file(path, form)
            promised = {name for name in weight_map if weight_map[name] == shard}
            for name in sorted(promised ^ set(file.names)):
                found = "lacks" if name in promised else "holds"
                said = shard if name in promised else weight_map.get(name, "none of the shards")
                raise CheckpointFormatError(
                    f"{path}: {found} tensor {name!r:.200}, but {self.path.name} says that it is in {said}"
                )


def find_weights(directory: Path, weights: str = "auto") -> tuple[Path, Format]:
    """The file to begin with, weights or index, and its format.

    Raises:
        CheckpointError: if `weights` names no format, or there are no such files.
    """
    if weights != "auto" and weights not in FORMATS:
        raise CheckpointError(f"weights must be one of auto, {', '.join(FORMATS)}; got {weights!r}")
    forms = list(FORMATS.values()) if weights == "auto" else [FORMATS[weights]]
    for form in forms:
        for name in (form.whole, form.index):
            if os.path.lexists(directory / name):
                return directory / name, form
    wanted = ", ".join(f"{form.whole} or {form.index}" for form in forms)
    found = ", ".join(sorted(path.name for path in directory.glob("*"))[:20]) or "nothing"
    raise CheckpointError(f"{directory}: holds no weights; looked for {wanted}; found {found}")


def pending_path(directory: Path, name: str, mark: str) -> Path:
    """Where a JSON file waits until the weights that it belongs to are in place."""
    return directory / f".tfgptj-{mark}-{name}.tmp"


def fingerprint(directory: Path, weights: str = "auto") -> tuple[Path, list[tuple[int, ...]]]:
    """What stays the same until a save replaces the weights or the configuration of a directory.

    Raises:
        CheckpointError: as for :func:`find_weights`.
    """
    path, _ = find_weights(directory, weights)
    stamps: list[tuple[int, ...]] = []
    for file in (path, directory / "config.json"):
        try:
            status = file.stat()
            stamps.append((status.st_dev, status.st_ino, status.st_mtime_ns))
        except OSError:
            stamps.append(())
    return path, stamps


def _read_index(path: Path, form: Format) -> tuple[Mapping[str, Any], dict[str, str]]:
    try:
        index = read_json(path)
    except ConfigError as error:
        raise CheckpointFormatError(str(error)) from None
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(f"{path}: weight_map must map tensors to shards, got {weight_map!r:.80}")
    if not isinstance(metadata, dict):
        raise CheckpointFormatError(f"{path}: metadata must be an object, got {metadata!r:.80}")
    for name, shard in weight_map.items():
        if not _is_plain_name(shard, form.suffix):
            raise CheckpointFormatError(
                f"{path}: tensor {name!r:.200} is said to be in {shard!r:.200}; "
                f"a shard must be a *{form.suffix} file in the same directory"
            )
    return metadata, {form.index_name(name): shard for name, shard in weight_map.items()}


def _is_plain_name(name: object, suffix: str) -> bool:
    """Whether a name can mean nothing but a file beside the index, on any system."""
    return (
        isinstance(name, str)
        and name.endswith(suffix)
        and name.isprintable()
        and PurePosixPath(name).name == PureWindowsPath(name).name == name
        and ":" not in name
    )
