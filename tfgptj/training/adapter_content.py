"""The tensors of an adapter file, matched with the layers and weights of a model before any of them is read."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops

from tfgptj.checkpoints.mapping import canonical_name
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, HealthCheck, TensorFile, assemble
from tfgptj.errors import CheckpointFormatError, CheckpointMismatchError
from tfgptj.training.lora import Adaptation, Settings
from tfgptj.training.lora_targets import path_of, projections_of, weights_of
from tfgptj.training.peft_config import PeftConfig

# How PEFT calls what belongs to a model, A and B of a layer, and a weight of a layer that has them.
PREFIX = "base_model.model."
SUFFIXES = {".lora_A.weight": "lora_kernel_a", ".lora_B.weight": "lora_kernel_b"}
INNER = ".base_layer."
_WRAPPED = (".modules_to_save.", ".original_module.")


class AdapterContent:
    """The tensors of a file, matched with the layers and weights of a model."""

    def __init__(self, file: TensorFile, directory: Path, config: PeftConfig, model: Any) -> None:
        self.file, self.directory, self.config = file, directory, config
        self.weights, self.projections = weights_of(model), projections_of(model)
        self.pairs: dict[str, dict[str, str]] = {}  # by layer: which tensor is A, and which B
        self.settings: dict[str, Settings] = {}
        self.whole: dict[str, str] = {}  # by weight: the tensor
        self.copies: dict[str, str] = {}  # the same, of weights that the adapters' training left alone
        self._sort()
        self._check()

    def adaptation(self) -> Adaptation:
        """What the file is for."""
        return Adaptation(self.settings, tuple(name for name in self.weights if name in self.whole))

    def values(self) -> deque[np.ndarray]:
        """All values, in the order of :meth:`variables`; NaN and infinity are refused."""
        for weight, name in self.copies.items():
            self._compare(weight, name)
        values = deque(
            self._read(self.pairs[path][suffix], FLOAT_DTYPES["float32"], transpose=True)
            for path in self.settings
            for suffix in SUFFIXES
        )
        for weight, name in self.whole.items():
            layer, entry = self.weights[weight]
            values.append(self._read(name, FLOAT_DTYPES[layer.variable_dtype], entry.is_transposed("torch")))
        return values

    def variables(self) -> list[Any]:
        """What the values are for; the model has its adapters by now."""
        found = [getattr(self.projections[path], name) for path in self.settings for name in SUFFIXES.values()]
        return found + [self._variable(weight) for weight in self.whole]

    def _sort(self) -> None:
        paths = {canonical_name(path): path for path in self.projections}
        weights = {canonical_name(name): name for name in self.weights}
        unexpected = []
        names = [name for name in self.file.names if not self._is_repeated(name)]
        for name in names:
            inner = name.removeprefix(PREFIX).replace(INNER, ".")
            suffix = next((suffix for suffix in SUFFIXES if inner.endswith(suffix)), "")
            canonical = canonical_name(inner.removesuffix(suffix))
            if suffix and canonical in paths:
                self.pairs.setdefault(paths[canonical], {})[suffix] = name
                self.settings[paths[canonical]] = self.config.settings(inner.removesuffix(suffix))
            elif not suffix and canonical in weights:
                kind = self.whole if self.config.is_whole(inner) else self.copies
                kind[weights[canonical]] = name
            else:
                unexpected.append(name)
        found = sum(map(len, self.pairs.values())) + len(self.whole) + len(self.copies)
        if found + len(unexpected) != len(names):
            raise CheckpointFormatError(f"{self.directory}: a tensor is stored under two names")
        if unexpected:
            raise CheckpointMismatchError(
                f"{self.directory}: {len(unexpected):,} tensors are for nothing that can have adapters in this model: "
                f"{', '.join(unexpected[:20])}"
            )

    def _is_repeated(self, name: str) -> bool:
        """Whether PEFT wrote a bias of `modules_to_save` again, for `bias="all"`, with the base's beside it."""
        return any(part in name and name.replace(part, ".") in self.file.names for part in _WRAPPED)

    def _check(self) -> None:
        if not self.pairs:
            raise CheckpointMismatchError(f"{self.directory}: holds no LoRA adapters")
        expected = {name for name in self.weights if self.config.is_whole(name)}
        if self.config.bias == "lora_only":
            expected = {n for n in expected if not n.endswith(".bias") or path_of(n) in self.pairs or n in self.whole}
        faults = [f"{path}: has {', '.join(pair)} alone" for path, pair in self.pairs.items() if len(pair) == 1]
        faults += [f"{name}: is missing" for name in sorted(expected - set(self.whole))]
        for path, pair in self.pairs.items():
            units, inputs = self.weights[f"{path}.weight"][1].shape
            rank = self.settings[path].rank
            shapes = {".lora_A.weight": (rank, inputs), ".lora_B.weight": (units, rank)}
            faults += [self._fault(name, shapes[suffix]) for suffix, name in pair.items()]
        for weight, name in (self.whole | self.copies).items():
            faults.append(self._fault(name, self.weights[weight][1].stored_shape("torch")))
        faults = [fault for fault in faults if fault]
        if faults:
            raise CheckpointMismatchError(
                "\n  ".join([f"{self.directory}: these adapters are not as their configuration and the model call for:",
                             *faults[:1000]])
            )  # fmt: skip
        self.config.check_targets(self.projections, self.pairs)

    def _fault(self, name: str, shape: tuple[int, ...]) -> str:
        spec = self.file.spec(name)
        if spec.dtype not in FLOAT_DTYPES.values():
            return f"{name}: is {spec.dtype.name}, expected floats"
        return "" if spec.shape == shape else f"{name}: is {list(spec.shape)}, expected {list(shape)}"

    def _read(self, name: str, dtype: np.dtype[Any], transpose: bool) -> np.ndarray:
        check = HealthCheck()
        array = assemble(check.watch(self.file.blocks(name)), self.file.spec(name), dtype, transpose=transpose)
        if not check.health.finite:
            raise CheckpointFormatError(f"{self.directory}: {name} holds NaN or infinite values: its training failed")
        return array

    def _compare(self, weight: str, name: str) -> None:
        """PEFT adds some weights as they are in the base; others than the model's own cannot go with its adapters."""
        layer, entry = self.weights[weight]
        is_same = not getattr(layer, "quantization_mode", None)
        if is_same:
            own = np.array(ops.convert_to_numpy(ops.convert_to_tensor(self._variable(weight))))
            stored = self._read(name, FLOAT_DTYPES[layer.variable_dtype], entry.is_transposed("torch"))
            is_same = np.array_equal(own, stored.astype(own.dtype))
        if not is_same:
            raise CheckpointMismatchError(
                f"{self.directory}: holds {name}, which is not the model's own and is none of modules_to_save; save "
                "the adapters with save_embedding_layers=False, or load them on the base that they were trained on"
            )

    def _variable(self, weight: str) -> Any:
        layer, entry = self.weights[weight]
        leaf = entry.variable.rpartition(".")[2]
        # With adapters, a projection's `kernel` is a sum.
        return layer.base_kernel if leaf == "kernel" else getattr(layer, leaf)
