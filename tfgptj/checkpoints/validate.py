"""A checkpoint read through: what it is, what is worth knowing, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from tfgptj.checkpoints.checks import match_plan
from tfgptj.checkpoints.directory import TOKENIZER_FILES
from tfgptj.checkpoints.mapping import Entry, plan
from tfgptj.checkpoints.opening import head_of_checkpoint, open_checkpoint, read_config
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.checkpoints.tensors import health
from tfgptj.checkpoints.write import Progress
from tfgptj.config import GPTJConfig
from tfgptj.errors import TFGPTJError
from tfgptj.generation.config import GenerationConfig

# Weights that a sound model may have all zero: those that are added.
_ADDED = ("bias", "beta")


@dataclasses.dataclass
class Report:
    """What :func:`validate` found."""

    facts: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # names and values
    notes: list[str] = dataclasses.field(default_factory=list)  # what need not be wrong
    faults: list[str] = dataclasses.field(default_factory=list)


def validate(directory: str | os.PathLike[str], *, weights: str = "auto", progress: Progress | None = None) -> Report:
    """Check a checkpoint as far as it can be checked without knowing what the model should say.

    The files are read strictly, and against the plan that follows from the configuration. No weight may be NaN or
    infinite, no matrix and no scale all zero. The tokenizer, if there is one, must give ids that the vocabulary has.
    Faults are collected, not raised.

    Args:
        directory: where the checkpoint is.
        weights: which files to read, where there are several formats.
        progress: called with the bytes that are read and those that there are, after each tensor.

    Returns:
        A :class:`Report`, whose facts have the SHA-256 of every weight file.
    """
    directory, report = Path(directory), Report()
    try:
        checkpoint, config = open_checkpoint(directory, read_config, weights)
    except TFGPTJError as error:
        report.faults.append(str(error))
        return report
    with checkpoint:
        _check_weights(checkpoint, config, report, progress or (lambda done, total: None))
        _check_generation(checkpoint, report)
        report.facts += [(f"sha256 {name}", digest) for name, digest in checkpoint.sha256().items()]
    _check_tokenizer(directory, config, report)
    return report


def _check_weights(checkpoint: Checkpoint, config: GPTJConfig, report: Report, progress: Progress) -> None:
    specs = [checkpoint.spec(name) for name in checkpoint.names]
    total = sum(spec.nbytes for spec in specs)
    dtypes = sorted({spec.dtype.name for spec in specs})
    report.facts.append(("weights", f"{checkpoint.path.name}, {len(specs):,} tensors, {total:,} bytes"))
    report.facts.append(("stored as", ", ".join(dtypes)))
    try:
        head = head_of_checkpoint(checkpoint, config)
        report.facts.append(("head", head.replace("_", " ")))
        stored = match_plan(plan(config, head), checkpoint).stored
    except TFGPTJError as error:
        report.faults.append(str(error))
        return
    planned = sum(checkpoint.spec(name).nbytes for _, name in stored)
    if planned < total:
        report.notes.append(f"{len(specs) - len(stored):,} tensors are constants or of another head, and not loaded")
    done = 0
    for entry, name in stored:
        _check_values(checkpoint, entry, name, report)
        done += checkpoint.spec(name).nbytes
        progress(done, planned)


def _check_values(checkpoint: Checkpoint, entry: Entry, name: str, report: Report) -> None:
    try:
        found = health(checkpoint.blocks(name))
    except TFGPTJError as error:
        report.faults.append(str(error))
        return
    if not found.finite:
        report.faults.append(f"{name}: holds NaN or infinite values")
    if found.zero and not entry.variable.endswith(_ADDED):
        report.faults.append(f"{name}: all values are zero")


def _check_generation(checkpoint: Checkpoint, report: Report) -> None:
    path = checkpoint.companion("generation_config.json")
    if path.is_file():
        try:
            GenerationConfig.from_json_file(path)
        except TFGPTJError as error:
            report.faults.append(str(error))


def _check_tokenizer(directory: Path, config: GPTJConfig, report: Report) -> None:
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        report.notes.append("there is no tokenizer beside the weights")
        return
    from tfgptj.tokenizer import GPTJTokenizer

    try:
        tokenizer = GPTJTokenizer.from_pretrained(directory)
    except TFGPTJError as error:
        report.faults.append(str(error))
        return
    size = len(tokenizer)
    report.facts.append(("tokenizer", f"{size:,} tokens, for a vocabulary of {config.vocab_size:,}"))
    if size > config.vocab_size:
        report.faults.append(
            f"the tokenizer has {size:,} tokens, but the model's vocabulary only {config.vocab_size:,}"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ours, theirs = getattr(config, name), getattr(tokenizer, name)
        if theirs is not None and ours is not None and ours not in (theirs, [theirs]):
            report.notes.append(f"{name} is {ours} in the configuration, but {theirs} in the tokenizer")
