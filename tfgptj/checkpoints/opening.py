"""A checkpoint and its configuration, opened together: nothing but names, shapes and dtypes is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from tfgptj.checkpoints.directory import fingerprint
from tfgptj.checkpoints.mapping import ARCHITECTURES, canonical_name, heads_in
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.config import ALIASES, GPTJConfig
from tfgptj.errors import CheckpointError, ConfigError, TFGPTJError
from tfgptj.foreign import check_codegen_heads
from tfgptj.transformers_habits import remedies

Read = TypeVar("Read")

# A directory that is saved to again and again while it is loaded; each try takes milliseconds, a save seconds.
_OPENING_ATTEMPTS = 5


def open_checkpoint(
    directory: Path, read: Callable[[Checkpoint], Read], weights: str = "auto"
) -> tuple[Checkpoint, Read]:
    """Weights and configurations of one and the same save, even while another save is replacing them all.

    Args:
        directory: where they are.
        read: reads the configurations that lie beside the weights, by their `companion`; its result is returned.
        weights: the format, or "auto".

    Raises:
        CheckpointError: if they cannot be read.
        CheckpointFormatError: if a file is damaged.
        ConfigError, GenerationError: if a configuration is invalid.
    """
    for _ in range(_OPENING_ATTEMPTS):
        before = fingerprint(directory, weights)
        with ExitStack() as on_failure:
            try:
                checkpoint = on_failure.enter_context(Checkpoint(directory, weights))
                result = read(checkpoint)
            except (TFGPTJError, FileNotFoundError):
                if fingerprint(directory, weights) == before:
                    raise
                continue
            if fingerprint(directory, weights) == before:
                on_failure.pop_all()
                return checkpoint, result
    raise CheckpointError(f"{directory}: its files are being replaced again and again; load when that has ended")


def read_config(
    checkpoint: Checkpoint, config: GPTJConfig | None = None, overrides: Mapping[str, Any] | None = None
) -> GPTJConfig:
    """The configuration that belongs to some weights.

    Args:
        checkpoint: the weights.
        config: what to take in place of `config.json`.
        overrides: fields of the configuration to replace.

    Raises:
        CheckpointError: if it cannot be read.
        ConfigError: if it is invalid.
    """
    if config is not None and not isinstance(config, GPTJConfig):
        raise ConfigError(f"config must be a GPTJConfig, got {type(config).__name__}")
    overrides = overrides or {}
    path = checkpoint.companion("config.json")
    if config is None and not path.is_file():
        raise CheckpointError(
            f"{path}: there is no such file; give the configuration as config=GPTJConfig(...) to from_pretrained"
        )
    known = {*inspect.signature(GPTJConfig).parameters, *ALIASES, "id2label", "label2id"} - {"extra"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ConfigError(
            f"from_pretrained has no argument, and GPTJConfig no field, {', '.join(unknown)}{remedies(unknown)}"
        )
    try:
        if config is None:
            config = GPTJConfig.from_json_file(path, **overrides)
        else:
            config = GPTJConfig.from_dict(config.to_dict(), **overrides)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if checkpoint.is_fused:
        check_codegen_heads(config.n_head)
    return config


def head_of_checkpoint(checkpoint: Checkpoint, config: GPTJConfig) -> str:
    """Which head's weights a checkpoint has.

    Where there are several, that of the configuration's `architectures` counts.
    """
    names = {canonical_name(name) for name in checkpoint.names}
    heads = heads_in(names, checkpoint.layout)
    named = str(getattr(config, "architectures", None))
    return next((head for head in heads if ARCHITECTURES[head] in named), heads[0] if heads else "none")
