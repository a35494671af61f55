"""The notebooks, executed from start to end in a kernel of their own, without network.

    python tests/execute_notebooks.py [NAME ...]

stores in `notebooks/` what each one, or those whose names begin so, prints and draws.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
LONGEST = 600  # seconds of a cell: twenty times what the slowest takes


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(path: Path, directory: Path, changes: Mapping[str, str] | None = None) -> NotebookNode:
    """A notebook as a run in this directory leaves it, without anything about the machine.

    Args:
        path: the notebook.
        directory: where its kernel works.
        changes: code that stands in it once, and what is executed instead.

    Raises:
        CellExecutionError: when a cell fails.
    """
    notebook = read(path)
    for old, new in (changes or {}).items():
        [cell] = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
        cell.source = cell.source.replace(old, new)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(directory / ".ipython"),  # nobody's profile and history
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    client = NotebookClient(
        notebook,
        timeout=LONGEST,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        # What TensorFlow's C++ says of the machine when it starts stays out of the notebook.
        extra_arguments=["--IPKernelApp.capture_fd_output=False", "--log-level=ERROR"],
        resources={"metadata": {"path": str(directory)}},
    )
    client.execute(env=environment)
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main() -> None:
    names = tuple(sys.argv[1:]) or ("",)
    for path in NOTEBOOKS:
        if path.name.startswith(names):
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as directory:
                notebook = execute(path, Path(directory))
            nbformat.write(notebook, path)
            print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
