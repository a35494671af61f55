"""When a row ends: end-of-text tokens, stop strings, the caller's criteria, and time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tfgptj.errors import GenerationError
from tfgptj.generation.config import GenerationConfig
from tfgptj.text_stream import TextStream
from tfgptj.tokenizer import GPTJTokenizer

Criterion = Callable[[np.ndarray, Any], Any]


class StopText:
    """The text of new tokens up to a stop string: no part of one is ever given out.

    Text that could be the beginning of a stop string is held back until it is clear that it is none. A stop string
    that is a special token of the tokenizer is found too. Ids that the tokenizer does not have are left out: GPT-J's
    embedding has more rows than its tokenizer has tokens.

    Args:
        tokenizer: the tokenizer that the ids are from.
        stops: the stop strings; there may be none.
        skip_special_tokens: as in `decode`.

    >>> tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257)
    >>> text = StopText(tokenizer, ("bd", "cc"))
    >>> [text.put([token]) for token in tokenizer.encode("abccd")], text.found
    (['a', '', 'b', '', ''], True)
    """

    def __init__(self, tokenizer: GPTJTokenizer, stops: Sequence[str], skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._stream = TextStream(tokenizer, skip_special_tokens)
        special = set(tokenizer.all_special_ids) if stops else set()
        self._ends = {token for token in special if tokenizer.convert_ids_to_tokens(token) in self._stops}
        self._held = ""
        self.found = False  # whether a stop string came

    def put(self, ids: Any) -> str:
        """Take new ids, int [n]; return the text that is sure to come before any stop string."""
        if not self._stops:
            return self.show(ids)
        shown = ""
        for token in ids:
            if self.found:
                break
            if token < len(self._tokenizer):
                shown += self._cut(self._stream.put([int(token)]), int(token) in self._ends)
        return shown

    def after(self, token: int) -> StopText:
        """Another text that has one token more."""
        twin = copy.copy(self)
        twin._stream = self._stream.copy()
        twin.put([token])
        return twin

    def show(self, ids: Any) -> str:
        """Take ids, int [n] or [1, n], that are the prompt's: stop strings in them do not count."""
        ids = np.asarray(ids)
        return self._stream.put(ids[ids < len(self._tokenizer)])

    def end(self) -> str:
        """Return what was held back, if no stop string came."""
        rest = self._stream.end()
        if self.found:
            return ""
        rest, self._held = self._held + rest, ""
        return rest

    def _cut(self, piece: str, ended: bool) -> str:
        self._held += piece
        places = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        self.found = ended or bool(places)
        if self.found:
            sure = min(places, default=len(self._held))
        else:
            sure = next(i for i in range(len(self._held) + 1) if self._may_become_a_stop(self._held[i:]))
        shown, self._held = self._held[:sure], self._held[sure:]
        return shown

    def _may_become_a_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


def check_stops(config: GenerationConfig, tokenizer: Any) -> None:
    """Raise if there are stop strings, and no tokenizer to find them with.

    Raises:
        GenerationError: naming the argument.
    """
    if config.stops and not isinstance(tokenizer, GPTJTokenizer):
        raise GenerationError(
            f"stop_strings need the model's tokenizer: give tokenizer= a GPTJTokenizer, got {tokenizer!r}"
        )


