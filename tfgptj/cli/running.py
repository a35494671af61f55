"""`tfgptj run`: texts through a model."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from tfgptj.cli.common import start_keras, text_lines
from tfgptj.errors import BackendError, InputError
from tfgptj.pipelines import ALIASES, TASKS

DTYPES = ("auto", "float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")

# Flags of `run` that mean something only where tokens are drawn, and all that are options of pipelines.
SAMPLING = ("temperature", "top_k", "top_p", "num_return_sequences")
OPTIONS = ("max_new_tokens", "do_sample", *SAMPLING, "seed", "return_full_text", "batch_size")

RUN_HELP = """
The texts are PROMPT, or the lines of --input, or those of standard input; line ends are cut off and blank lines are
left out. On a terminal generated text appears as it comes, elsewhere when all texts are complete. Flags that are left
out follow the model's own configuration.
"""


def run(args: argparse.Namespace) -> None:
    """Send texts through a model."""
    args.task = ALIASES.get(args.task, args.task)
    options, texts = _options(args), _texts(args)
    if args.output and not Path(args.output).parent.is_dir():
        args.usage_error(f"--output: there is no directory {Path(args.output).parent}")
    start_keras(args.debug)
    if args.device is not None:
        _use_device(args.device)
    from tfgptj.pipelines import pipeline

    function: Any = pipeline(args.task, args.model, args.tokenizer, dtype=args.dtype, revision=args.revision, **options)
    streamed = args.task == "text-generation" and args.num_return_sequences in (None, 1)
    if streamed and not args.json and not args.output and sys.stdout.isatty():
        _print_stream(function.stream(texts, return_full_text=args.return_full_text is not False))
        return
    results = zip(texts, _results(function, texts, args), strict=True)
    records = [{"input": text, **result} for text, found in results for result in found]
    with open(args.output, "w", encoding="utf-8") if args.output else contextlib.nullcontext(sys.stdout) as out:
        for record in records:
            print(json.dumps(record, ensure_ascii=False) if args.json else _plain(record), file=out)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`."""
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="the text; may be empty")
    add("--task", choices=[*TASKS, *ALIASES], default="text-generation", help="default: text-generation")
    add("--model", metavar="M", help="a directory, a Hub id, or a packaged model, which is the default")
    add("--tokenizer", metavar="T", help="the same for the tokenizer; default: the model's")
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--dtype", choices=DTYPES, help="dtype policy to load the model with")
    add("--device", type=int, metavar="N", help="-1: the CPU; else the GPU of this number; default: 0, if any")
    add("--input", metavar="FILE", help="read texts from this file, one per line")
    add("--output", metavar="FILE", help="write results to this file")
    add("--json", action="store_true", help="print one JSON object per line, for programs")
    add("--batch-size", type=int, metavar="N", help="texts that the model works on at once")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens; show the K best labels or answers")

    generation = parser.add_argument_group("text generation")
    add = generation.add_argument
    add("--max-new-tokens", type=int, metavar="N", help="tokens to add, at most")
    add("--temperature", type=float, metavar="T", help="below 1: likelier tokens even more often; implies --do-sample")
    add("--top-p", type=float, metavar="P", help="draw among the likeliest tokens of this probability; the same")
    add("--num-return-sequences", type=int, metavar="N", help="continuations of each prompt; more than 1: the same")
    add("--seed", type=int, metavar="S", help="the same seed draws the same text")
    add = generation.add_mutually_exclusive_group().add_argument
    add("--do-sample", action="store_true", default=None, help="draw tokens")
    add("--greedy", action="store_false", dest="do_sample", default=None, help="always take the likeliest token")
    add = generation.add_mutually_exclusive_group().add_argument
    add("--return-full-text", action="store_true", default=None, help="put the prompt first, which is the default")
    add("--no-full-text", action="store_false", dest="return_full_text", default=None, help="leave out the prompt")

    add = parser.add_argument_group("question answering").add_argument
    add("--question", metavar="TEXT", help="the question")
    add("--context", metavar="TEXT", help="the text that holds the answer")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the pipeline that were given, or follow from those given."""
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    drawing = [name for name in SAMPLING if name in options and (name, options[name]) != ("num_return_sequences", 1)]
    if args.task == "text-generation" and drawing:
        if args.do_sample is False:
            args.usage_error(f"--greedy draws nothing, so --{drawing[0].replace('_', '-')} would have no effect")
        options["do_sample"] = True
    return options


def _texts(args: argparse.Namespace) -> list[str]:
    """What to send through the pipeline; of question answering, the question."""
    if (args.task == "question-answering") != (args.question is not None and args.context is not None):
        args.usage_error("--question and --context belong to --task question-answering, and it needs both")
    given = [text for text in (args.question, args.prompt, args.input) if text is not None]
    if len(given) > 1:
        args.usage_error("give one of PROMPT, --input and --question, not several")
    if args.input is not None:
        with open(args.input, encoding="utf-8") as file:
            return _nonblank(file, args.input)
    if given:
        return given
    if sys.stdin.isatty():
        args.usage_error("there is no text: give a PROMPT or --input, or pipe lines into standard input")
    return _nonblank(sys.stdin, "standard input")


def _nonblank(file: IO[str], name: str) -> list[str]:
    lines = [line.rstrip("\r\n") for line in text_lines(file, name) if line.strip()]
    if not lines:
        raise InputError(f"{name}: holds no text, only blank lines")
    return lines


def _use_device(number: int) -> None:
    """Let TensorFlow see one GPU alone, or none."""
    import keras

    if keras.backend.backend() != "tensorflow":
        raise BackendError(f"--device needs TensorFlow, and Keras runs on {keras.backend.backend()}: leave it out")
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not -1 <= number < len(gpus):
        raise BackendError(f"--device {number}: TensorFlow sees {len(gpus)} GPUs here; -1 is the CPU, 0 the first GPU")
    tf.config.set_visible_devices([] if number == -1 else [gpus[number]], "GPU")


def _print_stream(streams: Iterable[Iterable[str]]) -> None:
    for pieces in streams:
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def _results(function: Any, texts: list[str], args: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """One list of results for each text, whatever the task."""
    if args.task == "question-answering":
        found = function(texts[0], args.context)
        return [found if isinstance(found, list) else [found]]
    if args.task == "text-classification":
        return list(function(texts, top_k=args.top_k or 1))
    if args.task == "feature-extraction":
        return [[{"features": states[0]}] for states in function(texts)]
    return list(function(texts))


def _plain(record: dict[str, Any]) -> str:
    """A result for people to read."""
    if "label" in record:
        return f"{record['label']}\t{record['score']:.6f}"
    text = record.get("generated_text", record.get("answer"))
    return json.dumps(record["features"]) if text is None else text
