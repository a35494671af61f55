"""Pretrain a small GPT-J on one text, from nothing: its tokenizer, its weights, and how well it reads held-out text.

This is the program that made the packaged model "shakespeare".
"""

from __future__ import annotations

import keras
import numpy as np

from tfgptj.config import GPTJConfig
from tfgptj.errors import InputError
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.losses import IGNORE_INDEX, causal_lm_loss
from tfgptj.tokenizer import GPTJTokenizer
from tfgptj.training.data import Dataset, block_dataset, evaluation_windows
from tfgptj.training.recipe import Recipe
from tfgptj.training.tokens import Tokens


def pretrain(text: str, recipe: Recipe = Recipe(), verbose: int = 2) -> tuple[TFGPTJForCausalLM, GPTJTokenizer, float]:
    """Train a tokenizer and a model on a text.

    Args:
        text: the whole text; its last `recipe.held_out` part is only evaluated.
        recipe: sizes and schedule.
        verbose: as for Keras's `fit`.

    Returns:
        The model with averaged weights, its tokenizer, and its loss on the held-out part in nats per character.

    Raises:
        InputError: if the text is too short for the recipe, or none of it is held out.
    """
    if not 0 < recipe.held_out < 1:
        raise InputError(f"held_out must be a share between 0 and 1, got {recipe.held_out}: some text must be held out")
    keras.utils.set_random_seed(recipe.seed)
    cut = int(len(text) * (1 - recipe.held_out))
    train_text, held_out_text = text[:cut], text[cut:]
    tokenizer = GPTJTokenizer.train([train_text], vocab_size=recipe.vocab_size, model_max_length=recipe.block_size)
    model = TFGPTJForCausalLM(_config(recipe, tokenizer), dtype=recipe.dtype)

    steps_per_epoch = _steps_per_epoch(recipe, len(tokenizer.encode(train_text)))
    model.compile(_optimizer(recipe, model, steps_per_epoch * recipe.epochs))
    report = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(
            held_out=nats_per_character(model, tokenizer, held_out_text, recipe.block_size)
        )
    )
    model.fit(
        _dataset(recipe, tokenizer, train_text),
        epochs=recipe.epochs,
        steps_per_epoch=steps_per_epoch,
        callbacks=[report],
        verbose=verbose,
        shuffle=False,
    )
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


def _steps_per_epoch(recipe: Recipe, tokens: int) -> int:
    """Whole batches of one pass; one block is lost to the random place where a pass begins."""
    steps = (tokens // recipe.block_size - 1) // recipe.batch_size
    if steps * recipe.epochs <= recipe.warmup_steps:
        raise InputError(
            f"{tokens:,} tokens make {max(steps, 0)} steps of {recipe.batch_size} blocks of {recipe.block_size}, and "
            f"{recipe.epochs} epochs of these are no more than {recipe.warmup_steps} warmup_steps: "
            "take a longer text, smaller batches or more epochs"
        )
    return steps


def _dataset(recipe: Recipe, tokenizer: GPTJTokenizer, text: str) -> Dataset:
    """All blocks in random order, cut at other places in every epoch, some merges skipped but in the last.

    Skipped merges make more tokens, so the stream lasts longer than the steps do: of the five plain passes at the end
    of the packaged model's run, about two were seen.
    """
    noisy = tokenizer.with_dropout(recipe.bpe_dropout)

    def stream(epoch: int) -> list[Tokens]:
        encoder = noisy if epoch < recipe.epochs - recipe.plain_epochs else tokenizer
        ids = np.asarray(encoder.encode(text), "int32")
        ids = ids[np.random.default_rng((recipe.seed, epoch)).integers(recipe.block_size) :]
        return [Tokens(ids, np.array([len(ids)]))]

    return block_dataset(
        stream,
        block_size=recipe.block_size,
        batch_size=recipe.batch_size,
        shuffle_buffer=len(text),  # all blocks
        epochs=recipe.epochs,
        seed=recipe.seed,
    )


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
        schedule,
        weight_decay=recipe.weight_decay,
        beta_2=0.99,
        clipnorm=1.0,
        use_ema=True,
        ema_momentum=recipe.ema_momentum,
    )
    optimizer.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if len(v.shape) < 2])
    return optimizer
