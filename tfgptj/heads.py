"""GPT-J with a head: causal language model, sequence classifier, question answering."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfgptj.attention import ConfiguredLayer
from tfgptj.backbone import TFGPTJModel
from tfgptj.config import GPTJConfig
from tfgptj.errors import ConfigError
from tfgptj.fused import Product
from tfgptj.generative import Generative
from tfgptj.head import GPTJHead
from tfgptj.inputs import split_labels
from tfgptj.language_loss import LanguageLoss
from tfgptj.losses import (
    classification_count,
    classification_loss,
    count,
    positions_in_text,
    question_answering_loss,
)
from tfgptj.products import project
from tfgptj.projection import Projection


@keras.saving.register_keras_serializable(package="tfgptj")
class LMHead(ConfiguredLayer):
    """Hidden states to logits: a dense layer with bias, or the embedding's own matrix when the two are tied.

    Args:
        config: :class:`GPTJConfig`.
        embedding: the embedding layer; used when `config.tie_word_embeddings`.

    Call arguments:
        x: float [B, T, D].

    Returns:
        float32 [B, T, V].
    """

    def __init__(self, config: GPTJConfig, embedding: keras.layers.Embedding | None = None, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.tied = embedding if config.tie_word_embeddings else None
        if self.tied is None:
            self.dense = head_dense(config, config.vocab_size, use_bias=True, name="dense", dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        if self.tied is None:
            self.dense.build((None, None, self.config.n_embd))
        else:
            self.bias = self.add_weight(name="bias", shape=(self.config.vocab_size,), initializer="zeros")

    def compute_output_spec(self, x: Any, training: bool | None = None) -> keras.KerasTensor:
        """As :meth:`tfgptj.block.ParallelBlock.compute_output_spec`."""
        return keras.KerasTensor((*x.shape[:-1], self.config.vocab_size), "float32")

    @property
    def is_quantized(self) -> bool:
        """Whether the matrix is one of few bits, whose products are Keras's own."""
        return (self.dense if self.tied is None else self.tied).quantization_mode is not None

    def products(self, x: Any, training: bool) -> tuple[list[Product], Any]:
        """What the logits of hidden states [N, D] are the sum of; the last of it is the bias [V]. Not if quantized."""
        if self.tied is None:
            return self.dense.products(x, training), self.dense.bias
        return [Product(x, self.tied.embeddings, transposed=True, trained=self.tied.trainable)], self.bias

    def call(self, x: Any, training: bool | None = None) -> Any:
        if self.tied is None:
            logits = self.dense(x, training=training)
        else:
            logits = project(x, ops.cast(self.tied.embeddings, x.dtype), training) + self.bias
        return ops.cast(logits, "float32")


def head_dense(config: GPTJConfig, units: int, *, use_bias: bool, name: str, dtype: Any) -> Projection:
    """A dense layer initialised as GPT-J's are."""
    normal = keras.initializers.RandomNormal(stddev=config.initializer_range)
    return Projection(units, use_bias=use_bias, kernel_initializer=normal, dtype=dtype, name=name)


@keras.saving.register_keras_serializable(package="tfgptj")
class TFGPTJForCausalLM(Generative, LanguageLoss, GPTJHead):
    """GPT-J with a language-model head: the next token's logits at every position.

    Args, call arguments and errors: as :class:`tfgptj.backbone.TFGPTJModel`.

    Returns:
        logits float32 [B, T, V], whatever the dtype policy; with `config.output_hidden_states` or
        `config.output_attentions` a dict of `logits`, `hidden_states`, `attentions`.

    Its own loss takes as labels the input ids, -100 where a token does not count; with no labels at all, the input ids
    where the attention mask is 1, but for the first of each segment.

    Source: transformers, modeling_gptj.py, `GPTJForCausalLM`.

    >>> model = TFGPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4))
    >>> model([[1, 2, 3]]).shape
    TensorShape([1, 3, 50])
    >>> model.compile("adam")
    >>> history = model.fit(ops.array([[1, 2, 3]]), verbose=0)
    """

    def __init__(self, config: GPTJConfig, dtype: Any = None, **kwargs: Any) -> None:
        transformer = TFGPTJModel(config, dtype=dtype, name="transformer")
        head = LMHead(config, transformer.embedding.wte, dtype=transformer.dtype_policy, name="lm_head")
        self._compose(transformer, kwargs, logits=head(transformer.last_hidden_state))
        self.lm_head = head


