"""The Markdown of `report.py`: what was left out and lost first, then everything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from report_rows import LIMIT, RIVAL, Row, Spread


def markdown(report: dict[str, Any], rows: dict[str, list[Row]]) -> str:
    """A report as Markdown.

    Args:
        report: as it is written to JSON.
        rows: those of each comparison, by its name.
    """
    machine = report["machine"]
    lines = [
        "# tfgptj beside others",
        "",
        f"{machine['processor']}, {machine['processors']} processors in use, "
        f"{(machine['memory_bytes'] or 0) / 2**30:.0f} GiB, {machine['device']}; load average "
        f"{machine['load_average']} at the start and {report['load_average_at_the_end']} at the end. "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
        "",
        "Medians, in brackets the least and the most. Ratios above 1: tfgptj is that many times better; they are those "
        "of the same rounds, and *level* where the rounds do not agree who is ahead.",
    ]
    if report["quick"]:
        lines += ["", "**A quick run**: small models and few rounds, which tell that all works, not who is faster."]
    lines += ["", "## Not measured", "", *(missing_lines(report["comparisons"]) or ["Everything was measured."])]
    against = [(name, row) for name, found in rows.items() for row in found if row.kind == RIVAL]
    behind = sorted((pair for pair in against if pair[1].ratio.median < 1), key=lambda pair: pair[1].ratio.median)
    lines += ["", f"## Where others are ahead: {len(behind)} of {len(against)}", ""]
    lines += table([(f"{name}: {row.asked}", row) for name, row in behind]) if behind else ["Nowhere."]
    for name, entry in report["comparisons"].items():
        lines += ["", f"## {name}", "", f"`{entry['command']}`, {entry['seconds']:.0f} s. {entry['about']}", ""]
        lines += table([(row.asked, row) for row in rows[name]]) if rows.get(name) else ["Nothing was measured."]
    lines += ["", "## Versions of the others", ""]
    told = [f"* {name}: {', '.join(packages)}" for name, packages in report["environments"].items()]
    return "\n".join([*lines, *(told or ["None was there."]), ""])


def missing_lines(comparisons: dict[str, Any]) -> list[str]:
    """Everything that was to be measured and was not, with the reason."""
    return [
        f"* {name}{': ' + part if part else ''}: {reason}"
        for name, entry in comparisons.items()
        for part, reason in entry["missing"].items()
    ]


def table(rows: Iterable[tuple[str, Row]]) -> list[str]:
    """Rows of comparisons, with what each is called."""
    lines = ["| asked | tfgptj | measured | beside | measured | ratio | |", "|---|---|---|---|---|---|---|"]
    for asked, row in rows:
        sides = [cell for name, found in (row.ours, row.theirs) for cell in (name, f"{shown(found)} {row.unit}")]
        verdict = "" if row.kind == LIMIT else "**behind**" if row.verdict == "behind" else row.verdict
        cells = [asked, *sides, shown(row.ratio), f"{verdict}{'of the limit' if row.kind == LIMIT else ''}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def shown(found: Spread) -> str:
    """A spread in few digits.

    >>> shown(Spread(2.0, 1.0, 1234.5)), shown(Spread(2.0, 2.0, 2.0))
    ('2.00 (1.00 to 1,234)', '2.00')
    """
    texts = [f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in found]
    texts = [f"{value:.2f}" if abs(value) < 10 else text for value, text in zip(found, texts, strict=True)]
    return texts[0] if found.least == found.most else f"{texts[0]} ({texts[1]} to {texts[2]})"
