"""Feeds one format's reader with damaged files for as long as one lets it::

    python tests/malformed/fuzz_readers.py --format h5 --seconds 600 CORPUS

``CORPUS`` is a directory of files to begin with; sound ones are put there where it is empty. Each file that is tried is
``CORPUS/.last`` while it is: that is where to look after a crash of the process, or when it has ended by itself because
a file took more than 20 seconds. What the reader answers with another error than its two is kept as
``CORPUS/finding-*``, and the exit status is 1.

With ``--coverage`` atheris chooses the files by the lines of code that they reach; install it beside tfgptj first: it
is no dependency (``pip install atheris``; it lags behind the newest Python). Arguments after ``--`` are libFuzzer's,
such as ``-- -max_len=65536 -jobs=2``. Without it files are changed at random, and those with an answer that was not
given before are kept and changed on.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import random
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from malformed import torch_files  # noqa: E402
from reader_checks import FORMATS, SOUND  # noqa: E402

from tfgptj.errors import CheckpointFormatError, UnsafeCheckpointError  # noqa: E402

SECONDS = 20
MEMORY = 2**32  # of address space; a reader that asks for more fails
VALUES = 2**24  # bytes; larger tensors are not read

NUMBERS = [0, 1, 2, 4, 8, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
TEXTS = [b"[", b"]", b"{", b"}", b'"', b",", b"-1", b"1e9", b"NaN", b"\xc1", b"\xdb", b"\xdf", b"\xc9", b"PK\x03\x04"]


def answer(form: str, path: Path) -> str:
    """What a reader says of a file; exceptions that it should not raise go on."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        with FORMATS[form].reader(path) as file:
            specs = [file.spec(name) for name in file.names]
            for spec in specs:
                if spec.nbytes <= VALUES:
                    array = file.read(spec.name)
                    assert (array.shape, array.dtype) == spec[1:]
                    assert sum(block.nbytes for block in file.blocks(spec.name)) == spec.nbytes
    except (CheckpointFormatError, UnsafeCheckpointError) as error:
        assert str(path) in str(error)
        return without_particulars(str(error)[len(str(path)) :])
    finally:
        faulthandler.cancel_dump_traceback_later()
    return f"{len(specs)} tensors"


def without_particulars(text: str) -> str:
    """A message without the names and numbers in it."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d[\d,]*|0x\w+|\[.*\]", "", text)[:120]


def mutated(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """A copy with a few changes."""
    values = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        place, other = chance.randrange(len(values) + 1), chance.choice(others)
        length = chance.choice([1, 2, 4, 8, 16, chance.randrange(len(values) + 2)])
        source = chance.randrange(len(other) + 1)
        width = chance.choice([1, 2, 4, 8])
        number = (chance.choice(NUMBERS) + chance.choice([0, 0, -1, 1])) % 256**width
        number_bytes = number.to_bytes(width, chance.choice(["little", "big"]))
        changes: list[tuple[int, bytes]] = [
            (1, bytes([values[place] ^ 1 << chance.randrange(8)]) if place < len(values) else b"\0"),
            (width, number_bytes),
            (0, number_bytes),
            (chance.choice([0, 1]), chance.choice(TEXTS)),
            (length, b""),
            (0, bytes(values[place : place + length])),
            (length, other[source : source + length]),
        ]
        removed, put = chance.choice(changes)
        values[place : place + removed] = put
    return bytes(values[: 2**20])


def wrapped(form: str, content: bytes, chance: random.Random) -> bytes:
    """For half of PyTorch's files, the pickle alone is changed, and the archive's checksums are right again."""
    if form != "bin" or chance.random() < 0.5:
        return content
    start = content.find(b"\x80\x02")
    return torch_files.archive(torch_files.members(content[start:] if start >= 0 else content))


class Corpus:
    """A directory of files, and one that is being tried."""

    def __init__(self, form: str, directory: Path) -> None:
        self.form, self._directory = form, directory
        directory.mkdir(parents=True, exist_ok=True)
        if not any(directory.iterdir()):
            for name, sound in SOUND.items():
                if sound.form == form:
                    sound.build(directory / name.replace(" ", "-"))
        files = [path for path in sorted(directory.iterdir()) if not path.name.startswith((".", "finding-"))]
        self.contents = [path.read_bytes() for path in files]
        self.findings = 0
        self._told: set[str] = set()

    def attempt(self, content: bytes) -> str:
        """The reader's answer; what should not happen is kept as a file, and told."""
        path = self._directory / ".last"
        path.write_bytes(content)
        try:
            return answer(self.form, path)
        except Exception as error:
            said = without_particulars(repr(error))
            self.findings += 1
            if said not in self._told:  # one file of each kind
                self._told.add(said)
                kept = self._directory / f"finding-{hashlib.sha256(content).hexdigest()[:16]}"
                kept.write_bytes(content)
                print(f"{kept}: {error!r:.200}", flush=True)
            return said


def fuzz_at_random(corpus: Corpus, seconds: float, seed: int) -> None:
    chance, tried, answers = random.Random(seed), 0, set()
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        content = wrapped(corpus.form, mutated(chance.choice(corpus.contents), corpus.contents, chance), chance)
        said = corpus.attempt(content)
        tried += 1
        if said not in answers:
            answers.add(said)
            corpus.contents.append(content)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{corpus.form}: {tried:,} files, {len(answers)} answers, {corpus.findings} findings, peak {peak} MiB")


def fuzz_by_coverage(corpus: Corpus, arguments: list[str]) -> None:
    import atheris

    def attempt(content: bytes) -> None:
        before = corpus.findings
        corpus.attempt(content)
        if corpus.findings > before:
            raise RuntimeError("a finding")

    atheris.instrument_all()
    run: Callable[[], None] = atheris.Fuzz
    atheris.Setup([sys.argv[0], *arguments], attempt)
    run()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true", help="let atheris choose")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:end])
    if not options.coverage:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    corpus = Corpus(options.format, options.corpus)
    if options.coverage:
        seconds = f"-max_total_time={options.seconds:.0f}"
        fuzz_by_coverage(corpus, [seconds, *given[end + 1 :], str(options.corpus)])
    else:
        fuzz_at_random(corpus, options.seconds, options.seed)
    return int(corpus.findings > 0)


if __name__ == "__main__":
    sys.exit(main())
