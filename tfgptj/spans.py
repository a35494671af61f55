"""Answers as spans of a text: tokens with their characters, overlapping windows, and from logits back to text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tfgptj.errors import InputError
from tfgptj.tokenizer import GPTJTokenizer

# As in Hugging Face's pipeline: tokens of a window at most, and those that it shares with the next.
DEFAULT_WINDOW, DEFAULT_OVERLAP = 384, 128


class Context(NamedTuple):
    """The tokens of a text: their ids, the characters [start, end) of each, and the number of its word; int [T]."""

    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    words: np.ndarray

    def window(self, first: int, last: int) -> Context:
        """The tokens from `first` to before `last`."""
        part = slice(first, last)
        return Context(self.text, self.ids[part], self.starts[part], self.ends[part], self.words[part])

    def characters(self, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
        """The characters from one token to another, or from the word of the one to that of the other."""
        if align_to_words:
            first = int(np.searchsorted(self.words, self.words[first], "left"))
            last = int(np.searchsorted(self.words, self.words[last], "right")) - 1
        return int(self.starts[first]), int(self.ends[last])

    def tokens(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and the last of the tokens that hold the characters [start, end), None if some are elsewhere."""
        if not len(self.ids) or start < self.starts[0] or end > self.ends[-1]:
            return None
        return int(np.searchsorted(self.ends, start, "right")), int(np.searchsorted(self.starts, end, "left")) - 1


def contexts_of(texts: list[str], tokenizer: GPTJTokenizer) -> list[Context]:
    """The tokens of texts, with the characters and the word that each is from."""
    contexts = []
    for text, encoding in zip(texts, tokenizer._backend.encode_batch(texts, add_special_tokens=False), strict=True):
        starts, ends = np.asarray(encoding.offsets, int).reshape(-1, 2).T
        contexts.append(Context(text, np.asarray(encoding.ids, int), starts, ends, np.asarray(encoding.word_ids)))
    return contexts


def windows(question_ids: list[int], context: Context, size: int, overlap: int | None) -> Iterator[Context]:
    """Parts of a context, each of which fills a window together with the question.

    Args:
        question_ids: tokens of the question.
        context: the whole context.
        size: tokens of question and part together, at most.
        overlap: tokens that neighbouring parts share; None: half of `size`, at most 128, less for a long question.

    Raises:
        InputError: if the question leaves no room, or `overlap` leaves no way forward.
    """
    room = size - len(question_ids)
    if room < 1:
        raise InputError(
            f"the question has {len(question_ids)} tokens, which leaves no room for the context in a window of {size}: "
            "shorten the question, or take larger windows"
        )
    if overlap is None:
        overlap = min(size // 2, DEFAULT_OVERLAP)
        overlap = overlap if overlap < room else room // 2
    if len(context.ids) > room and overlap >= room:
        raise InputError(
            f"neighbouring windows share {overlap} tokens, which must be below {room}, the tokens of context in a "
            "window: windows must advance"
        )
    first = 0
    while True:
        yield context.window(first, first + room)
        if first + room >= len(context.ids):
            return
        first += room - overlap


def add_answers(
    answers: list[dict[str, Any]],
    window: Context,
    logits: tuple[np.ndarray, np.ndarray],
    *,
    count: int,
    longest: int,
    align_to_words: bool,
) -> None:
    """Add a window's best answers to those of the windows before it.

    Args:
        answers: dicts of `score`, `start`, `end` and `answer`; changed in place.
        window: the part of the context.
        logits: of its tokens as first and as last of the answer, float [T] each.
        count: how many answers are wanted in the end.
        longest: tokens of an answer at most, before it is extended to whole words.
        align_to_words: whether answers begin and end where words do.
    """
    # Several spans of tokens may be extended to the same words, so more are looked at than asked for.
    looked_at = 2 * count + 10 if align_to_words else count
    for first, last, score in best_spans(*logits, longest, looked_at):
        start, end = window.characters(first, last, align_to_words)
        text = window.text[start:end]
        same = next((answer for answer in answers if answer["answer"].lower() == text.lower()), None)
        if same is None:
            answers.append({"score": score, "start": start, "end": end, "answer": text})
        else:
            same["score"] += score


def best_spans(start: np.ndarray, end: np.ndarray, longest: int, count: int) -> list[tuple[int, int, float]]:
    """The likeliest spans of tokens.

    Args:
        start, end: logits [T] of the first and of the last token.
        longest: tokens of a span at most.
        count: how many spans.

    Returns:
        First token, last token and score of each, best first. The score is the product of the two probabilities.
    """
    length = len(start)
    firsts, lasts = np.nonzero(np.tril(np.triu(np.ones((length, length), bool)), longest - 1))
    start, end = (np.exp(logits - logits.max()) for logits in (start, end))
    scores = (start / start.sum())[firsts] * (end / end.sum())[lasts]
    best = np.argsort(-scores, kind="stable")[:count]
    return list(zip(firsts[best].tolist(), lasts[best].tolist(), scores[best].tolist(), strict=True))


def ranked(answers: list[dict[str, Any]], count: int, impossible: bool) -> list[dict[str, Any]]:
    """The best answers first. With `impossible`, "" is one of them, of score 0: GPT-J has no token for it."""
    empty = [{"score": 0.0, "start": 0, "end": 0, "answer": ""}] if impossible else []
    return sorted([*answers, *empty], key=lambda answer: -answer["score"])[:count]
