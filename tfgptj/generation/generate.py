"""`generate`: token ids in, token ids out; and the same step by step for streaming."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.functions import functions_of, listed
from tfgptj.generation.prefix_cache import PrefixCache
from tfgptj.generation.results import GenerationOutput
from tfgptj.generation.run import CHUNK, Extras
from tfgptj.generation.strategies import check_streaming, new_run
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.tokenizer import GPTJTokenizer


def generate(
    model: TFGPTJForCausalLM,
    input_ids: Any = None,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Any = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
    assistant_model: Any = None,
    prefix_cache: PrefixCache | None = None,
    tokenizer: GPTJTokenizer | None = None,
    streamer: Any = None,
    seed: int | None = None,
    jit_compile: bool | None = None,
    **parameters: Any,
) -> np.ndarray | GenerationOutput:
    """Continue token ids.

    Args:
        input_ids: int [B, P], or None for one row of `bos_token_id`. Shorter rows are padded, on either side.
        attention_mask: int or bool [B, P], 1 for real tokens; None when there is no padding. It is never guessed.
        generation_config: a :class:`GenerationConfig`. What is given wins in this order: keyword arguments, this, the
            model's `generation_config` (from its `generation_config.json`), the model's special tokens, the defaults.
        logits_processor: a function `f(input_ids, scores)`, or a list of them, called at each step for each row, or
            beam, that has not ended: NumPy's int32 [1, n], the row's tokens, prompt included and padding not, and
            float32 [1, V], -inf for forbidden tokens. It returns scores of that shape, -inf to forbid. It comes after
            all processors of the configuration but those of sampling.
        stopping_criteria: a function `f(input_ids, scores)`, or a list of them, called after each step with int32
            [B, P + n], what `generate` would return now, and a tuple of the scores so far, or None unless
            `output_scores`. It returns a bool, or one for each row [B]: whether to stop. With beams it is asked about
            each candidate, several of each prompt, and ends that text as an end-of-text token does.
        prefix_allowed_tokens_fn: a function `f(row, input_ids)` that gets a row's number and its tokens, int32 [n], and
            returns the ids that may follow. It comes after `min_new_tokens`. All beams of a prompt have its number.
        negative_prompt_ids, negative_prompt_attention_mask: what `guidance_scale` leads away from, int [B, P2] or
            [1, P2]; without them the last token of each prompt.
        assistant_model: a smaller TFGPTJForCausalLM with the same tokens that drafts what the model then judges: fewer
            steps of the model for the same result. See `num_assistant_tokens` in :class:`GenerationConfig`; what stands
            in the assistant's own `generation_config` counts before the model's. Rows are generated one by one.
        prefix_cache: a :class:`PrefixCache` that earlier calls were given too: what their texts and these prompts have
            in common at the beginning is not read again.
        tokenizer: the model's, for `stop_strings`.
        streamer: an object with `put(ids)` and `end()`, given the prompt [B, P] and then each step's tokens [B].
        seed: int >= 0; the same seed draws the same tokens, whatever the other rows of the batch are and on every
            backend up to rounding of the logits. None draws anew at each call.
        jit_compile: compile with XLA on TensorFlow; None means on GPUs only, where it pays.
        **parameters: any parameter of :class:`GenerationConfig`.

    Returns:
        int32 [B · num_return_sequences, P + new], prompt included; finished rows are filled with `pad_token_id`. With
        `return_dict_in_generate` a :class:`tfgptj.generation.results.GenerationOutput`.

    Raises:
        InputError: for ids out of range, rows without a token, prompt and continuation over `n_positions`.
        GenerationError: for parameters that are unknown or contradict each other.
        NonFiniteLogitsError: when the model produces NaN or infinite logits, or every token is forbidden.
        ResourceLimitError: when there is not enough memory.

    >>> from tfgptj.config import GPTJConfig
    >>> tiny = GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, eos_token_id=None)
    >>> TFGPTJForCausalLM(tiny).generate([[1, 2, 3]], max_new_tokens=4).shape
    (1, 7)
    """
    extras = Extras(
        functions=functions_of(logits_processor, prefix_allowed_tokens_fn),
        criteria=listed("stopping_criteria", stopping_criteria),
        negative=(negative_prompt_ids, negative_prompt_attention_mask),
        tokenizer=tokenizer,
        assistant=assistant_model,
        prefix_cache=prefix_cache,
    )
    run = new_run(model, input_ids, attention_mask, generation_config, seed, jit_compile, parameters, extras)
    if streamer is None:
        for _ in run.chunks(CHUNK):
            pass
    else:
        check_streaming(run)
        streamer.put(run.prompt.ids)
        for tokens in run.chunks(1):
            for column in tokens.T:
                streamer.put(column)
        streamer.end()
    return run.result()
