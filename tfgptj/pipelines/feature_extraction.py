"""Feature extraction: texts in, the model's last hidden states out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from keras import ops

from tfgptj import batching
from tfgptj.backbone import TFGPTJModel
from tfgptj.heads import GPTJHead
from tfgptj.pipelines.base import PACKAGED_MODEL, Pipeline
from tfgptj.tokenizer import GPTJTokenizer


class FeatureExtractionPipeline(Pipeline):
    """Turns texts into vectors, one per token. Made by `pipeline("feature-extraction")`.

    A model's head is left out. Every option can be given to the pipeline or to a call; see `__call__`.

    >>> from tfgptj.config import GPTJConfig
    >>> model = TFGPTJModel(GPTJConfig(vocab_size=257, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    >>> extract = FeatureExtractionPipeline(model, GPTJTokenizer.train(["abc"], vocab_size=257))
    >>> extract("abc", return_tensors=True).shape
    TensorShape([1, 3, 16])
    """

    task = "feature-extraction"
    model_class = TFGPTJModel
    packaged_model = PACKAGED_MODEL
    own_options: ClassVar[Mapping[str, Any]] = {
        "return_tensors": False,
        "truncation": False,
        "max_length": None,
        "batch_size": 8,
    }

    def __init__(self, model: Any, tokenizer: GPTJTokenizer, **options: Any) -> None:
        super().__init__(model.transformer if isinstance(model, GPTJHead) else model, tokenizer, **options)

    def __call__(self, inputs: str | list[str], **options: Any) -> Any:
        """The last hidden states of one text, or of each of several.

        Args:
            inputs: a text or a list of texts.
            return_tensors: bool, whether to return tensors instead of nested lists.
            truncation: bool, whether to cut longer texts to `max_length` tokens, or else to what the model takes.
            max_length: int.
            batch_size: int, texts that the model reads at once.

        Returns:
            For one text float32 [1, T, D], as nested lists or a tensor; for a list of texts a list of these.

        Raises:
            InputError: for texts that are empty or too long, and for invalid options.
            InputTypeError: for texts that are no strings.
        """
        settings = self.settings(options)
        rows = self.encode(batching.texts_of(inputs), settings["truncation"], settings["max_length"])
        outputs = self.outputs(rows, settings["batch_size"], "last_hidden_state")
        features = [states[None, : len(row)] for row, (states,) in zip(rows, outputs, strict=True)]
        results = [ops.convert_to_tensor(x) if settings["return_tensors"] else x.tolist() for x in features]
        return results[0] if isinstance(inputs, str) else results