@keras.saving.register_keras_serializable(package="tfgptj")
class LastToken(ConfiguredLayer):
    """The hidden state of each row's last real token.

    Real is where the attention mask is 1; without a mask, every token but `pad_token_id`; without both, every token.
    A row without any real token gives its first.

    Call arguments:
        inputs: dict of `x` float [B, T, D] and perhaps `attention_mask`, `input_ids` int [B, T].

    Returns:
        float [B, D].

    Source: transformers, modeling_gptj.py, `GPTJForSequenceClassification`.
    """

    def build(self, input_shape: Any = None) -> None:
        self.built = True  # nothing to create

    def call(self, inputs: dict[str, Any]) -> Any:
        x, mask, ids = inputs["x"], inputs.get("attention_mask"), inputs.get("input_ids")
        if mask is None and ids is not None and self.config.pad_token_id is not None:
            mask = ids != self.config.pad_token_id
        if mask is None:
            return x[:, -1]
        steps = ops.arange(ops.shape(x)[1], dtype="int32")  # [T]
        last = ops.max(steps * ops.cast(ops.cast(mask, "bool"), "int32"), axis=1)  # [B]
        return ops.squeeze(ops.take_along_axis(x, last[:, None, None], axis=1), axis=1)


@keras.saving.register_keras_serializable(package="tfgptj")
class TFGPTJForSequenceClassification(GPTJHead):
    """GPT-J with a classifier on each row's last real token.

    Args, call arguments and errors: as :class:`tfgptj.backbone.TFGPTJModel`.

    Returns:
        logits float32 [B, config.num_labels]; with `config.output_hidden_states` or `config.output_attentions` a dict
        of `logits`, `hidden_states`, `attentions`.

    Its own loss follows `config.problem_type`: see :func:`tfgptj.losses.classification_loss`.

    Source: transformers, modeling_gptj.py, `GPTJForSequenceClassification`.

    >>> config = GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, num_labels=3)
    >>> TFGPTJForSequenceClassification(config)([[1, 2, 3]]).shape
    TensorShape([1, 3])
    """

    def __init__(self, config: GPTJConfig, dtype: Any = None, **kwargs: Any) -> None:
        transformer = TFGPTJModel(config, dtype=dtype, name="transformer")
        policy = transformer.dtype_policy
        score = head_dense(config, config.num_labels, use_bias=False, name="score", dtype=policy)
        masks = {name: transformer.input[name] for name in ("attention_mask", "input_ids")}
        last = LastToken(config, dtype=policy, name="last_token")({"x": transformer.last_hidden_state, **masks})
        self._compose(transformer, kwargs, logits=ops.cast(score(last), "float32"))
        self.score = score

    def head_loss(self, labels: Any, outputs: Any, sample_weight: Any = None, counted: Any = None) -> Any:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs
        return classification_loss(labels, logits, self.config.problem_type, sample_weight, counted)

    def count_labels(self, y: Any, x: Any) -> Any:
        return classification_count(y, self.config.num_labels, self.config.problem_type)


@keras.saving.register_keras_serializable(package="tfgptj")
class TFGPTJForQuestionAnswering(GPTJHead):
    """GPT-J that marks the answer in a text: logits of its first and of its last token.

    Args, call arguments and errors: as :class:`tfgptj.backbone.TFGPTJModel`; `config.num_labels` must be 2.

    Returns:
        dict of `start_logits` and `end_logits`, float32 [B, T] each, and perhaps `hidden_states` and `attentions`.

    Its own loss takes `start_positions` and `end_positions`: see :func:`tfgptj.losses.question_answering_loss`.

    Source: transformers, modeling_gptj.py, `GPTJForQuestionAnswering`.

    >>> config = GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    >>> TFGPTJForQuestionAnswering(config)([[1, 2, 3]])["end_logits"].shape
    TensorShape([1, 3])
    """

    def __init__(self, config: GPTJConfig, dtype: Any = None, **kwargs: Any) -> None:
        if config.num_labels != 2:
            raise ConfigError(f"question answering has two outputs, start and end; got num_labels={config.num_labels}")
        transformer = TFGPTJModel(config, dtype=dtype, name="transformer")
        qa_outputs = head_dense(config, 2, use_bias=True, name="qa_outputs", dtype=transformer.dtype_policy)
        logits = ops.cast(qa_outputs(transformer.last_hidden_state), "float32")  # [B, T, 2]
        self._compose(transformer, kwargs, start_logits=logits[:, :, 0], end_logits=logits[:, :, 1])
        self.qa_outputs = qa_outputs

    def head_loss(self, labels: Any, outputs: Any, sample_weight: Any = None, counted: Any = None) -> Any:
        return question_answering_loss(labels, outputs, sample_weight, counted)

    def count_labels(self, y: Any, x: Any) -> Any:
        inputs = split_labels(x)[0]
        text = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
        return ops.stack([count(labels) for labels in positions_in_text(y, ops.shape(text)[1])])
