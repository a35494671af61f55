"""The README's Python examples run as they stand there; all else in it that can be checked is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tfgptj import cli

OPTIMIZED = True  # graphs run as they do for users: see conftest.py

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
NOT_RUN = re.findall(r"^```python no-run\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHELL = "\n".join(re.findall(r"^```bash[^\n]*\n(.*?)^```", README, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
TEXT = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_examples_and_two_commands() -> None:
    assert len(EXAMPLES) >= 2
    for name in ("run", "tests"):
        assert re.search(rf"<!-- {name} -->\n```bash\npip install .*\n```\n<!-- end -->", README)


def test_examples_that_are_not_run_are_python() -> None:
    assert NOT_RUN
    for code in NOT_RUN:
        compile(code, "README.md", "exec")


def commands() -> list[list[str]]:
    """The arguments of each call of `tfgptj` in the shell's examples."""
    words = [
        shlex.split(part, comments=True) for line in SHELL.splitlines() for part in re.split(r" [|]{1,2} | && ", line)
    ]
    return [each[1:] for each in words if each[:1] == ["tfgptj"]]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_command_is_understood(arguments: list[str]) -> None:
    cli._parser().parse_args(arguments)


def test_links_lead_to_headings() -> None:
    headings = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert links and not set(links) - anchors
    assert len(headings) == len(set(headings))


def test_files_that_are_named_are_there() -> None:
    root = Path(__file__).parents[1]
    named = re.findall(r"`((?:tests|tfgptj|notebooks|\.ci)/[\w./]+)`", TEXT)
    assert named and not [name for name in named if not (root / name).exists()]
