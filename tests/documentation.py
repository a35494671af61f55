"""Data to train on that every Python has: its own documentation, as text, as labelled paragraphs, and as questions."""

from __future__ import annotations

import importlib
import inspect
import json
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

# Modules whose classes and functions are asked about.
MODULES = (
    *("os", "os.path", "re", "json", "math", "random", "string", "textwrap", "collections", "itertools", "functools"),
    *(
        "operator",
        "statistics",
        "datetime",
        "calendar",
        "decimal",
        "fractions",
        "pathlib",
        "shutil",
        "glob",
        "tempfile",
    ),
    *("zlib", "gzip", "bz2", "lzma", "zipfile", "tarfile", "csv", "configparser", "hashlib", "hmac", "secrets", "io"),
    *("time", "argparse", "logging", "threading", "subprocess", "socket", "select", "asyncio", "email.message", "html"),
    *("html.parser", "urllib.parse", "urllib.request", "http.client", "ftplib", "smtplib", "uuid", "socketserver"),
    *("locale", "gettext", "cmd", "shlex", "unittest", "unittest.mock", "doctest", "pdb", "timeit", "trace", "inspect"),
    *("ast", "dis", "copy", "types", "typing", "abc", "contextlib", "dataclasses", "enum", "heapq", "bisect", "array"),
    *("weakref", "struct", "codecs", "unicodedata", "difflib", "pprint", "numbers", "cmath", "sqlite3", "builtins"),
)


def topic_texts(share: float = 0.1) -> tuple[str, str]:
    """The texts of all topics, most of them to train on and a share held out: whole topics, drawn at random.

    Many paragraphs stand in several topics. Those that are held out are taken from the others.
    """
    names = sorted(topics)
    random.Random(0).shuffle(names)
    cut = int(len(names) * (1 - share))
    held_out = [topics[name].split("\n\n") for name in names[cut:]]
    known = {" ".join(part.split()) for parts in held_out for part in parts}
    train = [
        [part for part in topics[name].split("\n\n") if " ".join(part.split()) not in known] for name in names[:cut]
    ]
    first, second = ("\n\n\n".join("\n\n".join(parts) for parts in texts) for texts in (train, held_out))
    return first, second


def paragraphs(most: int = 8, shortest: int = 60) -> list[tuple[str, str]]:
    """Paragraphs, each with its topic, of the topics that have the most; those that stand in several are left out."""
    found = {
        name: dict.fromkeys(" ".join(part.split()) for part in text.split("\n\n")) for name, text in topics.items()
    }
    counts = Counter(text for texts in found.values() for text in texts)
    own = {
        name: [text for text in texts if len(text) >= shortest and counts[text] == 1] for name, texts in found.items()
    }
    largest = sorted(own, key=lambda name: (-len(own[name]), name))[:most]
    return [(text, name) for name in sorted(largest) for text in own[name]]


def definitions() -> list[tuple[str, str]]:
    """Names of classes and functions, each with the first paragraph of its docstring, where that is short."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what is asked about
        for name, value in (pair for module in MODULES for pair in _public(vars(importlib.import_module(module)))):
            members = _public(vars(value)) if inspect.isclass(value) else ()
            for full, member in [(name, value), *((f"{name}.{key}", each) for key, each in members)]:
                text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
                if callable(member) and 30 <= len(text) <= 100 and text.isascii() and text.endswith("."):
                    found.setdefault(text, full)
    return sorted({name: text for text, name in found.items()}.items())


def _public(members: Any) -> list[tuple[str, Any]]:
    return sorted((name, value) for name, value in members.items() if not name.startswith("_"))


def questions(pairs: list[tuple[str, str]], entries: int, rounds: int, seed: int) -> Iterator[dict[str, Any]]:
    """What a name means, with some other definitions beside its own; each is asked about so many times."""
    order = random.Random(seed)
    for _ in range(rounds):
        order.shuffle(pairs)
        for number, (name, text) in enumerate(pairs):
            others = [pairs[(number + distance) % len(pairs)] for distance in range(1, entries)]
            listed = [(name, text), *others]
            order.shuffle(listed)
            context = "\n".join(f"{each}: {meaning}" for each, meaning in listed)
            answers = {"text": [text], "answer_start": [context.index(f"{name}: {text}") + len(f"{name}: ")]}
            yield {"question": f"What is {name}?\n", "context": context, "answers": answers}


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
