"""The merges of a BPE as arrays, with what allows many of a word to be done at once.

The `tokenizers` library merges a word's pair of lowest rank, over and over. A pair may be merged out of that order if
nothing that could still happen beside it has a lower rank. For neighbours x and y, the bounds of this table say what
could happen between them before one of them has changed:

- `left_bound`, the lowest rank of a merge of y with something on its left that ends with x;
- `right_bound`, the lowest rank of a merge of x with something on its right that begins with y.

So long words take about as few rounds as short ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tfgptj.errors import TokenizerError

NEVER = np.iinfo(np.int32).max  # the rank of a pair that is not merged


class MergeTable(NamedTuple):
    """K pairs of tokens in ascending order, and M merges in the order of their rank.

    Attributes:
        base: the number that the first token of a pair is multiplied with in `keys`.
        keys: int64 [K + 1], first · base + second; the last is larger than all.
        bounds: int32 [K + 1, 3], of each pair its rank, `left_bound` and `right_bound`, or `NEVER`.
        joined: int32 [M + 1], the token that a merge makes; the last is 0.
    """

    base: int
    keys: np.ndarray
    bounds: np.ndarray
    joined: np.ndarray


def make_merge_table(merges: list[tuple[str, str]], id_of: dict[str, int]) -> MergeTable:
    """Arrange merges, most important first, for look-ups by pairs of ids.

    Raises:
        TokenizerError: if a merge makes a token that an earlier merge uses already; no training gives such an order.
    """
    made_by: dict[int, list[tuple[int, int]]] = {}
    # As in the library, the last of two equal merges counts.
    rank_of = {(id_of[first], id_of[second]): rank for rank, (first, second) in enumerate(merges)}
    joined = np.zeros(len(merges) + 1, np.int32)
    for (first, second), rank in rank_of.items():
        joined[rank] = id_of["".join(merges[rank])]
        made_by.setdefault(int(joined[rank]), []).append((first, second))
    _check_order(merges, rank_of, joined)
    bounds: dict[tuple[int, int], list[int]] = {}
    for (first, second), rank in rank_of.items():
        bounds.setdefault((first, second), [NEVER] * 3)[0] = rank
        at_left = [(1, (end, second)) for end in _outermost(first, 1, made_by)]
        at_right = [(2, (first, start)) for start in _outermost(second, 0, made_by)]
        for column, pair in at_left + at_right:
            known = bounds.setdefault(pair, [NEVER] * 3)
            known[column] = min(known[column], rank)
    base = max(id_of.values(), default=0) + 1
    keys = np.array([first * base + second for first, second in bounds] + [np.iinfo(np.int64).max], np.int64)
    rows = np.array([*bounds.values(), [NEVER] * 3], np.int32)
    order = np.argsort(keys)
    return MergeTable(base, keys[order], rows[order], joined)


def _check_order(merges: list[tuple[str, str]], rank_of: dict[tuple[int, int], int], joined: np.ndarray) -> None:
    first_use: dict[int, int] = {}
    for pair, rank in rank_of.items():
        for token in pair:
            first_use[token] = min(rank, first_use.get(token, NEVER))
    for rank in rank_of.values():
        use = first_use.get(int(joined[rank]), NEVER)
        if use <= rank:
            raise TokenizerError(
                f"Merge {rank + 1} makes {''.join(merges[rank])!r:.80}, which merge {use + 1} uses already. A graph "
                "needs merges in the order in which they were learnt; GPTJTokenizer takes any."
            )


def _outermost(token: int, side: int, made_by: dict[int, list[tuple[int, int]]]) -> set[int]:
    """All that may stand at one side, 0 left or 1 right, of what becomes `token`."""
    found, waiting = {token}, [token]
    while waiting:
        parts = {pair[side] for pair in made_by.get(waiting.pop(), ())} - found
        found |= parts
        waiting += parts
    return found
