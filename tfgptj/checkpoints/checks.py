"""What a checkpoint must pass before its weights are loaded: nothing is allocated for one that does not.

Digests that the caller knows, names and shapes of all tensors, and, where the weights are for a model that exists, the
parts of its configuration that no tensor shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tfgptj.checkpoints.mapping import Entry, canonical_name, is_ignorable
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.checkpoints.tensors import FLOAT_DTYPES
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError

# A hostile file may have 500,000 unexpected tensors; a real one differs in a few, or in all of its layers.
_LISTED_DIFFERENCES = 1000

# Its rows are the vocabulary: Hugging Face's GPT-J has 50,400, of which 143 stand for no token, and some have cut them.
_EMBEDDING = "embedding.wte.embeddings"

# What decides how a model computes, and what of it to compare: None for a width stands for a default.
_ARCHITECTURE = {
    **{name: name for name in ("vocab_size", "n_embd", "n_layer", "n_head", "activation_function")},
    **{"layer_norm_epsilon": "layer_norm_epsilon", "tie_word_embeddings": "tie_word_embeddings"},
    **{"n_inner": "inner_dim", "rotary_dim": "rotary_width"},
}


class Match(NamedTuple):
    """How a plan and the tensors of a checkpoint go together."""

    stored: list[tuple[Entry, str]]  # what to load, and its name in the checkpoint
    absent: list[str]  # head weights that the checkpoint lacks
    resized: list[str]  # weights that have another shape there, and are left out on the caller's demand


def check_sha256(checkpoint: Checkpoint, expected: str | Mapping[str, str]) -> None:
    """Compare the open files with digests that are known from elsewhere.

    Args:
        checkpoint: the open files.
        expected: SHA-256 in hexadecimal digits: of the one weight file, or of every file by name, the index of shards
            among them.

    Raises:
        CheckpointError: if `expected` is no such digest, or names other files than these.
        CheckpointFormatError: if a file has another digest; all such files are named.
    """
    files = ([] if checkpoint.path.name in checkpoint.shards else [checkpoint.path.name]) + checkpoint.shards
    digests = _digests_by_file(checkpoint.path, expected, files)
    found = checkpoint.sha256()
    wrong = [f"{name} has {found[name]}, expected {digests[name]}" for name in files if found[name] != digests[name]]
    if wrong:
        raise CheckpointFormatError(
            f"{checkpoint.path.parent}: not the weights that were expected, by their SHA-256: {'; '.join(wrong)}"
        )


def _digests_by_file(path: Path, expected: object, files: Sequence[str]) -> dict[str, str]:
    if isinstance(expected, str) and len(files) == 1:
        expected = {files[0]: expected}
    if not isinstance(expected, Mapping):
        wanted = "64 hexadecimal digits" if len(files) == 1 else "a dict of 64 hexadecimal digits for each file"
        raise CheckpointError(
            f"{path}: expected_sha256 must be {wanted} ({', '.join(files)}), got {type(expected).__name__}"
        )
    names = {"lacks": set(files) - set(expected), "names what is none of them:": set(expected) - set(files)}
    faults = [f"it {fault} {', '.join(sorted(map(str, found)))}" for fault, found in names.items() if found]
    if faults:
        raise CheckpointError(
            f"{path}: expected_sha256 must have exactly the files {', '.join(files)}; {'; '.join(faults)}"
        )
    for name, digest in expected.items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-fA-F]{64}", digest):
            raise CheckpointError(f"expected_sha256 of {name} must be 64 hexadecimal digits, got {digest!r:.200}")
    return {name: digest.lower() for name, digest in expected.items()}


def check_same_architecture(
    path: Path, stored: GPTJConfig, config: GPTJConfig, head: str, *, ignore_mismatched_sizes: bool = False
) -> None:
    """Compare the configuration of a checkpoint with that of a model, as far as results depend on it.

    Args:
        path: the weights, for messages.
        stored: the checkpoint's configuration.
        config: the model's.
        head: the model's head.
        ignore_mismatched_sizes: whether the vocabularies may differ.

    Raises:
        CheckpointMismatchError: with all differences, if there are any.
    """
    differences = architecture_differences(stored, config, head, ignore_mismatched_sizes=ignore_mismatched_sizes)
    if differences:
        raise CheckpointMismatchError(
            "\n".join([f"{path}: these weights are for a model of another architecture:", *differences])
            + "\nLoad them into a model of their own, with from_pretrained"
        )


def architecture_differences(
    stored: GPTJConfig, config: GPTJConfig, head: str, *, ignore_mismatched_sizes: bool = False
) -> list[str]:
    """A line for each field in which two configurations differ, as far as results depend on it; arguments as above."""
    left_out = {"vocab_size"} if ignore_mismatched_sizes else set()
    if head != "causal_lm":
        left_out.add("tie_word_embeddings")  # it says what the head is made of
    return [
        f"  {field}: {getattr(stored, field)!r}, the model has {getattr(config, field)!r}"
        for field, value in _ARCHITECTURE.items()
        if field not in left_out and getattr(stored, value) != getattr(config, value)
    ]


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
    advice = "Does the config.json belong to these weights, and does the model class?"
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
            if entry.variable == _EMBEDDING and spec.shape[1:] == entry.shape[1:]:
                advice = (
                    f"The weights are for a vocabulary of {spec.shape[0]:,}, the configuration says vocab_size "
                    f"{entry.shape[0]:,}: if the weights are right, load with vocab_size={spec.shape[0]}"
                )
        else:
            match.stored.append((entry, spec.name))
    planned = {entry.names[layout] for entry in entries}
    faults["unexpected"] = [name for key, name in names.items() if key not in planned and not is_ignorable(key)]
    faults["stored under two names"] = sorted(set(checkpoint.names) - set(names.values()))
    _check_no_faults(checkpoint.path, faults, advice)
    return match


def _check_no_faults(path: Path, faults: dict[str, list[str]], advice: str) -> None:
    lines = [
        f"  {fault} ({len(items):,}): {', '.join(items[:_LISTED_DIFFERENCES])}"
        + (", …" if len(items) > _LISTED_DIFFERENCES else "")
        for fault, items in faults.items()
        if items
    ]
    if lines:
        raise CheckpointMismatchError(
            "\n".join([f"{path}: these tensors are not as the configuration calls for:", *lines, advice])
        )
