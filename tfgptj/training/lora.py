"""LoRA: a frozen model, and beside some of its projections two thin matrices that are trained in its place.

Variables and flags are those of Keras's `Dense.enable_lora`; see :mod:`tfgptj.projection` for what is computed. The
base may be float, or quantized to int8 or int4 before.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Dettmers et al. 2023, "QLoRA".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import keras

from tfgptj.checkpoints.mapping import HEADS, head_of
from tfgptj.compiled import forget_compiled, forget_programs
from tfgptj.errors import ConfigError, InputError, InputTypeError
from tfgptj.projection import Projection
from tfgptj.training.lora_targets import (
    Targets,
    layers_of,
    matching,
    path_of,
    projections_of,
    trainable_weights,
    weights_of,
)

Biases = Literal["none", "lora_only", "all"]

# The modes of quantization whose layers Keras can compute with adapters. It refuses them for GPTQ and float8, and
# leaves them out without a word for AWQ.
_BASES = (None, "int8", "int4")

# Heads that begin at random, and so are of no use untrained.
_OWN_HEADS = {"classification": "score", "question_answering": "qa_outputs"}

# Where a model keeps the names of the weights that adding adapters has frozen.
_FROZEN = "_frozen_by_lora"


class Settings(NamedTuple):
    """The adapters of one layer. Their product counts alpha / rank times."""

    rank: int
    alpha: float
    dropout: float = 0.0


class Adaptation(NamedTuple):
    """All that is trained beside a frozen model: adapters by layer path, and whole weights by name."""

    layers: Mapping[str, Settings]
    weights: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LoraReport:
    """What is trained after :func:`add_lora`."""

    layers: tuple[str, ...]  # paths of those that have adapters
    weights: tuple[str, ...]  # names of the weights that are trained whole
    trainable: int  # numbers that are trained
    total: int  # numbers of the model, adapters included

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        whole = f", {len(self.weights)} weights are trained whole" if self.weights else ""
        return (
            f"{self.trainable:,} of {self.total:,} parameters are trainable ({share:.3g} %); "
            f"{len(self.layers)} layers have adapters{whole}"
        )


def add_lora(
    model: Any,
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = ("q_proj", "v_proj"),
    *,
    dropout: float = 0.0,
    also_train: Targets | None = None,
    bias: Biases = "none",
    rank_stabilized: bool = False,
) -> LoraReport:
    """Freeze a model and add adapters, which are all that is trained from here on; compile afterwards.

    At first the model computes what it did before: A is random and uniform, as in PEFT, and B is zero. Adapters are
    float32 whatever the dtype policy, and take part in its compute dtype. For a quantized base call
    `model.quantize("int8")` or `("int4")` first.

    Args:
        model: one of the package's models.
        rank: columns of A and rows of B.
        alpha: the product A B counts alpha / rank times; None is the rank.
        targets: layers that get adapters, one or several of: a name ("q_proj"), a path in Hugging Face's names
            ("transformer.h.0.attn.q_proj") or its end, a regular expression for the whole path, a function
            `f(path, layer)`, or "all-linear" for all projections but the head's.
        dropout: share of each adapted layer's inputs that its adapters do not see in training.
        also_train: layers that are trained whole, given in the same way; None is the head of a classifier or of a
            question answering model, which begins at random.
        bias: which biases are trained too: "none", "lora_only" for those of adapted layers, or "all".
        rank_stabilized: count the product alpha / sqrt(rank) times (Kalajdzievski 2023, "rsLoRA").

    Returns:
        A :class:`LoraReport`, which can be printed.

    Raises:
        InputError: if a target matches no layer, an argument is out of range, or the model cannot have adapters.
        InputTypeError: if an argument is of a wrong type.

    >>> from tfgptj import GPTJConfig, TFGPTJForCausalLM
    >>> model = TFGPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4))
    >>> print(model.add_lora(rank=2))
    256 of 8,306 parameters are trainable (3.08 %); 4 layers have adapters
    """
    _check_arguments(rank, alpha, dropout, bias)
    layers, projections = layers_of(model), projections_of(model)
    others = {path: layer for path, layer in layers.items() if path not in projections}
    chosen = matching(targets, projections, others, "targets")
    if also_train is None:
        own = _OWN_HEADS.get(head_of(type(model))[0])
        also_train = [own] if own is not None and own not in chosen else []
    whole = set(matching(also_train, layers, {}, "also_train") if also_train else ())
    scale = rank if alpha is None else alpha
    settings = Settings(rank, scale * math.sqrt(rank) if rank_stabilized else scale, dropout)
    names = [
        name
        for name in weights_of(model)
        if path_of(name) in whole
        or (name.endswith(".bias") and (bias == "all" or (bias == "lora_only" and path_of(name) in chosen)))
    ]
    adapt(model, Adaptation(dict.fromkeys(chosen, settings), tuple(names)))
    return report(model)


def adapt(model: Any, adaptation: Adaptation) -> None:
    """Freeze a model, and give it new adapters; nothing is changed if that cannot be done.

    Raises:
        InputError: saying what stands against it.
    """
    projections, weights = projections_of(model), weights_of(model)
    _check_base(model, projections, weights, adaptation)
    model.__dict__[_FROZEN] = tuple(trainable_weights(model))
    for variable in model.trainable_variables:
        variable.trainable = False
    for path, settings in adaptation.layers.items():
        # PEFT's: uniform between ± 1 / sqrt(in). One for each layer, as one alone draws the same numbers every time.
        initializer = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
        projections[path].enable_lora(settings.rank, settings.alpha, initializer, dropout=settings.dropout)
    _set_trainable(weights, adaptation.weights)
    forget_compiled(model)


def adaptation_of(model: Any) -> Adaptation | None:
    """What is trained beside the frozen model; None for a model without adapters."""
    layers = {
        path: Settings(layer.lora_rank, layer.lora_alpha, layer.lora_dropout) for path, layer in _adapted(model).items()
    }
    return Adaptation(layers, tuple(trainable_weights(model))) if layers else None


def report(model: Any) -> LoraReport:
    """What is trainable in a model, and how much that is of all."""
    adapted, weights = _adapted(model), weights_of(model)
    adapters = sum(layer.lora_rank * (layer.lora_kernel_a.shape[0] + layer.units) for layer in adapted.values())
    trained = tuple(trainable_weights(model))
    return LoraReport(
        layers=tuple(adapted),
        weights=trained,
        trainable=adapters + sum(math.prod(weights[name][1].shape) for name in trained),
        total=adapters + sum(math.prod(entry.shape) for _, entry in weights.values()),
    )


def remove_lora(model: Any) -> None:
    """Take the adapters away, merged or not: the base as it was, trainable as it was; compile again to train.

    Weights that were trained whole keep what they learned.

    Raises:
        InputError: if the model has no adapters, or they are disabled.
    """
    adapted = _adapted_or_refuse(model)
    for layer in adapted.values():
        if layer.merged:
            layer.unmerge()
    _drop(model, adapted)


def merge_lora(model: Any, *, keep_base: bool = True, requantize: bool = False) -> None:
    """Make the adapters part of the kernels: generation is as fast as without them, and the model cannot be trained.

    A kernel becomes kernel + alpha / rank · A B, computed in float32 and rounded once to the kernel's dtype, which is
    what `save_pretrained` writes of a model with adapters, bit for bit.

    Args:
        model: a model with adapters.
        keep_base: keep the adapters, and in the computer's memory a copy of the kernels that they are added to, so that
            :func:`unmerge_lora` can restore every bit. Otherwise the adapters are gone afterwards, and the model is one
            like any other.
        requantize: merge into a quantized base, too: the sum is rounded to int8 or int4 again, and small adapters may
            be lost in that. For the adapters as they were trained merge them into the float model, and quantize that.

    Raises:
        InputError: if the model has no adapters, they are merged already or disabled, or the base is quantized and
            `requantize` is not set.
    """
    adapted = _adapted_or_refuse(model)
    if any(layer.merged for layer in adapted.values()):
        raise InputError("the adapters are merged already; unmerge_lora() undoes that")
    quantized = [path for path, layer in adapted.items() if layer.quantization_mode]
    if quantized and not requantize:
        raise InputError(
            f"{quantized[0]} is quantized to {adapted[quantized[0]].quantization_mode}: adapters merged into it are "
            "rounded to so few bits. Save them and merge them into the float model, or pass requantize=True"
        )
    done: list[Projection] = []
    try:
        for layer in adapted.values():
            done.append(layer)
            layer.merge()
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    if keep_base:
        forget_programs(model)
    else:
        _drop(model, adapted)


def unmerge_lora(model: Any) -> None:
    """Undo :func:`merge_lora`: the kernels have every bit that they had, and the adapters stand beside them again.

    Raises:
        InputError: if the model has no merged adapters.
    """
    adapted = _adapted(model)
    if not any(layer.merged for layer in adapted.values()):
        raise InputError("the model has no merged adapters; a merge with keep_base=False cannot be undone")
    for layer in adapted.values():
        layer.unmerge()
    forget_programs(model)


@contextmanager
def adapters_disabled(model: Any) -> Iterator[None]:
    """The base model within a `with` block; what was compiled is compiled anew within it and after it.

    Weights that are trained whole stay as they are.

    Raises:
        InputError: if the model has no adapters, or they are merged or disabled already.

    >>> from tfgptj import GPTJConfig, TFGPTJForCausalLM
    >>> model = TFGPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4))
    >>> report = model.add_lora(rank=2)
    >>> with model.adapters_disabled():
    ...     model([[1, 2, 3]]).shape
    TensorShape([1, 3, 50])
    """
    adapted = _adapted_or_refuse(model)
    if any(layer.merged for layer in adapted.values()):
        raise InputError("the adapters are merged; unmerge_lora() gives the base model back")
    _enable(model, adapted, False)
    try:
        yield
    finally:
        _enable(model, adapted, True)


def lora_config(model: Any) -> dict[str, Any] | None:
    """What a model's Keras configuration says of its adapters; those that are merged or disabled are not saved."""
    is_known = any(parent.__name__ in HEADS for parent in type(model).__mro__)
    adaptation = adaptation_of(model) if is_known else None
    if adaptation is None or not all(layer.lora_enabled for layer in _adapted(model).values()):
        return None
    return {"layers": {path: list(settings) for path, settings in adaptation.layers.items()},
            "weights": list(adaptation.weights)}  # fmt: skip


