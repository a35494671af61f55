"""Whether fine-tuning works on real text: the packaged model on Python's own documentation, in minutes on two cores.

    python tests/benchmarks/convergence.py [--only NAME ...] [--json FILE]

Four runs of `fine_tune`, each beside what can be had without it: a language model in full and by LoRA (held-out topics;
xz that has seen the same text), a classifier (the topic of a paragraph; the likeliest topic, and naive Bayes on words),
and a question answering model (what a name of the standard library means; the definition that comes first).
"""

from __future__ import annotations

import argparse
import lzma
import math
import random
import re
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from documentation import definitions, paragraphs, questions, topic_texts, write_lines

from tfgptj.benchmark.machine import describe_machine
from tfgptj.files import write_json
from tfgptj.training.fine_tuning import fine_tune
from tfgptj.training.metrics import answer_scores, label_scores
from tfgptj.training.settings import FineTuning

HELD_OUT = 200  # definitions
ENTRIES = 3  # of them beside each other in a context


def language_model(place: Path, **options: Any) -> dict[str, Any]:
    """Held-out topics, before and after, and by xz."""
    train, held_out = topic_texts()
    (place / "train.txt").write_text(train, encoding="utf-8")
    (place / "held_out.txt").write_text(held_out, encoding="utf-8")
    found = fine_tune(
        FineTuning(
            train_files=(str(place / "train.txt"),),
            validation_files=(str(place / "held_out.txt"),),
            output_dir=str(place / "model"),
            block_size=256,
            warmup_steps=20,
            dtype="mixed_bfloat16",
            **options,
        )
    )
    packed = [len(lzma.compress(text.encode(), preset=9)) for text in (train, train + held_out)]
    bits = 8 * (packed[1] - packed[0]) / len(held_out.encode())
    return {**found, "baselines": {"xz bits per byte": bits}}


def classifier(place: Path) -> dict[str, Any]:
    """The topic of a paragraph among eight."""
    rows = paragraphs(most=8)
    random.Random(0).shuffle(rows)
    cut = len(rows) // 5
    held_out, train = rows[:cut], rows[cut:]
    for name, part in (("train", train), ("held_out", held_out)):
        write_lines(place / f"{name}.jsonl", ({"text": text, "label": label} for text, label in part))
    found = fine_tune(
        FineTuning(
            task="text-classification",
            train_files=(str(place / "train.jsonl"),),
            validation_files=(str(place / "held_out.jsonl"),),
            output_dir=str(place / "model"),
            truncation=True,
            epochs=5,
            batch_size=16,
            learning_rate=5e-4,
            warmup_steps=20,
            dtype="mixed_bfloat16",
        )
    )
    return {**found, "baselines": {"naive Bayes": naive_bayes(train, held_out)}}


def answering(place: Path) -> dict[str, Any]:
    """The definition of a name, among three of them; none of the held-out ones was seen in training."""
    pairs = definitions()
    random.Random(0).shuffle(pairs)
    train = list(questions(pairs[HELD_OUT:], ENTRIES, rounds=3, seed=0))
    held_out = list(questions(pairs[:HELD_OUT], ENTRIES, rounds=1, seed=1))
    write_lines(place / "train.jsonl", train)
    write_lines(place / "held_out.jsonl", held_out)
    found = fine_tune(
        FineTuning(
            task="question-answering",
            train_files=(str(place / "train.jsonl"),),
            validation_files=(str(place / "held_out.jsonl"),),
            output_dir=str(place / "model"),
            epochs=3,
            batch_size=16,
            block_size=256,
            learning_rate=5e-4,
            warmup_steps=50,
            max_answer_length=60,
            dtype="mixed_bfloat16",
        )
    )
    first = [row["context"].split("\n")[0].partition(": ")[2] for row in held_out]
    right = [row["answers"]["text"] for row in held_out]
    return {**found, "baselines": {"first definition": answer_scores(first, right)}}


def naive_bayes(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> dict[str, float]:
    """Scores of multinomial naive Bayes on lower-case words, each counted once more than it occurs."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text, label in train:
        counts[label].update(words(text))
    known = len(set().union(*counts.values()))
    priors = Counter(label for _, label in train)

    def score(text: str, label: str) -> float:
        total = counts[label].total() + known
        return math.log(priors[label]) + sum(math.log((counts[label][word] + 1) / total) for word in words(text))

    numbers = {label: number for number, label in enumerate(sorted(counts))}
    guesses = [numbers[max(sorted(counts), key=lambda label: score(text, label))] for text, _ in held_out]
    return label_scores(guesses, [numbers[label] for _, label in held_out])


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


RUNS = {
    "language model": lambda place: language_model(place, epochs=2, learning_rate=1e-3),
    "language model, LoRA": lambda place: language_model(
        place, epochs=2, learning_rate=4e-3, lora=16, lora_alpha=32.0, lora_targets=("all-linear", "lm_head")
    ),
    "classifier": classifier,
    "question answering": answering,
}


def markdown(results: dict[str, Any]) -> str:
    """Results as a table."""
    lines = ["| | trained | s | before | after | without a model |", "|---|---|---|---|---|---|"]
    for name, found in results.items():
        without = {**found["baselines"], **({"likeliest label": found["baseline"]} if "baseline" in found else {})}
        cells = [
            f"{found['trainable']:,}",
            f"{found['seconds']:.0f}",
            shown(found["before"]),
            shown(found["validation"]),
        ]
        lines.append(f"| {' | '.join([name, *cells, shown(without)])} |")
    return "\n".join(lines)


def shown(scores: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} ({shown(value)})" if isinstance(value, dict) else f"{name.replace('_', ' ')} {value:.3g}"
        for name, value in scores.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[*RUNS], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    results = {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as directory:
            results[name] = RUNS[name](Path(directory))
        print(markdown(results), flush=True)
    if options.json:
        write_json(options.json, {"machine": describe_machine(), "results": results})


if __name__ == "__main__":
    main()
