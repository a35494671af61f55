"""`generate`: token ids in, token ids out; and the same step by step for streaming."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import keras
import numpy as np
from keras import ops

from tfgptj.errors import GenerationError, InputError, NonFiniteLogitsError
from tfgptj.generation import beams, contrastive, loop
from tfgptj.generation.chain import build_chain
from tfgptj.generation.compiling import Compiled
from tfgptj.generation.config import DEFAULT_NEW_TOKENS, GenerationConfig
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.inputs import complete_inputs, concrete

# Tokens per call into the compiled loop: between calls Ctrl-C is heard and the numbers are checked. A call copies the
# cache once, which at 16 tokens is under one percent of what they cost.
CHUNK = 16


def generate(
    model: TFGPTJForCausalLM,
    input_ids: Any = None,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    streamer: Any = None,
    seed: int | None = None,
    jit_compile: bool | None = None,
    **parameters: Any,
) -> np.ndarray:
    """Continue token ids.

    Args:
        input_ids: int [B, P], or None for one row of `bos_token_id`. Shorter rows are padded, on either side.
        attention_mask: int or bool [B, P], 1 for real tokens; None when there is no padding. It is never guessed.
        generation_config: a :class:`GenerationConfig`. What is given wins in this order: keyword arguments, this, the
            model's `generation_config` (from its `generation_config.json`), the model's special tokens, the defaults.
        streamer: an object with `put(ids)` and `end()`, given the prompt [B, P] and then each step's tokens [B].
        seed: int >= 0; the same seed draws the same tokens, whatever the other rows of the batch are and on every
            backend up to rounding of the logits. None draws anew at each call.
        jit_compile: compile with XLA on TensorFlow; None means on GPUs only, where it pays.
        **parameters: any parameter of :class:`GenerationConfig`.

    Returns:
        int32 [B · num_return_sequences, P + new], prompt included; finished rows are filled with `pad_token_id`.

    Raises:
        InputError: for ids out of range, rows without a token, prompt and continuation over `n_positions`.
        GenerationError: for parameters that are unknown or contradict each other.
        NonFiniteLogitsError: when the model produces NaN or infinite logits.

    >>> from tfgptj.config import GPTJConfig
    >>> tiny = GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, eos_token_id=None)
    >>> TFGPTJForCausalLM(tiny).generate([[1, 2, 3]], max_new_tokens=4).shape
    (1, 7)
    """
    run = Run(model, input_ids, attention_mask, generation_config, seed, jit_compile, parameters)
    if streamer is None:
        for _ in run.chunks(CHUNK):
            pass
    else:
        beams.check_streaming(run.config)
        streamer.put(run.prompt)
        for tokens in run.chunks(1):
            streamer.put(tokens[:, 0])
        streamer.end()
    tokens = run.tokens()
    return np.concatenate([np.repeat(run.prompt, len(tokens) // len(run.prompt), axis=0), tokens], axis=1)


class Run:
    """One generation: parameters resolved and checked, the prompt laid out, tokens produced chunk by chunk."""

    def __init__(
        self,
        model: TFGPTJForCausalLM,
        input_ids: Any,
        attention_mask: Any,
        generation_config: GenerationConfig | None,
        seed: int | None,
        jit_compile: bool | None,
        parameters: dict[str, Any],
    ) -> None:
        self.model = model
        self.config = resolve_config(model, generation_config, parameters)
        self.prompt, self.mask = _prompt(model, input_ids, attention_mask, self.config)
        self.room = _room(model, self.mask, self.config)
        self.jit_compile = _has_gpu() if jit_compile is None else jit_compile
        names, self.numbers = build_chain(self.config)
        sampled = self.config.do_sample and self.config.temperature != 0
        self.strategy, search = _strategy(self.config)
        self.plan = loop.Plan(do_sample=sampled, processors=names, search=search)
        self.draws = search.draws if self.strategy is beams else 1
        self.uniforms = _uniforms(seed, self.prompt.shape[0], self.room * self.draws, sampled)
        self.state: loop.State | None = None

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Produce the new tokens, int32 [B, <= size] at a time, until all rows are finished or full."""
        controls, done = self._controls(), 0
        while done < self.room and not (self.state is not None and bool(np.all(to_numpy(self.state.finished)))):
            if self.state is None:
                self.state = self._compiled("prefill")(self.plan, *self._laid_out(), controls)
            limit = ops.convert_to_tensor(min(done + size, self.room), dtype="int32")
            if int(self.state.step) < int(limit):
                self.state = self._compiled("decode")(self.plan, self.state, limit, controls)
            self._check(self.state)
            yield self.tokens()[:, done:]
            done = int(self.state.step)

    def tokens(self) -> np.ndarray:
        """The new tokens so far, int32 [B, new]; of beams those of the best texts, [B · num_return_sequences, new]."""
        assert self.state is not None  # chunks() ran
        if self.strategy is beams:
            return self.found().tokens
        start, stop = int(self.state.slot) - int(self.state.step), int(self.state.slot)
        return to_numpy(self.state.ids)[:, start:stop]

    def found(self) -> beams.Result:
        """What beams have found so far."""
        assert self.state is not None  # chunks() ran
        return beams.result_of(self.config, *(to_numpy(table) for table in self.state.search.found))

    def search(self, keep: bool = False) -> beams.Result:
        """Run a search with beams to its end; `keep` asks for each step's scores and logits."""
        self.plan = self.plan._replace(search=self.plan.search._replace(keep=keep))
        kept: list[tuple[np.ndarray, ...]] = []
        for _ in self.chunks(1 if keep else CHUNK):
            if keep:
                assert self.state is not None  # chunks() sets it
                kept.append((to_numpy(self.state.search.step_scores), to_numpy(self.state.search.step_logits)))
        scores, logits = (np.stack(steps) for steps in zip(*kept, strict=True)) if keep else (None, None)
        return self.found()._replace(step_scores=scores, step_logits=logits)

    def _check(self, state: loop.State) -> None:
        step = int(state.step)
        if not bool(state.finite):
            raise NonFiniteLogitsError(
                f"the model produced NaN or infinite logits within {step} new tokens: "
                "check its weights (tfgptj validate) and its dtype (float16 overflows where bfloat16 does not)"
            )
        if not bool(state.possible):
            raise NonFiniteLogitsError(
                f"within {step} new tokens every token of the vocabulary was forbidden: loosen the parameters that "
                f"forbid tokens: {self.config!r}"
            )

    def _compiled(self, name: str) -> Compiled:
        programs = self.model.__dict__.setdefault("_generation_programs", {})
        key = (name, self.jit_compile, self.strategy.__name__)
        if key not in programs:
            programs[key] = Compiled(self.model, getattr(self.strategy, name), self.jit_compile)
        return programs[key]

    def _size(self, length: int) -> int:
        """Slots for so many tokens: rounded up where shapes are fixed in compiled programs."""
        backend = keras.backend.backend()
        return bucket(length) if backend == "jax" or (backend == "tensorflow" and self.jit_compile) else length

    def _laid_out(self) -> tuple[Any, Any]:
        """Ids int32 [B, S] and where there are tokens, bool [B, S]: prompts to the right, then room for new tokens."""
        ids, mask = align_right(self.prompt, self.mask)
        room = self._size(self.room)
        padding = ((0, 0), (self._size(ids.shape[1]) - ids.shape[1], room))
        ids = np.pad(ids, padding, constant_values=self._pad_token())
        return ops.convert_to_tensor(ids), ops.convert_to_tensor(np.pad(mask, padding))

    def _pad_token(self) -> int:
        if self.config.pad_token_id is not None:
            return self.config.pad_token_id
        return self.config.eos_token_ids[0] if self.config.eos_token_ids else 0

    def _controls(self) -> loop.Controls:
        uniforms = np.pad(self.uniforms, ((0, 0), (0, (self._size(self.room) - self.room) * self.draws)))
        weight = {beams: self.config.length_penalty, contrastive: self.config.penalty_alpha}.get(self.strategy)
        return loop.Controls(
            processors=tuple(tuple(ops.convert_to_tensor(value) for value in values) for values in self.numbers),
            eos=ops.convert_to_tensor(np.asarray(self.config.eos_token_ids, "int32")),
            pad=ops.convert_to_tensor(self._pad_token(), dtype="int32"),
            limit=ops.convert_to_tensor(self.room, dtype="int32"),
            uniforms=ops.convert_to_tensor(uniforms, dtype="float32"),
            search=() if weight is None else ops.convert_to_tensor(weight, dtype="float32"),
        )


