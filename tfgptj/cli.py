"""The `tfgptj` command: one verb, one function.

Nothing here imports Keras, TensorFlow or NumPy before the arguments are known to be right, so that help and usage
errors come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from tfgptj import __version__
from tfgptj.errors import BackendError, CheckpointError, InputError, TFGPTJError
from tfgptj.pipelines import ALIASES, TASKS
from tfgptj.training.recipe import Recipe

# Exit codes; argparse exits with 2 on wrong usage. The last two are what shells report for these signals.
OK, FAILED, INTERRUPTED, PIPE_CLOSED = 0, 1, 130, 141

DTYPES = ("auto", "float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")

# Flags of `run` that mean something only where tokens are drawn, and all that are options of pipelines.
SAMPLING = ("temperature", "top_k", "top_p", "num_return_sequences")
OPTIONS = ("max_new_tokens", "do_sample", *SAMPLING, "seed", "return_full_text", "batch_size")

RECIPE = dataclasses.fields(Recipe)  # what `train` has flags for

RUN_HELP = """
The texts are PROMPT, or the lines of --input, or those of standard input; line ends are cut off and blank lines are
left out. On a terminal generated text appears as it comes, elsewhere when all texts are complete. Flags that are left
out follow the model's own configuration.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes the process's own.

    Returns:
        The exit code: 0; 1 for an error that is not the program's own, told in one line; 130 after Ctrl-C; 141 when
        the reader of the output went away. Wrong usage exits with 2.
    """
    args = _parser().parse_args(argv)
    try:
        args.verb(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (TFGPTJError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"tfgptj: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    return OK


def run(args: argparse.Namespace) -> None:
    """Send texts through a model."""
    args.task = ALIASES.get(args.task, args.task)
    options, texts = _options(args), _texts(args)
    if args.output and not Path(args.output).parent.is_dir():
        args.usage_error(f"--output: there is no directory {Path(args.output).parent}")
    _start_keras(args.debug)
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


def train(args: argparse.Namespace) -> None:
    """Train a small model and its tokenizer on a text, from nothing."""
    with open(args.text_file, encoding="utf-8") as file:
        text = "".join(_lines(file, args.text_file))
    directory = Path(args.output_dir)
    if not args.overwrite and directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CheckpointError(f"{directory}: there is something already; choose another place, or add --overwrite")
    directory.mkdir(parents=True, exist_ok=True)  # now, not after hours, if it cannot be made
    _start_keras(args.debug)
    from tfgptj.training.pretrain import pretrain

    recipe = Recipe(**{field.name: getattr(args, field.name) for field in RECIPE})
    model, tokenizer, loss = pretrain(text, recipe, verbose=0 if args.quiet else 2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"held-out loss: {loss:.4f} nats per character\nsaved in {directory}")


def info(args: argparse.Namespace) -> None:
    """Tell a model's sizes, by arithmetic from its configuration."""
    from tfgptj.checkpoints.mapping import HEADS
    from tfgptj.config import GPTJConfig

    config = GPTJConfig.from_pretrained(args.model, revision=args.revision or "main")
    architectures = str(getattr(config, "architectures", None))
    head = next((head for name, head in HEADS.items() if name.removeprefix("TF") in architectures), "causal_lm")
    weights = config.num_parameters(head)
    cached = 2 * config.n_layer * config.n_embd * config.n_positions  # keys and values
    lines = {
        "parameters": f"{weights:,}, with the head: {head.replace('_', ' ')}",
        "layers": f"{config.n_layer:,}",
        "width": f"{config.n_embd:,}, feed-forward {config.inner_dim:,}",
        "heads": f"{config.n_head:,} of {config.head_dim:,}, {config.rotary_width:,} of them rotated",
        "vocabulary": f"{config.vocab_size:,}",
        "positions": f"{config.n_positions:,}",
        "weights take": _memory(weights),
        "cache takes": f"{_memory(cached)}, for one text of {config.n_positions:,} tokens",
    }
    for name, value in lines.items():
        print(f"{name:13} {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tfgptj", description="GPT-J for TensorFlow and Keras 3.")
    parser.add_argument("--version", action="version", version=f"tfgptj {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def add(verb: Callable[[argparse.Namespace], None], description: str = "") -> argparse.ArgumentParser:
        meaning = str(verb.__doc__)
        added = verbs.add_parser(
            verb.__name__, help=meaning.rstrip("."), description=meaning + description, allow_abbrev=False
        )
        added.set_defaults(verb=verb, usage_error=added.error)
        added.add_argument("--debug", action="store_true", help="show where an error comes from")
        return added

    _add_run_arguments(add(run, RUN_HELP))
    _add_train_arguments(add(train))
    shown = add(info)
    shown.add_argument("model", metavar="MODEL", help="a directory, a Hub id, or the name of a packaged model")
    shown.add_argument("--revision", help="branch, tag or commit on the Hub")
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
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


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text_file", metavar="TEXT_FILE", help="a text in UTF-8")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="where to save model and tokenizer")
    parser.add_argument("--overwrite", action="store_true", help="save even where there is something already")
    parser.add_argument("--quiet", action="store_true", help="show no progress")

    for field in RECIPE:
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=_value_type(field), default=field.default, metavar="X",
            help=f"{field.metadata['meaning']}; default: {field.default}",
        )  # fmt: skip


def _value_type(field: dataclasses.Field[Any]) -> Callable[[str], Any]:
    """What makes a value of the recipe from its text."""
    default: Any = field.default
    kind, least = type(default), field.metadata["least"]

    def parse(text: str) -> Any:
        value = kind(text)
        if not isinstance(value, str) and not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it in its own error
    return parse


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
    lines = [line.rstrip("\r\n") for line in _lines(file, name) if line.strip()]
    if not lines:
        raise InputError(f"{name}: holds no text, only blank lines")
    return lines


def _lines(file: IO[str], name: str) -> list[str]:
    try:
        return list(file)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not text in UTF-8: {error}") from None


def _start_keras(debug: bool) -> None:
    """Import Keras and its backend, without the notices that TensorFlow gives when it starts.

    C++ initialisers write some of them before any log level counts, so standard error leads nowhere for as long as the
    import takes. --debug shows them, and a TF_CPP_MIN_LOG_LEVEL in the environment decides for itself.
    """
    if debug or "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import keras  # noqa: F401
    finally:
        os.dup2(saved, 2)
        os.close(saved)


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


def _memory(numbers: int) -> str:
    """What so many numbers take, in the dtypes that models are held in."""
    return f"{_amount(4 * numbers)} in float32, {_amount(2 * numbers)} in bfloat16 or float16"


def _amount(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
