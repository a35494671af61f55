"""`tfgptj bench`: how fast models are on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tfgptj.cli.common import amount, start_keras
from tfgptj.cli.running import DTYPES

BENCH_HELP = "Measure how fast a model is on this machine."

GENERATE_HELP = """
The time per token is the difference between a long and a short generation; the share is what decoding reads in that
time, as a part of what a matrix-vector product reads, timed in the same rounds. Medians of all rounds.
"""


def generate(args: argparse.Namespace) -> None:
    """Time the first token and the next ones, beside what the memory's bandwidth allows."""
    if args.json and not Path(args.json).parent.is_dir():
        args.usage_error(f"--json: there is no directory {Path(args.json).parent}")
    if args.config is not None and args.dtype == "auto":
        args.usage_error("--dtype auto takes the dtype of stored weights, and with --config there are none")
    start_keras(args.debug)
    from tfgptj.benchmark.generation import Settings, measure
    from tfgptj.files import write_json

    settings = Settings(args.batch_size, args.prompt_length, args.new_tokens, args.rounds, args.jit)
    result = measure(_model(args, settings), settings)
    print(_table(result))
    if args.json:
        write_json(args.json, result)


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `bench generate`."""
    add = parser.add_mutually_exclusive_group().add_argument
    add("model", metavar="MODEL", nargs="?", help="a directory, a Hub id, or a packaged model, which is the default")
    add("--config", metavar="C", help="a config.json, or where MODEL may be: that shape, with random weights")
    add = parser.add_argument
    add("--revision", help="branch, tag or commit on the Hub")
    add("--dtype", choices=DTYPES, help="dtype policy to load the model with")
    add("--batch-size", type=int, metavar="N", default=1, help="prompts at once; default: 1")
    add("--prompt-length", type=int, metavar="N", default=128, help="tokens of each; default: 128")
    add("--new-tokens", type=int, metavar="N", default=32, help="tokens to add; default: 32")
    add("--rounds", type=int, metavar="N", default=5, help="measurements of everything; default: 5")
    add("--jit", action=argparse.BooleanOptionalAction, help="compile with XLA or not; default: on GPUs only")
    add("--json", metavar="FILE", help="write all numbers to this file")


def _model(args: argparse.Namespace, settings: Any) -> Any:
    """The model to measure, once it is known that the settings fit it."""
    from tfgptj.checkpoints.directory import is_converted
    from tfgptj.config import GPTJConfig
    from tfgptj.heads import TFGPTJForCausalLM
    from tfgptj.pipelines.base import PACKAGED_MODEL

    name, revision = args.config or args.model or PACKAGED_MODEL, args.revision or "main"
    given = args.config is not None and Path(name).is_file()
    config = GPTJConfig.from_json_file(name) if given else GPTJConfig.from_pretrained(name, revision=revision)
    settings.check(config)
    if args.config is not None:
        return TFGPTJForCausalLM(config, dtype=args.dtype)
    model: Any
    if is_converted(name):
        if args.dtype is not None:
            args.usage_error(f"--dtype would have no effect: {name} holds a LiteRT model")
        from tfgptj.litert.model import LiteRTGPTJForCausalLM

        model = LiteRTGPTJForCausalLM.from_pretrained(name)
    else:
        model = TFGPTJForCausalLM.from_pretrained(name, dtype=args.dtype, revision=revision)
    model.generation_config = None  # what its authors recommend to draw with is not what is measured
    return model


def _table(result: dict[str, Any]) -> str:
    """A result for people to read."""
    results = result["results"]
    rows = {
        "first token": ("first_token_ms", "ms"),
        "each further one": ("decode_ms_per_step", "ms"),
        "read bandwidth": ("read_bandwidth_gb_per_second", "GB/s"),
    }
    lines = [f"{name:17} {value}" for name, value in _facts(result).items()]
    lines += ["", f"{'':17} {'median':>10} {'least':>10} {'most':>10}"]
    for name, (key, unit) in rows.items():
        median, least, most = (results[key][which] for which in ("median", "least", "most"))
        lines.append(f"{name:17} {median:10,.2f} {least:10,.2f} {most:10,.2f} {unit}")
    return "\n".join([*lines, "", *(f"{name:17} {value}" for name, value in _conclusions(result).items())])


def _facts(result: dict[str, Any]) -> dict[str, str]:
    """What was measured, and on what."""
    model, machine, settings = result["model"], result["machine"], result["settings"]
    tokens = f"{settings['prompt_length']:,} + {settings['new_tokens']:,} tokens"
    processor = f"{machine['processor']}, {machine['processors']} in use, device {machine['device']}"
    return {
        "model": f"{model['parameters']:,} parameters, {model['dtype']}",
        "generated": f"{settings['batch_size']:,} x {tokens}, in each of {settings['rounds']:,} rounds",
        "machine": f"{processor}; load average {machine['load_average']}",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }


def _conclusions(result: dict[str, Any]) -> dict[str, str]:
    """What follows from the times, and the other numbers that are no medians."""
    model, results = result["model"], result["results"]
    weights, cache = model["weight_bytes_read_per_step"], model["cache_bytes_read_per_step"]
    first, new_shape = results["first_call_compile_seconds"], results["new_shape_compile_seconds"]
    memory = {"in memory": results["peak_memory_bytes"], "on the device": results["peak_device_memory_bytes"]}
    return {
        "prompt": f"{results['prefill_tokens_per_second']:,.1f} tokens/s",
        "new tokens": f"{results['decode_tokens_per_second']:,.1f} tokens/s",
        "read each time": f"{model['parameters_read_per_step']:,} parameters of {amount(weights)}, "
        f"and {amount(cache)} of keys and values",
        "that is": f"{results['decode_gb_per_second']:,.2f} GB/s, {results['share_of_bandwidth']:.0%} of the bandwidth",
        "compiling": f"{first:.2f} s at the first call, {new_shape:.2f} s for another length of prompt",
        "peak": ", ".join(f"{amount(size)} {where}" for where, size in memory.items() if size is not None),
    }
