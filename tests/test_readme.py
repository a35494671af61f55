"""The README's Python examples run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_examples_and_two_commands() -> None:
    assert len(EXAMPLES) >= 2
    for name in ("run", "tests"):
        assert re.search(rf"<!-- {name} -->\n```bash\npip install .*\n```\n<!-- end -->", README)
