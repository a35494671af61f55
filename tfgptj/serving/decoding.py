"""Generation within one graph: prefill and loop of :mod:`tfgptj.generation`, with numbers of each row's own."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tfgptj.errors import GenerationError
from tfgptj.generation import loop
from tfgptj.generation.chain import Names, Numbers, build_chain
from tfgptj.generation.config import DEFAULT_NEW_TOKENS, GenerationConfig
from tfgptj.generation.parameters import DEFAULTS
from tfgptj.generation.run import resolve_config
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.serving.requests import Caps, Rows, aligned_right, checked, of_each_row, within
from tfgptj.serving.streams import random_rows

# Parameters that a graph cannot follow, or that have no meaning in one.
NOT_SERVED = (
    *("max_length", "max_time", "stop_strings", "num_return_sequences", "guidance_scale", "penalty_alpha"),
    *("prompt_lookup_num_tokens", "prefill_chunk_size", "return_dict_in_generate", "num_beam_groups"),
)
MAX_SEED = 2**63 - 1
HIGHEST_TEMPERATURE = 1e6  # of what is colder than 1e-30, nothing is drawn


class Sampling(NamedTuple):
    """How the tokens of each row are chosen, [B] each."""

    max_new_tokens: Any  # int32
    temperature: Any  # float32, 0 for the likeliest token
    top_k: Any  # int32, 0 for no cut
    top_p: Any  # float32, 1 for no cut
    seed: Any  # int64, -1 to draw anew


class Continued(NamedTuple):
    """What was added to rows."""

    ids: Any  # int32 [B, M], filled up with the pad token
    lengths: Any  # int32 [B], an end-of-text token included
    ended: Any  # bool [B], whether there is one


def served_config(
    model: TFGPTJForCausalLM, given: GenerationConfig | None, parameters: dict[str, Any]
) -> GenerationConfig:
    """The parameters of an export, of the same sources as those of `generate`.

    Raises:
        GenerationError: for parameters that a graph cannot follow.
    """
    config = resolve_config(model, given, parameters)
    for name in NOT_SERVED:
        if getattr(config, name) not in (None, False, DEFAULTS[name], []):
            hint = "set max_new_tokens" if name == "max_length" else f"leave it at {DEFAULTS[name]!r}"
            raise GenerationError(f"{name}={getattr(config, name)!r} cannot be served: {hint}")
    if config.num_beams > 1 and config.samples:
        raise GenerationError(
            f"do_sample=True cannot be served with num_beams={config.num_beams}: set do_sample=False, or one beam"
        )
    room = new_tokens(config)
    if room >= model.config.n_positions:
        raise GenerationError(
            f"max_new_tokens={room} leaves no room for a prompt: the model has n_positions={model.config.n_positions}"
        )
    return config


def new_tokens(config: GenerationConfig) -> int:
    """Tokens to add, where a request does not say how many."""
    return int(config.max_new_tokens or DEFAULT_NEW_TOKENS)


def fixed_sampling(config: GenerationConfig, seed: int | None, rows: Any) -> Sampling:
    """A configuration's numbers for each row of a tensor [B, …]."""

    def repeated(value: Any, dtype: str) -> Any:
        return tf.fill(tf.shape(rows)[:1], tf.constant(value, dtype))

    return Sampling(
        repeated(new_tokens(config), "int32"),
        repeated(config.temperature if config.samples else 0.0, "float32"),
        repeated(config.top_k or 0, "int32"),
        repeated(config.top_p, "float32"),
        repeated(-1 if seed is None else seed, "int64"),
    )


