"""The signatures of classifiers and of models that answer questions."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfgptj.heads import TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification
from tfgptj.losses import default_function
from tfgptj.serving.requests import Caps, checked, id_rows, of_each_row, texts
from tfgptj.serving.text import Outputs, Signatures, TextRows, last_of, read

FUNCTIONS = {"softmax": tf.nn.softmax, "sigmoid": tf.sigmoid, "none": tf.identity}
LONGEST_ANSWER = 15  # tokens, as in the pipeline


def classifier_signatures(model: TFGPTJForSequenceClassification, caps: Caps, text: TextRows | None) -> Signatures:
    """Texts, or token ids, to labels with scores, the best first: those of the pipeline with `top_k=None`."""
    config = model.config
    names = tf.constant([config.id2label[index] for index in range(config.num_labels)])
    function = FUNCTIONS[default_function(config)]

    def tokens(token_ids: Any, lengths: Any, what: str = "token_ids") -> Outputs:
        ids, lengths = caps.check_rows(token_ids, lengths, what=what)
        last = last_of(read(model.transformer, ids, lengths)[0], lengths)
        scores, order = tf.math.top_k(function(tf.cast(model.score(last), "float32")), config.num_labels)
        return {"labels": tf.gather(names, order), "scores": scores}

    def default(given: Any) -> Outputs:
        assert text is not None  # the signature is not offered without
        return tokens(*text.encode(given, "text"), what="text")

    found: Signatures = {"tokens": (tokens, id_rows())}
    return {"serving_default": (default, (texts("text"),)) if text else found["tokens"], **found}


class AnswerSignatures:
    """Questions with the texts that hold the answers, to answers; question and text are read as one row.

    Args:
        model: the model.
        caps: what a request may ask for.
        text: between texts and tokens; None for a model that is served without a tokenizer.
        longest: tokens of an answer at most.
    """

    def __init__(
        self, model: TFGPTJForQuestionAnswering, caps: Caps, text: TextRows | None, longest: int = LONGEST_ANSWER
    ) -> None:
        self.model, self.caps, self._text, self.longest = model, caps, text, longest

    def signatures(self) -> Signatures:
        """All of them, by name."""
        tokens = (self.tokens, id_rows())
        if self._text is None:
            return {"serving_default": tokens, "tokens": tokens}
        return {"serving_default": (self.answer, (texts("question"), texts("context"))), "tokens": tokens}

    def tokens(self, token_ids: Any, lengths: Any) -> Outputs:
        """The logits of each token as the first and as the last of the answer."""
        start, end = self._logits(*self.caps.check_rows(token_ids, lengths))
        return {"start_logits": start, "end_logits": end}

    def answer(self, question: Any, context: Any) -> Outputs:
        """The likeliest answer in each context, with its characters [start, end) and its score."""
        assert self._text is not None  # the signature is not offered without
        context = of_each_row("context", context, question)
        asked, asked_lengths = self._text.encode(question, "question")
        given, given_lengths = self._text.encode(context, "context", leading=False)
        for name, lengths in (("question", asked_lengths), ("context", given_lengths)):
            message = f"{name}: a text is empty"
            asked = checked(asked, lambda m=message, n=lengths: [tf.debugging.assert_positive(n, m)])  # type: ignore[misc]
        ids, lengths = _joined(asked, asked_lengths, given, given_lengths)
        ids, lengths = self.caps.check_rows(ids, lengths, what="question and context")
        start, end = self._logits(ids, lengths)
        columns = tf.range(tf.shape(ids)[1])[None]
        inside = (columns >= asked_lengths[:, None]) & (columns < lengths[:, None])  # [B, T], the context
        first, last, score = self._best(start, end, inside)
        return {**self._texts(given, first - asked_lengths, last - asked_lengths), "score": score}

    def _logits(self, ids: Any, lengths: Any) -> tuple[Any, Any]:
        """Of the first and of the last token of the answer, float32 [B, T] each."""
        logits = tf.cast(self.model.qa_outputs(read(self.model.transformer, ids, lengths)[0]), "float32")  # [B, T, 2]
        return logits[:, :, 0], logits[:, :, 1]

    def _best(self, start: Any, end: Any, inside: Any) -> tuple[Any, Any, Any]:
        """First and last token, int32 [B] each, and score, float32 [B], of the likeliest span."""
        start, end = (tf.nn.softmax(tf.where(inside, logits, -1e30)) for logits in (start, end))
        padded = tf.pad(end, [[0, 0], [0, self.longest - 1]])
        width = tf.shape(start)[1]
        ends = tf.stack([padded[:, i : i + width] for i in range(self.longest)], axis=2)  # [B, T, longest]
        scores = tf.reshape(start[:, :, None] * ends, [-1, width * self.longest])
        best = tf.argmax(scores, axis=1, output_type=tf.int32)
        first, more = best // self.longest, best % self.longest
        return first, first + more, tf.reduce_max(scores, axis=1)

    def _texts(self, ids: Any, first: Any, last: Any) -> Outputs:
        """The answers, and their characters in the contexts."""
        assert self._text is not None  # the signature is not offered without
        before, whole = (self._text.bytes_of(ids, count) for count in (first, last + 1))
        start, end = tf.strings.length(before), tf.strings.length(whole)
        return {
            "answer": tf.strings.substr(whole, start, end - start),
            "start": tf.strings.length(before, "UTF8_CHAR"),
            "end": tf.strings.length(whole, "UTF8_CHAR"),
        }


def _joined(first: Any, first_lengths: Any, second: Any, second_lengths: Any) -> tuple[Any, Any]:
    """Rows behind rows, int32 [B, T], and their lengths."""
    parts = [tf.RaggedTensor.from_tensor(first, first_lengths), tf.RaggedTensor.from_tensor(second, second_lengths)]
    joined = tf.concat(parts, axis=1)
    return joined.to_tensor(), first_lengths + second_lengths
