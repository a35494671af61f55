"""A checkpoint and its configuration, opened together and compared: nothing but names, shapes and dtypes is read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tfgptj.checkpoints.directory import fingerprint
from tfgptj.checkpoints.mapping import ARCHITECTURES, Entry, canonical_name, heads_in, is_ignorable
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.checkpoints.tensors import FLOAT_DTYPES
from tfgptj.config import ALIASES, GPTJConfig
from tfgptj.errors import CheckpointError, CheckpointMismatchError, ConfigError, TFGPTJError

# A hostile file may have 500,000 unexpected tensors; a real one differs in a few, or in all of its layers.
_LISTED_DIFFERENCES = 1000

# A directory that is saved to again and again while it is loaded; each try takes milliseconds, a save seconds.
_OPENING_ATTEMPTS = 5


class Match(NamedTuple):
    """How a plan and the tensors of a checkpoint go together."""

    stored: list[tuple[Entry, str]]  # what to load, and its name in the checkpoint
    absent: list[str]  # head weights that the checkpoint lacks
    resized: list[str]  # weights that have another shape there, and are left out on the caller's demand


def open_checkpoint(
    directory: Path, weights: str = "auto", config: GPTJConfig | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[Checkpoint, GPTJConfig]:
    """Weights and configuration of one and the same save, even while another save is replacing both.

    Args:
        directory: where they are.
        weights: the format, or "auto".
        config: what to take in place of `config.json`.
        overrides: fields of the configuration to replace.

    Raises:
        CheckpointError: if they cannot be read.
        CheckpointFormatError: if a file is damaged.
        ConfigError: if the configuration is invalid.
    """
    for _ in range(_OPENING_ATTEMPTS):
        before = fingerprint(directory, weights)
        with ExitStack() as on_failure:
            try:
                checkpoint = on_failure.enter_context(Checkpoint(directory, weights))
                configuration = _configuration(checkpoint, config, overrides or {})
            except TFGPTJError:
                if fingerprint(directory, weights) == before:
                    raise
                continue
            if fingerprint(directory, weights) == before:
                on_failure.pop_all()
                return checkpoint, configuration
    raise CheckpointError(f"{directory}: its files are being replaced again and again; load when that has ended")


def _configuration(checkpoint: Checkpoint, config: GPTJConfig | None, overrides: Mapping[str, Any]) -> GPTJConfig:
    if config is not None and not isinstance(config, GPTJConfig):
        raise ConfigError(f"config must be a GPTJConfig, got {type(config).__name__}")
    path = checkpoint.companion("config.json")
    if config is None and not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; give the configuration as config=GPTJConfig(...)")
    known = {*inspect.signature(GPTJConfig).parameters, *ALIASES, "id2label", "label2id"} - {"extra"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ConfigError(f"from_pretrained has no argument, and GPTJConfig no field, {', '.join(unknown)}")
    if config is not None:
        return GPTJConfig.from_dict(config.to_dict(), **overrides)
    try:
        return GPTJConfig.from_json_file(path, **overrides)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def match_plan(entries: Sequence[Entry], checkpoint: Checkpoint, *, ignore_mismatched_sizes: bool = False) -> Match:
    """Compare a plan with the tensors of a checkpoint; only names, shapes and dtypes are read.

    Args:
        entries: the plan.
        checkpoint: the open files.
        ignore_mismatched_sizes: whether another shape is no difference.

    Raises:
        CheckpointMismatchError: with all differences, if there are any.
    """
    layout = checkpoint.layout
    names = {canonical_name(name): name for name in checkpoint.names}
    head = [entry for entry in entries if entry.in_head]
    has_head = any(entry.names[layout] in names for entry in head)
    match = Match([], [], [])
    faults: dict[str, list[str]] = {"missing": [], "of the wrong shape": [], "of the wrong dtype": []}
    for entry in entries:
        wanted = entry.names[layout]
        if wanted is None or wanted not in names:
            lost = faults["missing"] if has_head or not entry.in_head else match.absent
            lost.append(wanted or f"{entry.variable} (unknown to {layout})")
            continue
        spec = checkpoint.spec(names[wanted])
        if spec.dtype not in FLOAT_DTYPES.values():
            faults["of the wrong dtype"].append(f"{spec.name} ({spec.dtype.name})")
        if spec.shape != entry.stored_shape(layout):
            shapes = f"{spec.name} ({list(spec.shape)}, expected {list(entry.stored_shape(layout))})"
            (match.resized if ignore_mismatched_sizes else faults["of the wrong shape"]).append(shapes)
        else:
            match.stored.append((entry, spec.name))
    planned = {entry.names[layout] for entry in entries}
    faults["unexpected"] = [name for key, name in names.items() if key not in planned and not is_ignorable(key)]
    faults["stored under two names"] = sorted(set(checkpoint.names) - set(names.values()))
    _check_no_faults(checkpoint.path, faults)
    return match


def _check_no_faults(path: Path, faults: dict[str, list[str]]) -> None:
    lines = [
        f"  {fault} ({len(items):,}): {', '.join(items[:_LISTED_DIFFERENCES])}"
        + (", …" if len(items) > _LISTED_DIFFERENCES else "")
        for fault, items in faults.items()
        if items
    ]
    if lines:
        raise CheckpointMismatchError(
            "\n".join([f"{path}: these tensors are not as the configuration calls for:", *lines])
            + "\nDoes the config.json belong to these weights, and does the model class?"
        )


def head_of_checkpoint(checkpoint: Checkpoint, config: GPTJConfig) -> str:
    """Which head's weights a checkpoint has.

    Where there are several, that of the configuration's `architectures` counts.
    """
    names = {canonical_name(name) for name in checkpoint.names}
    heads = heads_in(names, checkpoint.layout)
    named = str(getattr(config, "architectures", None))
    return next((head for head in heads if ARCHITECTURES[head] in named), heads[0] if heads else "none")