def resolve_config(
    model: TFGPTJForCausalLM, generation_config: GenerationConfig | None, parameters: dict[str, Any]
) -> GenerationConfig:
    """All sources of parameters merged, the later winning: model config, model's file, given config, keywords."""
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise GenerationError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}")
    own = getattr(model, "generation_config", None)
    merged = GenerationConfig.from_model_config(model.config).merged(own, generation_config, parameters)
    strategy, _ = _strategy(merged)
    if merged.num_return_sequences > 1 and not merged.do_sample and strategy is loop:
        raise GenerationError(
            "num_return_sequences > 1 needs do_sample=True or as many beams: without them all would be the same"
        )
    return merged


def _strategy(config: GenerationConfig) -> tuple[ModuleType, Any]:
    """The module that generates as a configuration asks, and what it fixes in the graph."""
    rules, candidates = beams.rules_of(config), contrastive.candidates_of(config)
    if candidates is not None:
        return contrastive, candidates
    return (loop, None) if rules is None else (beams, rules)


def align_right(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The real tokens of each row moved to its end, without columns that no row needs.

    >>> align_right(np.array([[5, 6, 0, 0], [0, 7, 8, 9]]), np.array([[1, 1, 0, 0], [0, 1, 1, 1]], bool))[0]
    array([[0, 5, 6],
           [7, 8, 9]])
    """
    order = np.argsort(mask, axis=1, kind="stable")[:, -int(mask.sum(axis=1).max()) :]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(mask, order, axis=1)


def bucket(length: int) -> int:
    """Round a length up to 16, 24, 32, 48, 64, 96, …: under a third of waste, few sizes to compile for."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor's values on the host."""
    return np.asarray(ops.convert_to_numpy(tensor))


def _prompt(
    model: TFGPTJForCausalLM, input_ids: Any, attention_mask: Any, config: GenerationConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [B, P] and mask bool [B, P], one row per returned sequence; with beams one per prompt."""
    if input_ids is None:
        if config.bos_token_id is None:
            raise GenerationError("there is neither a prompt nor a bos_token_id to start from: give input_ids")
        input_ids = np.array([[config.bos_token_id]])
    checked = complete_inputs({"input_ids": input_ids, "attention_mask": attention_mask}, model.config)
    ids, mask = concrete(checked["input_ids"]), checked["attention_mask"]
    if ids is None:
        raise GenerationError("generate() cannot be called inside a compiled function: it compiles its own loop")
    real = np.ones(ids.shape, bool) if mask is None else np.asarray(concrete(mask)).astype(bool)
    if not real.any(axis=1).all():
        row = int(np.argmin(real.any(axis=1)))
        raise InputError(f"row {row} of the prompt has no token: its attention_mask is all 0")
    repeats = config.num_return_sequences if config.num_beams == 1 else 1
    return np.repeat(ids, repeats, axis=0), np.repeat(real, repeats, axis=0)


def _room(model: TFGPTJForCausalLM, mask: np.ndarray, config: GenerationConfig) -> int:
    """New tokens at most, checked against the model's positions."""
    longest, limit = int(mask.sum(axis=1).max()), model.config.n_positions
    if config.max_new_tokens is not None:
        room = config.max_new_tokens
    elif config.max_length is not None:
        room = config.max_length - mask.shape[1]
        if room < 1:
            raise GenerationError(
                f"max_length={config.max_length} leaves no room after a prompt of {mask.shape[1]} tokens; "
                "set max_new_tokens instead"
            )
    else:
        room = max(1, min(DEFAULT_NEW_TOKENS, limit - longest))
    if longest + room > limit:
        raise InputError(
            f"a prompt of {longest} tokens and {room} new ones are {longest + room}, over n_positions={limit}: "
            f"shorten the prompt or set max_new_tokens to at most {max(limit - longest, 0)}"
        )
    return room


def _uniforms(seed: int | None, rows: int, steps: int, do_sample: bool) -> np.ndarray:
    """Random numbers float32 [B, M]: a stream of its own for each row, so that no row depends on its neighbours."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
        raise GenerationError(f"seed must be an integer of at least 0, got {seed!r}")
    if not do_sample:
        return np.zeros((rows, steps), "float32")
    root = np.random.SeedSequence(None if seed is None else int(seed))
    return np.stack([np.random.default_rng(child).random(steps, dtype="float32") for child in root.spawn(rows)])


def _has_gpu() -> bool:
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU"))
