"""What beams go on with and which texts are kept: one step of one group of beams, as Hugging Face's two searches do it.

Tables have B · K rows, the K beams of the first prompt, then of the second; those of one group B · G, its G beams of
each prompt. A plain search is one group. Groups are steered like plain search but in three things: texts cut off by the
limit compete with all that are still open; a group is finished by its best candidate, even one that ends here; and a
finished group goes on with padding.

Source: transformers 4.57, `_beam_search`; 4.55, `_group_beam_search` and beam_search.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from tfgptj.generation.loop import Controls, State
from tfgptj.generation.processors import FORBIDDEN, draw

BEHIND = -1e9  # added to the sum of what must not be gone on with
NOTHING = -1e37  # the score of a text that is not there, below that of every text


class Rules(NamedTuple):
    """What shapes the graph of a search."""

    beams: int  # per prompt (K)
    groups: int
    candidates: int  # per group, looked at in each step (C)
    early_stopping: bool | str
    do_sample: bool

    @property
    def size(self) -> int:
        """Beams of a group (G)."""
        return self.beams // self.groups

    @property
    def draws(self) -> int:
        """Random numbers that a step needs for each prompt."""
        return self.candidates if self.do_sample else 1


class Found(NamedTuple):
    """Finished texts, the best of each group first. [rows] is [B · K], of one group [B · G]."""

    tokens: Any  # int32 [rows, M], new tokens; the pad token after their end
    parents: Any  # int32 [rows, M], the row that each token was chosen in; -1 after the end
    scores: Any  # float32 [rows], the sum divided by length ** length_penalty; `NOTHING` where there is no text


class Beams(NamedTuple):
    """Texts that are one token longer: candidates [B, C], or what a group's beams go on with, [B · G] each."""

    origin: Any  # int32, the row of [B · K] that the text comes from
    tokens: Any  # int32, added to it
    scores: Any  # float32, the sum of its log-probabilities


class Step(NamedTuple):
    """What one group makes of a step."""

    beams: Beams
    found: Found  # [B · G]
    closed: Any  # bool [B], whether the group has its final texts
    possible: Any  # bool scalar, was there a token for every group that is not closed?


def of_group(rules: Rules, table: Any, group: int) -> Any:
    """A group's rows [B · G, …] of a table [B · K, …]."""
    if rules.groups == 1:
        return table
    rest = ops.shape(table)[1:]
    parted = ops.reshape(table, (-1, rules.groups, rules.size, *rest))[:, group]
    return ops.reshape(parted, (-1, *rest))


def of_all(rules: Rules, parts: list[Any]) -> Any:
    """A table [B · K, …] from those of all groups, [B · G, …] each."""
    if rules.groups == 1:
        return parts[0]
    rest = ops.shape(parts[0])[1:]
    return ops.reshape(ops.concatenate([ops.reshape(part, (-1, rules.size, *rest)) for part in parts], 1), (-1, *rest))


def extend(table: Any, origin: Any, values: Any, column: Any) -> Any:
    """Rows [n, M] of a table [B · K, M] with a value [n] written into a column."""
    here = ops.arange(ops.shape(table)[1], dtype="int32") == column  # [M]
    return ops.where(here, values[:, None], ops.take(table, origin, axis=0))


def pick(table: Any, index: Any) -> Any:
    """Of each row of a table [B, n] the entries [B, m]."""
    batch, width = ops.shape(table)[:2]
    flat = index + ops.arange(batch, dtype="int32")[:, None] * width
    return ops.take(ops.reshape(table, (-1,)), flat, axis=0)