class Continuation:
    """Continues rows of token ids in a graph: one function, that all signatures share.

    Args:
        model: the language model.
        config: from :func:`served_config`.
        caps: what a request may ask for.
    """

    def __init__(self, model: TFGPTJForCausalLM, config: GenerationConfig, caps: Caps) -> None:
        self.model, self.config, self.caps = model, config, caps
        self._names, self._numbers = self._chain()
        ids, row = tf.TensorSpec([None, None], "int32"), tf.TensorSpec([None], "int32")
        whole, real = row, tf.TensorSpec([None], "float32")
        sampling = Sampling(whole, real, whole, real, tf.TensorSpec([None], "int64"))
        self._program = tf.function(self._continued, input_signature=[ids, row, sampling], autograph=False)

    def __call__(self, ids: Any, lengths: Any, sampling: Sampling, what: str) -> Continued:
        """Continue rows of ids int32 [B, T], lengths int32 [B]; `what` is their name in messages."""
        sampling = self._checked(sampling, ids)
        ids, lengths = self.caps.check_rows(ids, lengths, sampling.max_new_tokens, what, self.config.num_beams)
        sampling = Sampling(*(checked(values, lambda: [ids]) for values in sampling))  # nothing begins before
        return Continued(*self._program(ids, lengths, sampling))

    @property
    def pad_token(self) -> int:
        """What rows are filled up with."""
        if self.config.pad_token_id is not None:
            return int(self.config.pad_token_id)
        return int(self.config.eos_token_ids[0]) if self.config.eos_token_ids else 0

    def _chain(self) -> tuple[Names, Numbers]:
        return row_chain(self.config)

    def _checked(self, sampling: Sampling, rows: Any) -> Sampling:
        given = Sampling(*(of_each_row(name, values, rows) for name, values in sampling._asdict().items()))
        return Sampling(
            within("max_new_tokens", given.max_new_tokens, 1, self.model.config.n_positions),
            within("temperature", given.temperature, 0.0, HIGHEST_TEMPERATURE),
            within("top_k", given.top_k, 0, 2**31 - 1),
            within("top_p", given.top_p, 0.0, 1.0),
            within("seed", given.seed, -1, MAX_SEED),
        )

    def _continued(self, ids: Any, lengths: Any, sampling: Sampling) -> Continued:
        sampling = Sampling(*sampling)
        room = tf.reduce_max(sampling.max_new_tokens)
        ids, real = self._with_room(ids, lengths, room)
        controls = self._controls(sampling, room)
        plan = loop.Plan(do_sample=True, processors=self._names)
        state = loop.prefill(self.model, plan, ids, real, controls)
        state = loop.decode(self.model, plan, state, room, controls)
        new = checked(state.ids[:, tf.shape(ids)[1] - room :], lambda: sound(state))
        return self._cut(new, tf.minimum(state.step, sampling.max_new_tokens), controls.eos)

    def _with_room(self, ids: Any, lengths: Any, room: Any) -> Rows:
        """Rows as generation has them, with so many slots behind: ids, and where they have tokens."""
        ids, real = aligned_right(ids, lengths)
        padding = tf.stack([[0, 0], tf.stack([0, room])])
        return tf.pad(ids, padding, constant_values=self.pad_token), tf.pad(real, padding)

    def _controls(self, sampling: Sampling, room: Any) -> loop.Controls:
        drawn = tf.raw_ops.RandomUniformInt(
            shape=tf.shape(sampling.seed), minval=tf.constant(0, "int64"), maxval=MAX_SEED
        )
        seeds = tf.where(sampling.seed < 0, drawn, sampling.seed)
        uniforms = random_rows(seeds, room, self.model.config.n_positions)
        # So cold that only the likeliest tokens have a probability: the first of them is drawn.
        uniforms = tf.where(sampling.temperature[:, None] == 0, 0.0, uniforms)
        of_rows = {
            "temperature": (tf.maximum(sampling.temperature, 1e-30)[:, None],),
            "cutoffs": (sampling.top_k[:, None], sampling.top_p[:, None]),
        }
        pairs = zip(self._names, self._numbers, strict=True)
        return loop.Controls(
            processors=tuple(of_rows.get(name, tuple(map(tf.constant, numbers))) for (name, _), numbers in pairs),
            eos=tf.constant(self.config.eos_token_ids, "int32"),
            pad=tf.constant(self.pad_token, "int32"),
            limit=sampling.max_new_tokens,
            uniforms=uniforms,
        )

    def _cut(self, new: Any, steps: Any, eos: Any) -> Continued:
        """New tokens [B, M] up to the end of each row, without columns that no row has."""
        columns = tf.range(tf.shape(new)[1])[None]  # [1, M]
        is_end = tf.reduce_any(new[:, :, None] == eos, axis=2) & (columns < steps[:, None])  # [B, M]
        ended = tf.reduce_any(is_end, axis=1)
        first = tf.argmax(tf.cast(is_end, "int32"), axis=1, output_type=tf.int32)
        lengths = tf.where(ended, first + 1, steps)
        new = tf.where(columns < lengths[:, None], new, self.pad_token)
        return Continued(new[:, : tf.reduce_max(lengths)], lengths, ended)


def row_chain(config: GenerationConfig) -> tuple[Names, Numbers]:
    """The chain of a configuration, with temperature, top-k and top-p of each row."""
    names, numbers = build_chain(config.merged({"do_sample": True, "temperature": 0.5, "top_k": 1, "top_p": 0.5}))
    chain = [pair for pair in zip(names, numbers, strict=True) if pair[0][0] != "top_p"]
    chain = [(("cutoffs", ()), ()) if name == "top_k" else ((name, static), values) for (name, static), values in chain]
    return tuple(name for name, _ in chain), tuple(values for _, values in chain)


def sound(state: loop.State) -> list[Any]:
    """That the model gave numbers, and left a token to choose."""
    return [
        tf.debugging.Assert(
            state.finite, ["the model produced NaN or infinite logits: check its weights and its dtype"]
        ),
        tf.debugging.Assert(state.possible, ["every token was forbidden: loosen the parameters that forbid tokens"]),
    ]
