"""Pretrain a small GPT-J on one text, from nothing: its tokenizer, its weights, and how well it reads held-out text.

This is the program that made the packaged model "shakespeare".
"""

from __future__ import annotations

import dataclasses
import keras
import numpy as np

from tfgptj.config import GPTJConfig
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.losses import IGNORE_INDEX, causal_lm_loss
from tfgptj.tokenizer import GPTJTokenizer
from tfgptj.training.data import block_dataset, evaluation_windows


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes and schedule of a pretraining run; the defaults are those of the packaged model."""

    vocab_size: int = 1024
    n_embd: int = 256
    n_layer: int = 4
    n_head: int = 4
    rotary_dim: int = 32
    dropout: float = 0.2  # after the embedding and in the blocks; not on the attention weights, where it is slow
    block_size: int = 256  # tokens that the model sees at once, and its n_positions: it reads no further than trained
    batch_size: int = 16  # blocks
    epochs: int = 24
    learning_rate: float = 2e-3  # at its peak; from there a cosine to a hundredth of it
    warmup_steps: int = 100
    weight_decay: float = 0.1
    ema_momentum: float = 0.995  # the weights that are kept are a moving average
    bpe_dropout: float = 0.1  # merges that are skipped at random, so that no epoch sees the same tokens
    plain_epochs: int = 5  # the last epochs without that
    held_out: float = 0.1  # the end of the text, never trained on
    seed: int = 1
    dtype: str = "mixed_bfloat16"


def pretrain(text: str, recipe: Recipe = Recipe(), verbose: int = 2) -> tuple[TFGPTJForCausalLM, GPTJTokenizer, float]:
    """Train a tokenizer and a model on a text.

    Args:
        text: the whole text; its last `recipe.held_out` part is only evaluated.
        recipe: sizes and schedule.
        verbose: as for Keras's `fit`.

    Returns:
        The model with averaged weights, its tokenizer, and its loss on the held-out part in nats per character.
    """
    keras.utils.set_random_seed(recipe.seed)
    cut = int(len(text) * (1 - recipe.held_out))
    train_text, held_out_text = text[:cut], text[cut:]
    tokenizer = GPTJTokenizer.train(
        [train_text], vocab_size=recipe.vocab_size, model_max_length=recipe.block_size
    )
    model = TFGPTJForCausalLM(_config(recipe, tokenizer), dtype=recipe.dtype)

    steps = recipe.epochs * (len(tokenizer.encode(train_text)) // (recipe.block_size * recipe.batch_size))
    model.compile(_optimizer(recipe, model, steps))
    noisy = tokenizer.with_dropout(recipe.bpe_dropout)

    def epoch_ids(epoch: int) -> np.ndarray:
        encoder = noisy if epoch < recipe.epochs - recipe.plain_epochs else tokenizer
        return np.asarray(encoder.encode(train_text), "int32")

    dataset = block_dataset(
        epoch_ids, block_size=recipe.block_size, batch_size=recipe.batch_size, epochs=recipe.epochs, seed=recipe.seed
    )
    report = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(
            held_out=nats_per_character(model, tokenizer, held_out_text, recipe.block_size)
        )
    )
    per_epoch = steps // recipe.epochs
    model.fit(dataset, epochs=recipe.epochs, steps_per_epoch=per_epoch, callbacks=[report], verbose=verbose)
    return model, tokenizer, nats_per_character(model, tokenizer, held_out_text, recipe.block_size)


def nats_per_character(
    model: TFGPTJForCausalLM, tokenizer: GPTJTokenizer, text: str, window: int, batch_size: int = 16
) -> float:
    """Loss of a text in nats per character, every token scored once with at least half a window before it.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        text: the text, as the tokenizer reads it: one token stream.
        window: tokens that the model sees at once, at most `n_positions`.
        batch_size: windows per forward pass.
    """
    ids = np.asarray([tokenizer.eos_token_id, *tokenizer.encode(text)], "int32")
    inputs, labels = evaluation_windows(ids, window=window, stride=window // 2)
    total = 0.0
    for start in range(0, len(inputs), batch_size):
        batch = slice(start, start + batch_size)
        scored = int((labels[batch, 1:] != IGNORE_INDEX).sum())
        total += scored * float(causal_lm_loss(labels[batch], model.predict_on_batch(inputs[batch])))
    return total / len(text)


def _config(recipe: Recipe, tokenizer: GPTJTokenizer) -> GPTJConfig:
    return GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=recipe.block_size,
        n_embd=recipe.n_embd,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        rotary_dim=recipe.rotary_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=recipe.dropout,
        embd_pdrop=recipe.dropout,
    )


def _optimizer(recipe: Recipe, model: TFGPTJForCausalLM, steps: int) -> keras.optimizers.Optimizer:
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        steps - recipe.warmup_steps,
        alpha=0.01,
        warmup_target=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
    )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=recipe.weight_decay, beta_2=0.99, clipnorm=1.0, use_ema=True,
        ema_momentum=recipe.ema_momentum,
    )
    optimizer.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if len(v.shape) < 2])
    return optimizer
