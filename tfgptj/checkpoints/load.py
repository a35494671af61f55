"""from_pretrained: the weights of a checkpoint into a new model, each variable created once, with its final value.

The configuration gives the plan of all tensors; the files' headers must agree with it before anything is allocated.
Then the model is built with variables that have no values yet, and these are filled one after the other.

load_pretrained: the weights into a model that exists. All are read before the first variable changes, so that a failure
leaves the model as it was.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj.checkpoints.checks import Match, check_same_architecture, check_sha256, match_plan
from tfgptj.checkpoints.hub import resolve_directory
from tfgptj.checkpoints.mapping import Entry, head_of, layer_of, plan, variable_of
from tfgptj.checkpoints.opening import open_checkpoint, read_config
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, Health, HealthCheck, assemble
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, ConfigError
from tfgptj.generation.config import GenerationConfig

# Two threads already reach half of the memory's bandwidth; each holds one tensor that no variable has yet.
_READERS = 2

# Tensors that are named in a warning of their values.
_NAMED = 5

# Values that no trained model has.
_NOT_FINITE, _ALL_ZERO = "hold NaN or infinite values", "are all zero"

# What to load: a variable, its entry in the plan, and the tensor's name in the checkpoint.
Target = tuple[Any, tuple[Entry, str]]


def from_pretrained(
    cls: type,
    name_or_path: str | os.PathLike[str],
    *,
    config: GPTJConfig | None = None,
    dtype: Any = None,
    weights: str = "auto",
    revision: str = "main",
    subfolder: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    ignore_mismatched_sizes: bool = False,
    expected_sha256: str | Mapping[str, str] | None = None,
    **config_overrides: Any,
) -> Any:
    """Load a model with its weights, those of a GPT-J or of a CodeGen.

    Tensors that hold NaN or infinite values, and kernels, embeddings and normalisations that are all zero, are named in
    a warning.

    Args:
        cls: the model class. A head that the checkpoint lacks altogether is freshly initialised, with a warning;
            weights of another head are left out.
        name_or_path: a directory with weights and a `config.json`, the name of a packaged model, or a Hub id.
        config: :class:`GPTJConfig` to take in place of `config.json`.
        dtype: Keras dtype policy or its name, "auto" for the dtype that the weights are stored in, None for the
            global policy.
        weights: which files to read, and from the Hub to fetch: "safetensors", "bin" (PyTorch), "h5" (Hugging Face's
            TensorFlow) or "msgpack" (Flax); "auto" takes the first of these that is there, and after an error no other.
        revision: branch, tag or commit on the Hub.
        subfolder: directory below `name_or_path`.
        cache_dir: where downloads are kept; None is the Hub library's own place.
        token: Hub token, True for the stored one, None for the stored one where it is needed, False for none.
        local_files_only: take downloaded files only.
        ignore_mismatched_sizes: initialise freshly, with a warning, what has another shape in the checkpoint.
        expected_sha256: SHA-256 of the weight file in hexadecimal digits, or of every weight file by its name, the
            index of shards among them. The open files are compared with it before anything is loaded from them.
        **config_overrides: fields of the configuration to replace.

    Returns:
        A model of class `cls`.

    Raises:
        CheckpointError: if there is no such checkpoint, or it cannot be read.
        CheckpointFormatError: if a file is damaged, or not the one that `expected_sha256` tells of.
        CheckpointMismatchError: if its tensors are not those that the configuration calls for; all differences are
            listed.
        ConfigError: if the configuration, an override or `dtype` is invalid.
    """
    head, _ = head_of(cls)
    directory = resolve_directory(
        name_or_path, files="weights", revision=revision, subfolder=subfolder, cache_dir=cache_dir, token=token,
        local_files_only=local_files_only, weights=weights,
    )  # fmt: skip
    checkpoint, (config, parameters) = open_checkpoint(
        directory, lambda opened: (read_config(opened, config, config_overrides), _parameters(opened, head)), weights
    )
    with checkpoint:
        if expected_sha256 is not None:
            check_sha256(checkpoint, expected_sha256)
        match = match_plan(plan(config, head), checkpoint, ignore_mismatched_sizes=ignore_mismatched_sizes)
        policy = _dtype_policy(dtype, checkpoint, match)
        entries = [entry for entry, _ in match.stored]
        model, variables = _build_without_values(lambda: cls(config, dtype=policy), entries)
        faults = _fill(checkpoint, list(zip(variables, match.stored, strict=True)))
        if parameters is not None:
            model.generation_config = parameters
    fate = "They were initialised at random; train the model before you use it."
    _warn(checkpoint.path, cls, match, fate, faults)
    return model


def _parameters(checkpoint: Checkpoint, head: str) -> GenerationConfig | None:
    """How text is generated, where the model can and there is a file that says so."""
    path = checkpoint.companion("generation_config.json")
    return GenerationConfig.from_json_file(path) if head == "causal_lm" and path.is_file() else None


def load_pretrained(
    model: Any,
    name_or_path: str | os.PathLike[str],
    *,
    weights: str = "auto",
    revision: str = "main",
    subfolder: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    ignore_mismatched_sizes: bool = False,
    expected_sha256: str | Mapping[str, str] | None = None,
) -> None:
    """Load weights into a model that exists: built, compiled or trained.

    After an error, or an interruption, all variables are as before. For that, all weights are read and converted to the
    variables' dtypes before the first of them changes, which takes the memory of the model once more. The model's
    configuration, its `generation_config` and an optimizer's state are left alone.

    Args:
        model: one of the package's models. A head that the checkpoint lacks altogether is left as it is, with a
            warning.
        name_or_path, weights, revision, subfolder, cache_dir, token, local_files_only, expected_sha256: as for
            :func:`from_pretrained`.
        ignore_mismatched_sizes: leave as it is, with a warning, what has another shape in the checkpoint.

    Raises:
        CheckpointError: if the model is quantized or has LoRA weights, if there is no such checkpoint, if it cannot be
            read, or if a value is too large for its variable's dtype.
        CheckpointFormatError: if a file is damaged, or not the one that `expected_sha256` tells of.
        CheckpointMismatchError: if the checkpoint's configuration or tensors are not those of the model; all
            differences are listed.
        ConfigError: if the checkpoint's configuration is invalid.
    """
    head, _ = head_of(type(model))
    entries = plan(model.config, head)
    _check_plain(model, entries)
    directory = resolve_directory(
        name_or_path, files="weights", revision=revision, subfolder=subfolder, cache_dir=cache_dir, token=token,
        local_files_only=local_files_only, weights=weights,
    )  # fmt: skip
    checkpoint, stored = open_checkpoint(directory, read_config, weights)
    with checkpoint:
        if expected_sha256 is not None:
            check_sha256(checkpoint, expected_sha256)
        check_same_architecture(
            checkpoint.path, stored, model.config, head, ignore_mismatched_sizes=ignore_mismatched_sizes
        )
        match = match_plan(entries, checkpoint, ignore_mismatched_sizes=ignore_mismatched_sizes)
        targets = [(variable_of(model, entry), (entry, name)) for entry, name in match.stored]
        faults: dict[str, list[str]] = {_NOT_FINITE: [], _ALL_ZERO: []}
        values = deque(_values(checkpoint, targets, faults))
    assign_all([variable for variable, _ in targets], values)
    _warn(checkpoint.path, type(model), match, "They keep the values that they had.", faults)


def _check_plain(model: Any, entries: Iterable[Entry]) -> None:
    """Refuse a model whose variables are not the weights of a checkpoint."""
    for entry in entries:
        layer = layer_of(model, entry)
        if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_rank", None):
            what = "is quantized" if getattr(layer, "quantization_mode", None) else "has LoRA weights"
            raise CheckpointError(
                f"{entry.variable}: {what}; load the weights into a new model with from_pretrained, "
                "then quantize it or add the adapters again"
            )


def _warn(path: Path, cls: type, match: Match, fate: str, faults: dict[str, list[str]]) -> None:
    """Tell the caller of the model's own method what was not loaded, and which values cannot be right."""
    for names, reason in ((match.absent, "not in the checkpoint"), (match.resized, "of other shapes there")):
        if names:
            listed = ", ".join(names)
            warnings.warn(f"{path}: these weights of {cls.__name__} are {reason}: {listed}. {fate}", stacklevel=4)
    found = [
        f"{len(names):,} {fault} ({', '.join(sorted(names)[:_NAMED])}{', …' if len(names) > _NAMED else ''})"
        for fault, names in faults.items()
        if names
    ]
    if found:
        warnings.warn(
            f"{path}: of the tensors, {' and '.join(found)}. They were loaded, but no trained model has such weights; "
            "are the files those that were published?",
            stacklevel=4,
        )


