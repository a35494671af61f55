"""`generate`: token ids in, token ids out; and the same step by step for streaming."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from tfgptj.errors import GenerationError, NonFiniteLogitsError
from tfgptj.generation import beams, contrastive, loop, memory, prompts, stepping
from tfgptj.generation.chain import build_chain
from tfgptj.generation.compiling import Compiled
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.functions import Functions, functions_of, listed
from tfgptj.generation.prompts import Rows
from tfgptj.generation.results import GenerationOutput, Records
from tfgptj.generation.stopping import Criterion, Ends, check_stops
from tfgptj.generation.strategies import check_combined, strategy_of
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.tokenizer import GPTJTokenizer

# Tokens per call into the compiled loop: between calls Ctrl-C is heard and the numbers are checked. A call copies the
# cache once, which at 16 tokens is under one percent of what they cost.
CHUNK = 16


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
        logits_processor: a function `f(input_ids, scores)`, or a list of them, called at each step for each row that
            has not ended: NumPy's int32 [1, n], the row's tokens, prompt included and padding not, and float32 [1, V],
            -inf for forbidden tokens. It returns scores of that shape, -inf to forbid. It comes after all processors of
            the configuration but those of sampling.
        stopping_criteria: a function `f(input_ids, scores)`, or a list of them, called after each step with int32
            [B, P + n], what `generate` would return now, and a tuple of the scores so far, or None unless
            `output_scores`. It returns a bool, or one for each row [B]: whether to stop.
        prefix_allowed_tokens_fn: a function `f(row, input_ids)` that gets a row's number and its tokens, int32 [n], and
            returns the ids that may follow. It comes after `min_new_tokens`.
        negative_prompt_ids, negative_prompt_attention_mask: what `guidance_scale` leads away from, int [B, P2] or
            [1, P2]; without them the last token of each prompt.
        assistant_model: not supported yet.
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
    if assistant_model is not None:
        raise GenerationError("assistant_model is not supported by tfgptj; leave it out")
    extras = Extras(
        functions=functions_of(logits_processor, prefix_allowed_tokens_fn),
        criteria=listed("stopping_criteria", stopping_criteria),
        negative=(negative_prompt_ids, negative_prompt_attention_mask),
        tokenizer=tokenizer,
    )
    run = Run(model, input_ids, attention_mask, generation_config, seed, jit_compile, parameters, extras)
    if streamer is None:
        for _ in run.chunks(CHUNK):
            pass
    else:
        beams.check_streaming(run.config)
        streamer.put(run.prompt.ids)
        for tokens in run.chunks(1):
            streamer.put(tokens[:, 0])
        streamer.end()
    return run.result()


class Extras(NamedTuple):
    """What a generation may need that is no parameter: see the arguments of :func:`generate`."""

    functions: Functions = Functions()
    criteria: tuple[Criterion, ...] = ()
    negative: tuple[Any, Any] = (None, None)
    tokenizer: GPTJTokenizer | None = None


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
        extras: Extras = Extras(),
    ) -> None:
        self.model, self.extras = model, extras
        self.config = resolve_config(model, generation_config, parameters)
        self.strategy, search = strategy_of(self.config)
        check_combined(self.strategy, self.config, extras.functions, extras.criteria)
        check_stops(self.config, extras.tokenizer)
        prompts.check_seed(seed)
        names, self.numbers = build_chain(self.config, extras.functions.names)
        self.plan = loop.Plan(do_sample=self.config.samples, processors=names, search=search)
        self.prompt, self.negative = self._rows(input_ids, attention_mask)
        every = self.prompt if self.negative is None else prompts.stacked(self.prompt, self.negative)
        self.room = prompts.room_after(every, model.config.n_positions, self.config)
        self.jit_compile = _has_gpu() if jit_compile is None else jit_compile
        rows = len(self.prompt.ids)
        self.draws = search.draws if self.strategy is beams else 1  # random numbers for each row and step
        size = self.room * self.draws
        self.uniforms = (
            prompts.random_rows(seed, rows, size) if self.plan.do_sample else np.zeros((rows, size), "float32")
        )

    def part(self, rows: slice) -> Run:
        """Some rows of a generation that has not begun, as a generation of their own.

        Each row keeps the random numbers that it has among all, so that texts do not depend on the batch size.
        """
        part = copy.copy(self)
        part.prompt, part.uniforms = self.prompt.of(rows), self.uniforms[rows]
        part.negative = None if self.negative is None else self.negative.of(rows)
        return part

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Produce the new tokens, int32 [B, <= size] at a time, until all rows are finished or full.

        Raises:
            ResourceLimitError: when there is not enough memory.
        """
        self._check_memory()
        rows, width = self.prompt.ids.shape
        self.state: loop.State | None = None
        self.new = np.zeros((rows, 0), "int32")  # the new tokens so far
        self.ends = Ends(self.config, rows, self.extras.tokenizer, self.extras.criteria)
        self.records = Records(self.config, rows * self.config.num_beams, width)
        self.stepper: stepping.Stepper | None = None
        if self.strategy is loop and (self.records.wanted or self.extras.functions.names):
            controls = self._controls()
            self.stepper = stepping.Stepper(self._compiled, self.plan, self.extras.functions, controls, self.records)
        return self._chunks(1 if self.records.wanted or self.stepper or self.ends.step_by_step else size)

    def result(self) -> np.ndarray | GenerationOutput:
        """What `generate` returns, once all chunks are there."""
        sequences = self._sequences()
        if not self.config.return_dict_in_generate:
            return sequences
        output = self.records.output(sequences)
        if self.strategy is beams:
            found = self.found()
            output = dataclasses.replace(output, sequences_scores=found.scores, beam_indices=found.beam_indices)
        return output

    def found(self) -> beams.Result:
        """What beams have found so far."""
        assert self.state is not None  # chunks() ran
        return beams.result_of(self.config, *(to_numpy(table) for table in self.state.search.found))

    def tokens(self, row: int) -> np.ndarray:
        """The new tokens of a row, int32 [n], the last of which may be an end-of-text token."""
        length = int(self.ends.lengths[row])
        return self.new[row] if length < 0 else self.new[row, :length]

    def _chunks(self, size: int) -> Iterator[np.ndarray]:
        controls = self._controls()
        done = 0
        while done < self.room and not self.ends.all_ended:
            self._advance(min(done + size, self.room), controls)
            if self.strategy is beams:
                self._take_found()
            else:
                self._take(done)
            yield self.new[:, done:]
            if self.ends.out_of_time:
                break
            assert self.state is not None  # _advance made it
            done = int(self.state.step)

    def _advance(self, limit: int, controls: loop.Controls) -> None:
        """Run the model until the rows have `limit` new tokens, or have all ended."""
        first = self._laid_out() if self.state is None else ()
        if self.stepper is not None:
            self.state = self.stepper.step(self.state, *first)
        else:
            if self.state is None:
                self.state = self._compiled("prefill")(self.plan, *first, controls)
            if int(self.state.step) < limit:
                bound = ops.convert_to_tensor(limit, dtype="int32")
                self.state = self._compiled("decode")(self.plan, self.state, bound, controls)
        self._check(self.state)

    def _take(self, done: int) -> None:
        """Bring the tokens after `done` to the host, and see which rows they end."""
        assert self.state is not None  # _advance made it
        stop = int(self.state.slot)
        fresh = to_numpy(self.state.ids)[: len(self.new), stop - int(self.state.step) + done : stop]
        self.ends.look(fresh, done)
        self.new = self.ends.padded(np.concatenate([self.new, fresh], axis=1), self._pad_token())
        scores = self.records.scores
        self.ends.ask(self._sequences(), None if scores is None else tuple(scores), self.new.shape[1])
        if self.ends.beyond_the_loop:
            self.state = self.state._replace(finished=ops.convert_to_tensor(self.ends.lengths >= 0))

    def _take_found(self) -> None:
        """The same with beams: the best texts so far, which are what they come to once all are closed."""
        assert self.state is not None  # _advance made it
        if self.records.wanted:
            search = self.state.search
            self.records.add(search.step_logits, search.step_scores, (), int(self.state.slot), int(self.state.step))
        found = self.found()
        self.new = found.tokens
        if to_numpy(self.state.finished).all():
            self.ends.lengths = (found.beam_indices >= 0).sum(axis=1)

    def _sequences(self) -> np.ndarray:
        returned = len(self.new) // len(self.prompt.ids)  # by beams; other rows are there from the beginning
        return np.concatenate([np.repeat(self.prompt.ids, returned, axis=0), self.new], axis=1)

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

    def _check_memory(self) -> None:
        if _on_accelerator():
            return  # how much of its memory is free is not known
        rows = len(self.prompt.ids) * (1 + self.plan.guided)
        prompt, room = self._size(self.prompt.longest), self._size(self.room)
        itemsize = 4 if self.model.compute_dtype == "float32" else 2
        if self.strategy is beams:
            room *= self.config.num_beams  # they share the prompt
        needed = memory.needed_memory(self.model.config, rows, prompt, room, itemsize)
        memory.check_memory(needed, memory.available_memory(), rows, prompt + room)

    def _compiled(self, name: str) -> Compiled:
        programs = self.model.__dict__.setdefault("_generation_programs", {})
        key = (name, self.jit_compile, self.strategy.__name__)
        if key not in programs:
            function = getattr(self.strategy, name, None) or getattr(stepping, name)
            programs[key] = Compiled(self.model, function, self.jit_compile)
        return programs[key]

    def _rows(self, input_ids: Any, attention_mask: Any) -> tuple[Rows, Rows | None]:
        """Prompts, one row per returned sequence, with beams one each; and negative prompts if there is guidance."""
        if input_ids is None:
            if self.config.bos_token_id is None:
                raise GenerationError("there is neither a prompt nor a bos_token_id to start from: give input_ids")
            input_ids = np.array([[self.config.bos_token_id]])
        prompt = prompts.read_rows(self.model.config, input_ids, attention_mask)
        repeats = 1 if self.strategy is beams else self.config.num_return_sequences
        if self.plan.guided:
            negative = prompts.negative_rows(self.model.config, *self.extras.negative, prompt)
            return prompt.repeated(repeats), negative.repeated(repeats)
        if any(given is not None for given in self.extras.negative):
            raise GenerationError("negative_prompt_ids have no effect without a guidance_scale")
        return prompt.repeated(repeats), None

    def _size(self, length: int) -> int:
        """Slots for so many tokens: rounded up where shapes are fixed in compiled programs."""
        backend = keras.backend.backend()
        fixed = backend == "jax" or (backend == "tensorflow" and self.jit_compile)
        return prompts.bucket(length) if fixed else length

    def _laid_out(self) -> tuple[Any, Any]:
        """Ids int32 [B, S] and where there are tokens, bool [B, S]: prompts to the right, then room for new tokens."""
        rows = prompts.align_right(self.prompt)
        if self.negative is not None:
            rows = prompts.stacked(rows, prompts.align_right(self.negative))
        width = rows.ids.shape[1]
        padding = ((0, 0), (self._size(width) - width, self._size(self.room)))
        # A model may have no row for the pad token. In front of a prompt any other is masked just as well.
        ids = np.pad(rows.ids, padding, constant_values=((0, 0), (0, self._pad_token())))
        return ops.convert_to_tensor(ids), ops.convert_to_tensor(np.pad(rows.real, padding))

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
    """All sources of parameters merged, the later winning: model config, model's file, given config, keywords.

    Raises:
        GenerationError: for parameters that are unknown, contradict each other, or name tokens that there are not.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise GenerationError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}")
    own = getattr(model, "generation_config", None)
    merged = GenerationConfig.from_model_config(model.config).merged(own, generation_config, parameters)
    merged.check_together()
    prompts.check_tokens(merged, model.config.vocab_size)
    return merged


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor's values on the host."""
    return np.asarray(ops.convert_to_numpy(tensor))


def _on_accelerator() -> bool:
    return "cpu" not in str(ops.zeros(()).device).lower()


def _has_gpu() -> bool:
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU"))
