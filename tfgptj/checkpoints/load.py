"""from_pretrained: the weights of a checkpoint into a new model, each variable created once, with its final value.

The configuration gives the plan of all tensors; the files' headers must agree with it before anything is allocated.
Then the model is built with variables that have no values yet, and these are filled one after the other.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj.checkpoints.hub import resolve_directory
from tfgptj.checkpoints.mapping import Entry, head_of, plan, variable_of
from tfgptj.checkpoints.matching import Match, match_plan, open_checkpoint
from tfgptj.checkpoints.sources import Checkpoint
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, assemble
from tfgptj.config import GPTJConfig
from tfgptj.errors import ConfigError
from tfgptj.generation.config import GenerationConfig

# Two threads already reach half of the memory's bandwidth; each holds one tensor that no variable has yet.
_READERS = 2


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
    **config_overrides: Any,
) -> Any:
    """Load a model with its weights.

    Args:
        cls: the model class. A head that the checkpoint lacks altogether is freshly initialised, with a warning;
            weights of another head are left out.
        name_or_path: a directory with weights and a `config.json`, the name of a packaged model, or a Hub id.
        config: :class:`GPTJConfig` to take in place of `config.json`.
        dtype: Keras dtype policy or its name, "auto" for the dtype that the weights are stored in, None for the
            global policy.
        weights: which files to read: "safetensors", "bin" (PyTorch), "h5" (Hugging Face's TensorFlow) or "msgpack"
            (Flax); "auto" takes the first of these that is there, and after an error no other one.
        revision: branch, tag or commit on the Hub.
        subfolder: directory below `name_or_path`.
        cache_dir: where downloads are kept; None is the Hub library's own place.
        token: Hub token, True for the stored one, None for the stored one where it is needed, False for none.
        local_files_only: take downloaded files only.
        ignore_mismatched_sizes: initialise freshly, with a warning, what has another shape in the checkpoint.
        **config_overrides: fields of the configuration to replace.

    Returns:
        A model of class `cls`.

    Raises:
        CheckpointError: if there is no such checkpoint, or it cannot be read.
        CheckpointFormatError: if a file is damaged.
        CheckpointMismatchError: if its tensors are not those that the configuration calls for; all differences are
            listed.
        ConfigError: if the configuration, an override or `dtype` is invalid.
    """
    head, _ = head_of(cls)
    directory = resolve_directory(
        name_or_path, files="weights", revision=revision, subfolder=subfolder, cache_dir=cache_dir, token=token,
        local_files_only=local_files_only, weights=weights,
    )  # fmt: skip
    checkpoint, config = open_checkpoint(directory, weights, config, config_overrides)
    with checkpoint:
        match = match_plan(plan(config, head), checkpoint, ignore_mismatched_sizes=ignore_mismatched_sizes)
        policy = _dtype_policy(dtype, checkpoint, match)
        entries = [entry for entry, _ in match.stored]
        model, variables = _build_without_values(lambda: cls(config, dtype=policy), entries)
        _fill(checkpoint, list(zip(variables, match.stored, strict=True)))
        parameters = checkpoint.companion("generation_config.json")
        if head == "causal_lm" and parameters.is_file():
            model.generation_config = GenerationConfig.from_json_file(parameters)
    for names, reason in ((match.absent, "not in the checkpoint"), (match.resized, "of other shapes there")):
        if names:
            warnings.warn(
                f"{checkpoint.path}: these weights of {cls.__name__} are {reason}: {', '.join(names)}. "
                "They were initialised at random; train the model before you use it.",
                stacklevel=3,  # the caller of the model's own from_pretrained
            )
    return model


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


def _fill(checkpoint: Checkpoint, targets: list[tuple[Any, tuple[Entry, str]]]) -> None:
    """Create each variable straight with its stored value.

    The largest come first: where a backend copies what it is given, the copy is not made on top of all the others.
    """
    targets.sort(key=lambda target: -checkpoint.spec(target[1][1]).size)
    values = _read_ahead([(checkpoint, name, entry, variable.dtype) for variable, (entry, name) in targets])
    for (variable, _), value in zip(targets, values, strict=True):
        del variable._deferred_initialize
        tensor = _as_tensor(value)
        variable._initializer = lambda shape, dtype, tensor=tensor: tensor
        variable._deferred_initialize()


def _read_ahead(arguments: Iterable[tuple[Any, ...]]) -> Iterator[np.ndarray]:
    """The arrays that :func:`_read` gives, one after the other, while the next few are already being read."""
    with ThreadPoolExecutor(_READERS) as pool:
        pending: deque[Future[np.ndarray]] = deque()
        for given in arguments:
            pending.append(pool.submit(_read, *given))
            if len(pending) > _READERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _read(checkpoint: Checkpoint, name: str, entry: Entry, dtype: str) -> np.ndarray:
    spec, transpose = checkpoint.spec(name), entry.is_transposed(checkpoint.layout)
    if spec.dtype == FLOAT_DTYPES[dtype] and not transpose:
        return checkpoint.read(name)
    return assemble(checkpoint.blocks(name), spec, FLOAT_DTYPES[dtype], transpose=transpose)


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
