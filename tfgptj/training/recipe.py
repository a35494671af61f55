"""The sizes and the schedule of a pretraining run; importing this loads neither Keras nor TensorFlow."""

from __future__ import annotations

import dataclasses
from typing import Any


def _setting(default: Any, meaning: str, least: float = 0) -> Any:
    """A field with what `tfgptj pretrain` shows of it, and the least value that makes sense."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "least": least})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A pretraining run; the defaults are those of the packaged model."""

    vocab_size: int = _setting(1024, "tokens of the tokenizer, at most", 1)
    n_embd: int = _setting(256, "width", 1)
    n_layer: int = _setting(4, "blocks", 1)
    n_head: int = _setting(4, "attention heads", 1)
    rotary_dim: int = _setting(32, "rotated dimensions of each head", 2)
    dropout: float = _setting(
        0.2, "dropout after the embedding and in the blocks"
    )  # on the attention weights it is slow
    block_size: int = _setting(256, "tokens that the model sees at once, in training and after", 2)
    batch_size: int = _setting(16, "blocks of one step", 1)
    epochs: int = _setting(24, "passes over the text", 1)
    learning_rate: float = _setting(2e-3, "learning rate at its highest; from there a cosine to a hundredth of it")
    warmup_steps: int = _setting(100, "steps to get there")
    weight_decay: float = _setting(0.1, "weight decay of AdamW")
    ema_momentum: float = _setting(0.995, "momentum of the moving average of the weights, which is what is saved")
    bpe_dropout: float = _setting(0.1, "share of the tokenizer's merges that training skips at random")
    plain_epochs: int = _setting(5, "last epochs, without that")
    held_out: float = _setting(0.1, "share of the text, at its end, that is only evaluated")
    seed: int = _setting(1, "random seed; the random merges have none")
    dtype: str = _setting("mixed_bfloat16", "dtype policy of the training")
