"""`export_saved_model`: a model with its tokenizer and its decoding as one graph."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfgptj.backbone import TFGPTJModel
from tfgptj.base import GPTJBase
from tfgptj.errors import BackendError, CheckpointError, GenerationError, InputError, InputTypeError
from tfgptj.generation.compiling import plain_graph
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.prompts import check_seed
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification
from tfgptj.limits import MAX_SERVED_ROWS, MAX_SERVED_TOKENS
from tfgptj.serving.answers import AnswerSignatures, classifier_signatures
from tfgptj.serving.decoding import MAX_SEED, served_config
from tfgptj.serving.deployment import add_serving_files
from tfgptj.serving.language import LanguageSignatures
from tfgptj.serving.requests import Caps
from tfgptj.serving.shared_blocks import SharedBlocks
from tfgptj.serving.text import Signatures, TextRows, embedding_signature
from tfgptj.serving.versions import new_version
from tfgptj.tokenizer import GPTJTokenizer


def export_saved_model(
    model: GPTJBase,
    directory: str | os.PathLike[str],
    tokenizer: GPTJTokenizer | None = None,
    *,
    version: int | None = None,
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
    max_batch_size: int = MAX_SERVED_ROWS,
    max_total_tokens: int = MAX_SERVED_TOKENS,
    **parameters: Any,
) -> Path:
    """Write a SavedModel that takes text and gives text, and needs TensorFlow alone.

    It is written beside its place and renamed when all is on disk: TensorFlow Serving never sees half of one. With it
    come a warm-up and batching parameters; :func:`tfgptj.serving.deployment.write_deployment` writes what else a server
    is started with.

    A language model has these signatures; [B] are rows, of which none depends on the others:

    `serving_default`: `prompt` string [B] to `text` string [B], the continuation as UTF-8, `text_bytes` as its bytes
    are, `num_tokens` int32 [B], the end-of-text token included, and `finish_reason` string [B], "stop" or "length".
    `generate`: beside `prompt`, for each row `max_new_tokens` int32, `temperature` float32 (0 for the likeliest
    tokens), `top_k` int32 (0 for no cut), `top_p` float32 (1 for no cut) and `seed` int64 (-1 to draw anew), [B] each.
    A row's text is the one that `generate` gives for it alone, with that seed. Not with `num_beams`: then
    `serving_default` and `tokens` give the best text of a search.
    `tokens`: `token_ids` int32 [B, T], filled up on the right, and `lengths` int32 [B] to `token_ids` int32 [B, M],
    `num_tokens` and `finish_reason`.
    `score`: `text` string [B] to `log_probabilities` float32 [B, T - 1] of its tokens but the first, `total` and
    `perplexity` float32 [B], `token_ids` and `num_tokens`.
    `embed`: `text` string [B] to the last hidden states, `mean` float32 [B, D] and `last`, that of the last token.
    `prefill` and `decode`: one step at a time. `prefill` takes `token_ids` [B, T] and `lengths`, and gives `logits`
    float32 [B, V] of the next token, and `cache` [B, L, 2, N, T, H]. `decode` takes the token chosen, `token_ids`
    int32 [B], the `lengths` of the cache's rows and the `cache`; its `cache` [B, L, 2, N, 1, H] is that token's, which
    belongs into slot `lengths` of each row.

    A classifier's `serving_default` takes `text` and gives `labels` string [B, C] and `scores` float32 [B, C], the best
    first; that of question answering takes `question` and `context` and gives `answer`, `score` and its characters
    `start` and `end`. Both have `tokens`, too, and every model has `embed`.

    Args:
        model: any of the package's models.
        directory: of all versions of the model.
        tokenizer: the model's; without it there are only signatures of token ids.
        version: the number of this version; None for the next.
        generation_config, **parameters: as for `generate`: what `serving_default` and `tokens` do, and for `generate`
            all but what a request says.
        seed: what `serving_default` and `tokens` draw every text with; None draws anew for each.
        max_batch_size: rows of a request at most.
        max_total_tokens: rows of a request, times the slots of each: its longest text's and longest continuation's.

    Returns:
        The directory of this version.

    Raises:
        InputError, InputTypeError, GenerationError: for arguments that are out of range or cannot be served.
        CheckpointError: if nothing can be written, or that version is there.
        BackendError: on other backends than TensorFlow.

    >>> import tempfile
    >>> from tfgptj.config import GPTJConfig
    >>> model = TFGPTJModel(GPTJConfig(vocab_size=257, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = export_saved_model(model, directory, GPTJTokenizer.train(["abc"], vocab_size=257))
    ...     embed = tf.saved_model.load(path).signatures["embed"]
    ...     embed(text=tf.constant(["abc", "a"]))["mean"].shape
    TensorShape([2, 16])
    """
    _check(model, tokenizer, seed, max_batch_size, max_total_tokens)
    caps = Caps(model.config, max_batch_size, max_total_tokens)
    text = None if tokenizer is None else TextRows(tokenizer, caps)
    signatures = signatures_of(model, caps, text, generation_config, seed, parameters)
    served = tf.Module()
    # Not the model: it would be stored with all that Keras knows of it, and its weights twice.
    served.weights = [weight.value for weight in model.weights]
    served.text = None if text is None else text.graph
    with plain_graph(), SharedBlocks().used():
        traced = {
            name: tf.function(_named(function), autograph=False).get_concrete_function(*specs)
            for name, (function, specs) in signatures.items()
        }
    options = tf.saved_model.SaveOptions(save_debug_info=False)
    with new_version(Path(directory), version) as (staging, target):
        try:
            tf.saved_model.save(served, str(staging), signatures=traced, options=options)
            # So many that, whatever is merged, no run of the graph is asked for too much.
            merged = min(caps.rows, max(1, caps.tokens // caps.config.n_positions))
            add_serving_files(staging, Path(directory).resolve().name, merged)
        except tf.errors.OpError as error:
            raise CheckpointError(f"{directory}: could not be written: {error.message}") from error
    return target


def signatures_of(
    model: GPTJBase,
    caps: Caps,
    text: TextRows | None,
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
    parameters: dict[str, Any] | None = None,
) -> Signatures:
    """What a model can be asked, by name: functions, and the tensors that each is given.

    Raises:
        InputError: for parameters of generation that the model has no use for.
        GenerationError: for those that cannot be served.
    """
    transformer: Any = getattr(model, "transformer", model)
    embed = {} if text is None else embedding_signature(transformer, caps, text)
    if isinstance(model, TFGPTJForCausalLM):
        config = served_config(model, generation_config, parameters or {})
        return {**LanguageSignatures(model, config, caps, text, seed).signatures(), **embed}
    given = [
        *(parameters or {}),
        *(["generation_config"] if generation_config else []),
        *(["seed"] if seed is not None else []),
    ]
    if given:
        raise InputError(f"a {type(model).__name__} generates no text, and has no use for {', '.join(given)}")
    if isinstance(model, TFGPTJForSequenceClassification):
        return {**classifier_signatures(model, caps, text), **embed}
    if isinstance(model, TFGPTJForQuestionAnswering):
        return {**AnswerSignatures(model, caps, text).signatures(), **embed}
    if not embed:
        raise InputError(
            "a model without a head can be asked for nothing but its embeddings of texts: give a tokenizer"
        )
    return {"serving_default": embed["embed"], **embed}


def _check(model: Any, tokenizer: Any, seed: Any, rows: Any, tokens: Any) -> None:
    if keras.backend.backend() != "tensorflow":
        raise BackendError(f"SavedModels are written on TensorFlow only, not on {keras.backend.backend()}")
    if not isinstance(
        model, (TFGPTJModel, TFGPTJForCausalLM, TFGPTJForSequenceClassification, TFGPTJForQuestionAnswering)
    ):
        raise InputTypeError(f"model must be one of the package's models, got a {type(model).__name__}")
    if tokenizer is not None and not isinstance(tokenizer, GPTJTokenizer):
        raise InputTypeError(f"tokenizer must be a GPTJTokenizer, got a {type(tokenizer).__name__}")
    check_seed(seed)
    if seed is not None and seed > MAX_SEED:
        raise GenerationError(f"seed must be below 2^63 to be served, got {seed}")
    for name, value in (("max_batch_size", rows), ("max_total_tokens", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be an integer of at least 1, got {value!r:.80}")


def _named(function: Any) -> Any:
    """A function of tensors whose arguments bear the names of their specifications."""
    return lambda *tensors: function(*tensors)
