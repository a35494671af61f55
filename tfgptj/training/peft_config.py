"""`adapter_config.json`, in which the PEFT library says what its adapters are.

A field that is unknown here and not off is refused by its name: it may change what is computed.

Source: the fields of `LoraConfig` and how `LoraModel` reads them, in the PEFT library.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tfgptj.config import read_json
from tfgptj.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError, ConfigError
from tfgptj.training.lora import Adaptation, Biases, Settings
from tfgptj.training.lora_targets import is_named, path_of

# Fields that change nothing of what a loaded adapter computes.
_IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "peft_type", "init_lora_weights"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),  # settings of initialisations
}

# Ways to begin that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and others change it, and are not known to be
# undone in the file.
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")

_TASKS = {
    "none": "FEATURE_EXTRACTION",
    "causal_lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "question_answering": "QUESTION_ANS",
}

# A pattern of a file is tried on paths of some 30 characters. Four quantifiers, none around another, take a second at
# most; nested ones could take a year.
_MOST_QUANTIFIERS = 4


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The fields that count, checked."""

    path: Path
    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    bias: Biases = "none"
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ()  # empty where it is a pattern: the tensors tell which layers are meant
    exclude_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> PeftConfig:
        """Read the file strictly.

        Raises:
            CheckpointError: if there is no such file, or it cannot be read.
            CheckpointFormatError: if it is damaged, a field has no sense, or asks for what is not supported.
        """
        try:
            fields = read_json(path)
        except ConfigError as error:
            raise CheckpointFormatError(str(error)) from None
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror}: is this a directory of adapters?"
            ) from error
        return _Fields(path, fields).parse()

    def settings(self, path: str) -> Settings:
        """The adapters that a layer has by this configuration."""
        rank = _by_pattern(self.rank_pattern, path, self.r)
        alpha = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return Settings(rank, alpha * math.sqrt(rank) if self.use_rslora else alpha, self.lora_dropout)

    def check_targets(self, projections: Collection[str], adapted: Collection[str]) -> None:
        """Compare the layers that the configuration names with those that there are tensors of.

        Raises:
            CheckpointMismatchError: if there are none of some.
        """
        missing = [
            path
            for path in projections
            if path not in adapted
            and any(is_named(path, name) for name in self.target_modules)
            and not any(is_named(path, name) for name in (*self.exclude_modules, *self.modules_to_save))
        ]
        if missing:
            raise CheckpointMismatchError(
                f"{self.path}: target_modules names {', '.join(missing[:20])}, but the file has no adapters of it"
            )

    def is_whole(self, weight: str) -> bool:
        """Whether a weight is one of those that are trained whole, by its name."""
        is_saved = any(is_named(path_of(weight), name) for name in self.modules_to_save)
        return is_saved or (self.bias != "none" and weight.endswith(".bias"))