def adapt_from_config(model: Any, fields: Any) -> None:
    """Give a model the adapters that its Keras configuration tells of, as yet untrained.

    Raises:
        ConfigError: if they are not for this model.
    """
    try:
        layers = {path: Settings(*values) for path, values in fields["layers"].items()}
        for settings in layers.values():
            _check_arguments(*settings, "none")
        weights = tuple(fields["weights"])
        known = projections_of(model).keys() | weights_of(model).keys()
        unknown = [name for name in (*layers, *weights) if name not in known]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the configuration's lora is not what Keras saved: {error!r:.200}") from None
    if unknown:
        raise ConfigError(f"the configuration's lora is for {unknown[0]!r:.200}, which the model has not")
    adapt(model, Adaptation(layers, weights))


def _check_arguments(rank: Any, alpha: Any, dropout: Any, bias: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise InputTypeError(f"rank must be an integer, got {rank!r:.200}")
    if rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}")
    for name, value in (("alpha", 1 if alpha is None else alpha), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputTypeError(f"{name} must be a number, got {value!r:.200}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise InputError(f"alpha must be positive and finite, got {alpha}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be at least 0 and less than 1, got {dropout}")
    if bias not in ("none", "lora_only", "all"):
        raise InputError(f"bias must be 'none', 'lora_only' or 'all', got {bias!r:.200}")


def _check_base(
    model: Any, projections: Mapping[str, Projection], weights: Mapping[str, Any], adaptation: Adaptation
) -> None:
    if _adapted(model):
        raise InputError(
            "the model has LoRA adapters already: remove_lora() takes them away, load_adapter replaces them"
        )
    for path in adaptation.layers:
        mode = projections[path].quantization_mode
        if mode not in _BASES:
            raise InputError(f"{path} is quantized to {mode}, which has no LoRA: take a float, int8 or int4 base")
    for name in adaptation.weights:
        path, layer = path_of(name), weights[name][0]
        if path in adaptation.layers and not name.endswith(".bias"):
            raise InputError(f"{path} is to have adapters and to be trained whole: leave it out of one of the two")
        if getattr(layer, "quantization_mode", None) and not name.endswith(".bias"):
            raise InputError(
                f"{path} is quantized, and cannot be trained whole: leave it out when you quantize, with filters"
            )


def _adapted(model: Any) -> dict[str, Projection]:
    return {path: layer for path, layer in projections_of(model).items() if layer.lora_rank}


def _adapted_or_refuse(model: Any) -> dict[str, Projection]:
    adapted = _adapted(model)
    if not adapted:
        raise InputError("the model has no LoRA adapters: add_lora() or load_adapter() gives it some")
    if not any(layer.lora_enabled or layer.merged for layer in adapted.values()):
        raise InputError("the adapters are disabled: leave the adapters_disabled() block first")
    return adapted


def _set_trainable(weights: Mapping[str, tuple[Any, Any]], names: tuple[str, ...]) -> None:
    for name in names:
        layer, entry = weights[name]
        getattr(layer, entry.variable.rpartition(".")[2]).trainable = True


def _enable(model: Any, adapted: Mapping[str, Projection], enabled: bool) -> None:
    for layer in adapted.values():
        layer.lora_enabled = enabled
    forget_programs(model)


def _drop(model: Any, adapted: Mapping[str, Projection]) -> None:
    for layer in adapted.values():
        layer.remove_lora()
    weights = weights_of(model)
    # What was quantized after the adapters were added cannot train any more.
    floats = [
        name
        for name in model.__dict__.pop(_FROZEN, ())
        if name.endswith(".bias") or not getattr(weights[name][0], "quantization_mode", None)
    ]
    _set_trainable(weights, tuple(floats))
    forget_compiled(model)
