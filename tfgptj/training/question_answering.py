"""Questions with their answers as tf.data, and a model's logits back as text answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfgptj import batching
from tfgptj.errors import InputError
from tfgptj.spans import DEFAULT_OVERLAP, DEFAULT_WINDOW, Context, add_answers, contexts_of, ranked, windows
from tfgptj.tokenizer import GPTJTokenizer
from tfgptj.training.data import Dataset
from tfgptj.training.examples import ENCODED_AT_ONCE, Example, example_dataset
from tfgptj.training.packing import batched
from tfgptj.training.rows import Rows, read_rows, text_of, value_of

_NO_ANSWER = 0  # Hugging Face's position, for models without a token that stands for it, of answers that are elsewhere


class Question(NamedTuple):
    """A checked row; `answer` is the characters [start, end) of the context, None if the context has no answer."""

    question: str
    context: str
    answer: tuple[int, int] | None


class Window(NamedTuple):
    """What a model reads at once: the question's tokens, and behind them a part of the context's."""

    number: int  # of the row
    question: Question
    question_ids: list[int]
    context: Context

    @property
    def ids(self) -> list[int]:
        """All tokens."""
        return [*self.question_ids, *self.context.ids.tolist()]

    def positions(self) -> tuple[int, int]:
        """The first and the last token of the answer, both 0 if it is not in this window."""
        span = self.question.answer and self.context.tokens(*self.question.answer)
        if not span:
            return _NO_ANSWER, _NO_ANSWER
        return len(self.question_ids) + span[0], len(self.question_ids) + span[1]


def question_answering_dataset(
    rows: Any,
    tokenizer: GPTJTokenizer,
    *,
    batch_size: int,
    max_length: int = DEFAULT_WINDOW,
    stride: int | None = DEFAULT_OVERLAP,
    **options: Any,
) -> Dataset:
    """Questions for `fit` of a `TFGPTJForQuestionAnswering`.

    The model reads the question, and right behind it the context, in overlapping windows if it is long: as the pipeline
    does. Of several answers the first is learnt. Where a window does not hold it, both positions are 0, as in Hugging
    Face's `run_qa.py`.

    Args:
        rows: rows of `read_squad`, or anything that `read_rows` takes: dicts of `question`, `context` and `answers`, a
            dict of the lists `text` and `answer_start` (in characters), empty if the context has no answer.
        tokenizer: the model's.
        batch_size: windows of a batch (B).
        max_length: tokens of a window at most.
        stride: tokens that neighbouring windows share; None: half of `max_length`, at most 128, less for a long
            question.
        **options: of `example_dataset`, for windows as examples: `length_buckets`, `pad_to_multiple_of`, `shuffle`,
            `shuffle_buffer`, `seed`, `epochs`, `drop_remainder`, `shard`, `start_step`, `count_batches`.

    Returns:
        A dataset of `(inputs, labels)`: dicts of `input_ids` and `attention_mask`, int32 [B, T] each, padded on the
        right, and of `start_positions` and `end_positions`, int32 [B] each.

    Raises:
        InputError: as `example_dataset`. An answer that is not where it should be makes a row corrupt.

    >>> tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257)
    >>> rows = [{"question": "Who?", "context": "It was I.", "answers": {"text": ["I"], "answer_start": [7]}}]
    >>> [(inputs, labels)] = question_answering_dataset(rows, tokenizer, batch_size=1)
    >>> position = int(labels["start_positions"][0])
    >>> tokenizer.decode(inputs["input_ids"][0, position])
    'I'
    """
    _check_sizes(max_length, stride)
    source = read_rows(rows)

    def examples() -> Iterator[Example]:
        for window in _windows(source, tokenizer, max_length, stride, answered=True):
            start, end = window.positions()
            yield Example(window.ids, {"start_positions": start, "end_positions": end})

    labels = {"start_positions": ((), "int32"), "end_positions": ((), "int32")}
    return example_dataset(examples, labels, batch_size=batch_size, **options)


def text_answers(
    outputs: Mapping[str, Any],
    rows: Any,
    tokenizer: GPTJTokenizer,
    *,
    max_length: int = DEFAULT_WINDOW,
    stride: int | None = DEFAULT_OVERLAP,
    n_best: int = 1,
    max_answer_length: int = 15,
    align_to_words: bool = True,
    impossible: bool = False,
) -> list[list[dict[str, Any]]]:
    """A model's logits as text answers, by what the question-answering pipeline does.

    The logits are those of `model.predict(question_answering_dataset(rows, tokenizer, max_length=n, stride=m,
    length_buckets=[n], shuffle=False, …))`: all windows, in the order of rows, of one width.

    Args:
        outputs: dict of `start_logits` and `end_logits`, float [windows, T] each.
        rows, tokenizer, max_length, stride: as they were then.
        n_best: answers of a question at most.
        max_answer_length: tokens of an answer at most, before it is extended to whole words.
        align_to_words: whether answers begin and end where words do.
        impossible: whether "" may be an answer; its score is 0.

    Returns:
        For each row its answers, best first: dicts of `score`, `start`, `end`, and `answer`, which is
        `context[start:end]`. The score is a probability, added up over windows with the same answer.

    Raises:
        InputError: if there are more or fewer windows than logits; for a corrupt row; for an invalid argument.
    """
    _check_sizes(max_length, stride)
    for name, value in (("n_best", n_best), ("max_answer_length", max_answer_length)):
        batching.check_positive(name, value)
    starts, ends = np.asarray(outputs["start_logits"]), np.asarray(outputs["end_logits"])
    answers: list[list[dict[str, Any]]] = []
    count = 0
    for window in _windows(read_rows(rows), tokenizer, max_length, stride, answered=False):
        if window.number == len(answers):
            answers.append([])
        part = slice(len(window.question_ids), len(window.ids))
        if part.stop > starts.shape[1]:
            raise InputError(f"the logits are of {starts.shape[1]} tokens, fewer than the {part.stop} of a window")
        if count < len(starts):
            logits = starts[count, part], ends[count, part]
            add_answers(
                answers[-1],
                window.context,
                logits,
                count=n_best,
                longest=max_answer_length,
                align_to_words=align_to_words,
            )
        count += 1
    if count != len(starts):
        raise InputError(
            f"the rows make {count} windows, but there are logits of {len(starts)}: predict with the same max_length "
            "and stride, shuffle=False, drop_remainder=False and epochs=1"
        )
    return [ranked(found, n_best, impossible) for found in answers]


def _check_sizes(max_length: int, stride: int | None) -> None:
    batching.check_positive("max_length", max_length)
    batching.check_positive("stride", stride)


def _windows(
    rows: Rows, tokenizer: GPTJTokenizer, max_length: int, stride: int | None, *, answered: bool
) -> Iterator[Window]:
    """The windows of all rows, in their order."""
    number = 0
    for batch in batched(rows.rows(lambda values: question_of(values, answered)), ENCODED_AT_ONCE):
        questions = [row.values for row in batch]
        question_ids = tokenizer([question.question for question in questions])["input_ids"]
        contexts = contexts_of([question.context for question in questions], tokenizer)
        for row, ids, context in zip(batch, question_ids, contexts, strict=True):
            try:
                for window in windows(ids, context, max_length, stride):
                    yield Window(number, row.values, ids, window)
            except InputError as error:
                raise InputError(f"{row.place}: {error}") from None
            number += 1


def question_of(values: Any, answered: bool = True) -> Question:
    """A row as a question.

    Args:
        values: dict of `question`, `context`, and `answers` if it is answered.
        answered: whether the answer matters.

    Raises:
        InputError: if something is missing, or the answer is not where it should be.
    """
    question, context = (text_of({name: value_of(values, name)}, name) for name in ("question", "context"))
    for name, text in (("question", question), ("context", context)):
        if not text:
            raise InputError(f"the field {name!r} is empty")
    return Question(question, context, _answer_of(value_of(values, "answers"), context) if answered else None)


def _answer_of(answers: Any, context: str) -> tuple[int, int] | None:
    """Where the first answer stands; all are checked."""
    texts, starts = (value_of(answers, name) for name in ("text", "answer_start"))
    if not all(isinstance(values, Sequence | np.ndarray) and not isinstance(values, str) for values in (texts, starts)):
        raise InputError("the answers' text and answer_start are not lists")
    if len(texts) != len(starts):
        raise InputError(f"there are {len(texts)} answers, but {len(starts)} places where they begin")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text or not isinstance(start, int | np.integer) or start < 0:
            raise InputError(f"the answer {text!r:.80} at {start!r:.20} is not a text at a character's number")
        if context[start : start + len(text)] != text:
            found = context[start : start + len(text)]
            raise InputError(f"the answer {text!r:.80} is not at character {start}, where {found!r:.80} stands")
    return (int(starts[0]), int(starts[0]) + len(texts[0])) if len(texts) else None