def _dtype_policy(dtype: Any, checkpoint: Checkpoint, match: Match) -> Any:
    if isinstance(dtype, str) and dtype == "auto":
        counts: dict[str, int] = {}
        for _, name in match.stored:
            spec = checkpoint.spec(name)
            counts[spec.dtype.name] = counts.get(spec.dtype.name, 0) + spec.size
        dtype = max(counts, key=lambda name: counts[name], default=None)
    try:
        policy = keras.dtype_policies.get(keras.config.dtype_policy() if dtype is None else dtype)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"dtype must be 'auto' or a Keras dtype policy, got {dtype!r}: {error}") from None
    if getattr(policy, "quantization_mode", None) is not None:
        raise ConfigError(f"dtype {policy.name!r} is a quantized one: load in a float dtype, then call model.quantize")
    if "float64" in (policy.variable_dtype, policy.compute_dtype) and not _has_float64():
        raise ConfigError("JAX has float64 only with jax_enable_x64 set: set it, or load with dtype='float32'")
    return policy


def _has_float64() -> bool:
    if keras.backend.backend() != "jax":
        return True
    import jax

    return bool(jax.config.read("jax_enable_x64"))


def _build_without_values(build: Callable[[], Any], entries: Iterable[Entry]) -> tuple[Any, list[Any]]:
    """A model whose variables for these entries have no values; all others are initialised as ever.

    In a stateless scope Keras creates variables without values and gives them these when the scope closes. Those that
    will be loaded are taken out of that: their own method of that name, which :func:`_fill` removes again, does
    nothing. So no random number is drawn for them, no memory is touched, and Keras has nothing left to do for them,
    whatever happens while they are loaded.
    """
    with keras.StatelessScope():
        model = build()
        variables = [variable_of(model, entry) for entry in entries]
        for variable in variables:
            variable._deferred_initialize = _do_nothing
    return model, variables


