"""Where a checkpoint is: a directory, a model that comes with the package, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tfgptj.checkpoints.directory import ADAPTER_FILES, DOCUMENTS, TOKENIZER_FILES, companion
from tfgptj.checkpoints.repository import Repository
from tfgptj.errors import CheckpointError

PACKAGED = Path(__file__).parents[1] / "pretrained"

_HUB_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

# What is needed for each purpose. Many repositories hold the same weights in several formats, 24 GB each: of these
# only one is fetched.
_FILES = {
    "config": ("config.json",),
    "generation": ("generation_config.json",),
    "tokenizer": TOKENIZER_FILES,
    "documents": (*DOCUMENTS, *TOKENIZER_FILES),
    "weights": DOCUMENTS,
    "adapter": ADAPTER_FILES,
}


def resolve_directory(
    name_or_path: str | os.PathLike[str],
    files: str,
    *,
    revision: str = "main",
    subfolder: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    weights: str = "auto",
) -> Path:
    """The local directory of a checkpoint; what is on the Hub is downloaded first.

    A directory that exists comes first, as in Hugging Face's libraries; then the packaged models, whose names have no
    slash; then the Hub, whose ids are of the form owner/name.

    Args:
        name_or_path: a directory, the name of a packaged model, or a Hub id.
        files: what is needed of it: "config", "generation", "tokenizer", "documents" (all of these), "adapter" (of
            LoRA) or "weights" (with the two JSON files). From the Hub comes this and nothing else.
        revision: branch, tag or commit on the Hub.
        subfolder: directory below `name_or_path`.
        cache_dir: where downloads are kept; None is the Hub library's own place.
        token: Hub token, True for the stored one, None for the stored one where it is needed, False for none.
        local_files_only: take downloaded files only. The environment variable HF_HUB_OFFLINE=1 does the same, and so
            does a Hub that cannot be reached.
        weights: which weights to fetch: "safetensors", "bin", "h5" or "msgpack"; "auto" takes the first of these that
            the repository has.

    Returns:
        The directory, `subfolder` included.

    Raises:
        CheckpointError: if there is no such directory, packaged model or repository, or it cannot be fetched.
    """
    if files not in _FILES:
        raise CheckpointError(f"files must be one of {', '.join(_FILES)}; got {files!r}")
    name = os.fspath(name_or_path)
    _check_subfolder(subfolder)
    if os.path.isdir(name):
        directory = Path(name)
    elif name in packaged_models():
        directory = PACKAGED / name
    elif os.path.exists(name):
        raise CheckpointError(f"{name}: is a file; give the directory that holds it")
    elif isinstance(name_or_path, str) and _HUB_ID.fullmatch(name):
        repository = Repository(name, revision, subfolder, cache_dir, token, local_files_only)
        return repository.fetch_weights(weights) if files == "weights" else repository.fetch(_FILES[files])
    else:
        raise CheckpointError(
            f"{name!r} is neither a directory, nor a Hub id of the form owner/name, nor a packaged model; "
            f"packaged are: {', '.join(packaged_models()) or 'none'}"
        )
    directory = directory / subfolder
    if not directory.is_dir():
        raise CheckpointError(f"{name}: has no subfolder {subfolder!r}")
    if files in ("config", "generation") and not companion(directory, _FILES[files][0]).is_file():
        raise CheckpointError(f"{directory}: holds no {_FILES[files][0]}")
    return directory


def packaged_models() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(path.parent.name for path in PACKAGED.glob("*/config.json")))


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part keyword arguments into those of :func:`resolve_directory` and all others.

    >>> split_options({"revision": "float16", "n_layer": 2})
    ({'revision': 'float16'}, {'n_layer': 2})
    """
    hub = {name: value for name, value in options.items() if name in _HUB_OPTIONS}
    return hub, {name: value for name, value in options.items() if name not in hub}


def _check_subfolder(subfolder: str) -> None:
    path = Path(subfolder)
    if path.is_absolute() or path.drive or ".." in path.parts:
        raise CheckpointError(f"subfolder must be a path below the checkpoint's own directory, got {subfolder!r}")
