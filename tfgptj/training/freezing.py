"""Train some layers of a model and leave the others as they are."""

from __future__ import annotations

from typing import Any

from tfgptj.compiled import forget_compiled
from tfgptj.errors import InputError
from tfgptj.training.lora import adaptation_of
from tfgptj.training.lora_targets import Targets, layers_of, matching, path_of, weights_of


def freeze(model: Any, patterns: Targets) -> tuple[str, ...]:
    """Take layers out of the training; compile afterwards.

    Frozen weights get no gradient and no optimizer state. Layers before the first one that is trained cost no backward
    pass either: to freeze the embedding and the lower blocks saves more than to freeze as many others.
    What is frozen is not saved with the model.

    Args:
        model: one of the package's models.
        patterns: layers, one or several of: a name ("mlp.fc_in"), a path in Hugging Face's names
            ("transformer.h.0.attn.q_proj"), a regular expression for the whole path, a function `f(path, layer)`.

    Returns:
        The names of the layers' weights.

    Raises:
        InputError: if a pattern matches no layer, or the model has adapters, beside which everything is frozen.
        InputTypeError: if a pattern is of a wrong type.

    >>> from tfgptj import GPTJConfig, TFGPTJForCausalLM
    >>> model = TFGPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4))
    >>> len(freeze(model, ["wte", r"transformer\\.h\\.0\\..*"]))
    11
    """
    return _set_trainable(model, patterns, False)


def unfreeze(model: Any, patterns: Targets) -> tuple[str, ...]:
    """Train layers again that were frozen; compile afterwards.

    Args, returns and errors: as for :func:`freeze`; quantized weights cannot be trained, either.

    >>> from tfgptj import GPTJConfig, TFGPTJForCausalLM
    >>> model = TFGPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4))
    >>> model.trainable = False
    >>> unfreeze(model, "lm_head")
    ('lm_head.weight', 'lm_head.bias')
    """
    return _set_trainable(model, patterns, True)


def _set_trainable(model: Any, patterns: Targets, trainable: bool) -> tuple[str, ...]:
    if adaptation_of(model) is not None:
        raise InputError(
            "the model has LoRA adapters, beside which everything is frozen: add_lora's also_train names what trains "
            "whole, and remove_lora() takes the adapters away"
        )
    chosen = set(matching(patterns, layers_of(model), {}, "patterns"))
    weights = {name: found for name, found in weights_of(model).items() if path_of(name) in chosen}
    variables = {name: getattr(layer, entry.variable.rpartition(".")[2]) for name, (layer, entry) in weights.items()}
    if trainable:
        for name, (layer, _) in weights.items():
            if getattr(layer, "quantization_mode", None):
                raise InputError(f"{name} is quantized and cannot be trained: leave its layer out, or give it adapters")
        _open_layers(model)
    for variable in variables.values():
        variable.trainable = trainable
    forget_compiled(model)
    return tuple(variables)


def _open_layers(model: Any) -> None:
    """Leave it to the weights whether they train: a layer with `trainable = False` would hide its own."""
    states = [(variable, variable.trainable) for variable in model.variables]
    model.trainable = True
    for variable, trainable in states:
        variable.trainable = trainable
