"""Served models: decoding beside `generate`, and an export of GPT-J-6B's full size.

    python tests/benchmarks/serving.py decode CHECKPOINT [--dtype bfloat16] [--prompt 128] [--new 32] [--rounds 5]
    python tests/benchmarks/serving.py full-size [--directory DIRECTORY]

`decode` exports a model, loads the export beside it, and lets both continue the same tokens in turns: with one new
token and with more, whose difference is the time of decoding. `full-size` writes 12.1 GB of random bfloat16 weights and
as much of an export, and removes both: it needs 16 GB of memory and 25 GB of disk, and tells time and peak memory of
the export and of a process that loads it and answers requests.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def decode(options: argparse.Namespace) -> None:
    """Time of a token, served and not."""
    import numpy as np
    import tensorflow as tf

    from tfgptj.benchmark.machine import describe_machine
    from tfgptj.heads import TFGPTJForCausalLM
    from tfgptj.serving.export import export_saved_model

    model = TFGPTJForCausalLM.from_pretrained(options.checkpoint, dtype=options.dtype)
    model.generation_config = model.config.eos_token_id = None  # no text ends early
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, options.prompt)).astype("int32")
    calls: dict[str, dict[int, Callable[[], Any]]] = {"served": {}, "generate": {}}
    with tempfile.TemporaryDirectory() as directory:
        for count in (1, 1 + options.new):
            start = time.perf_counter()
            path = export_saved_model(model, directory, max_new_tokens=count, do_sample=False)
            took = time.perf_counter() - start
            tokens = tf.saved_model.load(str(path)).signatures["tokens"]
            if count > 1:
                graph, stored = (path / "saved_model.pb").stat().st_size, size_of(path / "variables")
                say(parameters=model.count_params(), export_seconds=round(took, 1), graph_bytes=graph, weights=stored)
            shutil.rmtree(path)
            given = {"token_ids": tf.constant(ids), "lengths": tf.constant([options.prompt])}
            calls["served"][count] = lambda tokens=tokens, given=given: tokens(**given)["token_ids"].numpy()
            calls["generate"][count] = lambda count=count: model.generate(ids, max_new_tokens=count, do_sample=False)
    first = {name: {count: call() for count, call in counts.items()} for name, counts in calls.items()}
    last = first["served"][1 + options.new]
    equal = bool((first["generate"][1 + options.new][:, options.prompt :] == last).all())
    seconds: dict[str, list[float]] = {"served": [], "generate": []}
    for _ in range(options.rounds):
        for name, counts in calls.items():
            taken = []
            for call in counts.values():
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
            seconds[name].append((taken[1] - taken[0]) / options.new)
    ratios = [served / own for served, own in zip(seconds["served"], seconds["generate"], strict=True)]
    say(
        dtype=options.dtype,
        same_tokens=equal,
        milliseconds={name: [round(1000 * second, 2) for second in taken] for name, taken in seconds.items()},
        ratio=round(statistics.median(ratios), 3),  # of the same rounds
        ratio_of_least=round(min(seconds["served"]) / min(seconds["generate"]), 3),
        machine=describe_machine(),
    )


def full_size(options: argparse.Namespace) -> None:
    """GPT-J-6B in bfloat16, exported by one process and served by another."""
    from random_checkpoint import write_random_checkpoint

    from tfgptj.config import GPTJConfig

    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        home = Path(directory)
        write_random_checkpoint(home / "checkpoint", GPTJConfig(), dtype="bfloat16")
        for step in ("export", "serve"):
            command = [sys.executable, __file__, step, str(home)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(done.stdout.splitlines()[-1], flush=True)
            shutil.rmtree(home / "checkpoint", ignore_errors=True)


def export(options: argparse.Namespace) -> None:
    """One process of `full-size`."""
    from tfgptj.heads import TFGPTJForCausalLM
    from tfgptj.serving.export import export_saved_model
    from tfgptj.tokenizer import GPTJTokenizer

    model = TFGPTJForCausalLM.from_pretrained(Path(options.directory) / "checkpoint", dtype="bfloat16")
    loaded, start = peak_memory(), time.perf_counter()
    tokenizer = GPTJTokenizer.from_pretrained("shakespeare")
    path = export_saved_model(model, Path(options.directory) / "served", tokenizer, max_new_tokens=8, do_sample=False)
    weights = 2 * model.count_params()
    say(
        step="export",
        seconds=round(time.perf_counter() - start, 1),
        loaded_peak_mb=loaded,
        peak_mb=peak_memory(),
        graph_bytes=(path / "saved_model.pb").stat().st_size,
        bytes_for_weights=round(size_of(path) / weights, 5),
    )


def serve(options: argparse.Namespace) -> None:
    """The other."""
    import tensorflow as tf

    start = time.perf_counter()
    served = tf.saved_model.load(str(Path(options.directory) / "served" / "1")).signatures["serving_default"]
    loaded = time.perf_counter() - start
    answers = []
    for _ in range(2):
        start = time.perf_counter()
        answer = served(prompt=tf.constant(["ROMEO: What light"]))
        answers.append(round(time.perf_counter() - start, 1))
    say(
        step="serve",
        load_seconds=round(loaded, 1),
        answer_seconds=answers,
        tokens=int(answer["num_tokens"][0]),
        peak_mb=peak_memory(),
    )


def peak_memory() -> int:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 10**6


def size_of(directory: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def say(**facts: Any) -> None:
    """One line of JSON."""
    print(json.dumps(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    timing = verbs.add_parser("decode")
    timing.set_defaults(verb=decode)
    timing.add_argument("checkpoint")
    timing.add_argument("--dtype", default="bfloat16")
    for name, default in (("--prompt", 128), ("--new", 32), ("--rounds", 5)):
        timing.add_argument(name, type=int, default=default)
    whole = verbs.add_parser("full-size")
    whole.set_defaults(verb=full_size)
    whole.add_argument("--directory", help="where there is room for 25 GB; default: a temporary directory")
    for step in (export, serve):
        part = verbs.add_parser(step.__name__)
        part.set_defaults(verb=step)
        part.add_argument("directory")
    options = parser.parse_args()
    options.verb(options)


if __name__ == "__main__":
    main()
