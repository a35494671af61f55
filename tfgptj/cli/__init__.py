"""The `tfgptj` command: one verb, one function.

Nothing here imports Keras, TensorFlow or NumPy before the arguments are known to be right, so that help and usage
errors come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from tfgptj import __version__
from tfgptj.cli.benchmarks import BENCH_HELP, GENERATE_HELP, add_generate_arguments, generate
from tfgptj.cli.checkpoints import (
    add_convert_arguments,
    add_info_arguments,
    add_validate_arguments,
    convert,
    info,
    validate,
)
from tfgptj.cli.running import RUN_HELP, add_run_arguments, run
from tfgptj.cli.serving import EXPORT_HELP, add_export_arguments, export
from tfgptj.cli.training import TRAIN_HELP, add_pretrain_arguments, add_train_arguments, pretrain, train
from tfgptj.errors import TFGPTJError

# Exit codes; argparse exits with 2 on wrong usage. The last two are what shells report for these signals.
OK, FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes the process's own.

    Returns:
        The exit code: 0; 1 for an error that is not the program's own, told in one line; 130 after Ctrl-C; 141 when
        the reader of the output went away. Wrong usage exits with 2.
    """
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return USAGE
    args = parser.parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tfgptj", description="GPT-J for TensorFlow and Keras 3.")
    parser.add_argument("--version", action="version", version=f"tfgptj {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def add(
        verb: Callable[[argparse.Namespace], None], description: str = "", among: Any = verbs
    ) -> argparse.ArgumentParser:
        meaning = str(verb.__doc__)
        added = among.add_parser(
            verb.__name__, help=meaning.rstrip("."), description=meaning + description, allow_abbrev=False
        )
        added.set_defaults(verb=verb, usage_error=added.error)
        added.add_argument("--debug", action="store_true", help="show where an error comes from")
        return added

    add_run_arguments(add(run, RUN_HELP))
    add_train_arguments(add(train, TRAIN_HELP))
    add_pretrain_arguments(add(pretrain))
    add_info_arguments(add(info))
    add_convert_arguments(add(convert))
    add_validate_arguments(add(validate))
    add_export_arguments(add(export, EXPORT_HELP))
    bench = verbs.add_parser("bench", help=BENCH_HELP.rstrip("."), description=BENCH_HELP)
    benches = bench.add_subparsers(metavar="WHAT", required=True)
    add_generate_arguments(add(generate, GENERATE_HELP, benches))
    return parser
