"""Question answering: a question and a text in, the part of the text that answers it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tfgptj import batching
from tfgptj.errors import InputError
from tfgptj.heads import TFGPTJForQuestionAnswering
from tfgptj.pipelines.base import Pipeline
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


class QuestionAnsweringPipeline(Pipeline):
    """Finds answers in texts. Made by `pipeline("question-answering", model)`.

    The model reads the question, and right behind it the text, in overlapping windows if it is long. Every option can
    be given to the pipeline or to a call; see `__call__`.

    Source: transformers, pipelines/question_answering.py.

    >>> from tfgptj.config import GPTJConfig
    >>> config = GPTJConfig(vocab_size=257, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    >>> tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257)
    >>> answer = QuestionAnsweringPipeline(TFGPTJForQuestionAnswering(config), tokenizer)
    >>> sorted(answer(question="Who?", context="The king and the fool."))
    ['answer', 'end', 'score', 'start']
    """

    task = "question-answering"
    model_class = TFGPTJForQuestionAnswering
    own_options: ClassVar[Mapping[str, Any]] = {
        "top_k": 1,
        "doc_stride": None,
        "max_seq_len": None,
        "max_answer_len": 15,
        "handle_impossible_answer": False,
        "align_to_words": True,
        "batch_size": 8,
    }

    def __call__(self, question: str | list[str], context: str | list[str], **options: Any) -> Any:
        """Answer one question, or each of several.

        Args:
            question: a question or a list of questions.
            context: the text that holds the answer: one for all questions, or a list with one for each.
            top_k: int, how many answers to return at most.
            doc_stride: int, tokens that neighbouring windows share; None: half of `max_seq_len`, at most 128.
            max_seq_len: int, tokens of question and window together; None: 384, or what the model takes if less.
            max_answer_len: int, tokens of an answer at most, before it is extended to whole words.
            handle_impossible_answer: bool, whether "" may be an answer. As GPT-J has no token that stands for it, its
                score is 0, as in Hugging Face.
            align_to_words: bool, whether answers begin and end where words do.
            batch_size: int, windows that the model reads at once.

        Returns:
            For one question a dict `{"score": float, "start": int, "end": int, "answer": str}`, where `answer` is
            `context[start:end]`, or with `top_k` above 1 a list of such dicts, best first. For a list of questions a
            list of these. Answers that differ in letter case only are one, with the sum of their scores.

        Raises:
            InputError: for empty questions or contexts, questions that are too long, and invalid options.
            InputTypeError: for questions or contexts that are no strings.
        """
        settings = self.settings(options)
        questions, contexts = _pairs(question, context)
        windows, rows, examples = [], [], []
        for index, pair in enumerate(zip(questions, contexts, strict=True)):
            for row, window in self._windows(*pair, settings):
                rows.append(row)
                windows.append(window)
                examples.append(index)
        answers: list[list[dict[str, Any]]] = [[] for _ in questions]
        outputs = self.outputs(rows, settings["batch_size"], "start_logits", "end_logits")
        for index, row, window, (start, end) in zip(examples, rows, windows, outputs, strict=True):
            part = slice(len(row) - len(window.ids), len(row))  # the window's tokens, behind the question's
            _add_answers(answers[index], window, start[part], end[part], settings)
        results = [_best(found, settings) for found in answers]
        return results[0] if isinstance(question, str) else results

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        for name in ("top_k", "doc_stride", "max_seq_len", "max_answer_len"):
            batching.check_positive(name, options.get(name))

    def _windows(self, question: str, context: str, settings: dict[str, Any]) -> Iterator[tuple[list[int], Context]]:
        """Token ids of question and context together, and the part of the context that is in them."""
        question_ids, tokens = self.tokenizer.encode(question), tokens_of(context, self.tokenizer)
        limit = self.model.config.n_positions
        size = settings["max_seq_len"] or min(DEFAULT_WINDOW, self.tokenizer.model_max_length or limit, limit)
        room = size - len(question_ids)
        if room < 1:
            raise InputError(
                f"the question has {len(question_ids)} tokens, which leaves no room for the context in "
                f"max_seq_len={size}: shorten it, or set max_seq_len higher"
            )
        overlap = settings["doc_stride"] or min(size // 2, DEFAULT_OVERLAP)
        if settings["doc_stride"] is None and overlap >= room:  # a long question
            overlap = room // 2
        if len(tokens.ids) > room and overlap >= room:
            raise InputError(
                f"doc_stride={overlap} must be below {room}, the tokens of context in a window: windows must advance"
            )
        first = 0
        while True:
            window = tokens.window(first, first + room)
            yield [*question_ids, *window.ids.tolist()], window
            if first + room >= len(tokens.ids):
                return
            first += room - overlap


def tokens_of(text: str, tokenizer: GPTJTokenizer) -> Context:
    """The tokens of a text, with the characters and the word that each is from."""
    encoding = tokenizer._backend.encode(text, add_special_tokens=False)
    starts, ends = np.asarray(encoding.offsets).T
    return Context(text, np.asarray(encoding.ids), starts, ends, np.asarray(encoding.word_ids))


def _pairs(question: str | list[str], context: str | list[str]) -> tuple[list[str], list[str]]:
    questions, contexts = batching.texts_of(question), batching.texts_of(context)
    if isinstance(context, str):
        contexts *= len(questions)
    if len(questions) != len(contexts):
        raise InputError(f"there are {len(questions)} questions and {len(contexts)} contexts: give one for each")
    for name, texts in (("question", questions), ("context", contexts)):
        if "" in texts:
            raise InputError(f"{name} {texts.index('')} is empty")
    return questions, contexts


def _add_answers(
    answers: list[dict[str, Any]], window: Context, start: np.ndarray, end: np.ndarray, settings: dict[str, Any]
) -> None:
    """Add a window's best answers to those of the windows before it."""
    aligned = settings["align_to_words"]
    # Several spans of tokens may be extended to the same words, so more are looked at than asked for.
    count = 2 * settings["top_k"] + 10 if aligned else settings["top_k"]
    for first, last, score in best_spans(start, end, settings["max_answer_len"], count):
        first_character, end_character = window.characters(first, last, aligned)
        text = window.text[first_character:end_character]
        same = next((answer for answer in answers if answer["answer"].lower() == text.lower()), None)
        if same is None:
            answers.append({"score": score, "start": first_character, "end": end_character, "answer": text})
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


def _best(answers: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    if settings["handle_impossible_answer"]:
        answers = [*answers, {"score": 0.0, "start": 0, "end": 0, "answer": ""}]
    ranked = sorted(answers, key=lambda answer: -answer["score"])[: settings["top_k"]]
    return ranked[0] if settings["top_k"] == 1 else ranked
