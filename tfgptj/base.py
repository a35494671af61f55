"""GPTJBase: what all model classes share."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import keras

from tfgptj.adaptable import Adaptable
from tfgptj.compiled import forget_compiled, forget_programs
from tfgptj.config import GPTJConfig
from tfgptj.errors import InputError, InputTypeError
from tfgptj.inputs import INPUTS, check_arrays, complete_inputs, split_labels
from tfgptj.resizing import resize_token_embeddings
from tfgptj.transformers_habits import remedies
from tfgptj.workers import reducible


class GPTJBase(Adaptable, keras.Model):
    """What all model classes share: checked inputs, configuration, loading and saving.

    Models are called with a dict of inputs, with the `input_ids` alone, or with inputs by keyword.
    """

    config: GPTJConfig

    def __call__(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        named = {name: kwargs.pop(name) for name in INPUTS if name in kwargs}
        _check_options(kwargs)
        if named:
            inputs = {**named, **_as_named(inputs, named)}
        return super().__call__(complete_inputs(inputs, self.config), *args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None, **kwargs: Any) -> Any:
        # Keras's JAX trainer comes here past __call__, with what fit() was given.
        return super().call(split_labels(inputs)[0], training=training, mask=mask, **kwargs)

    def fit(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().fit(check_arrays(x, self.config), *args, **kwargs)

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().evaluate(check_arrays(x, self.config), *args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super().predict(check_arrays(x, self.config), *args, **kwargs)

    def train_on_batch(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super().train_on_batch(check_arrays(x, self.config), *args, **kwargs)

    def test_on_batch(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super().test_on_batch(check_arrays(x, self.config), *args, **kwargs)

    def predict_on_batch(self, x: Any) -> Any:
        return super().predict_on_batch(check_arrays(x, self.config))

    def get_metrics_result(self) -> dict[str, Any]:
        return reducible(super().get_metrics_result())

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Keras's `model.export`, with two differences.

        The default signature takes `input_ids` and `attention_mask`, int32 [B, T] each, not all optional inputs. And a
        SavedModel written on TensorFlow holds every weight once; Keras 3.15 writes them twice.
        """
        if input_signature is None:
            names = ("input_ids", "attention_mask")
            input_signature = [{n: keras.InputSpec(dtype="int32", shape=(None, None), name=n) for n in names}]
        if format != "tf_saved_model" or keras.backend.backend() != "tensorflow":
            super().export(filepath, format, verbose, input_signature=input_signature, **kwargs)
            return
        archive = keras.export.ExportArchive()
        # `archive.track(self)` is what doubles the weights: the endpoint finds its variables without it.
        archive.add_endpoint("serve", lambda inputs: self(inputs, training=False), input_signature, **kwargs)
        archive.write_out(str(filepath), verbose=verbose is not False)

    # Keras's function for TensorFlow would call the model with all optional inputs, which exclude each other.
    _default_save_signature = None

    def quantize(self, mode: str | None = None, config: Any = None, filters: Any = None, **kwargs: Any) -> None:
        """Keras's `model.quantize`; what was compiled for the float weights is dropped, and the optimizer with it."""
        if filters is None:  # Keras warns of every layer that has nothing to quantize
            filters = _is_quantizable
        super().quantize(mode, config=config, filters=filters, **kwargs)
        forget_compiled(self)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether training computes the blocks twice, to keep less of them."""
        return all(block.gradient_checkpointing for block in self._blocks)

    def gradient_checkpointing_enable(self) -> None:
        """Train in less memory: of each block only its input is kept, and the backward pass computes it again.

        Gradients are the same, dropout included, and a step takes about a third longer. Generation, evaluation and
        what is saved are as before; of a model that was compiled, the next step is traced anew.
        """
        self._checkpoint(True)

    def gradient_checkpointing_disable(self) -> None:
        """Undo :meth:`gradient_checkpointing_enable`."""
        self._checkpoint(False)

    @property
    def _blocks(self) -> list[Any]:
        backbone: Any = getattr(self, "transformer", self)
        return list(backbone.blocks)

    def _checkpoint(self, enabled: bool) -> None:
        for block in self._blocks:
            block.gradient_checkpointing = enabled
        forget_programs(self)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of weights, or of those that are trained."""
        return sum(math.prod(v.shape) for v in self.trainable_variables) if only_trainable else self.count_params()

    def resize_token_embeddings(self, size: int) -> keras.layers.Embedding:
        """Change the vocabulary size in place: see :func:`tfgptj.resizing.resize_token_embeddings`."""
        return resize_token_embeddings(self, size)

    def get_config(self) -> dict[str, Any]:
        from tfgptj.training.lora import lora_config

        policy, lora = keras.dtype_policies.serialize(self.dtype_policy), lora_config(self)
        fields = {"config": self.config.to_dict(), "dtype": policy, "name": self.name, "trainable": self.trainable}
        return fields if lora is None else {**fields, "lora": lora}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> GPTJBase:
        from tfgptj.training.lora import adapt_from_config

        fields = dict(config)
        lora = fields.pop("lora", None)
        model = cls(GPTJConfig.from_dict(fields.pop("config")), **fields)
        if lora is not None:
            adapt_from_config(model, lora)
        return model

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Load a model with its weights: see :func:`tfgptj.checkpoints.load.from_pretrained`."""
        from tfgptj.checkpoints.load import from_pretrained

        return from_pretrained(cls, name_or_path, **options)

    def load_pretrained(self, name_or_path: str | os.PathLike[str], **options: Any) -> None:
        """Load weights into this model, all or none: see :func:`tfgptj.checkpoints.load.load_pretrained`."""
        from tfgptj.checkpoints.load import load_pretrained

        load_pretrained(self, name_or_path, **options)

    def save_pretrained(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """Save configuration and weights: see :func:`tfgptj.checkpoints.save.save_pretrained`."""
        from tfgptj.checkpoints.save import save_pretrained

        save_pretrained(self, directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Save configuration and weights and upload them: see :func:`tfgptj.checkpoints.push.push_to_hub`."""
        from tfgptj.checkpoints.push import push_to_hub

        return push_to_hub(self, repo_id, **options)


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse what Keras would pass on, and no layer would look at."""
    unknown = sorted(options.keys() - {"training", "mask"})
    if unknown:
        known = f"{', '.join(INPUTS)} and training"
        raise InputTypeError(f"a model's call has no argument {', '.join(unknown)}, only {known}{remedies(unknown)}")


def _as_named(inputs: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """The positional inputs of a call by name, beside those that were given by name."""
    given = {} if inputs is None else dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    twice = [name for name in given if name in named]
    if twice:
        raise InputError(f"{twice[0]} was given twice: once by position, once by name")
    return given


def _is_quantizable(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, (keras.layers.Dense, keras.layers.Embedding))
