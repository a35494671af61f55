"""`tfgptj info`, `convert` and `validate`: checkpoints, without Keras."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tfgptj.cli.common import amount, start_keras
from tfgptj.errors import CheckpointError

if TYPE_CHECKING:
    from tfgptj.checkpoints.write import Progress
    from tfgptj.config import GPTJConfig

# What `--format` and `--weights` know; the tables that they are checked against again are slow to import.
FORMATS = ("safetensors", "h5", "msgpack", "litert", "tflite")
WEIGHTS = ("auto", "safetensors", "bin", "h5", "msgpack")
DTYPES = ("float32", "bfloat16", "float16")
BITS, BLOCK_SIZES = (4, 8, 32), (0, 32, 64, 128)

# Flags of `convert` for some formats alone.
OF_CHECKPOINTS, OF_FEW_BITS, OF_LITERT, OF_ONE_FILE = (
    ("dtype", "max_shard_size"),
    ("bits", "block_size", "keep_head_bits"),
    ("calibration",),
    ("positions",),
)
REFUSED = {
    **dict.fromkeys(("safetensors", "h5", "msgpack"), (*OF_FEW_BITS, *OF_LITERT, *OF_ONE_FILE)),
    **{"litert": (*OF_CHECKPOINTS, *OF_ONE_FILE), "tflite": (*OF_CHECKPOINTS, *OF_LITERT)},
}


def info(args: argparse.Namespace) -> None:
    """Tell a model's sizes, from its configuration and the headers of its weight files."""
    from tfgptj.checkpoints.directory import has_weights, is_converted
    from tfgptj.checkpoints.hub import resolve_directory
    from tfgptj.checkpoints.mapping import ARCHITECTURES
    from tfgptj.config import GPTJConfig

    directory = resolve_directory(args.model, files="config", revision=args.revision or "main")
    config = GPTJConfig.from_pretrained(directory)
    named = str(getattr(config, "architectures", None))
    head = next((head for head, name in ARCHITECTURES.items() if name in named), "causal_lm")
    stored: dict[str, str] = {}
    if has_weights(directory):  # of a model on the Hub only the configuration is fetched
        head, stored = _stored(directory, config)
    elif is_converted(directory):
        stored = _converted(directory, config)
    weights = config.num_parameters(head)
    cached = 2 * config.n_layer * config.n_embd * config.n_positions  # keys and values
    lines = {
        "parameters": f"{weights:,}, with the head: {head.replace('_', ' ')}",
        "layers": f"{config.n_layer:,}",
        "width": f"{config.n_embd:,}, feed-forward {config.inner_dim:,}",
        "heads": f"{config.n_head:,} of {config.head_dim:,}, {config.rotary_width:,} of them rotated",
        "vocabulary": f"{config.vocab_size:,}",
        "positions": f"{config.n_positions:,}",
        **stored,
        "weights take": _memory(weights),
        "cache takes": f"{_memory(cached)}, for one text of {config.n_positions:,} tokens",
    }
    for name, value in lines.items():
        print(f"{name:13} {value}")


def convert(args: argparse.Namespace) -> None:
    """Write a checkpoint in another format, dtype or number of bits, tensor by tensor."""
    for name in REFUSED[args.format]:
        if getattr(args, name) not in (None, False):
            args.usage_error(f"--{name.replace('_', '-')} does not go with --format {args.format}")
    common = {"weights": args.weights, "revision": args.revision or "main", "overwrite": args.overwrite}
    bits = {"bits": args.bits or 8, "block_size": args.block_size, "head_bits": args.keep_head_bits}
    with _progress_bar("writing", args.quiet) as progress:
        if args.format == "litert":
            from tfgptj.litert.convert import convert as convert_to_litert

            if args.calibration is not None:
                start_keras(args.debug)
            convert_to_litert(
                args.source, args.destination, calibration=args.calibration, progress=progress, **bits, **common
            )
        elif args.format == "tflite":
            from tfgptj.litert.single_file import convert_to_file

            convert_to_file(
                args.source, args.destination, positions=args.positions, progress=progress, **bits, **common
            )
        else:
            from tfgptj.checkpoints.convert import convert as convert_checkpoint

            convert_checkpoint(
                args.source, args.destination, format=args.format, dtype=args.dtype,
                max_shard_size=args.max_shard_size or "5GB", progress=progress, **common,
            )  # fmt: skip
    print(f"saved in {args.destination}")


