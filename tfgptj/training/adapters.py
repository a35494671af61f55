"""Adapters in files: a directory in the PEFT library's layout, which travels to PyTorch and back.

`adapter_model.safetensors` holds them by layer path, `base_model.model.transformer.h.0.attn.q_proj.lora_A.weight`
[r, in] and `lora_B` [out, r], and what is trained whole; `adapter_config.json` says how they count. The base's
configuration stands in the metadata of the former, so that adapters of another model are told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from tfgptj import limits
from tfgptj.checkpoints.checks import architecture_differences
from tfgptj.checkpoints.directory import ADAPTER_FILES
from tfgptj.checkpoints.hub import resolve_directory
from tfgptj.checkpoints.load import assign_all
from tfgptj.checkpoints.mapping import Entry, head_of
from tfgptj.checkpoints.safetensors import SafetensorsFile, write_safetensors
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorFile, TensorSpec, assemble
from tfgptj.checkpoints.torch_zip import TorchZipFile
from tfgptj.compiled import forget_programs
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError, InputError, TFGPTJError
from tfgptj.files import json_bytes, parse_json, replaced_file, sync_directory
from tfgptj.training.adapter_content import INNER, PREFIX, SUFFIXES, AdapterContent
from tfgptj.training.lora import Adaptation, LoraReport, adapt, adaptation_of, remove_lora, report
from tfgptj.training.lora_targets import path_of, projections_of, trainable_weights, weights_of
from tfgptj.training.peft_config import PeftConfig, peft_fields

_CONFIG, _WEIGHTS, _PICKLE = ADAPTER_FILES

# In the metadata of the file.
_BASE = "tfgptj_base"


class _Stored(NamedTuple):
    """A tensor of a file, and the variable that it is for."""

    name: str
    variable: Any
    transpose: bool


def save_adapter(
    model: Any, directory: str | os.PathLike[str], *, base_model: str | None = None, dtype: str = "float32"
) -> None:
    """Write a model's adapters and what is trained whole beside them, as PEFT does: a few MB.

    Adapters that are merged or disabled are written as they are. An older adapter in the directory is replaced; where
    its configuration differs a crash can leave a directory without one, which no library loads.

    Args:
        model: a model with adapters.
        directory: where to; created if need be.
        base_model: the base's Hub id or directory, for PEFT's `AutoPeftModel`; loading does not need it.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        InputError: if the model has no adapters.
        CheckpointError: if the dtype is another, the directory cannot be written, or PEFT has no words for what trains.
    """
    adaptation = adaptation_of(model)
    if adaptation is None:
        raise InputError("the model has no LoRA adapters: add_lora() or load_adapter() gives it some")
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {dtype!r}")
    directory, weights = Path(directory), weights_of(model)
    fields = peft_fields(adaptation, head_of(type(model))[0], projections_of(model), weights, base_model)
    stored = sorted(_variables(model, adaptation, weights))
    specs = [
        TensorSpec(name, tuple(variable.shape[::-1] if transpose else variable.shape), FLOAT_DTYPES[dtype])
        for name, variable, transpose in stored
    ]
    metadata = {"format": "pt", _BASE: json.dumps(model.config.to_dict(), sort_keys=True)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        content, path = json_bytes(fields), directory / _CONFIG
        is_new = not path.is_file() or path.read_bytes() != content
        if is_new:
            path.unlink(missing_ok=True)
            sync_directory(directory)
        write_safetensors(directory / _WEIGHTS, specs, _values(stored, specs), metadata)
        if is_new:
            with replaced_file(path) as file:
                file.write(content)
        (directory / _PICKLE).unlink(missing_ok=True)  # an older adapter, which some versions of PEFT would prefer
    except OSError as error:
        if isinstance(error, TFGPTJError):
            raise
        raise CheckpointError(f"{error.filename or directory}: could not be written: {error.strerror}") from error


def _variables(model: Any, adaptation: Adaptation, weights: Mapping[str, tuple[Any, Entry]]) -> Iterator[_Stored]:
    projections = projections_of(model)
    for path in adaptation.layers:
        for suffix, attribute in SUFFIXES.items():
            yield _Stored(f"{PREFIX}{path}{suffix}", getattr(projections[path], attribute), True)
    for name, variable in trainable_weights(model).items():
        path = path_of(name)
        inner = name.replace(f"{path}.", f"{path}{INNER}") if path in adaptation.layers else name
        yield _Stored(f"{PREFIX}{inner}", variable, weights[name][1].is_transposed("torch"))


def _values(stored: list[_Stored], specs: list[TensorSpec]) -> Iterator[tuple[str, np.ndarray]]:
    for (name, variable, transpose), spec in zip(stored, specs, strict=True):
        array = np.array(ops.convert_to_numpy(ops.convert_to_tensor(variable)))
        own = TensorSpec(name, array.shape, array.dtype)
        yield name, assemble([array] if array.ndim else [], own, spec.dtype, transpose=transpose)


def load_adapter(
    model: Any,
    name_or_path: str | os.PathLike[str],
    *,
    revision: str = "main",
    subfolder: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> LoraReport:
    """Load adapters that :func:`save_adapter` or PEFT wrote, all or none.

    A model without adapters is frozen and gets such as the file has: float, int8 or int4 alike. One that has adapters
    of the same layers and ranks gets their values, and goes on without being compiled anew: so adapters are swapped.
    After an error the model is as it was.

    Of PEFT's LoRA the ranks and alphas of single layers, rsLoRA, biases and `modules_to_save` are supported; DoRA and
    whatever else changes what is computed is refused by its name.

    Args:
        model: one of the package's models.
        name_or_path: a directory or a Hub id.
        revision, subfolder, cache_dir, token, local_files_only: as for
            :func:`tfgptj.checkpoints.load.from_pretrained`.

    Returns:
        A :class:`tfgptj.training.lora.LoraReport`.

    Raises:
        CheckpointError: if there are no such files, or they cannot be read.
        CheckpointFormatError: if a file is damaged, or holds what is not supported.
        CheckpointMismatchError: if the adapters are for another model, or other than those that this one has.
        InputError: if the model's adapters are merged, or its layers cannot have any.
    """
    directory = resolve_directory(
        name_or_path, files="adapter", revision=revision, subfolder=subfolder, cache_dir=cache_dir, token=token,
        local_files_only=local_files_only,
    )  # fmt: skip
    config = PeftConfig.read(directory / _CONFIG)
    current = adaptation_of(model)
    if current is not None and any(layer.merged for layer in projections_of(model).values()):
        raise InputError("the model's adapters are merged; unmerge_lora() before others are loaded")
    file = _open(directory)
    try:
        _check_base(directory / _WEIGHTS, file, model)
        content = AdapterContent(file, directory, config, model)
        wanted = content.adaptation()
        if current is not None:
            _check_same(directory, wanted, current)
        values = content.values()
    finally:
        file.close()
    if current is None:
        adapt(model, wanted)
    try:
        assign_all(content.variables(), values)
    except BaseException:
        if current is None:
            remove_lora(model)
        raise
    _set_scales(model, wanted)
    return report(model)


def _open(directory: Path) -> TensorFile:
    if (directory / _WEIGHTS).exists():
        return SafetensorsFile(directory / _WEIGHTS)
    if (directory / _PICKLE).exists():
        return TorchZipFile(directory / _PICKLE)
    raise CheckpointError(f"{directory}: holds no adapters; looked for {_WEIGHTS} and {_PICKLE}")


def _check_base(path: Path, file: TensorFile, model: Any) -> None:
    """Compare the base's configuration, where the file has it, with the model's; vocabularies may differ."""
    text = file.metadata.get(_BASE)
    if text is None:
        return
    try:
        fields = parse_json(text, limits.MAX_JSON_VALUES)
        stored = GPTJConfig.from_dict(fields) if isinstance(fields, dict) else None
    except ValueError as error:  # a ConfigError is one
        raise CheckpointFormatError(f"{path}: {_BASE} in the metadata is no configuration: {error}") from None
    if stored is None:
        raise CheckpointFormatError(f"{path}: {_BASE} in the metadata is no configuration: {text!r:.80}")
    differences = architecture_differences(stored, model.config, head_of(type(model))[0], ignore_mismatched_sizes=True)
    if differences:
        raise CheckpointMismatchError(
            "\n".join([f"{path}: these adapters were trained on a model of another architecture:", *differences])
        )


def _check_same(directory: Path, wanted: Adaptation, current: Adaptation) -> None:
    """Compare adapters of a file with those of a model, in all that a change of values does not change."""
    ranks = [{path: settings.rank for path, settings in each.layers.items()} for each in (wanted, current)]
    whole = [set(each.weights) for each in (wanted, current)]
    differing = sorted(dict(ranks[0].items() ^ ranks[1].items())) + sorted(whole[0] ^ whole[1])
    if differing:
        name = differing[0]
        found, own = (f"rank {rank[name]}" if name in rank else str(name in names)
                      for rank, names in zip(ranks, whole, strict=True))  # fmt: skip
        raise CheckpointMismatchError(
            f"{directory}: the model has other adapters than these, {len(differing):,} differ; {name}: {found} in the "
            f"file, {own} in the model; remove_lora() first"
        )


def _set_scales(model: Any, wanted: Adaptation) -> None:
    """Let the adapters count as they should; that is part of what is compiled, as values are not."""
    projections = projections_of(model)
    changed = {path: s.alpha for path, s in wanted.layers.items() if projections[path].lora_alpha != s.alpha}
    for path, alpha in changed.items():
        projections[path].lora_alpha = alpha
    if changed:
        forget_programs(model)
