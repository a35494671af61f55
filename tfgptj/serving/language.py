"""The signatures of a language model: text from text, from tokens, in steps; and how likely text is."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfgptj.generation import scoring
from tfgptj.generation.config import GenerationConfig
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.serving.decoding import Continuation, Sampling, fixed_sampling
from tfgptj.serving.requests import Caps, checked, id_rows, numbers, of_each_row, texts
from tfgptj.serving.searching import BeamContinuation
from tfgptj.serving.text import Outputs, Signatures, TextRows, last_of, read


class LanguageSignatures:
    """What a served language model can be asked.

    Args:
        model, config, caps: see :class:`tfgptj.serving.decoding.Continuation`.
        text: between texts and tokens; None for a model that is served without a tokenizer.
        seed: what all texts of `serving_default` and `tokens` are drawn with; None draws anew for each.
    """

    def __init__(
        self, model: TFGPTJForCausalLM, config: GenerationConfig, caps: Caps, text: TextRows | None, seed: int | None
    ) -> None:
        self.model, self.config, self.caps, self.seed = model, config, caps, seed
        self._continue = (BeamContinuation if config.num_beams > 1 else Continuation)(model, config, caps)
        self._text = text

    def signatures(self) -> Signatures:
        """All of them, by name."""
        found: Signatures = {
            "tokens": (self.tokens, id_rows()),
            "prefill": (self.prefill, id_rows()),
            "decode": (self.decode, (numbers("token_ids", "int32"), numbers("lengths", "int32"), self._cache_spec())),
        }
        if self._text is None:
            return {"serving_default": found["tokens"], **found}
        found |= {"serving_default": (self.default, (texts("prompt"),)), "score": (self.score, (texts("text"),))}
        if self.config.num_beams == 1:  # a search has no numbers of each row's own
            steered = [numbers(name, dtype) for name, dtype in zip(Sampling._fields, DTYPES, strict=True)]
            found["generate"] = self.generate, (texts("prompt"), *steered)
        return found

    def default(self, prompt: Any) -> Outputs:
        """Continue texts with the parameters of the export."""
        return self._continued(prompt, fixed_sampling(self.config, self.seed, prompt))

    def generate(self, prompt: Any, *sampling: Any) -> Outputs:
        """Continue each text with numbers of its own."""
        return self._continued(prompt, Sampling(*sampling))

    def tokens(self, token_ids: Any, lengths: Any) -> Outputs:
        """Continue token ids with the parameters of the export."""
        new = self._continue(token_ids, lengths, fixed_sampling(self.config, self.seed, token_ids), "token_ids")
        return {"token_ids": new.ids, "num_tokens": new.lengths, "finish_reason": _reasons(new.ended)}

    def score(self, text: Any) -> Outputs:
        """How likely texts are: see :func:`tfgptj.generation.scoring.score`."""
        assert self._text is not None  # the signature is not offered without
        ids, lengths = self.caps.check_rows(*self._text.encode(text, "text"), what="text")
        message = "text: a text of one token has no probability: only tokens after others have"
        lengths = checked(lengths, lambda: [tf.debugging.assert_greater(lengths, 1, message)])
        hidden, _ = read(self.model.transformer, ids, lengths)
        counts = lengths - 1
        logs = self._log_probabilities(hidden[:, :-1], ids[:, 1:])
        logs = tf.where(tf.sequence_mask(counts, tf.shape(logs)[1]), logs, 0.0)
        total = tf.reduce_sum(tf.cast(logs, "float64"), axis=1)
        return {
            "token_ids": ids,
            "num_tokens": lengths,
            "log_probabilities": logs,
            "total": tf.cast(total, "float32"),
            "perplexity": tf.cast(tf.exp(-total / tf.cast(counts, "float64")), "float32"),
        }

    def prefill(self, token_ids: Any, lengths: Any) -> Outputs:
        """Read token ids: the logits of the next token, and keys and values for `decode`."""
        ids, lengths = self.caps.check_rows(token_ids, lengths)
        hidden, caches = read(self.model.transformer, ids, lengths)
        cache = tf.stack([tf.stack(pair, axis=1) for pair in caches], axis=1)  # [B, L, 2, N, S, H]
        return {"logits": self.model.lm_head(last_of(hidden, lengths)[:, None])[:, 0], "cache": cache}

    def decode(self, token_ids: Any, lengths: Any, cache: Any) -> Outputs:
        """Read one more token of each row: the next logits, and its own keys and values."""
        tokens = of_each_row("token_ids", token_ids, lengths)
        tokens, _ = self.caps.check_rows(tokens[:, None], tf.ones_like(tokens))
        cache, lengths = self._checked_cache(cache, lengths)
        size = tf.shape(cache)[4]
        slots = tf.range(size + 1)
        visible = (slots < lengths[:, None]) | (slots == size)  # [B, S + 1]
        grown = tf.pad(cache, [[0, 0]] * 4 + [[0, 1], [0, 0]])
        pairs = tuple((grown[:, i, 0], grown[:, i, 1]) for i in range(self.model.config.n_layer))
        hidden, new = self.model.transformer.step(tokens, lengths[:, None], visible[:, None, None], pairs, size)
        newest = tf.stack([tf.stack([part[:, :, size:] for part in pair], axis=1) for pair in new], axis=1)
        return {"logits": self.model.lm_head(hidden)[:, 0], "cache": newest}

    def _continued(self, prompt: Any, sampling: Sampling) -> Outputs:
        assert self._text is not None  # the signatures are not offered without
        ids, lengths = self._text.encode(prompt, "prompt", self.config.bos_token_id)
        new = self._continue(ids, lengths, sampling, "prompt")
        found, raw = self._text.decode(new.ids, new.lengths - tf.cast(new.ended, "int32"))
        return {"text": found, "text_bytes": raw, "num_tokens": new.lengths, "finish_reason": _reasons(new.ended)}

    def _log_probabilities(self, hidden: Any, targets: Any) -> Any:
        """Of each target int32 [B, T] after hidden states [B, T, D], float32 [B, T]; few logits are there at once."""
        rows, width = tf.shape(targets)[0], tf.shape(targets)[1]
        size = tf.minimum(width, scoring.POSITIONS)

        def more(start: Any, logs: Any) -> tuple[Any, Any]:
            piece = slice(start, start + size)
            judged = scoring.judge(self.model, None, hidden[:, piece], targets[:, piece])
            return start + size, tf.concat([logs, judged], axis=1)

        return tf.while_loop(
            lambda start, logs: start < width,
            more,
            (tf.constant(0), tf.zeros((rows, 0))),
            shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None])),
            parallel_iterations=1,
        )[1]

    def _cache_spec(self) -> tf.TensorSpec:
        config = self.model.config
        shape = [None, config.n_layer, 2, config.n_head, None, config.head_dim]
        return tf.TensorSpec(shape, self.model.compute_dtype, "cache")

    def _checked_cache(self, cache: Any, lengths: Any) -> tuple[Any, Any]:
        """The cache, and the tokens in it of each row, int32 [B]."""
        cache = tf.ensure_shape(cache, self._cache_spec().shape)
        lengths = of_each_row("lengths", lengths, cache)
        limit = self.model.config.n_positions
        return cache, checked(
            lengths,
            lambda: [
                tf.debugging.assert_positive(lengths, "lengths: the cache of each row needs at least one token"),
                tf.debugging.assert_less_equal(lengths, tf.shape(cache)[4], "lengths: the cache has fewer slots"),
                tf.debugging.assert_less(lengths, limit, f"lengths: there are only n_positions={limit:,}"),
                tf.debugging.assert_less_equal(
                    tf.reduce_prod(tf.gather(tf.shape(cache, "int64"), [0, 4])),
                    tf.constant(self.caps.tokens, "int64"),
                    f"cache: rows times slots are more than {self.caps.tokens:,}",
                ),
            ],
        )


DTYPES = ("int32", "float32", "int32", "float32", "int64")  # of `Sampling`


def _reasons(ended: Any) -> Any:
    return tf.where(ended, "stop", "length")
