"""Between texts and rows of tokens, and what all heads do with rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfgptj.attention import Cache
from tfgptj.backbone import TFGPTJModel
from tfgptj.generation.loop import read_whole
from tfgptj.serving.graph_tokenizer import GraphTokenizer
from tfgptj.serving.requests import Caps, Rows, texts
from tfgptj.tokenizer import GPTJTokenizer

Outputs = dict[str, Any]
Signatures = dict[str, tuple[Callable[..., Outputs], tuple[tf.TensorSpec, ...]]]  # functions, and what they are given


class TextRows:
    """Texts to rows of tokens and back, within a graph.

    Args:
        tokenizer: the model's.
        caps: what a request may ask for.
    """

    def __init__(self, tokenizer: GPTJTokenizer, caps: Caps) -> None:
        self.graph, self._caps = GraphTokenizer(tokenizer), caps
        # One function, however many signatures call it.
        self._encode = tf.function(self.graph.encode, [tf.TensorSpec([None], tf.string)], autograph=False)
        self._leading = len(tokenizer.encode(""))
        every = range(len(tokenizer))
        self._longest = max(len(tokenizer.decode_bytes(token)) for token in every)
        # Of an id that the tokenizer does not have, there is no text.
        self._shown = np.zeros(max(len(tokenizer), caps.config.vocab_size), bool)
        self._shown[list(set(every) - set(tokenizer.all_special_ids))] = True

    def encode(self, given: Any, name: str, start: int | None = None, leading: bool = True) -> Rows:
        """Token ids int32 [B, T], and how many each row has.

        Args:
            given: string [B].
            name: theirs in messages.
            start: the one token of an empty text, or None to leave it empty.
            leading: whether rows begin with what the tokenizer puts in front of all texts.
        """
        found = self._encode(self._caps.check_texts(name, given, self._longest))
        ids, lengths = found.to_tensor(), tf.cast(found.row_lengths(), "int32")
        if not leading:
            ids, lengths = ids[:, self._leading :], lengths - self._leading
        if start is None:
            return ids, lengths
        ids = tf.pad(ids, [[0, 0], [0, tf.cast(tf.shape(ids)[1] == 0, "int32")]])
        return tf.where(lengths[:, None] == 0, start, ids), tf.maximum(lengths, 1)

    def decode(self, ids: Any, lengths: Any) -> tuple[Any, Any]:
        """Texts string [B] of rows, without special tokens: as UTF-8, and their bytes as they are."""
        shown = tf.gather(self._shown, ids) & tf.sequence_mask(lengths, tf.shape(ids)[1])
        rows = tf.ragged.boolean_mask(ids, shown)
        ids, lengths = rows.to_tensor(), tf.cast(rows.row_lengths(), "int32")
        raw = self.bytes_of(ids, lengths)
        return tf.strings.unicode_transcode(raw, "UTF-8", "UTF-8"), raw

    def bytes_of(self, ids: Any, lengths: Any) -> Any:
        """The bytes, string [B], that rows stand for."""
        return self.graph.decode_bytes(ids, lengths)


def read(transformer: TFGPTJModel, ids: Any, lengths: Any) -> tuple[Any, tuple[Cache, ...]]:
    """Last hidden states [B, T, D] of rows, and keys and values."""
    return read_whole(transformer, ids, tf.sequence_mask(lengths, tf.shape(ids)[1]))


def last_of(hidden: Any, lengths: Any) -> Any:
    """The hidden state [B, D] of each row's last token."""
    return tf.gather(hidden, lengths - 1, batch_dims=1)


def embedding_signature(transformer: TFGPTJModel, caps: Caps, text: TextRows) -> Signatures:
    """`embed`: the last hidden states of texts, as one vector for each."""

    def embed(text_given: Any) -> Outputs:
        ids, lengths = caps.check_rows(*text.encode(text_given, "text"), what="text")
        hidden = tf.cast(read(transformer, ids, lengths)[0], "float32")
        real = tf.cast(tf.sequence_mask(lengths, tf.shape(ids)[1]), "float32")[:, :, None]  # [B, T, 1]
        mean = tf.reduce_sum(hidden * real, axis=1) / tf.cast(lengths, "float32")[:, None]
        return {"mean": mean, "last": last_of(hidden, lengths), "num_tokens": lengths}

    return {"embed": (embed, (texts("text"),))}
