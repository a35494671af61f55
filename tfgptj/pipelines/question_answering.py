"""Question answering: a question and a text in, the part of the text that answers it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from tfgptj import batching
from tfgptj.errors import InputError
from tfgptj.heads import TFGPTJForQuestionAnswering
from tfgptj.pipelines.base import Pipeline
from tfgptj.spans import DEFAULT_WINDOW, Context, add_answers, contexts_of, ranked, windows


class QuestionAnsweringPipeline(Pipeline):
    """Finds answers in texts. Made by `pipeline("question-answering", model)`.

    The model reads the question, and right behind it the text, in overlapping windows if it is long. Every option can
    be given to the pipeline or to a call; see `__call__`.

    Source: transformers, pipelines/question_answering.py.

    >>> from tfgptj.config import GPTJConfig
    >>> from tfgptj.tokenizer import GPTJTokenizer
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
            add_answers(
                answers[index],
                window,
                (start[part], end[part]),
                count=settings["top_k"],
                longest=settings["max_answer_len"],
                align_to_words=settings["align_to_words"],
            )
        results = [_best(found, settings) for found in answers]
        return results[0] if isinstance(question, str) else results

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        for name in ("top_k", "doc_stride", "max_seq_len", "max_answer_len"):
            batching.check_positive(name, options.get(name))

    def _windows(self, question: str, context: str, settings: dict[str, Any]) -> Iterator[tuple[list[int], Context]]:
        """Token ids of question and context together, and the part of the context that is in them."""
        question_ids, tokens = self.tokenizer.encode(question), contexts_of([context], self.tokenizer)[0]
        limit = self.model.config.n_positions
        size = settings["max_seq_len"] or min(DEFAULT_WINDOW, self.tokenizer.model_max_length or limit, limit)
        for window in windows(question_ids, tokens, size, settings["doc_stride"]):
            yield [*question_ids, *window.ids.tolist()], window


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


def _best(answers: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    best = ranked(answers, settings["top_k"], settings["handle_impossible_answer"])
    return best[0] if settings["top_k"] == 1 else best
