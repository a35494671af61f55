"""What `report.py` makes of the benchmarks' JSON: one row for each thing that was measured on both sides.

A ratio above 1 says that tfgptj, or its faster way, is ahead: of times and memory it is theirs by ours, of scores ours
by theirs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

RIVAL, WAY, LIMIT = "another library", "another way of ours", "a limit"

MEASURES = {"first_token": "first token", "decode": "each further step"}

# Whom each of ours stands beside, in `litert.py`.
FEW_BITS = {
    "LiteRT int8": ("CTranslate2 int8", "ggml q8_0"),
    "LiteRT int4": ("CTranslate2 int8", "ggml q4_0"),
    "LiteRT int4-wide": ("CTranslate2 int8", "ggml q4_0"),
}


class Spread(NamedTuple):
    """Median, least and most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of some numbers.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, least=1.0, most=3.0)
        """
        return cls(statistics.median(values), min(values), max(values))


class Row(NamedTuple):
    """One comparison.

    Args:
        asked: what was to be done.
        unit: of the measurements.
        ours: the name of our side, and what was measured.
        theirs: the same of the other side.
        ratio: above 1 where we are ahead.
        kind: what stands on the other side: `RIVAL`, `WAY` or `LIMIT`.
    """

    asked: str
    unit: str
    ours: tuple[str, Spread]
    theirs: tuple[str, Spread]
    ratio: Spread
    kind: str = RIVAL

    @property
    def verdict(self) -> str:
        """Who is ahead: nobody is, where the ratios of the rounds are on both sides of 1."""
        if self.ratio.least <= 1 <= self.ratio.most and self.ratio.least < self.ratio.most:
            return "level"
        return "ahead" if self.ratio.median > 1 else "behind" if self.ratio.median < 1 else "level"


def compared(
    asked: str,
    unit: str,
    ours: tuple[str, Sequence[float]],
    theirs: tuple[str, Sequence[float]],
    kind: str = RIVAL,
    *,
    more_is_better: bool = False,
) -> Row:
    """A row of samples: the ratios are those of the same rounds, where there were as many of both.

    >>> compared("a step", "ms", ("tfgptj", [2.0, 4.0]), ("other", [4.0, 4.0])).ratio
    Spread(median=1.5, least=1.0, most=2.0)
    """
    first, second = ours[1], theirs[1]
    if len(first) != len(second):
        first, second = [statistics.median(first)], [statistics.median(second)]
    pairs = zip(first, second, strict=True)
    ratio = Spread.of([a / b if more_is_better else b / a for a, b in pairs])
    return Row(asked, unit, (ours[0], Spread.of(ours[1])), (theirs[0], Spread.of(theirs[1])), ratio, kind)


def generation(found: Any) -> list[Row]:
    """`generate.py`: every library beside ours of the same dtype; times, memory, and what compiling takes."""
    rows = []
    for key, theirs in found["results"].items():
        name, scenario, what = key.split(" | ")
        ours = found["results"].get(f"{theirs['baseline']} | {scenario} | {what}")
        if name.startswith("tfgptj") or ours is None or not theirs["ratios_to_ours"]:
            continue
        sides = [
            (side, Spread(each["median"], each["least"], each["most"]))
            for side, each in ((theirs["baseline"], ours), (name, theirs))
        ]
        rows.append(Row(f"{MEASURES[what]}, {scenario}", "ms", *sides, Spread.of(theirs["ratios_to_ours"])))
    baselines = {key.split(" | ")[0]: each["baseline"] for key, each in found["results"].items()}
    for name, baseline in baselines.items():
        theirs, ours = found["peers"].get(name), found["peers"].get(baseline)
        if name.startswith("tfgptj") or not theirs or not ours:
            continue
        peaks = [[each["memory"]["peak"] / 2**20] for each in (ours, theirs)]
        rows.append(compared("peak memory of the process", "MiB", (baseline, peaks[0]), (name, peaks[1])))
    return rows


def training(found: Any) -> list[Row]:
    """`train.py`: a step beside ours of the same precision, and its memory."""
    rows = []
    settings = found["settings"]
    asked = f"training step, {settings['rows']} x {settings['tokens']} tokens"
    for name, times in found["samples_ms"].items():
        ours = "tfgptj mixed_bfloat16" if "bfloat16" in name else "tfgptj float32"
        if name.startswith("tfgptj") or ours not in found["samples_ms"]:
            continue
        rows.append(compared(asked, "ms", (ours, found["samples_ms"][ours]), (name, times)))
        peaks = [[found["peers"][each]["memory"]["peak"] / 2**20] for each in (ours, name)]
        rows.append(compared("peak memory of the process", "MiB", (ours, peaks[0]), (name, peaks[1])))
    return rows


def few_bits(found: Any) -> list[Row]:
    """`litert.py`: each number of bits beside CTranslate2's 8, and ggml's of as many."""
    rows, memory = [], []
    peaks = {name: [facts["memory"]["peak"] / 2**20] for name, facts in found["peers"].items()}
    for ours, rivals in FEW_BITS.items():
        for rival in rivals:
            for key, theirs in found["samples_ms"].items():
                name, scenario, what = key.split(" | ")
                mine = found["samples_ms"].get(f"{ours} | {scenario} | {what}")
                if name == rival and mine:
                    sides = (f"tfgptj {ours}", mine), (rival, theirs)
                    rows.append(compared(f"{MEASURES[what]}, {scenario}", "ms", *sides))
            if ours in peaks and rival in peaks:
                sides = (f"tfgptj {ours}", peaks[ours]), (rival, peaks[rival])
                memory.append(compared("peak memory of the process", "MiB", *sides))
    return rows + memory


def loading(found: Iterable[Any]) -> list[Row]:
    """`load.py`: beside touching as much memory, and the weights themselves."""
    rows = []
    for line in found:
        ours = f"tfgptj, {line['format']} to {line['dtype']}"
        touched = ("touching as much memory", [line["touch_memory_seconds"]])
        weights = ("weights and libraries alone", [line["weights_mb"] + line["peak_after_import_mb"]])
        if line["touch_memory_seconds"] > 0:
            rows.append(compared("from_pretrained", "s", (ours, line["all_seconds"]), touched, LIMIT))
        rows.append(compared("peak memory of the process", "MB", (ours, [line["peak_mb"]]), weights, LIMIT))
    return rows


def training_memory(found: Iterable[Any]) -> list[Row]:
    """`training_memory.py`: beside what cannot be done without."""
    rows = []
    for line in found:
        ours = f"tfgptj {line['way']}, {line['optimizer']}, {line['dtype']}"
        needed = ("weights and libraries alone", [line["weights_mib"] + line["empty_mib"]])
        asked = f"peak of a step of {line['tokens']} tokens"
        rows.append(compared(asked, "MiB", (ours, [line["peak_mib"]]), needed, LIMIT))
    return rows


def drafts(found: Iterable[Any]) -> list[Row]:
    """`speculation.py`: with drafts beside without."""
    return [
        compared(f"a token, text {line['text']}", "ms", (way, line[way]["samples"]), plain(line), WAY)
        for line in found
        for way in line
        if way not in ("text", "plain")
    ]


def plain(line: Mapping[str, Any]) -> tuple[str, list[float]]:
    """The samples of a run without drafts."""
    return "without drafts", line["plain"]["samples"]


def prefixes(found: Iterable[Any]) -> list[Row]:
    """`prefix_cache.py`: with the cache beside without."""
    return [
        compared("first token of a prompt that begins like others", "ms", (f"prefix cache, {way}", samples[way]),
                 ("without", samples["without"]), WAY)
        for samples in (line["samples"] for line in found)
        for way in ("with", "unchecked")
    ]  # fmt: skip


def beams(found: Iterable[Any]) -> list[Row]:
    """`beams.py`: a step of a search beside one of as many independent rows."""
    rows = []
    for line in found:
        samples, independent = line["samples"], f"{line['beams']} rows"
        for way in ("beams", "drawn beams", "groups", "contrastive"):
            rows.append(compared("a token", "ms", (way, samples[way]), (independent, samples[independent]), LIMIT))
    return rows


def served(found: Iterable[Any]) -> list[Row]:
    """`serving.py decode`: the exported model beside `generate`."""
    return [
        compared("a token", "ms", ("served", line["milliseconds"]["served"]),
                 ("generate", line["milliseconds"]["generate"]), WAY)
        for line in found if "milliseconds" in line
    ]  # fmt: skip


def ways(found: Iterable[Any], ours: str, kinds: Mapping[str, str]) -> list[Row]:
    """`lora.py` and `loss.py`: one way beside others, each a line; memory too."""
    lines = {line["way"]: line for line in found}
    rows = []
    for name, kind in kinds.items():
        if name not in lines or ours not in lines:
            continue
        for what, mine in lines[ours]["samples"].items():
            sides = (ours, mine), (name, lines[name]["samples"][what])
            rows.append(compared({"step_ms": "training step", "token_ms": "a token"}[what], "ms", *sides, kind))
        peaks = (ours, [lines[ours]["peak_mb"]]), (name, [lines[name]["peak_mb"]])
        rows.append(compared("peak memory of the process", "MB", *peaks, kind))
    return rows


def adapters(found: Iterable[Any]) -> list[Row]:
    """`lora.py`."""
    return ways(found, "package", {"Keras's Dense": RIVAL, "all weights": WAY})


def losses(found: Iterable[Any]) -> list[Row]:
    """`loss.py`."""
    return ways(found, "fused", {"logits": WAY})


def convergence(found: Any) -> list[Row]:
    """`convergence.py`: what a fine-tuned model gets beside what can be had without one."""
    rows = []
    for name, run in found["results"].items():
        scores, baselines = run["validation"], run["baselines"]
        if "xz bits per byte" in baselines:
            bits = [scores["bits_per_byte"]], [baselines["xz bits per byte"]]
            rows.append(compared(name, "bits per byte", ("tfgptj", bits[0]), ("xz", bits[1])))
            continue
        [(other, theirs)] = baselines.items()
        for score in ("accuracy", "exact_match", "f1"):
            if score in scores and score in theirs:
                sides = ("tfgptj", [scores[score]]), (other, [theirs[score]])
                rows.append(compared(name, score.replace("_", " "), *sides, more_is_better=True))
    return rows


def full_size(found: Iterable[Any]) -> list[Row]:
    """`full_size.py`: each step beside reading or copying the same files."""
    rows = []
    for line in found:
        for what, other in (("cat_seconds", "cat"), ("copy_seconds", "cp and sync")):
            if line.get(what):
                sides = (f"tfgptj {line['step']}", [line["seconds"]]), (other, [line[what]])
                rows.append(compared("GPT-J-6B", "s", *sides, LIMIT))
    return rows


def full_size_training(found: Iterable[Any]) -> list[Row]:
    """`full_size_training.py`, whose lines are those of `training_memory.py`."""
    return training_memory(found)


def few_bits_full_size(found: Iterable[Any]) -> list[Row]:
    """`litert_full_size.py`: how fast weights are read while decoding, beside the bandwidth."""
    rows = []
    for line in found:
        if "share_of_bandwidth" in line:
            speed = line["gb_per_token"] * line["tokens_per_second"]
            sides = (f"tfgptj LiteRT {line['kind']}", [speed]), ("the bandwidth", [line["bandwidth_gb_per_second"]])
            rows.append(compared("reading of GPT-J-6B while decoding", "GB/s", *sides, LIMIT, more_is_better=True))
    return rows
