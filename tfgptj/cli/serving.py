"""`tfgptj export`: a model as TensorFlow Serving wants it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tfgptj.cli.common import start_keras
from tfgptj.cli.running import DTYPES
from tfgptj.pipelines import ALIASES, TASKS

EXPORT_HELP = """
DIRECTORY is that of all versions, each in a directory with its number, as TensorFlow Serving watches them. Flags of
generation that are left out follow the model's own configuration. --deployment writes what a server is started with:
its configuration, and a README of how to serve the model and ask it.
"""
LABEL_HELP = "what requests may call version N, such as stable=1; may be repeated; default: stable is the newest"
SAMPLING = ("temperature", "top_k", "top_p", "seed")
BEAMS = ("num_beams", "length_penalty", "early_stopping")
OPTIONS = ("version", "max_batch_size", "max_total_tokens", "max_new_tokens", "do_sample", *SAMPLING, *BEAMS)
EARLY_STOPPING = {"yes": True, "no": False, "never": "never"}


def export(args: argparse.Namespace) -> None:
    """Write a SavedModel that takes text and gives text, and needs TensorFlow alone."""
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    drawing = [name for name in SAMPLING if name in options]
    if drawing and args.do_sample is False:
        args.usage_error(f"--greedy draws nothing, so --{drawing[0].replace('_', '-')} would have no effect")
    searching = [name for name in BEAMS if name in options]
    if searching and (drawing or args.do_sample):
        args.usage_error(f"--{searching[0].replace('_', '-')} searches for the likeliest text, and draws nothing")
    if "early_stopping" in options:
        options["early_stopping"] = EARLY_STOPPING[options["early_stopping"]]
    if drawing or searching:
        options["do_sample"] = bool(drawing)
    labels = _labels(args)
    start_keras(args.debug)
    from tfgptj.pipelines import pipeline
    from tfgptj.serving.deployment import README_FILE, model_config, write_deployment
    from tfgptj.serving.export import export_saved_model
    from tfgptj.serving.versions import next_version, versions_in

    directory = Path(args.directory)
    if args.deployment is not None:  # what cannot be written is told now, not after the export
        versions = [*versions_in(directory), args.version or next_version(directory)]
        model_config(args.deployment, directory.resolve(), versions, labels or {})

    task = ALIASES.get(args.task, args.task)
    found: Any = pipeline(task, args.model, args.tokenizer, dtype=args.dtype, revision=args.revision)
    print(f"saved in {export_saved_model(found.model, directory, found.tokenizer, **options)}")
    if args.deployment is not None:
        write_deployment(directory, args.deployment, labels)
        print(f"how to serve it: {directory / README_FILE}")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `export`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory, a Hub id, or the name of a packaged model")
    add("directory", metavar="DIRECTORY", help="where to write; it is made if need be")
    add("--version", type=int, metavar="N", help="the number of this version; default: the next")
    add("--task", choices=[*TASKS, *ALIASES], default="text-generation", help="default: text-generation")
    add("--tokenizer", metavar="T", help="a directory, a Hub id, or a packaged model; default: the model's")
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--dtype", choices=DTYPES, help="dtype policy to load the model with")
    add("--max-batch-size", type=int, metavar="N", help="texts that a request may have")
    add("--max-total-tokens", type=int, metavar="N", help="texts of a request times the tokens of each, at most")
    add = parser.add_argument_group("files to start TensorFlow Serving with").add_argument
    add("--deployment", metavar="NAME", help="write them, for a model of this name on the server")
    add("--label", action="append", type=_label, metavar="LABEL=N", help=LABEL_HELP)
    add = parser.add_argument_group("text generation, where a request does not say").add_argument
    add("--max-new-tokens", type=int, metavar="N", help="tokens to add, at most")
    add("--temperature", type=float, metavar="T", help="below 1: likelier tokens even more often; implies --do-sample")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens; the same")
    add("--top-p", type=float, metavar="P", help="draw among the likeliest tokens of this probability; the same")
    add("--seed", type=int, metavar="S", help="draw every text with this seed; the same; default: anew for each")
    add("--num-beams", type=int, metavar="K", help="search with K beams; the model draws nothing then")
    add("--length-penalty", type=float, metavar="P", help="of the search; above 0: longer texts; default: 1")
    add(
        "--early-stopping",
        choices=EARLY_STOPPING,
        help="of the search: end with K texts, by a guess whether better ones may come, or with certainty; default: no",
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add("--do-sample", action="store_true", default=None, help="draw tokens")
    add("--greedy", action="store_false", dest="do_sample", default=None, help="always take the likeliest token")


def _labels(args: argparse.Namespace) -> dict[str, int] | None:
    """Versions by label; None where there are none."""
    if args.label is None:
        return None
    if args.deployment is None:
        args.usage_error("--label belongs to --deployment")
    labels = dict(args.label)
    if len(labels) < len(args.label):
        args.usage_error("a --label is given twice")
    return labels


def _label(text: str) -> tuple[str, int]:
    """A label and its version."""
    label, _, number = text.rpartition("=")
    if not label or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"expected LABEL=N, such as stable=1, got {text}")
    return label, int(number)
