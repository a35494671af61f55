"""What few bits cost in accuracy, with and without a text to calibrate with: a model beside itself in float32.

    python tests/benchmarks/accuracy.py [--model MODEL --text FILE [--held-out 0.1]] [--tokens 16384] [--json FILE]

Without --model one is trained first, on Python's own documentation: 6 layers of width 384, some minutes on two cores.
Of --text the last part is held out: MODEL must not have seen it. Calibration reads the other part alone.

For each number of bits: perplexity of the held-out text in rows of at most 256 tokens, how often the likeliest token is
float32's, and the Kullback-Leibler divergence from float32's probabilities to these, which chance changes least. Then
the likeliest text after the same prompt.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from documentation import topic_texts

from tfgptj import GPTJTokenizer
from tfgptj.benchmark.machine import describe_machine
from tfgptj.files import write_json
from tfgptj.litert.convert import convert
from tfgptj.litert.model import LiteRTGPTJForCausalLM
from tfgptj.training.pretrain import pretrain
from tfgptj.training.recipe import Recipe

RECIPE = {"vocab_size": 2048, "n_embd": 384, "n_layer": 6, "n_head": 6, "dropout": 0.0, "bpe_dropout": 0.0}
SCHEDULE = {"batch_size": 8, "epochs": 4, "plain_epochs": 4, "warmup_steps": 30, "ema_momentum": 0.97}
KINDS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits, blocks of 32": {"bits": 4},
    "4 bits, blocks of 32, the head too": {"bits": 4, "head_bits": 4},
    "4 bits, one scale for each output": {"bits": 4, "block_size": 0},
}
CALIBRATED = ", calibrated"
WIDTH, ROWS = 256, 8  # of the texts that a model reads at once


def trained(place: Path) -> tuple[str, str, str]:
    """A model that has read Python's documentation; the text that it has seen, and one that it has not."""
    train, held_out = topic_texts()
    share = len(held_out) / len(train + held_out)
    start = time.perf_counter()
    model, tokenizer, loss = pretrain(train + held_out, Recipe(**RECIPE, **SCHEDULE, held_out=share))
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    print(f"{model.count_params():,} parameters in {time.perf_counter() - start:.0f} s, {loss:.3f} nats per character")
    return str(place), train, held_out


def given(model: str, text: Path, share: float) -> tuple[str, str, str]:
    """A model that there is, and its text in two."""
    content = text.read_text(encoding="utf-8")
    cut = int(len(content) * (1 - share))
    return model, content[:cut], content[cut:]


def log_probabilities(model: LiteRTGPTJForCausalLM, ids: np.ndarray) -> np.ndarray:
    """For int [B, T] those of the next tokens, float32 [B, T - 1, V]."""
    found = []
    for rows in np.split(ids, range(ROWS, len(ids), ROWS)):
        seen = np.tri(ids.shape[1], dtype=bool)[None, None].repeat(len(rows), axis=0)
        positions = np.arange(ids.shape[1], dtype="int32")[None].repeat(len(rows), axis=0)
        logits = model.lm_head(model.transformer.step(rows, positions, seen)[0])[:, :-1]
        logits -= logits.max(axis=-1, keepdims=True)
        found.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    return np.concatenate(found)


def compared(found: np.ndarray, reference: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """Scores of log probabilities [B, T - 1, V] beside float32's."""
    losses = [-np.take_along_axis(table, ids[:, 1:, None], axis=-1).mean() for table in (found, reference)]
    likeliest = [table.argmax(axis=-1) for table in (found, reference)]
    return {
        "perplexity": float(np.exp(losses[0])),
        "change": float(np.exp(losses[0] - losses[1]) - 1),
        "agreement": float(np.mean(likeliest[0] == likeliest[1])),
        "divergence": float((np.exp(reference) * (reference - found)).sum(axis=-1).mean()),
    }


def measured(source: str, train: str, held_out: str, tokens: int, place: Path) -> dict[str, dict[str, Any]]:
    """Scores of all kinds, and what each writes."""
    text = place / "calibration.txt"
    text.write_text(train, encoding="utf-8")
    tokenizer = GPTJTokenizer.from_pretrained(source)
    plain = {"float32": {"bits": 32}, **KINDS}
    kinds = plain | {name + CALIBRATED: {**options, "calibration": text} for name, options in KINDS.items()}
    ids, reference, results = np.empty(0), np.empty(0), {}
    for name, options in kinds.items():
        directory = place / name.replace(" ", "_")
        start = time.perf_counter()
        convert(source, directory, **options)
        seconds = time.perf_counter() - start
        model = LiteRTGPTJForCausalLM.from_pretrained(directory)
        if name == "float32":
            width = min(model.config.n_positions, WIDTH)
            stream = np.array(tokenizer.encode(held_out), "int32")[:tokens]
            ids = stream[: len(stream) // width * width].reshape(-1, width)
            reference = log_probabilities(model, ids)
        prompt = tokenizer.decode(ids[0, : ids.shape[1] // 8])
        pieces = model.stream(prompt, tokenizer=tokenizer, max_new_tokens=40, do_sample=False)
        results[name] = {
            **compared(log_probabilities(model, ids), reference, ids),
            "seconds": seconds,
            "text": "".join(pieces),
        }
    return results


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """Results as a table."""
    lines = [
        "| | perplexity | change | likeliest token is float32's | divergence, 0.001 nats |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        cells = [name, f"{found['perplexity']:.3f}", f"{found['change']:+.2%}", f"{found['agreement']:.1%}"]
        cells.append(f"{1000 * found['divergence']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory, or the name of a packaged model")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what it was trained on, and behind that what not")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of --text, at its end")
    parser.add_argument("--tokens", type=int, default=16384, help="of the held-out text, at most")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if options.model is None:
            source, train, held_out = trained(place / "model")
        else:
            source, train, held_out = given(options.model, options.text, options.held_out)
        results = measured(source, train, held_out, options.tokens, place)
    print(markdown(results))
    for name, found in results.items():
        print(f"\n--- {name}\n{found['text']}")
    if options.json:
        write_json(options.json, {"machine": describe_machine(), "results": results})


if __name__ == "__main__":
    main()
