"""The settings of a fine-tuning run; importing this loads neither Keras nor TensorFlow."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfgptj.errors import InputError, InputTypeError
from tfgptj.files import parse_json

GENERATION, CLASSIFICATION, ANSWERING = TASKS = ("text-generation", "text-classification", "question-answering")
DTYPES = ("float32", "bfloat16", "mixed_bfloat16", "mixed_float16")

# What a run leaves in its directory: its settings as long as it goes on, its results afterwards.
RUN_FILE, SUMMARY_FILE = "run.json", "summary.json"


def _setting(default: Any, meaning: str, kind: Any = str, **facts: Any) -> Any:
    """A field, with what `tfgptj train` shows of it and what is checked.

    Args:
        default: its value.
        meaning: for people.
        kind: int, float, str or bool; a tuple holds several.
        **facts: `least` and `below`, bounds; `choices`; `tasks` that alone have it; `needs`, a field without which it
            has no effect; `free`, whether a run that goes on may have another one; `flag`, what the shell calls it.
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning, "kind": kind, **facts})


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning:
    """What to train, on what, and how. Defaults are those of transformers' `run_clm.py` and its relatives.

    Files are named with patterns such as "corpus/*.txt", several of them in a tuple; `tfgptj train --help` lists all
    fields with their meanings.

    >>> FineTuning(train_files=("notes.txt",), output_dir="tuned", epochs=1).learning_rate
    5e-05
    """

    train_files: tuple[str, ...] = _setting((), "texts, JSON lines (.jsonl), CSV (.csv, .tsv), TFRecord (.tfrecord) or "
        "SQuAD's JSON (.json) to train on; .gz, and patterns", flag="--train-file")  # fmt: skip
    output_dir: str = _setting("", "directory for the result, which from_pretrained loads", free=True)
    task: str = _setting(GENERATION, "what the model is for", choices=TASKS)
    model: str = _setting("shakespeare", "a directory, a Hub id, or the name of a packaged model")
    revision: str = _setting("main", "branch, tag or commit of the model on the Hub")
    validation_files: tuple[str, ...] = _setting((), "files to evaluate on", flag="--validation-file")
    validation_split: float | None = _setting(
        None, "share of the training data to evaluate on instead; default: 0.05", float, least=0, below=1
    )
    block_size: int | None = _setting(None, "tokens of a block of text (default: 1024), of a text with its label "
        "(what the model takes), or of a window with its question (384)", int, least=2)  # fmt: skip
    batch_size: int = _setting(8, "blocks, texts or windows of a step, on all devices together", int, least=1)
    micro_batches: int = _setting(1, "parts that a step is computed in, one after the other", int, least=1)
    epochs: int = _setting(3, "passes over the training data", int, least=1)
    steps: int | None = _setting(None, "steps to train for, in place of --epochs", int, least=1)
    learning_rate: float = _setting(5e-5, "learning rate at its highest", float, least=0)
    schedule: str = _setting("linear", "how it goes down", choices=("constant", "linear", "cosine"))
    warmup_steps: int = _setting(0, "steps until it is reached", int, least=0)
    weight_decay: float = _setting(0.0, "share of the weights that decays, times the learning rate", float, least=0)
    optimizer: str = _setting("adamw", "optimizer", choices=("adamw", "adafactor"))
    global_clipnorm: float = _setting(1.0, "norm that gradients are clipped to; 0 for no clipping", float, least=0)
    lora: int | None = _setting(None, "train adapters of this rank alone", int, least=1)
    lora_alpha: float | None = _setting(
        None, "weight of the adapters times the rank; default: the rank", float, least=0, needs="lora"
    )
    lora_targets: tuple[str, ...] = _setting(
        ("q_proj", "v_proj"), "layers that get adapters, or all-linear", needs="lora"
    )
    lora_dropout: float = _setting(0.0, "dropout before the adapters", float, least=0, below=1, needs="lora")
    adapter_only: bool = _setting(False, "save the adapters without the merged model", bool, needs="lora")
    freeze: tuple[str, ...] = _setting((), "layers to leave as they are: names, paths or regular expressions")
    remat: bool = _setting(False, "compute the blocks twice to keep less (gradient checkpointing)", bool)
    dtype: str = _setting("float32", "dtype policy", choices=DTYPES)
    strategy: str = _setting(
        "none", "devices: one, all of this machine, or those of TF_CONFIG", choices=("none", "mirrored", "multiworker")
    )
    seed: int = _setting(42, "of initial weights, dropout and the order of data", int, least=0)
    save_freq: int | str | None = _setting(None, "steps between two checkpoints, or epoch: the same command started "
        "again goes on from there", "freq", least=1, free=True)  # fmt: skip
    sample_prompt: str | None = _setting(
        None, "show how the model goes on with this at the end of each epoch", tasks=(GENERATION,), free=True
    )
    tensorboard: bool = _setting(False, "write TensorBoard's logs, to OUTPUT_DIR/logs", bool, free=True)
    logs: str | None = _setting(None, "write them to this directory", free=True)
    text_column: str = _setting("text", "where the text is", tasks=(GENERATION, CLASSIFICATION))
    label_column: str = _setting("label", "where the label is", tasks=(CLASSIFICATION,))
    truncation: bool = _setting(False, "cut texts that are too long, in place of an error", bool,
        tasks=(CLASSIFICATION,))  # fmt: skip
    question_column: str = _setting("question", "where the question is", tasks=(ANSWERING,))
    context_column: str = _setting("context", "where the text with the answer is", tasks=(ANSWERING,))
    answers_column: str = _setting("answers", "where the answers are", tasks=(ANSWERING,))
    max_answer_length: int = _setting(30, "tokens of a predicted answer at most", int, least=1, tasks=(ANSWERING,))
    overwrite: bool = _setting(False, "begin anew, whatever is in OUTPUT_DIR", bool, free=True)

    def check(self) -> None:
        """Refuse what makes no sense, before anything is loaded.

        Raises:
            InputError: saying which setting.
            InputTypeError: if one is of another type.
        """
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        for field in dataclasses.fields(self):
            self._check_effect(field)
        if not self.train_files or not self.output_dir:
            raise InputError("fine-tuning needs train_files and an output_dir")
        if self.lora is not None and self.freeze:
            raise InputError("freeze has no effect beside lora, which freezes all but the adapters")
        if self.validation_files and self.validation_split is not None:
            raise InputError("validation_split has no effect beside validation_files")
        if self.strategy == "multiworker" and self.task != GENERATION:
            raise InputError(f"strategy multiworker is for {GENERATION} only: take mirrored or none")
        if (self.tensorboard or self.logs) and importlib.util.find_spec("tensorboard") is None:
            raise InputError("TensorBoard's logs need its package: pip install tensorboard")

    def _check_effect(self, field: dataclasses.Field[Any]) -> None:
        facts = field.metadata
        if getattr(self, field.name) == field.default:
            return
        if self.task not in facts.get("tasks", TASKS):
            raise InputError(f"{field.name} is for {' and '.join(facts['tasks'])}, and the task is {self.task}")
        if facts.get("needs") and getattr(self, facts["needs"]) is None:
            raise InputError(f"{field.name} has no effect without {facts['needs']}")

    @property
    def share_held_out(self) -> float:
        """The share of the training data that is evaluated on."""
        if self.validation_files:
            return 0.0
        return 0.05 if self.validation_split is None else self.validation_split

    def fixed(self) -> dict[str, Any]:
        """What may not change while a run goes on, as JSON has it."""
        fields = [field.name for field in dataclasses.fields(self) if not field.metadata.get("free")]
        values = {name: getattr(self, name) for name in fields}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_value(field: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value that is none for a field.

    Raises:
        InputError: if it is out of range.
        InputTypeError: if it is of another type.
    """
    facts, name = field.metadata, field.name
    if isinstance(field.default, tuple):
        if not isinstance(value, tuple) or not all(isinstance(part, str) for part in value):
            raise InputTypeError(f"{name} must be a tuple of texts, got {value!r:.200}")
        return
    if value is None and field.default is None:
        return
    kind = facts["kind"]
    if kind == "freq":
        kind = str if value == "epoch" else int
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise InputTypeError(f"{name} must be of type {kind.__name__}, got {value!r:.200}")
    if "choices" in facts and value not in facts["choices"]:
        raise InputError(f"{name} must be one of {', '.join(facts['choices'])}; got {value!r:.200}")
    if not isinstance(value, str) and not facts.get("least", value) <= value < facts.get("below", float("inf")):
        bounds = f"at least {facts['least']}" + (f" and below {facts['below']}" if "below" in facts else "")
        raise InputError(f"{name} must be {bounds}, got {value}")


def check_output(settings: FineTuning) -> None:
    """Refuse a directory that holds something else than this run, cut off; nothing is changed.

    Raises:
        InputError: saying what is there.
    """
    directory = Path(settings.output_dir)
    if settings.overwrite or not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    remedy = "choose another output_dir, or add overwrite"
    if not directory.is_dir():
        raise InputError(f"{directory}: is no directory; choose another output_dir")
    if (directory / SUMMARY_FILE).exists() or not (directory / RUN_FILE).is_file():
        raise InputError(f"{directory}: there is something already, and no run that was cut off; {remedy}")
    before = _read_run(directory / RUN_FILE)
    now = settings.fixed()
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise InputError(
            f"{directory}: the run there has {name}={before.get(name)!r:.200}, and now it is {now[name]!r:.200}; "
            f"to go on with it take the same settings, or else {remedy}"
        )


def _read_run(path: Path) -> Mapping[str, Any]:
    try:
        fields = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: is damaged: {error}") from None
    return fields if isinstance(fields, dict) else {}
