r"""Which characters are letters, numbers and white space: `\p{L}`, `\p{N}` and `\s` of GPT-2's regular expression."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

OTHER, LETTER, NUMBER, SPACE = range(4)
PATTERNS = ((LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (SPACE, r"\s+"))

# Planes 4 to 16 hold no letters, numbers or spaces: two are for private use, one has tags, the others are empty.
LAST_CHARACTER = 0x3FFFF
SURROGATES = range(0xD800, 0xE000)


class CharacterClasses(NamedTuple):
    """Ranges of code points: int32 `first` code points in ascending order, from 0 on, and the `kind` of each range."""

    first: np.ndarray
    kind: np.ndarray


def character_classes() -> CharacterClasses:
    r"""Ask the installed `tokenizers` library, whose version of Unicode is not Python's and not TensorFlow's.

    >>> classes = character_classes()
    >>> [int(classes.kind[np.searchsorted(classes.first, ord(char), "right") - 1]) for char in "!a1 "]
    [0, 1, 2, 3]
    """
    codes = np.array([code for code in range(LAST_CHARACTER + 1) if code not in SURROGATES])
    kinds = np.full(codes.shape, OTHER)
    text = "".join(map(chr, codes))
    for kind, pattern in PATTERNS:
        # What matches is removed, and the offsets of what remains are returned.
        rest = np.zeros(codes.shape, bool)
        for _, (start, end) in Split(Regex(pattern), "removed").pre_tokenize_str(text):
            rest[start:end] = True
        kinds[~rest] = kind
    changes = np.flatnonzero(np.diff(kinds, prepend=-1))
    # Beyond the last one there is nothing but others.
    first, found = np.append(codes[changes], LAST_CHARACTER + 1), np.append(kinds[changes], OTHER)
    return CharacterClasses(first.astype(np.int32), found.astype(np.int32))
