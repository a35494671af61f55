"""Text classification: texts in, labels with scores out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from tfgptj import batching
from tfgptj.errors import InputError
from tfgptj.heads import TFGPTJForSequenceClassification
from tfgptj.losses import default_function
from tfgptj.pipelines.base import Pipeline

FUNCTIONS = ("softmax", "sigmoid", "none")


class TextClassificationPipeline(Pipeline):
    """Labels texts. Made by `pipeline("text-classification", model)`.

    Every option can be given to the pipeline or to a call; see `__call__`.

    >>> from tfgptj import GPTJConfig, GPTJTokenizer
    >>> labels = {0: "bad", 1: "good"}
    >>> config = GPTJConfig(vocab_size=257, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, id2label=labels)
    >>> tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257)
    >>> classify = TextClassificationPipeline(TFGPTJForSequenceClassification(config), tokenizer)
    >>> sorted(result["label"] for result in classify("What a day!", top_k=None))
    ['bad', 'good']
    """

    task = "text-classification"
    model_class = TFGPTJForSequenceClassification
    own_options: ClassVar[Mapping[str, Any]] = {
        "top_k": None,
        "function_to_apply": None,
        "truncation": False,
        "max_length": None,
        "batch_size": 8,
    }

    def __call__(self, inputs: str | list[str], **options: Any) -> list[Any]:
        """Label one text, or each of several.

        Args:
            inputs: a text or a list of texts.
            top_k: int, how many labels to return; None for all.
            function_to_apply: "softmax", "sigmoid" or "none", what turns logits into scores; None decides by the
                model's `problem_type` and `num_labels`.
            truncation: bool, whether to cut longer texts to `max_length` tokens, or else to what the model takes.
            max_length: int.
            batch_size: int, texts that the model reads at once.

        Returns:
            A list with one dict `{"label": str, "score": float}` per text. If `top_k` is given, even as 1, there is a
            list of such dicts per text instead, best first; for a single text that list itself.

        Raises:
            InputError: for texts that are empty or too long, and for invalid options.
            InputTypeError: for texts that are no strings.
        """
        settings = self.settings(options)
        rows = self.encode(batching.texts_of(inputs), settings["truncation"], settings["max_length"])
        function = settings["function_to_apply"] or default_function(self.model.config)
        ranked = []
        for (logits,) in self.outputs(rows, settings["batch_size"], "logits"):
            scores = apply_function(function.lower(), logits)
            best = np.argsort(-scores, kind="stable")[: settings["top_k"]]
            ranked.append([{"label": self.model.config.id2label[i], "score": float(scores[i])} for i in best.tolist()])
        if "top_k" not in {**self.options, **options}:
            return [labels[0] for labels in ranked]  # as Hugging Face does, which also tells None from not given
        return ranked[0] if isinstance(inputs, str) else ranked

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        batching.check_positive("top_k", options.get("top_k"))
        function = options.get("function_to_apply")
        if function is not None and str(function).lower() not in FUNCTIONS:
            raise InputError(f"function_to_apply must be None or one of {', '.join(FUNCTIONS)}; got {function!r}")


def apply_function(name: str, logits: np.ndarray) -> np.ndarray:
    """Scores float [num_labels] from logits."""
    if name == "none":
        return logits
    logits = logits.astype("float64")  # where exp() of a float32 cannot overflow once the largest is subtracted
    if name == "sigmoid":
        return np.asarray(np.exp(-np.logaddexp(0.0, -logits)))
    exp = np.exp(logits - logits.max())
    return np.asarray(exp / exp.sum())