class Ends:
    """Where each row ends, as its tokens come.

    Args:
        config: the parameters.
        rows: how many there are.
        tokenizer: for stop strings.
        criteria: functions of the ids [B, P + n] and the scores so far (a tuple of [B, V], or None), that return a
            bool, or one for each row [B]: whether to stop.
    """

    def __init__(
        self, config: GenerationConfig, rows: int, tokenizer: GPTJTokenizer | None, criteria: Sequence[Criterion]
    ) -> None:
        self._eos, self._criteria = config.eos_token_ids, tuple(criteria)
        self._texts = [StopText(tokenizer, config.stops) for _ in range(rows)] if tokenizer and config.stops else []
        self._deadline = None if config.max_time is None else time.monotonic() + config.max_time
        self.lengths = np.full(rows, -1)  # new tokens of each row that has ended, its last included; -1 for the others

    @property
    def step_by_step(self) -> bool:
        """Whether each token must be looked at before the next is made."""
        return bool(self._criteria) or self._deadline is not None

    @property
    def beyond_the_loop(self) -> bool:
        """Whether rows may end that the compiled loop takes for unfinished."""
        return bool(self._criteria or self._texts)

    @property
    def all_ended(self) -> bool:
        """Whether no row goes on."""
        return bool((self.lengths >= 0).all())

    @property
    def out_of_time(self) -> bool:
        """Whether `max_time` has passed."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def look(self, tokens: np.ndarray, done: int) -> None:
        """Take new tokens, int [B, n], after `done` earlier ones."""
        for row in np.flatnonzero(self.lengths < 0):
            ends = np.flatnonzero(np.isin(tokens[row], self._eos))
            count = int(ends[0]) + 1 if len(ends) else 0
            for index in range((count or tokens.shape[1]) if self._texts else 0):
                self._texts[row].put(tokens[row, index : index + 1])
                if self._texts[row].found:
                    count = index + 1
                    break
            if count:
                self.lengths[row] = done + count

    def ask(self, ids: np.ndarray, scores: Any, done: int) -> None:
        """Ask the caller's criteria about all ids so far, of which `done` in each row are new.

        Raises:
            GenerationError: for an answer of another shape.
        """
        self.lengths[(self.lengths < 0) & self._answers(ids, scores)] = done

    def _answers(self, ids: np.ndarray, scores: Any) -> np.ndarray:
        """Which rows one of the criteria ends, bool [B]."""
        ended = np.zeros(len(ids), bool)
        for criterion in self._criteria:
            answer = np.asarray(criterion(ids, scores))
            if answer.shape not in ((), (len(ids),)):
                raise GenerationError(
                    f"a stopping criterion must return a bool, or one for each of {len(ids)} rows; "
                    f"got the shape {answer.shape}"
                )
            ended |= answer.astype(bool)
        return ended

    def padded(self, tokens: np.ndarray, pad: int) -> np.ndarray:
        """New tokens, int [B, n], with the pad token after the end of each row, without columns that no row has."""
        lengths = np.where(self.lengths < 0, tokens.shape[1], self.lengths)
        tokens = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, pad).astype("int32")
        return tokens[:, : int(lengths.max())]


class BranchEnds(Ends):
    """Which candidates of beams end.

    Args:
        prompts: int32 [B, P], as the caller gave them.
        config, tokenizer, criteria: see :class:`Ends`.
    """

    def __init__(
        self, prompts: np.ndarray, config: GenerationConfig, tokenizer: GPTJTokenizer | None, criteria: Any
    ) -> None:
        super().__init__(config, len(prompts) * config.num_beams, tokenizer, criteria)
        self._prompts = prompts
        self._branches: dict[tuple[int, int], StopText] = {}  # by the beam, and the token that is added to it

    def judge(self, origin: np.ndarray, tokens: np.ndarray, written: np.ndarray, scores: Any) -> np.ndarray:
        """Which candidates end, bool [B, C].

        Args:
            origin: int32 [B, C], the beam that each comes from.
            tokens: int32 [B, C], what is added to it.
            written: int32 [B · K, n], the new tokens of the beams.
            scores: for the criteria.

        Raises:
            GenerationError: for an answer of another shape.
        """
        ended = np.zeros(origin.size, bool)
        if self._criteria:
            prompts = np.repeat(self._prompts, origin.shape[1], axis=0)
            ended |= self._answers(np.concatenate([prompts, written[origin.ravel()], tokens.reshape(-1, 1)], 1), scores)
        if self._texts:
            pairs = list(zip(origin.ravel().tolist(), tokens.ravel().tolist(), strict=True))
            self._branches |= {(beam, token): self._texts[beam].after(token) for beam, token in pairs}
            ended |= np.array([self._branches[pair].found for pair in pairs])
        return ended.reshape(origin.shape)

    def follow(self, origin: np.ndarray, tokens: np.ndarray) -> None:
        """Take what the beams went on with, int32 [B · K] each; those of a closed group say nothing."""
        if self._texts:
            pairs = zip(origin.tolist(), tokens.tolist(), strict=True)
            self._texts = [self._branches.get(pair, self._texts[pair[0]]) for pair in pairs]
            self._branches = {}
