"""What fine-tuning a language model, a classifier and a question answering model differ in: data and scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import keras
import numpy as np

from tfgptj.config import GPTJConfig
from tfgptj.errors import InputError
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification
from tfgptj.spans import DEFAULT_WINDOW
from tfgptj.tokenizer import GPTJTokenizer
from tfgptj.training.data import Dataset, token_dataset
from tfgptj.training.devices import Shard
from tfgptj.training.examples import classification_dataset
from tfgptj.training.file_kinds import read_files
from tfgptj.training.metrics import BitsPerByte, Perplexity, answer_scores, label_scores
from tfgptj.training.question_answering import question_answering_dataset, text_answers
from tfgptj.training.rows import Row, Rows, derived_rows, renamed_rows, split_rows, value_of
from tfgptj.training.settings import ANSWERING, CLASSIFICATION, GENERATION, FineTuning
from tfgptj.training.tokens import Tokens, kept_tokens

DEFAULT_BLOCK = 1024  # as in transformers' run_clm.py

TOKENS_DIRECTORY = "tokens"  # in the run's, as long as it goes on

# Training examples of similar length come in one batch. Each length is one more shape for a compiler.
SHORTEST_BUCKET = 32


class Task(ABC):
    """The data of a run and what they ask of the model. Made by `open_task`.

    Attributes:
        config: the model's, with the fields that the data call for.
        overrides: these fields, for `from_pretrained`.
        has_validation: whether there are data to evaluate on.
        steps_per_epoch: whole or begun batches of the training data.
        validation_steps: the same of the validation data.
    """

    model_class: ClassVar[Any]
    config: GPTJConfig
    overrides: dict[str, Any]
    has_validation: bool

    def __init__(self, settings: FineTuning, tokenizer: GPTJTokenizer, config: GPTJConfig) -> None:
        self.settings, self.tokenizer, self.config, self.overrides = settings, tokenizer, config, {}
        self.open()
        batch_size = settings.batch_size
        self.steps_per_epoch = int(self.training_data(batch_size, epochs=1).cardinality())
        self.validation_steps = int(self.validation_data(batch_size).cardinality()) if self.has_validation else None

    @abstractmethod
    def open(self) -> None:
        """Find the data, and set the attributes."""

    @abstractmethod
    def training_data(
        self, batch_size: int, shard: Shard = (0, 1), *, epochs: int | None = None, start_step: int = 0
    ) -> Dataset:
        """Shuffled batches; `epochs` None is without end."""

    @abstractmethod
    def validation_data(self, batch_size: int, shard: Shard = (0, 1)) -> Dataset:
        """All of the validation data in their order."""

    def metrics(self) -> list[Any]:
        """What `fit` shows beside the loss."""
        return []

    def scores(self, model: Any, found: dict[str, float]) -> dict[str, float]:
        """What is measured on the validation data beside the loss and metrics that `evaluate` found."""
        return {}

    def baseline(self) -> dict[str, float]:
        """What comes of the data without any model."""
        return {}

    def block_size(self, default: int) -> int:
        """Tokens that the model reads at once.

        Raises:
            InputError: if these are more than it can.
        """
        limit = min(n for n in (self.config.n_positions, self.tokenizer.model_max_length) if n is not None)
        size = self.settings.block_size
        if size is not None and size > limit:
            raise InputError(f"block_size is {size}, and {self.settings.model} takes {limit} tokens at most")
        return min(default, limit) if size is None else size


class LanguageModeling(Task):
    """Blocks of text; what is held out of it is its end."""

    model_class = TFGPTJForCausalLM

    def open(self) -> None:
        self.size = self.block_size(DEFAULT_BLOCK)
        self.tokens = self._tokens(self.settings.train_files)
        self.held_out: Tokens | None = None
        if self.settings.validation_files:
            self.held_out = self._tokens(self.settings.validation_files)
        elif self.settings.share_held_out:
            ids, ends = self.tokens
            cut = max(len(ids) - max(2, int(len(ids) * self.settings.share_held_out)), 0)
            first = int(np.searchsorted(ends, cut, "right"))
            self.tokens, self.held_out = Tokens(ids[:cut], ends[:first]), Tokens(ids[cut:], ends[first:] - cut)
        self.has_validation = self.held_out is not None

    def training_data(
        self, batch_size: int, shard: Shard = (0, 1), *, epochs: int | None = None, start_step: int = 0
    ) -> Dataset:
        return self._dataset(
            self.tokens, batch_size=batch_size, seed=self.settings.seed, epochs=epochs, shard=shard,
            start_step=start_step,
        )  # fmt: skip

    def validation_data(self, batch_size: int, shard: Shard = (0, 1)) -> Dataset:
        whole = self.settings.strategy == "multiworker"
        return self._dataset(self.held_out, batch_size=batch_size, shuffle=False, drop_remainder=whole, shard=shard)

    def metrics(self) -> list[Any]:
        return [Perplexity(), BitsPerByte(self.tokenizer)]

    def scores(self, model: Any, found: dict[str, float]) -> dict[str, float]:
        # Keras's own is a mean over batches, of which the last has fewer tokens.
        return {"loss": math.log(found["perplexity"])}

    def _dataset(self, tokens: Any, **options: Any) -> Dataset:
        data = token_dataset(tokens, block_size=self.size, **options)
        # From several workers Keras 3.15 takes one tensor alone. In whole blocks the ids are labels enough.
        return data.map(lambda inputs, labels: labels) if self.settings.strategy == "multiworker" else data

    def _tokens(self, files: tuple[str, ...]) -> Tokens:
        place = Path(self.settings.output_dir) / TOKENS_DIRECTORY
        return kept_tokens(read_files(files, GENERATION), self.tokenizer, self.settings.text_column, place)


class Examples(Task):
    """Rows of labelled texts or of questions; what is held out is drawn at random."""

    rows: Rows
    held_out: Rows | None

    def open(self) -> None:
        self.rows, self.held_out = self._read(self.settings.train_files), None
        if self.settings.validation_files:
            self.held_out = self._read(self.settings.validation_files)
        elif self.settings.share_held_out:
            self.rows, self.held_out = split_rows(self.rows, self.settings.share_held_out, self.settings.seed)
        self.has_validation = self.held_out is not None

    def training_data(
        self, batch_size: int, shard: Shard = (0, 1), *, epochs: int | None = None, start_step: int = 0
    ) -> Dataset:
        rungs = range(int(math.log2(SHORTEST_BUCKET)), math.ceil(math.log2(self.size)))
        return self._dataset(
            self.rows, batch_size=batch_size, seed=self.settings.seed, epochs=epochs, start_step=start_step,
            length_buckets=[*(2**rung for rung in rungs), self.size], count_batches=epochs is not None,
        )  # fmt: skip

    def validation_data(self, batch_size: int, shard: Shard = (0, 1)) -> Dataset:
        return self._dataset(
            self.held_out, batch_size=batch_size, shuffle=False, length_buckets=[self.size], count_batches=True
        )

    size: int  # tokens of an example at most

    @abstractmethod
    def _read(self, files: tuple[str, ...]) -> Rows:
        """The rows of files."""

    @abstractmethod
    def _dataset(self, rows: Any, **options: Any) -> Dataset:
        """Batches of rows."""


class Classification(Examples):
    """Texts with one label each: names, or numbers from 0 on."""

    model_class = TFGPTJForSequenceClassification

    def open(self) -> None:
        super().open()
        self.size = self.block_size(self.config.n_positions)
        column = self.settings.label_column
        self.labels = Counter(row.values for row in self.rows.rows(lambda values: _checked_label(values, column)))
        self.overrides = self._label_fields()
        self.config = GPTJConfig.from_dict(self.config.to_dict(), **self.overrides)

    def metrics(self) -> list[Any]:
        """The share of right labels."""
        return [keras.metrics.SparseCategoricalAccuracy("accuracy")]

    def scores(self, model: Any, found: dict[str, float]) -> dict[str, float]:
        """Accuracy and macro F1."""
        data = self.validation_data(self.settings.batch_size)
        labels = np.concatenate([labels.numpy() for _, labels in data])
        return label_scores(np.argmax(model.predict(data, verbose=0), axis=-1), labels)

    def baseline(self) -> dict[str, float]:
        """The scores of the label that most training texts have."""
        counts = Counter[int]()
        for label, count in self.labels.items():
            counts[self._number(label)] += count
        column = self.settings.label_column
        assert self.held_out is not None  # is asked for where has_validation
        labels = [self._number(row.values) for row in self.held_out.rows(lambda v: _checked_label(v, column))]
        return label_scores([counts.most_common(1)[0][0]] * len(labels), labels)

    def _label_fields(self) -> dict[str, Any]:
        """Fields of the configuration for the labels that there are, unless the model knows them all."""
        fields: dict[str, Any] = {"problem_type": "single_label_classification"}
        known = self.config.label2id
        if all(map(_is_number, self.labels)):
            count = 1 + max(map(int, self.labels))
            if count > self.config.num_labels or known == GPTJConfig().label2id:
                fields["num_labels"] = max(count, 2)
        elif not all(label in known for label in self.labels):
            names = sorted(map(str, self.labels))
            fields |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        return fields

    def _number(self, label: str | int) -> int:
        return int(label) if label not in self.config.label2id else self.config.label2id[str(label)]

    def _read(self, files: tuple[str, ...]) -> Rows:
        return derived_rows(read_files(files, CLASSIFICATION), self._decoded)

    def _decoded(self, passed: Iterable[Row]) -> Iterator[Row]:
        """TFRecord has bytes where other formats have text."""
        column = self.settings.label_column
        for row in passed:
            label = row.values.get(column) if isinstance(row.values, dict) else None
            if isinstance(label, bytes):
                row = row._replace(values={**row.values, column: label.decode(errors="backslashreplace")})
            yield row

    def _dataset(self, rows: Any, **options: Any) -> Dataset:
        settings = self.settings
        return classification_dataset(
            rows, self.tokenizer, self.config, text_field=settings.text_column, label_field=settings.label_column,
            max_length=self.size, truncation=settings.truncation, **options,
        )  # fmt: skip


class Answering(Examples):
    """Questions whose answers are parts of their contexts, in overlapping windows."""

    model_class = TFGPTJForQuestionAnswering

    def open(self) -> None:
        super().open()
        self.size = self.block_size(DEFAULT_WINDOW)
        if self.config.num_labels != 2:
            self.overrides = {"num_labels": 2}

    def scores(self, model: Any, found: dict[str, float]) -> dict[str, float]:
        """Exact match and F1."""
        outputs = model.predict(self.validation_data(self.settings.batch_size), verbose=0)
        answers = text_answers(
            outputs, self.held_out, self.tokenizer, max_length=self.size, stride=None,
            max_answer_length=self.settings.max_answer_length,
        )  # fmt: skip
        assert self.held_out is not None  # is asked for where has_validation
        right = [row["answers"]["text"] for row in self.held_out]
        return answer_scores([best[0]["answer"] for best in answers], right)

    def _read(self, files: tuple[str, ...]) -> Rows:
        settings = self.settings
        columns = {"question": settings.question_column, "context": settings.context_column,
                   "answers": settings.answers_column}  # fmt: skip
        return renamed_rows(read_files(files, ANSWERING), columns)

    def _dataset(self, rows: Any, **options: Any) -> Dataset:
        return question_answering_dataset(rows, self.tokenizer, max_length=self.size, stride=None, **options)


def open_task(settings: FineTuning) -> Task:
    """Read a run's tokenizer, configuration and data, which are gone through once.

    Raises:
        InputError: if there is something wrong with the data, or the model is too small for them.
        CheckpointError, ConfigError, TokenizerError: if tokenizer or configuration cannot be read.
    """
    tokenizer = GPTJTokenizer.from_pretrained(settings.model, revision=settings.revision)
    config = GPTJConfig.from_pretrained(settings.model, revision=settings.revision)
    tasks: dict[str, Callable[..., Task]] = {
        GENERATION: LanguageModeling,
        CLASSIFICATION: Classification,
        ANSWERING: Answering,
    }
    return tasks[settings.task](settings, tokenizer, config)


def _checked_label(values: Any, column: str) -> str | int:
    label = value_of(values, column)
    if isinstance(label, bool) or not isinstance(label, str | int) or (isinstance(label, int) and label < 0):
        raise InputError(f"the label is {label!r:.80}, expected a name, or a number from 0 on")
    return label


def _is_number(label: str | int) -> bool:
    return isinstance(label, int) or label.isdecimal()
