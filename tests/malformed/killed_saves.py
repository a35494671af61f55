"""Kills a process that saves checkpoints, at one random moment after the other, and tells what it left each time::

    python tests/malformed/killed_saves.py DIRECTORY SIGNAL TRIALS SEED

Two checkpoints with different configurations, weights and, from trial to trial, formats are saved in turn. A line of
JSON for each trial says which of them is there after the kill, and which files are there after one more save.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from array_weights import ArrayWeights, is_same, random_weights, state_of  # noqa: E402

from tfgptj.checkpoints.write import WRITTEN, write_checkpoint  # noqa: E402

FORMS = [(form, limit) for limit in ("1GB", "2KB") for form in WRITTEN]
Saved = tuple[ArrayWeights, dict[str, Any]]


def save_for_ever(directory: Path, saved: list[Saved]) -> None:
    while True:
        for weights, options in saved:
            write_checkpoint(directory, weights, **options)


def in_a_process(act: Any, *arguments: Any) -> int:
    """Start it in a process of its own, which ends with it whatever happens; the process's number.

    Python loses the exception of a signal that comes while it forks: the process says when it is past that.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(sender, b"!")
            act(*arguments)
        finally:
            os._exit(0)
    os.read(receiver, 1)
    os.close(receiver)
    os.close(sender)
    return child


def name_of(directory: Path, saved: list[Saved], reference: Path) -> str:
    found = state_of(directory)
    for number, (weights, options) in enumerate(saved):
        write_checkpoint(reference, weights, **options)
        if is_same(found, state_of(reference)):
            return f"checkpoint {number}"
    return "a third state"


def main(directory: Path, number: int, trials: int, seed: int) -> None:
    """Run the trials."""
    chance = random.Random(seed)
    sources = [
        random_weights(1, documents=True),
        random_weights(2, n_layer=2, layer_norm_epsilon=1e-3),
        random_weights(3, n_layer=1, layer_norm_epsilon=1e-4),
    ]
    before: Saved = (sources[2], {})
    write_checkpoint(directory, *before[:1])
    for trial in range(trials):
        chosen = chance.sample(FORMS, 2)
        saved = [
            (source, {"format": form, "max_shard_size": limit})
            for source, (form, limit) in zip(sources[:2], chosen, strict=True)
        ]
        child = in_a_process(save_for_ever, directory, saved)
        time.sleep(chance.random() * 0.06)
        os.kill(child, number)
        os.waitpid(child, 0)
        found = name_of(directory, [*saved, before], directory.with_name("reference"))
        before = saved[trial % 2]
        write_checkpoint(directory, before[0], **before[1])
        names = sorted(path.name for path in directory.iterdir())
        print(json.dumps([found, names]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), signal.Signals[sys.argv[2]], int(sys.argv[3]), int(sys.argv[4]))
