"""What the readers of weight files have in common, whatever the format: a file that is read at given places."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from tfgptj.checkpoints.tensors import TensorSpec, aligned_empty, block_buffers
from tfgptj.errors import CheckpointError, CheckpointFormatError

# What is often saved under the name of a weight file, by its first bytes. A reader asks for them when it has found that
# a file does not begin as its format does.
IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights: fetch them with `git lfs pull`"),
    (b"<", "a web page or XML, not weights: an error page was saved when downloading; download the file again"),
    (b"PK\x03\x04", "a ZIP archive, such as PyTorch's .bin files, under a wrong name"),
    (b"\x89HDF", "an HDF5 file under a wrong name"),
    (b"\x80", "a Python pickle, which is never read: it could run code"),
)


class RawFile(ABC):
    """An open file of tensors, read by several threads if need be: the base of one class per format.

    The values are read with plain reads. A mapped file would count as memory of this process, page by page, beside the
    arrays that are filled from it.

    Args:
        path: the file.
        expected: what it should be, with its article, for messages.

    Raises:
        CheckpointFormatError: if it is no regular file, or its subclass finds it damaged.
        CheckpointError: if the file cannot be opened or read.
    """

    # What a subclass learns from the file when it is opened, in `_read_header`.
    _specs: dict[str, TensorSpec]
    _metadata: dict[str, str]

    def __init__(self, path: str | os.PathLike[str], expected: str) -> None:
        self.path = Path(path)
        self._file = _open_regular_file(self.path, expected)
        self._lock = threading.Lock()  # for the file's position, which several readers share
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._file.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._specs)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Free text that the writer left in the file."""
        return self._metadata

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor.

        Raises:
            CheckpointError: if the file has no tensor of that name.
        """
        if name not in self._specs:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}")
        return self._specs[name]

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, in an array of their own.

        Raises:
            CheckpointFormatError: if the values are damaged, where the format can tell.
            CheckpointError: if the file has no tensor of that name, is closed, or cannot be read.
        """
        spec = self.spec(name)
        array = aligned_empty(spec.shape, spec.dtype)
        self._fill(name, 0, array)
        return array

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """The values of a tensor, some rows at a time; each block is overwritten by the next.

        Args:
            name: the tensor.
            start: the first row.
            stop: the row before which to end; None for all.

        Raises:
            CheckpointError: as for :meth:`read`.
        """
        for skip, block in block_buffers(self.spec(name), start, stop):
            self._fill(name, skip, block)
            yield block

    def sha256(self) -> str:
        """SHA-256 of the whole file, in hexadecimal digits; of the very file that is open, whatever its name leads to.

        Raises:
            CheckpointError: if the file is closed, or cannot be read.
        """
        try:
            with self._lock:
                self._file.seek(0)
                return hashlib.file_digest(self._file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{self.path}: its digest could not be taken: {error.strerror}") from error
        except ValueError:  # what Python says of a closed file
            raise CheckpointError(f"{self.path}: its digest was asked for after the file was closed") from None

    @abstractmethod
    def _fill(self, name: str, skip: int, out: np.ndarray) -> None:
        """Fill an array with a tensor's values, after so many bytes of them."""

    @abstractmethod
    def _read_header(self) -> None:
        """Learn from the file which tensors it holds."""

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _read_bytes(self, start: int, out: memoryview, what: str) -> None:
        """Fill memory with the bytes from a place on; `what` they are is for messages."""
        done = 0
        try:
            with self._lock:
                self._file.seek(start)
                while done < len(out) and (count := self._file.readinto(out[done:])):
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: {what} could not be read: {error.strerror}") from error
        except ValueError:  # what Python says of a closed file
            raise CheckpointError(f"{self.path}: {what} was asked for after the file was closed") from None
        if done < len(out):
            raise CheckpointFormatError(
                f"{self.path}: cut short while being read: {what} ends {len(out) - done:,} bytes early"
            )


def bytes_of(array: np.ndarray) -> memoryview:
    """A contiguous array's memory. NumPy lends out that of a bfloat16 array only under another dtype."""
    return array.reshape(-1).view(np.uint8).data


def _open_regular_file(path: Path, expected: str) -> FileIO:
    try:
        # Looked at before it is opened: to open a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a directory" if path.is_dir() else "no regular file"
            raise CheckpointFormatError(f"{path}: is {kind}, expected {expected}")
        return FileIO(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except CheckpointFormatError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
