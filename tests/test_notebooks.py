"""The notebooks run from start to end, and what is stored in them is what such a run shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from execute_notebooks import METADATA, NOTEBOOKS, execute, read
from nbformat import NotebookNode

LARGEST = 300_000  # bytes, so that GitHub shows it at once
PRIVATE = re.compile(r"(?<![\w.:/])/(?:tmp|home|root|usr|var|opt|mnt|Users)/|[A-Z]:\\|site-packages|\b0x[0-9a-f]{8,}")

# Fewer steps and measurements, where nothing that comes after needs a model that has learnt.
SHORTER = {
    "02_causal_language_modeling": {"ROUNDS, STEPS = 6, 10": "ROUNDS, STEPS = 2, 3"},
    "04_question_answering": {"BATCH, ROUNDS, STEPS = 16, 5, 18": "BATCH, ROUNDS, STEPS = 16, 2, 6"},
    "06_cpu_inference": {"rounds=12": "rounds=3"},
    "07_multi_gpu_training": {"STEPS = 12": "STEPS = 4"},
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: NotebookNode) -> set[str]:
    """What a cell shows: "stdout", "stderr", "error", "image/png", …"""
    found: set[str] = set()
    for output in cell.outputs:
        found |= {output.get("name", output.output_type)} if "data" not in output else set(output.data)
    return found


def texts(cell: NotebookNode) -> Iterator[str]:
    for output in cell.outputs:
        yield from (value for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))
        yield output.get("text", "")


@each_notebook
def test_it_runs_and_shows_what_is_stored(path: Path, tmp_path: Path) -> None:
    fresh = execute(path, tmp_path, SHORTER.get(path.stem))
    for cell, stored in zip(code_cells(fresh), code_cells(read(path)), strict=True):
        assert kinds(cell) == kinds(stored), f"{cell.source}\n{''.join(texts(cell))}"
        assert "stderr" not in kinds(cell), f"{cell.source}\n{''.join(texts(cell))}"


@each_notebook
def test_it_is_stored_as_it_was_executed(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    assert all(cell.metadata == {} for cell in notebook.cells)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = set().union(*map(kinds, cells))
    assert {"stdout", "image/png"} <= shown and not {"stderr", "error"} & shown
    assert path.stat().st_size < LARGEST


@each_notebook
def test_its_results_have_no_warning_and_no_place_of_a_machine(path: Path) -> None:
    for cell in code_cells(read(path)):
        for text in texts(cell):
            assert not re.search("warning", text, re.IGNORECASE), text
            assert not PRIVATE.search(text), text


@each_notebook
def test_its_beginning_says_what_the_full_model_needs(path: Path) -> None:
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "GPT-J-6B" in first.source and re.search(r"\d GB", first.source)
