"""What all pipelines share: a model with its tokenizer, options, and batches of texts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from tfgptj import batching
from tfgptj.base import GPTJBase
from tfgptj.errors import InputError, InputTypeError
from tfgptj.generation.compiling import to_numpy
from tfgptj.tokenizer import GPTJTokenizer

# The model that comes with the package, for the tasks that it can do.
PACKAGED_MODEL = "shakespeare"

# Options of loading that a tokenizer has too.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


class Pipeline:
    """A model and its tokenizer as one function of texts.

    Args:
        model: a model of `model_class`.
        tokenizer: its tokenizer.
        **options: defaults for every call, by the names in `own_options`.

    Raises:
        InputTypeError: for a model with another head, or something that is no tokenizer.
        InputError: for an unknown option.
    """

    model: Any
    task: ClassVar[str]
    model_class: ClassVar[type[GPTJBase]]
    accepted: ClassVar[type | None] = None  # what a model may be an instance of, where that is not `model_class`
    packaged_model: ClassVar[str | None] = None
    own_options: ClassVar[Mapping[str, Any]]  # each with its default

    def __init__(self, model: Any, tokenizer: GPTJTokenizer, **options: Any) -> None:
        if not isinstance(model, self.accepted or self.model_class):
            raise InputTypeError(
                f"{self.task} needs a {self.model_class.__name__}, got a {type(model).__name__}: "
                f"load it with {self.model_class.__name__}.from_pretrained"
            )
        if not isinstance(tokenizer, GPTJTokenizer):
            raise InputTypeError(f"tokenizer must be a GPTJTokenizer, got a {type(tokenizer).__name__}")
        self.check_options(options)
        self.model, self.tokenizer, self.options = model, tokenizer, options

    @classmethod
    def load(cls, model: Any, tokenizer: Any, loading: dict[str, Any]) -> tuple[Any, Any]:
        """Load a model and its tokenizer, whichever of them is given by name.

        Args:
            model: a model, where to load one from, or None for the packaged one.
            tokenizer: a tokenizer, where to load one from, or None for the one beside the model.
            loading: options of `from_pretrained`.

        Raises:
            InputError: if there is nothing to load, or nothing that `loading` applies to.
        """
        model = cls.packaged_model if model is None else model
        if model is None:
            raise InputError(
                f"{cls.task} needs a model that was trained for it, and none is packaged: "
                f"give model=, a {cls.model_class.__name__} or where to load one from"
            )
        model_is_named = isinstance(model, str | os.PathLike)
        if loading and not model_is_named:
            raise InputError(f"{', '.join(loading)} would have no effect: the model is loaded already")
        if tokenizer is None and not model_is_named:
            raise InputError("a model that is loaded already does not say where its tokenizer is: give tokenizer= too")
        hub = {name: loading[name] for name in HUB_OPTIONS if name in loading}
        if tokenizer is None:
            tokenizer = GPTJTokenizer.from_pretrained(model, **hub)
        elif isinstance(tokenizer, str | os.PathLike):
            if tokenizer != model:
                hub.pop("revision", None)  # the model's branches are not the tokenizer's
            tokenizer = GPTJTokenizer.from_pretrained(tokenizer, **hub)
        return cls.load_model(model, loading) if model_is_named else model, tokenizer

    @classmethod
    def load_model(cls, name: str | os.PathLike[str], loading: dict[str, Any]) -> Any:
        """Load a model of the task's class."""
        return cls.model_class.from_pretrained(name, **loading)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that the task does not have.

        Raises:
            InputError: with the options that there are.
        """
        for name in options:
            if name not in cls.own_options:
                raise InputError(f"{cls.task} has no option {name!r}; {cls.hint(name)}")
        for name in ("batch_size", "max_length"):
            batching.check_positive(name, options.get(name) if name in cls.own_options else None)

    @classmethod
    def hint(cls, name: str) -> str:
        """What may have been meant by an option that does not exist."""
        close = difflib.get_close_matches(name, cls.own_options, n=1)
        return f"did you mean {close[0]}?" if close else f"there are {', '.join(cls.own_options)}"

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of one call: those given to it, else the pipeline's; None means the task's default."""
        self.check_options(options)
        given = {**self.options, **options}
        return {**self.own_options, **{name: value for name, value in given.items() if value is not None}}

    def encode(self, texts: list[str], truncation: bool, max_length: int | None) -> list[list[int]]:
        """Token ids of each text, at most `max_length` with `truncation`, and never more than the model takes.

        Raises:
            InputError: for a text without a token, or a text that is too long.
        """
        limit = self.model.config.n_positions
        if truncation:
            max_length = min(length for length in (max_length, self.tokenizer.model_max_length, limit) if length)
        rows: list[list[int]] = self.tokenizer(texts, truncation=truncation, max_length=max_length)["input_ids"]
        for index, row in enumerate(rows):
            if not row:
                raise InputError(f"text {index} is empty: {self.task} needs at least one token")
            if len(row) > limit:
                raise InputError(
                    f"text {index} has {len(row)} tokens, over n_positions={limit}: shorten it, or set truncation=True"
                )
        return rows

    def outputs(self, rows: list[list[int]], batch_size: int, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Run the model over rows of token ids, batch by batch.

        Args:
            rows: token ids of each row.
            batch_size: rows per forward pass.
            *names: the outputs wanted; of a model that returns a bare tensor, its name.

        Returns:
            An iterator over the rows' outputs. What the model says of padding, on the right, is still in them.
        """
        for start in range(0, len(rows), batch_size):
            ids, mask = padded(rows[start : start + batch_size], "right")
            outputs = self.model({"input_ids": ids, "attention_mask": mask}, training=False)
            outputs = outputs if isinstance(outputs, dict) else {names[0]: outputs}
            yield from zip(*(to_numpy(outputs[name]).astype("float32") for name in names), strict=True)


def padded(rows: list[list[int]], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and attention mask, int32 [B, T] each, of rows of token ids."""
    # Any id in the vocabulary may fill the gaps: the mask hides it.
    ids, mask = batching.pad(rows, max(map(len, rows)), 0, side)
    return np.asarray(ids, "int32"), np.asarray(mask, "int32")
