"""Language models of random weights that write what they are told: each token has one that follows it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfgptj.heads import TFGPTJForCausalLM


def teach(model: TFGPTJForCausalLM, successors: Sequence[int], seed: int = 0, sharpness: float = 4.0) -> None:
    """Make a model write `successors[t]` after the token t.

    Only the embedding and the head are written, so that all layers do their work on it: tokens are long random vectors,
    beside which what the blocks add is small, and the head points from each to the one that follows.
    """
    vocabulary, width = model.config.vocab_size, model.config.n_embd
    vectors = np.random.default_rng(seed).standard_normal((vocabulary, width), dtype="float32")
    model.transformer.embedding.wte.embeddings.assign(20 * vectors)
    head = np.zeros((vocabulary, width), "float32")
    np.add.at(head, np.asarray(successors), vectors * (sharpness / np.sqrt(width)))
    model.lm_head.dense.kernel.assign(head)
    model.lm_head.dense.bias.assign(np.zeros(vocabulary, "float32"))


def cycle(vocabulary: int) -> list[int]:
    """After each token the next higher, and after the last the first."""
    return [(token + 1) % vocabulary for token in range(vocabulary)]
