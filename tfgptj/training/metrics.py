"""How well text answers match those that people gave."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from tfgptj.errors import InputError


def normalized_answer(text: str) -> str:
    """An answer without case, punctuation, articles and extra spaces.

    Source: the evaluation script of SQuAD, Rajpurkar et al. 2016.

    >>> normalized_answer("The  King's fool!")
    'kings fool'
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers, once all are normalised, else 0.0.

    No answers at all mean that the right prediction is "".
    """
    return float(any(normalized_answer(prediction) == normalized_answer(answer) for answer in answers or [""]))


def f1_score(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the prediction's words, for the answer that it matches best.

    No answers at all mean that the right prediction is "".

    >>> round(f1_score("the king of France", ["King"]), 3)
    0.5
    """
    return max(_f1(normalized_answer(prediction).split(), normalized_answer(a).split()) for a in answers or [""])


def _f1(predicted: list[str], wanted: list[str]) -> float:
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = (Counter(predicted) & Counter(wanted)).total()
    return 2 * common / (len(predicted) + len(wanted))


def answer_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 of many questions, in percent.

    Args:
        predictions: an answer for each question.
        answers: the right answers of each, none if it has no answer.

    Returns:
        `{"exact_match": float, "f1": float}`.

    Raises:
        InputError: if there are no predictions, or not as many as questions.

    >>> answer_scores(["the king", "a fool"], [["King"], ["the old fool", "a king"]])
    {'exact_match': 50.0, 'f1': 83.33333333333333}
    """
    if not predictions or len(predictions) != len(answers):
        raise InputError(f"there are {len(predictions)} predictions and answers to {len(answers)} questions")
    pairs = list(zip(predictions, answers, strict=True))
    return {
        name: 100 * sum(score(*pair) for pair in pairs) / len(pairs)
        for name, score in (("exact_match", exact_match), ("f1", f1_score))
    }
