"""A converted model read through: whether its files are those that were written, and graphs that LiteRT can run."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tfgptj.checkpoints.validate import Report
from tfgptj.checkpoints.write import Progress
from tfgptj.config import GPTJConfig
from tfgptj.errors import TFGPTJError
from tfgptj.litert.layout import Layout, read_layout


def validate(directory: str | os.PathLike[str], *, progress: Progress | None = None) -> Report:
    """Check a converted model. Faults are collected, not raised.

    Args:
        directory: where it is.
        progress: called with the bytes that are read and those that there are, after each file.

    Returns:
        A :class:`tfgptj.checkpoints.validate.Report`, whose facts have the SHA-256 of every file.
    """
    directory, report = Path(directory), Report()
    try:
        config = GPTJConfig.from_pretrained(directory)
        layout = read_layout(directory, config.n_layer)
    except TFGPTJError as error:
        report.faults.append(str(error))
        return report
    report.facts.append(("weights", f"LiteRT, {len(layout.files):,} files"))
    report.facts.append(("stored as", layout.description))
    _check_files(directory, layout, report, progress or (lambda done, total: None))
    return report


def _check_files(directory: Path, layout: Layout, report: Report, progress: Progress) -> None:
    total, done = sum(said["bytes"] for said in layout.files.values()), 0
    for name, said in sorted(layout.files.items()):
        with open(directory / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        report.facts.append((f"sha256 {name}", found))
        if found != said["sha256"]:
            report.faults.append(f"{name}: its SHA-256 is not the one that was written down: convert it again")
        done += said["bytes"]
        progress(done, total)
