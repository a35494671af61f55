"""Which layers LoRA is for: by name, by path, by regular expression, by function.

Layers are called as in Hugging Face's PyTorch classes, after the one table of names: `transformer.h.0.attn.q_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tfgptj.checkpoints.mapping import Entry, head_of, layer_of, plan, stored_name
from tfgptj.errors import InputError, InputTypeError
from tfgptj.projection import Projection

Target = str | re.Pattern[str] | Callable[[str, Any], Any]
Targets = Target | Iterable[Target]

# PEFT's word for all projections but those of the head.
ALL_LINEAR = "all-linear"


def weights_of(model: Any) -> dict[str, tuple[Any, Entry]]:
    """The layer and the plan's entry of every weight, by its name in PyTorch."""
    head, _ = head_of(type(model))
    return {stored_name(entry, head, "torch"): (layer_of(model, entry), entry) for entry in plan(model.config, head)}


def layers_of(model: Any) -> dict[str, Any]:
    """All layers that have weights, by path."""
    return {path_of(name): layer for name, (layer, _) in weights_of(model).items()}


def projections_of(model: Any) -> dict[str, Projection]:
    """All layers that can have adapters, by path; a head that is tied to the embedding is none."""
    return {path: layer for path, layer in layers_of(model).items() if isinstance(layer, Projection)}


def path_of(weight: str) -> str:
    """The path of the layer that has a weight.

    >>> path_of("transformer.h.0.attn.q_proj.weight")
    'transformer.h.0.attn.q_proj'
    """
    return weight.rpartition(".")[0]


def is_named(path: str, name: str) -> bool:
    """Whether a name is a layer's path, or the end of it that begins after a dot."""
    return f".{path}".endswith(f".{name}")


def trainable_weights(model: Any) -> dict[str, Any]:
    """The variables that train, by name: neither adapters, nor kernels that have them, nor what is quantized."""
    found = {}
    for name, (layer, entry) in weights_of(model).items():
        leaf = entry.variable.rpartition(".")[2]
        is_quantized = getattr(layer, "quantization_mode", None) and leaf in ("kernel", "embeddings")
        if not is_quantized and not (leaf == "kernel" and getattr(layer, "lora_rank", None)):
            variable = getattr(layer, leaf)
            if variable.trainable:
                found[name] = variable
    return found


def matching(targets: Targets, layers: Mapping[str, Any], others: Mapping[str, Any], argument: str) -> list[str]:
    """The paths that some targets are for, in the order of the layers.

    Args:
        targets: one or several of: a layer's name ("q_proj") or path ("h.0.attn.q_proj"), a regular expression for the
            whole path, as text or compiled, or a function of path and layer that returns whether it is meant.
        layers: what may be meant, by path.
        others: what may not, so that the message can tell.
        argument: what the caller calls the targets.

    Raises:
        InputError: if there are no targets, or one of them matches no layer.
        InputTypeError: if one is of another type.
    """
    if isinstance(targets, (str, re.Pattern)) or callable(targets):
        targets = (targets,)
    elif not isinstance(targets, Iterable):
        raise InputTypeError(f"{argument} must be names, regular expressions or a function, got {targets!r:.200}")
    wanted, chosen = list(targets), set()
    if not wanted:
        raise InputError(f"{argument} is empty: name at least one layer, such as {next(iter(layers), '')!r}")
    for target in wanted:
        found = _matches(target, layers, argument)
        if not found:
            raise InputError(_no_match(target, layers, _matches(target, others, argument), argument))
        chosen.update(found)
    return [path for path in layers if path in chosen]


def _matches(target: Any, layers: Mapping[str, Any], argument: str) -> list[str]:
    if isinstance(target, str):
        if target == ALL_LINEAR:
            return [path for path in layers if "h" in path.split(".")]
        try:
            pattern = re.compile(target)
        except re.error as error:
            raise InputError(f"{argument}: {target!r} is neither a name nor a regular expression: {error}") from None
        return [path for path in layers if is_named(path, target) or pattern.fullmatch(path)]
    if isinstance(target, re.Pattern):
        return [path for path in layers if target.fullmatch(path)]
    if callable(target):
        return [path for path, layer in layers.items() if target(path, layer)]
    raise InputTypeError(f"{argument} must be names, regular expressions or a function, got {target!r:.200}")


def _no_match(target: Any, layers: Mapping[str, Any], found: list[str], argument: str) -> str:
    if found:
        return f"{argument}: {found[0]} has no kernel of its own that adapters could be added to"
    names = dict.fromkeys(path.rpartition(".")[2] for path in layers)
    shown = target.pattern if isinstance(target, re.Pattern) else target
    return (
        f"{argument}: {shown!r:.200} matches no layer; there are {', '.join(names)}, with paths such as "
        f"{', '.join(list(layers)[:2])}; a regular expression must match the whole path"
    )
