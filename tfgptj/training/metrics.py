"""How well a language model predicts, and how well text answers match those that people gave."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj.errors import InputError
from tfgptj.losses import IGNORE_INDEX, causal_lm_loss, count


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


def label_scores(predictions: Any, labels: Any) -> dict[str, float]:
    """Accuracy, and the mean over labels of their F1, however rare they are.

    Args:
        predictions: int [N], the label that is predicted for each text.
        labels: int [N], the right ones. Labels that occur in neither do not count.

    Returns:
        `{"accuracy": float, "macro_f1": float}`.

    >>> label_scores([0, 0, 1, 1], [0, 0, 0, 1])
    {'accuracy': 0.75, 'macro_f1': 0.7333333333333334}
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    scores = []
    for label in np.union1d(predictions, labels):
        hits = np.sum((predictions == label) & (labels == label))
        scores.append(2 * hits / (np.sum(predictions == label) + np.sum(labels == label)))
    return {"accuracy": float(np.mean(predictions == labels)), "macro_f1": float(np.mean(scores))}


class TokenMetric(keras.metrics.Metric):
    """A quotient of two sums over the tokens that count, exact however many there are in a batch or an epoch.

    In `model.compile("adam", metrics=[...])` of a causal language model it is fed by the loss, without logits;
    elsewhere `update_state` takes labels and logits. What is predicted is the next token's label; -100 does not count.
    """

    needs_hits = False  # whether update_sums reads the hits

    def __init__(self, name: str, dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        # Two sums, and what rounding has lost of each: Kahan's way to sum. A float32 stops to count at 16.8 million.
        self.sums = self.add_variable((2, 2), "zeros", dtype="float32", name="sums")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add a batch: labels int [B, T], logits float [B, T, V]."""
        if sample_weight is not None:
            raise InputError(f"{self.name} has no weights: give it as one of metrics, not of weighted_metrics")
        targets = ops.cast(ops.convert_to_tensor(y_true)[:, 1:], "int32")
        nats = causal_lm_loss(y_true, y_pred, counted=1.0)  # their sum
        counts = targets != IGNORE_INDEX
        right = ops.logical_and(counts, ops.cast(ops.argmax(y_pred[:, :-1], axis=-1), "int32") == targets)
        self.update_sums(ops.reshape(targets, (-1,)), nats=nats, hits=ops.sum(ops.cast(right, "float32")))

    def update_sums(self, targets: Any, *, nats: Any, hits: Any) -> None:
        """Add a batch: what is to be predicted, int [N], with its cross-entropies' sum, and how often it came first."""
        raise InputError(f"{type(self).__name__} has no sums of its own")

    def add(self, above: Any, below: Any) -> None:
        """Add to the dividend and to the divisor."""
        before, lost = self.sums[0], self.sums[1]
        more = ops.stack([ops.cast(above, "float32"), ops.cast(below, "float32")]) - lost
        after = before + more
        self.sums.assign(ops.stack([after, (after - before) - more]))

    def quotient(self) -> Any:
        """Dividend by divisor; 0 where nothing was counted."""
        sums = self.sums[0] - self.sums[1]
        return sums[0] / ops.maximum(sums[1], 1.0)


@keras.saving.register_keras_serializable(package="tfgptj")
class Perplexity(TokenMetric):
    """The exponential of the mean cross-entropy of all tokens that count.

    >>> metric = Perplexity()
    >>> metric.update_state(np.array([[0, 1, -100]]), np.zeros((1, 3, 4), "float32"))
    >>> round(float(metric.result()), 4)
    4.0
    """

    def __init__(self, name: str = "perplexity", dtype: Any = None) -> None:
        super().__init__(name, dtype)

    def update_sums(self, targets: Any, *, nats: Any, hits: Any) -> None:
        self.add(nats, count(targets))

    def result(self) -> Any:
        return ops.exp(self.quotient())


@keras.saving.register_keras_serializable(package="tfgptj")
class TokenAccuracy(TokenMetric):
    """The share of tokens that had the highest logit."""

    needs_hits = True

    def __init__(self, name: str = "token_accuracy", dtype: Any = None) -> None:
        super().__init__(name, dtype)

    def update_sums(self, targets: Any, *, nats: Any, hits: Any) -> None:
        self.add(hits, count(targets))

    def result(self) -> Any:
        return self.quotient()


@keras.saving.register_keras_serializable(package="tfgptj")
class BitsPerByte(TokenMetric):
    """Cross-entropy in bits by bytes of text, comparable between tokenizers.

    Args:
        tokenizer: a :class:`tfgptj.GPTJTokenizer`, or the bytes of text that each token stands for, int [V]. Of a
            tokenizer, special tokens stand for none.

    >>> metric = BitsPerByte([1, 2, 3, 4])
    >>> metric.update_state(np.array([[0, 1, -100]]), np.zeros((1, 3, 4), "float32"))
    >>> round(float(metric.result()), 4)
    1.0
    """

    def __init__(self, tokenizer: Any, name: str = "bits_per_byte", dtype: Any = None) -> None:
        super().__init__(name, dtype)
        if hasattr(tokenizer, "decode_bytes"):
            tokenizer = [len(tokenizer.decode_bytes([i], skip_special_tokens=True)) for i in range(len(tokenizer))]
        self.bytes_of = np.asarray(tokenizer, "float32")
        if self.bytes_of.ndim != 1 or not self.bytes_of.size or self.bytes_of.min() < 0:
            raise InputError("bits per byte need a tokenizer, or a row of its tokens' lengths in bytes")

    def update_sums(self, targets: Any, *, nats: Any, hits: Any) -> None:
        known = ops.logical_and(
            targets >= 0, targets < len(self.bytes_of)
        )  # a model may have more ids than its tokenizer
        lengths = ops.take(self.bytes_of, ops.where(known, targets, 0))
        self.add(nats, ops.sum(ops.where(known, lengths, 0.0)))

    def result(self) -> Any:
        return self.quotient() / math.log(2)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "tokenizer": [int(n) for n in self.bytes_of]}
