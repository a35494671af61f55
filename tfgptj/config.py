"""GPTJConfig: the hyperparameters of a GPT-J, with Hugging Face's field names, defaults and ``config.json``."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from tfgptj import limits
from tfgptj.errors import ConfigError
from tfgptj.files import parse_json, write_json
from tfgptj.foreign import CODE_FIELDS, CODEGEN, as_gptj, code_fields

# Hugging Face's generic names for the same fields.
ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# Every name that Hugging Face's ACT2FN offers for `activation_function`; tfgptj/activations.py computes them.
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6"),
    *("sigmoid", "silu", "swish", "tanh", "xielu"),
)

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class GPTJConfig:
    """The configuration of a GPT-J; its defaults are those of GPT-J-6B.

    Args:
        vocab_size: int, rows of the embedding and of the LM head (V).
        n_positions: int, longest sequence that the model is meant for.
        n_embd: int, width of the model (D); divisible by `n_head`.
        n_layer: int, number of blocks (L).
        n_head: int, attention heads (N); each is H = D / N wide.
        rotary_dim: int or None, leading dimensions of each head that are rotated (R, even); None rotates all of them.
        n_inner: int or None, width of the feed-forward layer (F); None means 4 D.
        activation_function: str, one of Hugging Face's activation names.
        resid_pdrop: float, dropout after the attention's output projection and after the feed-forward layer.
        embd_pdrop: float, dropout after the embedding.
        attn_pdrop: float, dropout of the attention weights.
        layer_norm_epsilon: float, added to the variance in every layer normalisation.
        initializer_range: float, standard deviation of freshly initialised kernels and embeddings.
        use_cache: bool, kept for Hugging Face; `generate` always uses the cache.
        bos_token_id: int or None, the token that an empty prompt starts with.
        eos_token_id: int, list of int, or None, the tokens that end a text.
        pad_token_id: int or None, the token that fills up shorter rows.
        tie_word_embeddings: bool, whether the LM head uses the embedding's matrix.
        num_labels: int, outputs of the classification head.
        problem_type: str or None, the classifier's loss; None infers it from `num_labels` and the labels' dtype.
        output_hidden_states: bool, whether models return the hidden states of all layers too.
        output_attentions: bool, whether models return the attention weights of all layers too.
        **extra: any other field of a `config.json`; kept as an attribute and written back unchanged.

    Raises:
        ConfigError: if a value has the wrong type, is out of range or contradicts another one.

    Source: transformers, configuration_gptj.py.

    Example:

    >>> config = GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
    >>> config.head_dim, config.inner_dim
    (16, 256)
    >>> GPTJConfig().num_parameters()
    6050882784
    """

    model_type = "gptj"

    def __init__(
        self,
        /,
        vocab_size: int = 50400,
        n_positions: int = 2048,
        n_embd: int = 4096,
        n_layer: int = 28,
        n_head: int = 16,
        rotary_dim: int | None = 64,
        n_inner: int | None = None,
        activation_function: str = "gelu_new",
        resid_pdrop: float = 0.0,
        embd_pdrop: float = 0.0,
        attn_pdrop: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = 50256,
        eos_token_id: int | list[int] | None = 50256,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        num_labels: int | None = None,
        problem_type: str | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **extra: Any,
    ) -> None:
        given = dict(locals())
        for name in ("self", "extra", "__class__", "num_labels"):
            given.pop(name, None)
        for name, value in given.items():
            setattr(self, name, value)
        extra = dict(extra)
        self._set_labels(num_labels, extra.pop("id2label", None), extra.pop("label2id", None))
        if extra.pop("model_type", self.model_type) != self.model_type:
            raise ConfigError(f"model_type must be {self.model_type!r}: this is the configuration of another model")
        for alias, field in ALIASES.items():
            if alias in extra:
                setattr(self, field, extra.pop(alias))
        code = code_fields(extra)
        if code:
            warnings.warn(
                f"the configuration names Python code of its own ({code}). It is ignored: no code from files is run, "
                "and the model is computed as a plain GPT-J",
                stacklevel=2,
            )
        for name in CODE_FIELDS:
            extra.pop(name, None)
        self._extra = extra
        self.validate()

    def _set_labels(self, num_labels: int | None, id2label: Any, label2id: Any) -> None:
        if id2label is None:
            count = 2 if num_labels is None else num_labels
            _check_int("num_labels", count, 1, limits.MAX_LABELS)
            self.id2label = {i: f"LABEL_{i}" for i in range(count)}
        else:
            try:
                self.id2label = {int(i): str(label) for i, label in id2label.items()}
            except (AttributeError, TypeError, ValueError):
                raise ConfigError(f"id2label must map ids to labels, got {_shown(id2label)}") from None
            if sorted(self.id2label) != list(range(len(self.id2label))) or not self.id2label:
                raise ConfigError(f"id2label must have the ids 0, 1, 2, …, got {sorted(self.id2label)}")
            if num_labels is not None and num_labels != len(self.id2label):
                raise ConfigError(f"num_labels is {num_labels}, but id2label names {len(self.id2label)} labels")
        if label2id is not None and not isinstance(label2id, dict):
            raise ConfigError(f"label2id must map labels to ids, got {_shown(label2id)}")
        self.label2id = label2id or {label: i for i, label in self.id2label.items()}

    # Unknown fields of config.json and Hugging Face's generic names read like ordinary attributes.
    def __getattr__(self, name: str) -> Any:
        if name in ALIASES:
            return getattr(self, ALIASES[name])
        extra = self.__dict__.get("_extra", {})
        if name in extra and not name.startswith("__"):  # Python's own protocols ask for such names
            return extra[name]
        raise AttributeError(f"GPTJConfig has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, ALIASES.get(name, name), value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GPTJConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"GPTJConfig({json.dumps(self.to_dict(), indent=2, sort_keys=True)})"

    @property
    def num_labels(self) -> int:
        """Number of outputs of the classification head."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self._set_labels(count, None, None)

    @property
    def head_dim(self) -> int:
        """Width of one attention head (H)."""
        return self.n_embd // self.n_head

    @property
    def rotary_width(self) -> int:
        """Rotated dimensions of each head (R): `rotary_dim`, or the whole head when that is None."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def inner_dim(self) -> int:
        """Width of the feed-forward layer (F)."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text tokens as a tuple: empty, one or many."""
        if self.eos_token_id is None:
            return ()
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, (list, tuple)) else (self.eos_token_id,)

    def num_parameters(self, head: str = "causal_lm") -> int:
        """Number of weights, by arithmetic; nothing is allocated.

        Args:
            head: "causal_lm", "classification", "question_answering", or "none" for the bare model.
        """
        d, f, v = self.n_embd, self.inner_dim, self.vocab_size
        learned_activation = {"prelu": 1, "xielu": 2}.get(self.activation_function, 0)
        block = 4 * d * d + 2 * d * f + f + d + 2 * d + learned_activation
        heads = {
            "none": 0,
            "causal_lm": v + (0 if self.tie_word_embeddings else v * d),
            "classification": self.num_labels * d,
            "question_answering": 2 * d + 2,
        }
        if head not in heads:
            raise ConfigError(f"head must be one of {', '.join(heads)}, got {head!r}")
        return v * d + self.n_layer * block + 2 * d + heads[head]

    def validate(self) -> None:
        """Check all fields against each other and against the caps of :mod:`tfgptj.limits`.

        Raises:
            ConfigError: naming the field, its value and what it must be.
        """
        _check_int("vocab_size", self.vocab_size, 1, limits.MAX_VOCAB)
        _check_int("n_positions", self.n_positions, 1, limits.MAX_POSITIONS)
        _check_int("n_embd", self.n_embd, 1, limits.MAX_WIDTH)
        _check_int("n_layer", self.n_layer, 1, limits.MAX_LAYERS)
        _check_int("n_head", self.n_head, 1, limits.MAX_HEADS)
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd must be divisible by n_head, got n_embd={self.n_embd} and n_head={self.n_head}")
        if self.n_inner is not None:
            _check_int("n_inner", self.n_inner, 1, limits.MAX_WIDTH)
        self._check_rotary()
        if self.activation_function not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"activation_function must be one of {known}; got {self.activation_function!r}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            _check_number(name, getattr(self, name), 0.0, 1.0)
        _check_number("layer_norm_epsilon", self.layer_norm_epsilon, 0.0, 1.0)
        _check_number("initializer_range", self.initializer_range, 0.0, 1e6)
        self._check_tokens()
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ConfigError(
                f"problem_type must be None or one of {', '.join(PROBLEM_TYPES)}; got {self.problem_type!r}"
            )
        for name in ("use_cache", "tie_word_embeddings", "output_hidden_states", "output_attentions"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.num_parameters() > limits.MAX_PARAMETERS:
            raise ConfigError(
                f"this configuration has {self.num_parameters():,} parameters; "
                f"at most {limits.MAX_PARAMETERS:,} are allowed"
            )

    def _check_rotary(self) -> None:
        if self.rotary_dim is not None:
            _check_int("rotary_dim", self.rotary_dim, 2, limits.MAX_WIDTH)
        if self.rotary_width > self.head_dim or self.rotary_width % 2:
            raise ConfigError(
                f"rotary_dim must be even and at most n_embd / n_head = {self.head_dim}, got {self.rotary_dim}"
                + (" (None: the whole head)" if self.rotary_dim is None else "")
            )

    def _check_tokens(self) -> None:
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), -1 if name == "pad_token_id" else 0, limits.MAX_ID)
        for token in self.eos_token_ids:
            _check_int("eos_token_id", token, 0, limits.MAX_ID)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as `config.json` holds them."""
        public = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        public["id2label"] = {str(i): label for i, label in self.id2label.items()}
        return {**self._extra, **public, "model_type": self.model_type}

    @classmethod
    def from_dict(cls, fields: dict[str, Any], **overrides: Any) -> GPTJConfig:
        """A configuration from the fields of a `config.json`, with some of them replaced.

        A CodeGen's fields (`model_type` "codegen") give the configuration of the same model as a GPT-J.
        """
        fields, overrides = ({ALIASES.get(name, name): value for name, value in d.items()} for d in (fields, overrides))
        fields = {**fields, **overrides}
        if "num_labels" in overrides:
            fields.pop("id2label", None)
            fields.pop("label2id", None)
        return cls(**as_gptj(fields))

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str], **overrides: Any) -> GPTJConfig:
        """Read one `config.json`.

        Raises:
            ConfigError: if the file is no JSON object or describes neither a GPT-J nor a CodeGen.
            OSError: if the file cannot be read.
        """
        fields = read_json(path)
        if fields.get("model_type", cls.model_type) not in (cls.model_type, CODEGEN):
            raise ConfigError(f"{path}: model_type is {fields['model_type']!r}, expected 'gptj' or {CODEGEN!r}")
        try:
            return cls.from_dict(fields, **overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> GPTJConfig:
        """The configuration of a directory, a packaged model or a Hub repository.

        Args:
            name_or_path: a directory with a `config.json`, the name of a packaged model, or a Hub id.
            **options: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`; all others replace fields.
        """
        from tfgptj.checkpoints.directory import companion
        from tfgptj.checkpoints.hub import resolve_directory, split_options

        hub_options, overrides = split_options(options)
        directory = resolve_directory(name_or_path, files="config", **hub_options)
        return cls.from_json_file(companion(directory, "config.json"), **overrides)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `config.json` into a directory, which is created if need be."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_json(Path(directory) / "config.json", self.to_dict())

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Save `config.json` and upload it: see :func:`tfgptj.checkpoints.push.push_to_hub`."""
        from tfgptj.checkpoints.push import push_to_hub

        return push_to_hub(self, repo_id, **options)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object strictly: no duplicate keys, no NaN, bounded size and depth.

    Raises:
        ConfigError: naming the file and what is wrong with it.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    if path.stat().st_size > limits.MAX_JSON_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size:,} bytes; at most {limits.MAX_JSON_BYTES:,} are allowed")
    try:
        content = parse_json(path.read_bytes(), limits.MAX_JSON_VALUES)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, got {_shown(value)}")
    if not low <= value <= high:
        raise ConfigError(f"{name} must be between {low:,} and {high:,}, got {_shown(value)}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number between {low:g} and {high:g}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value from a file as a message can hold it: whatever it is, it stays short."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a far larger number" if value > 0 else "a far smaller number"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value!r:.200}"