def candidates(rules: Rules, group: int, log_probs: Any, state: State, controls: Controls) -> Beams:
    """The texts [B, C] that a group may go on with, or that end here, the best first.

    Args:
        rules: see there.
        group: int, which of `rules.groups`.
        log_probs: float32 [B · G, V], processed.
        state: rows are beams; `state.search` is :class:`tfgptj.generation.beams.Branches`.
        controls: see there.
    """
    vocabulary = log_probs.shape[-1]
    sums = log_probs + of_group(rules, state.search.scores, group)[:, None]
    scores, index = _best(rules, ops.reshape(sums, (-1, rules.size * vocabulary)), state, controls)  # [B, C]
    first = ops.arange(ops.shape(index)[0], dtype="int32")[:, None] * rules.beams + group * rules.size
    return Beams(first + index // vocabulary, index % vocabulary, scores)


def settle(
    rules: Rules, group: int, texts: Beams, state: State, controls: Controls, ended: Any = False, stopped: Any = False
) -> Step:
    """Choose what a group's beams go on with, and keep the texts that end.

    Args:
        rules, group, state: see :func:`candidates`.
        texts: the candidates.
        controls: `controls.search` is the length penalty, a float32 scalar.
        ended: bool [B, C], which of them end beside those with an end-of-text token.
        stopped: bool scalar, whether this is the last step, whatever the limit is.
    """
    plain, size, scores = rules.groups == 1, rules.size, texts.scores
    closed = ops.reshape(of_group(rules, state.finished, group), (-1, size))[:, 0]  # [B]
    possible = ops.all(ops.logical_or(closed, ops.max(scores, axis=1) > FORBIDDEN / 2))
    ended = ops.logical_or(ended, ops.any(texts.tokens[:, :, None] == controls.eos, axis=-1))  # [B, C]
    length = state.step + 1
    last, shrink = ops.logical_or(stopped, length >= controls.limit), _power(length, controls)
    # Those behind the first G are there to go on with, should all of them end.
    over = ops.logical_and(ops.logical_or(ended, last) if plain else ended, ops.arange(scores.shape[1]) < size)
    over = ops.logical_and(over, ops.logical_not(closed)[:, None])
    found = Found(*(of_group(rules, table, group) for table in state.search.found))
    found = _merge(rules, found, texts._replace(scores=scores / shrink), over, state)
    kept, order = ops.top_k(scores + ops.cast(ended, "float32") * BEHIND, size)
    order = ops.cast(order, "int32")
    beams = Beams(pick(texts.origin, order), pick(texts.tokens, order), kept)  # [B, G] each

    best = (kept if plain else scores)[:, 0] / _attainable(rules, length, controls)
    worst = ops.min(ops.reshape(found.scores, (-1, size)), axis=1)
    closes = ops.logical_or(best <= worst, ops.all(ended, axis=1))  # [B]
    if rules.early_stopping is True:
        closes = ops.logical_or(closes, ops.all(ops.reshape(found.parents[:, 0], (-1, size)) >= 0, axis=1))
    closes = ops.logical_or(closes, closed)
    if not plain:
        open_at_last = ops.broadcast_to((ops.logical_and(last, ops.logical_not(closes)))[:, None], ops.shape(kept))
        found = _merge(rules, found, beams._replace(scores=kept / shrink), open_at_last, state)
        first = ops.arange(ops.shape(kept)[0], dtype="int32")[:, None] * rules.beams + group * size
        beams = Beams(
            ops.where(closed[:, None], first, beams.origin),
            ops.where(closed[:, None], controls.pad, beams.tokens),
            ops.where(closed[:, None], 0.0, beams.scores),
        )
    return Step(Beams(*(ops.reshape(each, (-1,)) for each in beams)), found, ops.logical_or(closes, last), possible)


def _best(rules: Rules, sums: Any, state: State, controls: Controls) -> tuple[Any, Any]:
    """The scores of C continuations of a group [B, G · V], and where they are: float32 and int32 [B, C]."""
    count = min(rules.candidates, sums.shape[-1])
    if not rules.do_sample:
        scores, index = ops.top_k(sums, count)
        return scores, ops.cast(index, "int32")
    columns = state.step * rules.candidates + ops.arange(rules.candidates, dtype="int32")
    uniforms = ops.take(controls.uniforms, columns, axis=1)  # [B, C]
    places, left, drawn = ops.arange(sums.shape[-1], dtype="int32"), sums, []
    for i in range(count):  # without putting back
        drawn.append(draw(left, uniforms[:, i]))
        left = ops.where(places[None] == drawn[-1][:, None], 2 * FORBIDDEN, left)
    index = ops.stack(drawn, axis=1)
    return pick(sums, index), index


def _merge(rules: Rules, found: Found, new: Beams, allowed: Any, state: State) -> Found:
    """The best G of each prompt's found texts and of new ones, of which there are [B, n]."""
    width = ops.shape(state.search.parents)[1]
    written = state.ids[:, ops.shape(state.ids)[1] - width :]  # [B · K, M]
    origin = ops.reshape(new.origin, (-1,))
    count = new.scores.shape[1]

    def both(old: Any, more: Any) -> Any:  # [B · (G + n), M]
        parts = (ops.reshape(old, (-1, rules.size, width)), ops.reshape(more, (-1, count, width)))
        return ops.reshape(ops.concatenate(parts, axis=1), (-1, width))

    scores = ops.where(allowed, new.scores, 2 * NOTHING)  # what is not allowed stays behind what is not there
    scores, index = ops.top_k(ops.concatenate([ops.reshape(found.scores, (-1, rules.size)), scores], 1), rules.size)
    rows = ops.arange(ops.shape(index)[0], dtype="int32")[:, None] * (rules.size + count) + ops.cast(index, "int32")
    rows = ops.reshape(rows, (-1,))
    tokens = both(found.tokens, extend(written, origin, ops.reshape(new.tokens, (-1,)), state.step))
    parents = both(found.parents, extend(state.search.parents, origin, origin, state.step))
    return Found(ops.take(tokens, rows, axis=0), ops.take(parents, rows, axis=0), ops.reshape(scores, (-1,)))


def _power(length: Any, controls: Controls) -> Any:
    return ops.power(ops.cast(length, "float32"), controls.search)


def _attainable(rules: Rules, length: Any, controls: Controls) -> Any:
    """What divides the score of the best open text for a guess of what it may come to."""
    if rules.early_stopping != "never":
        return _power(length, controls)
    return _power(ops.where(controls.search > 0, controls.limit, length), controls)
