"""`tfgptj train`: a small model from nothing."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfgptj.cli.common import start_keras, text_lines
from tfgptj.errors import CheckpointError
from tfgptj.training.recipe import Recipe

RECIPE = dataclasses.fields(Recipe)  # what `train` has flags for


def train(args: argparse.Namespace) -> None:
    """Train a small model and its tokenizer on a text, from nothing."""
    with open(args.text_file, encoding="utf-8") as file:
        text = "".join(text_lines(file, args.text_file))
    directory = Path(args.output_dir)
    if not args.overwrite and directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CheckpointError(f"{directory}: there is something already; choose another place, or add --overwrite")
    directory.mkdir(parents=True, exist_ok=True)  # now, not after hours, if it cannot be made
    start_keras(args.debug)
    from tfgptj.training.pretrain import pretrain

    recipe = Recipe(**{field.name: getattr(args, field.name) for field in RECIPE})
    model, tokenizer, loss = pretrain(text, recipe, verbose=0 if args.quiet else 2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"held-out loss: {loss:.4f} nats per character\nsaved in {directory}")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`."""
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
