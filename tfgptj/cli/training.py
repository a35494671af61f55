"""`tfgptj train`, and `tfgptj pretrain` for a small model from nothing."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfgptj.cli.common import start_keras, text_lines
from tfgptj.errors import CheckpointError, TFGPTJError
from tfgptj.training.recipe import Recipe
from tfgptj.training.settings import FineTuning, check_output, check_value

RECIPE = dataclasses.fields(Recipe)  # what `pretrain` has flags for
SETTINGS = dataclasses.fields(FineTuning)  # and `train`
REQUIRED = ("train_files", "output_dir")

TRAIN_HELP = """
A model is fine-tuned on files with Keras's fit, evaluated, and saved with its tokenizer and a summary.json. Defaults
are those of transformers' run_clm.py and its relatives.
"""


def train(args: argparse.Namespace) -> None:
    """Fine-tune a model on text, on labelled texts, or on questions."""
    settings = FineTuning(**{field.name: getattr(args, field.name) for field in SETTINGS})
    settings.check()
    check_output(settings)
    _check_files(settings)
    start_keras(args.debug)
    from tfgptj.training.fine_tuning import fine_tune

    summary = fine_tune(settings, verbose=0 if args.quiet else None)
    for name, value in summary.items():
        scores = value.items() if isinstance(value, dict) else [("", value)]
        for score, number in scores:
            print(
                f"{f'{name} {score}':26} {number:,.6g}" if isinstance(number, (int, float)) else f"{name:26} {number}"
            )
    print(f"saved in {settings.output_dir}")


def pretrain(args: argparse.Namespace) -> None:
    """Train a small model and its tokenizer on a text, from nothing."""
    with open(args.text_file, encoding="utf-8") as file:
        text = "".join(text_lines(file, args.text_file))
    directory = Path(args.output_dir)
    if not args.overwrite and directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CheckpointError(f"{directory}: there is something already; choose another place, or add --overwrite")
    directory.mkdir(parents=True, exist_ok=True)  # now, not after hours, if it cannot be made
    start_keras(args.debug)
    from tfgptj.training.pretrain import pretrain as run

    recipe = Recipe(**{field.name: getattr(args, field.name) for field in RECIPE})
    model, tokenizer, loss = run(text, recipe, verbose=0 if args.quiet else 2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"held-out loss: {loss:.4f} nats per character\nsaved in {directory}")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`."""
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    for field in SETTINGS:
        default: Any = field.default
        facts, several = field.metadata, isinstance(default, tuple)
        flag = facts.get("flag") or f"--{field.name.replace('_', '-')}"
        meaning, required = facts["meaning"], field.name in REQUIRED
        if facts["kind"] is bool:
            parser.add_argument(flag, dest=field.name, action="store_true", help=meaning)
            continue
        if default not in (None, (), ""):
            meaning += f"; default: {' '.join(default) if several else default}"
        parser.add_argument(
            flag, dest=field.name, required=required, default=default, type=_setting_type(field), help=meaning,
            choices=facts.get("choices"), metavar=None if "choices" in facts else "X",
            nargs="+" if several else None, action=_AsTuple if several else "store",
        )  # fmt: skip


def add_pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `pretrain`."""
    parser.add_argument("text_file", metavar="TEXT_FILE", help="a text in UTF-8")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="where to save model and tokenizer")
    parser.add_argument("--overwrite", action="store_true", help="save even where there is something already")
    parser.add_argument("--quiet", action="store_true", help="show no progress")

    for field in RECIPE:
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=_value_type(field), default=field.default, metavar="X",
            help=f"{field.metadata['meaning']}; default: {field.default}",
        )  # fmt: skip


class _AsTuple(argparse.Action):
    """Keeps several values as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _check_files(settings: FineTuning) -> None:
    """What is wrong with the files, as far as can be seen from outside."""
    from tfgptj.training.file_kinds import kind_of

    for files in (settings.train_files, settings.validation_files):
        if files:
            kind_of(files, settings.task)


def _setting_type(field: dataclasses.Field[Any]) -> Callable[[str], Any]:
    """What makes a value of a setting from its text."""
    kind = field.metadata["kind"]

    def parse(text: str) -> Any:
        is_word = kind == "freq" and text == "epoch"
        value = text if kind is str or is_word else (int if kind == "freq" else kind)(text)
        if not isinstance(field.default, tuple):
            try:
                check_value(field, value)
            except TFGPTJError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        return value

    parse.__name__ = "int or epoch" if kind == "freq" else kind.__name__  # what argparse calls it in its own error
    return parse


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