def validate(args: argparse.Namespace) -> None:
    """Read a checkpoint through and tell what is wrong with it: exit code 1, if anything is."""
    from tfgptj.checkpoints.directory import is_converted
    from tfgptj.checkpoints.hub import resolve_directory
    from tfgptj.checkpoints.validate import validate as validate_checkpoint

    with _progress_bar("reading", args.quiet) as progress:
        if is_converted(args.model):
            from tfgptj.litert.validate import validate as validate_converted

            directory = Path(args.model)
            report = validate_converted(directory, progress=progress)
        else:
            revision = args.revision or "main"
            resolve_directory(args.model, files="documents", revision=revision)
            directory = resolve_directory(args.model, files="weights", weights=args.weights, revision=revision)
            report = validate_checkpoint(directory, weights=args.weights, progress=progress)
    for name, value in report.facts:
        print(f"{name:13} {value}")
    for note in report.notes:
        print(f"note: {note}")
    for fault in report.faults:
        print(f"fault: {fault}")
    if report.faults:
        raise CheckpointError(f"{directory}: {len(report.faults):,} fault(s), listed above")
    print("no faults")


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `info`."""
    _add_model(parser, "model", "MODEL")


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `convert`."""
    _add_model(parser, "source", "SRC")
    add = parser.add_argument
    add(
        "destination",
        metavar="DST",
        help="what to write: a new or empty directory, unless --overwrite; of tflite a file",
    )
    add("--format", choices=FORMATS, default="safetensors", help="default: safetensors")
    add("--dtype", choices=DTYPES, help="what to store the weights in; default: what they are stored in")
    add("--max-shard-size", metavar="SIZE", help="largest weight file, like 200MB; default: 5GB")
    add("--overwrite", action="store_true", help="replace what is there, in one step; SRC may be DST")
    add = parser.add_argument_group(
        "--format litert, for `tfgptj run` on a small machine, and tflite, one file that LiteRT alone runs on a phone"
    ).add_argument
    add("--bits", type=int, choices=BITS, help="of each number of the matrices; 32: float32; default: 8")
    add(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        help="with 4 bits, numbers that share a scale; default: 32; 0: all of an output's",
    )
    add("--keep-head-bits", type=int, choices=BITS, help="of the LM head's matrix; default: 8")
    add("--calibration", metavar="FILE", help="of litert: a text such as the model will read, to round for")
    add("--positions", type=int, metavar="N", help="of tflite: tokens of a text at most; default: the model's")
    _add_reading(parser)


def add_validate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `validate`."""
    _add_model(parser, "model", "MODEL")
    _add_reading(parser)


def _add_model(parser: argparse.ArgumentParser, name: str, shown: str) -> None:
    parser.add_argument(name, metavar=shown, help="a directory, a Hub id, or the name of a packaged model")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="auto", help="which files to read, where there are several"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


@contextmanager
def _progress_bar(what: str, quiet: bool) -> Iterator[Progress]:
    """What moves a bar of bytes on a terminal."""
    from huggingface_hub.utils import tqdm  # comes with the Hub library, as the bars of its downloads

    with tqdm(desc=what, unit="B", unit_scale=True, disable=quiet or None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _stored(directory: Path, config: GPTJConfig) -> tuple[str, dict[str, str]]:
    """The head whose weights there are, and how they are stored."""
    from tfgptj.checkpoints.opening import head_of_checkpoint
    from tfgptj.checkpoints.sources import Checkpoint

    with Checkpoint(directory) as checkpoint:
        head = head_of_checkpoint(checkpoint, config)
        specs = [checkpoint.spec(name) for name in checkpoint.names]
        files = checkpoint.shards
    sizes: dict[str, int] = {}
    for spec in specs:
        sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.nbytes
    return head, {
        "weights": f"{checkpoint.path.name}, {len(specs):,} tensors in {len(files):,} file{'s'[: len(files) != 1]}",
        "stored as": ", ".join(f"{name}: {amount(size)}" for name, size in sorted(sizes.items())),
    }


def _converted(directory: Path, config: GPTJConfig) -> dict[str, str]:
    """How a model that was converted for LiteRT is stored."""
    from tfgptj.litert.layout import read_layout

    layout = read_layout(directory, config.n_layer)
    size = sum(said["bytes"] for said in layout.files.values())
    return {"weights": f"LiteRT, {len(layout.files):,} files, {amount(size)}", "stored as": layout.description}


def _memory(numbers: int) -> str:
    """What so many numbers take, in the dtypes that models are held in."""
    return f"{amount(4 * numbers)} in float32, {amount(2 * numbers)} in bfloat16 or float16"
