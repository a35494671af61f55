"""CodeGen's attention weights, read as those of a GPT-J.

Salesforce's CodeGen has the block of GPT-J, but keeps the projections of queries, keys and values in one matrix,
[3 D, D]. Its heads are in four groups, as many as processors shared the training. Each group has its rows of the
queries, then of the values, then of the keys. All other tensors are called and stored as in a GPT-J.

Source: transformers, modeling_codegen.py, `CodeGenAttention.forward`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from tfgptj.checkpoints.tensors import TensorFile, TensorSpec, assemble
from tfgptj.foreign import CODEGEN_GROUPS

_FUSED = re.compile(r"((?:transformer\.)?h\.\d+\.attn\.)qkv_proj\.weight")
_PARTS = ("q_proj", "v_proj", "k_proj")  # in the order of a group's rows


class UnfusedFile:
    """A weight file as if the projections of queries, keys and values were stored one by one.

    Args:
        file: the file. It is read through this object or past it, as one likes.
    """

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._parts: dict[str, tuple[str, int]] = {}  # the matrix that each is part of, and its place in a group
        names: list[str] = []
        for name in file.names:
            match = _FUSED.fullmatch(name)
            if match is None or not _has_groups(file.spec(name)):
                names.append(name)  # what no CodeGen can have is reported as unexpected
                continue
            parts = {f"{match[1]}{part}.weight": (name, place) for place, part in enumerate(_PARTS)}
            self._parts |= parts
            names += parts
        self._names = tuple(names)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors; one that is stored by itself and in a fused matrix comes twice."""
        return self._names

    @property
    def is_fused(self) -> bool:
        """Whether any tensor is part of a matrix in the file."""
        return bool(self._parts)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Free text that the writer left in the file."""
        return self._file.metadata

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor, as :meth:`~tfgptj.checkpoints.raw_file.RawFile.spec` gives them."""
        if name not in self._parts:
            return self._file.spec(name)
        fused = self._file.spec(self._parts[name][0])
        return TensorSpec(name, (fused.shape[0] // len(_PARTS), fused.shape[1]), fused.dtype)

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, in an array of their own."""
        if name not in self._parts:
            return self._file.read(name)
        spec = self.spec(name)
        return assemble(self.blocks(name), spec, spec.dtype)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """The values of a tensor or of some of its rows, a block at a time; each is overwritten by the next."""
        if name not in self._parts:
            yield from self._file.blocks(name, start, stop)
            return
        fused, place = self._parts[name]
        count = self.spec(name).shape[0]
        stop = count if stop is None else min(stop, count)
        rows = count // CODEGEN_GROUPS  # of one part in one group
        if (place, start, stop) == (0, 0, count):
            yield from self._first_part(fused, rows)
            return
        while start < stop:
            group, skipped = divmod(start, rows)
            first = (group * len(_PARTS) + place) * rows + skipped
            length = min(rows - skipped, stop - start)
            yield from self._file.blocks(fused, first, first + length)
            start += length

    def _first_part(self, fused: str, rows: int) -> Iterator[np.ndarray]:
        """The queries, picked while the whole matrix is read: only so can a file's checksum of it be compared."""
        done = 0
        for block in self._file.blocks(fused):
            chosen = np.arange(done, done + len(block)) % (len(_PARTS) * rows) < rows
            done += len(block)
            if chosen.any():
                yield block if chosen.all() else block[chosen]

    def sha256(self) -> str:
        """SHA-256 of the whole file, in hexadecimal digits."""
        return self._file.sha256()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _has_groups(spec: TensorSpec) -> bool:
    height, width = spec.shape if len(spec.shape) == 2 else (0, 0)
    return height == len(_PARTS) * width > 0 and width % CODEGEN_GROUPS == 0
