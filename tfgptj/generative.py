"""The methods of a language model that make text, or judge it; the work itself is done in `tfgptj.generation`."""

from __future__ import annotations

from typing import Any


class Generative:
    """What a causal language model has beside Keras's methods."""

    def generate(
        self: Any, input_ids: Any = None, attention_mask: Any = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """Continue token ids: see :func:`tfgptj.generation.generate.generate`."""
        from tfgptj.generation.generate import generate

        return generate(self, input_ids, attention_mask, generation_config, **kwargs)

    def stream(self: Any, prompt: Any, generation_config: Any = None, *, tokenizer: Any, **kwargs: Any) -> Any:
        """Continue a text piece by piece: see :func:`tfgptj.generation.streaming.stream_text`."""
        from tfgptj.generation.streaming import stream_text

        return stream_text(self, tokenizer, prompt, generation_config, **kwargs)

    def score(self: Any, texts: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        """The log-probability of each token of texts: see :func:`tfgptj.generation.scoring.score`."""
        from tfgptj.generation.scoring import score

        return score(self, texts, attention_mask, **kwargs)

    def compute_transition_scores(
        self, sequences: Any, scores: Any, beam_indices: Any = None, normalize_logits: bool = False
    ) -> Any:
        """The score of each new token: see :func:`tfgptj.generation.results.compute_transition_scores`."""
        from tfgptj.generation.results import compute_transition_scores

        return compute_transition_scores(sequences, scores, beam_indices, normalize_logits)
