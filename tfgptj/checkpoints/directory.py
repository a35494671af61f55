"""How a checkpoint lies in a directory: what its files are called, and which of them count.

One file decides what is loaded: the first of :data:`HEADS` that is there, either all weights or the index of shards. A
save takes effect when that file changes, in a single rename or removal. A configuration that differs from the old one
waits until then under a name with a mark, which is made of the size and the time of the new weights; whoever loads
before it has got its final name finds it by this mark. See `write.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from pathlib import Path

from tfgptj.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Format:
    """What the weight files of a format are called."""

    whole: str  # the file that holds all weights
    suffix: str

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
        return re.fullmatch(rf"{stem}(-[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}{suffix}", name) is not None


# In the order in which `weights="auto"` looks for them.
FORMATS = {
    "safetensors": Format("model.safetensors", ".safetensors"),
    "bin": Format("pytorch_model.bin", ".bin"),
    "h5": Format("tf_model.h5", ".h5"),
    "msgpack": Format("flax_model.msgpack", ".msgpack"),
}

# What may lie beside the weights: the configurations, and the tokenizer in its two forms.
DOCUMENTS = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "encoder.json", "merges.txt", "vocab.bpe"),
)

# LoRA adapters lie in a directory of their own, as the PEFT library writes them.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

# What tells of a model that was converted for LiteRT; see `tfgptj.litert.layout`.
LITERT = "litert.json"

# The files of which the first that is there counts. A whole file comes before an index of shards.
HEADS = tuple(name for form in FORMATS.values() for name in (form.whole, form.index))

# How often they are looked for: a save in another format may put its file under a name that was looked at just before,
# and then remove the old one.
_LOOKS = 3


def find_weights(directory: Path, weights: str = "auto") -> tuple[Path, str]:
    """The file to begin with, weights or index, and its format, a key of :data:`FORMATS`.

    Raises:
        CheckpointError: if `weights` names no format, or there are no such files.
    """
    wanted = heads_of(weights)
    for name in wanted * _LOOKS:
        if os.path.lexists(directory / name):
            return directory / name, next(key for key, form in FORMATS.items() if name in (form.whole, form.index))
    found = ", ".join(sorted(path.name for path in directory.glob("*"))[:20]) or "nothing"
    pairs = ", ".join(f"{whole} or {index}" for whole, index in zip(wanted[::2], wanted[1::2], strict=True))
    if is_converted(directory):
        raise CheckpointError(f"{directory}: holds a LiteRT model; load it with LiteRTGPTJForCausalLM.from_pretrained")
    raise CheckpointError(f"{directory}: holds no weights; looked for {pairs}; found {found}")


def heads_of(weights: str) -> tuple[str, ...]:
    """The files that a load may begin with, in the order in which they are looked for.

    Raises:
        CheckpointError: if `weights` names no format.
    """
    if weights == "auto":
        return HEADS
    if weights not in FORMATS:
        raise CheckpointError(f"weights must be one of auto, {', '.join(FORMATS)}; got {weights!r}")
    return FORMATS[weights].whole, FORMATS[weights].index


def is_converted(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a model that was converted for LiteRT."""
    return (Path(name_or_path) / LITERT).is_file()


def has_weights(directory: Path) -> bool:
    """Whether there is anything to load, sound or not."""
    return any(os.path.lexists(directory / name) for name in HEADS)


def pending_path(directory: Path, name: str, weights: os.stat_result) -> Path:
    """Where a JSON file waits until the weights that it belongs to, a file of that status, are in place.

    An empty file there says that the weights have none.
    """
    mark = hashlib.sha256(f"{weights.st_size} {weights.st_mtime_ns}".encode()).hexdigest()[:16]
    return directory / f".tfgptj-{mark}-{name}.tmp"


def companion(directory: Path, name: str, weights: str = "auto") -> Path:
    """The path of a JSON file that belongs to a directory's weights, such as "config.json"; it need not exist.

    After a save that was cut off between its weights and its configuration that is not yet the file of that name.
    """
    for head in heads_of(weights):
        if os.path.lexists(directory / head):
            try:
                pending = pending_path(directory, name, (directory / head).stat())
                # An empty one: the new weights have no such file, and the old ones' is not theirs.
                return pending if pending.stat().st_size else pending.with_suffix("")
            except OSError:  # nothing waits; or a broken link, or another save is under way
                break
    return directory / name


def fingerprint(directory: Path, weights: str = "auto") -> tuple[Path, list[tuple[int, ...]]]:
    """What stays the same until a save replaces the weights or the configurations of a directory.

    Raises:
        CheckpointError: as for :func:`find_weights`.
    """
    path, _ = find_weights(directory, weights)
    stamps: list[tuple[int, ...]] = []
    for file in (path, *(directory / name for name in DOCUMENTS)):
        try:
            status = file.stat()
            stamps.append((status.st_dev, status.st_ino, status.st_mtime_ns))
        except OSError:
            stamps.append(())
    return path, stamps
