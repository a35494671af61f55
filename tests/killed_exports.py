"""Exports that are killed amid their work, by a signal that cannot be caught: see test_killed_exports.py.

    python killed_exports.py DIRECTORY

Each export is a process forked from this one, which has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
from tensorflow.python.lib.io import file_io

from tfgptj.config import GPTJConfig
from tfgptj.heads import TFGPTJForSequenceClassification
from tfgptj.serving.export import export_saved_model

SIZES: dict[str, Any] = {"vocab_size": 48, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 16}


def new_model() -> Any:
    """Always with the same weights."""
    keras.utils.set_random_seed(0)
    return TFGPTJForSequenceClassification(GPTJConfig(**SIZES, num_labels=3, pad_token_id=0))


def kill(*arguments: Any, **options: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def after(function: Callable[..., Any], times: int = 1) -> Callable[..., Any]:
    """The function, which the process does not survive so often."""
    count = iter(range(times - 1))

    def doomed(*arguments: Any) -> Any:
        result = function(*arguments)
        if next(count, None) is None:
            kill()
        return result

    return doomed


def amid_the_files() -> None:
    file_io.atomic_write_string_to_file = kill  # the weights are written, the graph is not


def amid_the_syncs() -> None:
    os.fsync = after(os.fsync, 3)


def behind_the_name() -> None:
    os.rename = after(os.rename)


def main(directory: str) -> None:
    """Export to the same place again and again; a line of JSON tells what each kill left."""
    for prepare in (amid_the_files, amid_the_syncs, behind_the_name):
        child = os.fork()
        if not child:
            prepare()
            export_saved_model(new_model(), directory)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*"))
        print(json.dumps({"moment": prepare.__name__, "status": status, "left": left}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