def _do_nothing() -> None:
    """Stand in for the initialisation of a variable that is loaded afterwards."""


def _fill(checkpoint: Checkpoint, targets: list[Target]) -> dict[str, list[str]]:
    """Create each variable straight with its stored value; what :func:`_values` found wrong.

    The largest come first: where a backend copies what it is given, the copy is not made on top of all the others.
    """
    faults: dict[str, list[str]] = {_NOT_FINITE: [], _ALL_ZERO: []}
    targets.sort(key=lambda target: -checkpoint.spec(target[1][1]).size)
    for (variable, _), value in zip(targets, _values(checkpoint, targets, faults), strict=True):
        del variable._deferred_initialize
        tensor = _as_tensor(value)
        variable._initializer = lambda shape, dtype, tensor=tensor: tensor
        variable._deferred_initialize()
    return faults


def assign_all(variables: Sequence[Any], values: deque[np.ndarray]) -> None:
    """Give all variables new values, or after an error none of them."""
    previous: list[np.ndarray] = []
    try:
        for variable in variables:
            previous.append(np.array(ops.convert_to_numpy(ops.convert_to_tensor(variable))))
            # What is assigned is the variable's memory then, or free for the next copy.
            variable.assign(_as_tensor(values.popleft()))
    except BaseException:
        for variable, value in zip(variables, previous, strict=False):
            variable.assign(value)
        raise


def _values(checkpoint: Checkpoint, targets: Sequence[Target], faults: dict[str, list[str]]) -> Iterator[np.ndarray]:
    """The values of each target in its variable's dtype; the names of those that cannot be right are noted."""
    arguments = [
        (checkpoint, name, entry, keras.backend.standardize_dtype(variable.dtype))
        for variable, (entry, name) in targets
    ]
    for (_, name, entry, _), (value, health) in zip(arguments, _read_ahead(arguments), strict=True):
        if not health.finite:
            faults[_NOT_FINITE].append(name)
        elif health.zero and (len(entry.shape) > 1 or entry.variable.endswith(".gamma")):
            faults[_ALL_ZERO].append(name)
        yield value


def _read_ahead(arguments: Iterable[tuple[Any, ...]]) -> Iterator[tuple[np.ndarray, Health]]:
    """What :func:`_read` gives, one after the other, while the next few are already being read."""
    with ThreadPoolExecutor(_READERS) as pool:
        pending: deque[Future[tuple[np.ndarray, Health]]] = deque()
        for given in arguments:
            pending.append(pool.submit(_read, *given))
            if len(pending) > _READERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _read(checkpoint: Checkpoint, name: str, entry: Entry, dtype: str) -> tuple[np.ndarray, Health]:
    spec, transpose = checkpoint.spec(name), entry.is_transposed(checkpoint.layout)
    check = HealthCheck()
    if spec.dtype == FLOAT_DTYPES[dtype] and not transpose:
        array = checkpoint.read(name)
        check.look(array)
    else:
        array = assemble(check.watch(checkpoint.blocks(name)), spec, FLOAT_DTYPES[dtype], transpose=transpose)
    return array, check.health


def _as_tensor(array: np.ndarray) -> Any:
    """A tensor of an array's values, on TensorFlow of its very memory.

    TensorFlow's own conversion copies an array twice, and on fresh pages: that took longer than all else in loading.
    """
    if keras.backend.backend() != "tensorflow":
        return ops.convert_to_tensor(array, dtype=array.dtype.name)
    import tensorflow as tf

    if array.dtype == FLOAT_DTYPES["bfloat16"]:  # which NumPy's side of DLPack does not know
        return tf.bitcast(tf.experimental.dlpack.from_dlpack(array.view(np.uint16).__dlpack__()), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