class _Fields:
    """The fields of a file, each with its own error."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path, self.fields = path, fields

    def parse(self) -> PeftConfig:
        fields = self.fields
        if fields.get("peft_type") != "LORA":
            raise self._error(f"peft_type is {fields.get('peft_type')!r:.80}; only LORA is supported")
        if fields.get("init_lora_weights", True) not in _HARMLESS_STARTS:
            start = fields["init_lora_weights"]
            raise self._error(
                f"init_lora_weights is {start!r:.80}, which changed the base model, too; convert the adapters to plain "
                "ones with PEFT's path_initial_model_for_weight_conversion"
            )
        has_patterns = any(isinstance(fields.get(field), str) for field in ("target_modules", "exclude_modules"))
        is_listed = not has_patterns and fields.get("layers_to_transform") in (None, [])
        parsed = PeftConfig(
            self.path,
            r=self._rank(fields.get("r", 8), "r"),
            lora_alpha=self._number(fields.get("lora_alpha", 8), "lora_alpha"),
            lora_dropout=self._dropout(),
            bias=self._bias(),
            use_rslora=fields.get("use_rslora", False) is True,
            target_modules=self._names("target_modules") if is_listed else (),
            exclude_modules=self._names("exclude_modules") if is_listed else (),
            modules_to_save=self._names("modules_to_save"),
            rank_pattern=self._patterns("rank_pattern", self._rank),
            alpha_pattern=self._patterns("alpha_pattern", self._number),
        )
        known = {*_IGNORED, *(field.name for field in dataclasses.fields(PeftConfig))}
        known |= {"layers_to_transform", "layers_pattern"}
        for name, value in fields.items():
            if name not in known and value not in (None, False, {}, [], ""):
                raise self._error(f"{name} is {value!r:.80}, which is not supported")
        return parsed

    def _error(self, text: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{self.path}: {text}")

    def _rank(self, value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self._error(f"{name} must be a positive integer, got {value!r:.80}")
        return value

    def _number(self, value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**63:
            raise self._error(f"{name} must be a positive number, got {value!r:.80}")
        return value

    def _dropout(self) -> float:
        value = self.fields.get("lora_dropout", 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise self._error(f"lora_dropout must be at least 0 and less than 1, got {value!r:.80}")
        return value

    def _bias(self) -> Biases:
        value = self.fields.get("bias", "none")
        known: tuple[Biases, ...] = ("none", "lora_only", "all")
        for bias in known:
            if value == bias:
                return bias
        raise self._error(f"bias must be 'none', 'lora_only' or 'all', got {value!r:.80}")

    def _names(self, field: str) -> tuple[str, ...]:
        names = self.fields.get(field) or ()
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise self._error(f"{field} must be a list of names, got {names!r:.80}")
        return tuple(names)

    def _patterns(self, field: str, check: Any) -> dict[str, Any]:
        patterns = self.fields.get(field) or {}
        if not isinstance(patterns, dict):
            raise self._error(f"{field} must map names to numbers, got {patterns!r:.80}")
        for pattern in patterns:
            if len(re.findall(r"[*+{]", pattern)) > _MOST_QUANTIFIERS or re.search(r"\)[*+{]", pattern):
                raise self._error(f"{field}: {pattern!r:.200} has more or other repetitions than a name needs")
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise self._error(f"{field}: {pattern!r:.200} is no regular expression: {error}") from None
        return {pattern: check(value, f"{field}[{pattern!r:.80}]") for pattern, value in patterns.items()}


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches a path or its end, as in PEFT."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return default


def peft_fields(
    adaptation: Adaptation, head: str, projections: Collection[str], weights: Collection[str], base_model: str | None
) -> dict[str, Any]:
    """What PEFT is to be told of some adapters.

    Args:
        adaptation: the adapters.
        head: the model's head.
        projections: the paths of all layers that can have adapters.
        weights: the names of all weights.
        base_model: the base's Hub id or directory.

    Raises:
        CheckpointError: if PEFT has no words for it.
    """
    ranks = {path: settings.rank for path, settings in adaptation.layers.items()}
    alphas = {path: _plain(settings.alpha) for path, settings in adaptation.layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    bias, modules = _whole(adaptation, weights)
    own_head = {"classification": "score", "question_answering": "qa_outputs"}.get(head)
    return {
        "peft_type": "LORA",
        # PEFT takes a classifier's head for trained whole.
        "task_type": _TASKS[head] if own_head in (None, *modules) else None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(settings.dropout for settings in adaptation.layers.values()),
        "bias": bias,
        "target_modules": _shortest(list(adaptation.layers), projections),
        "modules_to_save": _shortest(modules, {path_of(name) for name in weights}) or None,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _whole(adaptation: Adaptation, weights: Collection[str]) -> tuple[Biases, list[str]]:
    """PEFT's `bias`, and the paths of the layers that are trained whole."""
    trained = set(adaptation.weights)
    by_path: dict[str, list[str]] = {}
    for name in weights:
        by_path.setdefault(path_of(name), []).append(name)
    biases = {name for name in weights if name.endswith(".bias")}
    modules = [
        path
        for path, names in by_path.items()
        if trained.issuperset(names) and path not in adaptation.layers and not biases.issuperset(names)
    ]
    rest = trained - {name for path in modules for name in by_path[path]}
    own = {name for name in biases if path_of(name) in adaptation.layers}
    if not rest:
        return "none", modules
    if trained.issuperset(biases) and rest <= biases:
        return "all", modules
    if rest == own:
        return "lora_only", modules
    raise CheckpointError(
        f"{sorted(rest)[0]} trains, but not the whole of its layer nor all biases: PEFT has no such adapters; "
        "set its trainable flag as those of its neighbours"
    )


def _shortest(paths: list[str], all_paths: Collection[str]) -> list[str]:
    """Layers by their bare names where all of that name are meant, else by their paths."""
    names = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    named = [path for path in all_paths if path.rpartition(".")[2] in names]
    return sorted(names) if len(named) == len(paths) else paths
