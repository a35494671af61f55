"""The weights in a directory as one collection of tensors, whatever files they are spread over."""

from __future__ import annotations

import hashlib
import logging
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from tfgptj import limits
from tfgptj.checkpoints import hdf5
from tfgptj.checkpoints.codegen import UnfusedFile
from tfgptj.checkpoints.directory import FORMATS, companion, find_weights
from tfgptj.checkpoints.flax_msgpack import FlaxFile
from tfgptj.checkpoints.hdf5 import HDF5File
from tfgptj.checkpoints.mapping import Layout
from tfgptj.checkpoints.safetensors import SafetensorsFile
from tfgptj.checkpoints.tensors import TensorFile, TensorSpec
from tfgptj.checkpoints.torch_zip import TorchZipFile
from tfgptj.errors import CheckpointError, CheckpointFormatError
from tfgptj.files import parse_json

_LOG = logging.getLogger("tfgptj")


# What opens a weight file of each format.
_READERS: dict[str, Callable[[Path], TensorFile]] = {
    "safetensors": SafetensorsFile,
    "bin": TorchZipFile,
    "h5": HDF5File,
    "msgpack": FlaxFile,
}

# The `format` that Hugging Face writes into a file's metadata, and whose names and layout it stands for.
_LAYOUTS: dict[str, Layout] = {"pt": "torch", "tf": "tensorflow", "flax": "flax"}


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
        self.path, self.format = find_weights(directory, weights)
        _LOG.info("reading weights from %s", self.path)
        self._files: dict[str, TensorFile] = {}  # by tensor name
        self._opened: list[UnfusedFile] = []
        self._index: dict[str, str] = {}  # its name and digest, where there is one
        self.shards: list[str] = []  # names of the files that hold the tensors
        self.metadata: Mapping[str, Any]
        try:
            if self.path.name == FORMATS[self.format].index:
                self._open_shards()
            else:
                self._add_file(self.path)
                self.metadata = self._opened[0].metadata
            self._check_names()
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

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """The values of a tensor or of some of its rows, a block at a time; each is overwritten by the next."""
        return self._files[name].blocks(name, start, stop)

    @property
    def is_fused(self) -> bool:
        """Whether the attention weights are stored as in a CodeGen; they are read as those of a GPT-J."""
        return any(file.is_fused for file in self._opened)

    def sha256(self) -> dict[str, str]:
        """SHA-256 in hexadecimal digits of every open file, and of the index where there is one, by file name.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        return self._index | {name: file.sha256() for name, file in zip(self.shards, self._opened, strict=True)}

    def companion(self, name: str) -> Path:
        """The path of a JSON file that belongs to these weights, such as "config.json"."""
        return companion(self.path.parent, name, self.format)

    def _add_file(self, path: Path) -> TensorFile:
        file = _READERS[self.format](path)
        unfused = UnfusedFile(file)
        self._opened.append(unfused)
        self._files.update(dict.fromkeys(unfused.names, unfused))
        self.shards.append(path.name)
        return file

    def _check_names(self) -> None:
        """Refuse a tensor that is stored by itself and as part of a fused matrix; a file holds no name twice."""
        counts = Counter(name for file in self._opened for name in file.names)
        for name in [name for name, count in counts.items() if count > 1]:
            raise CheckpointFormatError(f"{self.path}: holds tensor {name!r:.200} by itself and as part of qkv_proj")

    def _open_shards(self) -> None:
        digest = hashlib.sha256()
        self.metadata, weight_map = _read_index(self.path, self.format, digest)
        self._index = {self.path.name: digest.hexdigest()}
        for shard in sorted(set(weight_map.values())):
            path = self.path.parent / shard
            if not path.is_file():
                raise CheckpointError(f"{path}: this shard is named in {self.path.name}, but there is no such file")
            file = self._add_file(path)
            promised = {name for name in weight_map if weight_map[name] == shard}
            for name in sorted(promised ^ set(file.names)):
                found = "lacks" if name in promised else "holds"
                said = shard if name in promised else weight_map.get(name, "none of the shards")
                raise CheckpointFormatError(
                    f"{path}: {found} tensor {name!r:.200}, but {self.path.name} says that it is in {said}"
                )


def _read_index(path: Path, form: str, digest: Any) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The metadata of an index, and which shard holds which tensor; the digest is fed with the bytes that are read.

    What the metadata tell is not checked: their `total_size` counts parameters in some old files and bytes in others,
    in float at times, or is missing, and no library looks at it. The shards' own headers tell their sizes.
    """
    index = _read_json(path, digest)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(f"{path}: weight_map must map tensors to shards, got {weight_map!r:.80}")
    if not isinstance(metadata, dict):
        raise CheckpointFormatError(f"{path}: metadata must be an object, got {metadata!r:.80}")
    for name, shard in weight_map.items():
        if not _is_plain_name(shard, FORMATS[form].suffix):
            raise CheckpointFormatError(
                f"{path}: tensor {name!r:.200} is said to be in {shard!r:.200}; "
                f"a shard must be a *{FORMATS[form].suffix} file in the same directory"
            )
    return metadata, {(hdf5.index_name(name) if form == "h5" else name): shard for name, shard in weight_map.items()}


def _read_json(path: Path, digest: Any) -> dict[str, Any]:
    try:
        status, most = path.stat(), limits.MAX_INDEX_BYTES
        # Looked at before it is opened: to open a pipe would wait for its writer.
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointFormatError(f"{path}: is no regular file, expected the index of a checkpoint")
        if status.st_size > most:
            raise CheckpointFormatError(f"{path}: {status.st_size:,} bytes; at most {most:,} are read of an index")
        text = path.read_bytes()
        digest.update(text)
        content = parse_json(text, limits.MAX_INDEX_VALUES)
    except CheckpointFormatError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointFormatError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointFormatError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _is_plain_name(name: object, suffix: str) -> bool:
    """Whether a name can mean nothing but a file beside the index, on any system."""
    return (
        isinstance(name, str)
        and name.endswith(suffix)
        and name.isprintable()
        and PurePosixPath(name).name == PureWindowsPath(name).name == name
        and ":" not in name
    )
