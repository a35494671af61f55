"""One generation on the host's side: parameters resolved, prompts laid out, tokens produced chunk by chunk."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from tfgptj.errors import GenerationError, NonFiniteLogitsError
from tfgptj.generation import caches, loop, memory, prefix_cache, prompts, reading, stepping
from tfgptj.generation.casting import cast_bytes
from tfgptj.generation.chain import build_chain
from tfgptj.generation.compiling import Compiled, runs_itself, to_numpy
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.functions import Functions
from tfgptj.generation.prefix_cache import PrefixCache
from tfgptj.generation.prompts import Rows
from tfgptj.generation.results import GenerationOutput, Records
from tfgptj.generation.stopping import Criterion, Ends, check_stops
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.tokenizer import GPTJTokenizer

# Tokens per call into the compiled loop: between calls Ctrl-C is heard and the numbers are checked. A call copies the
# cache once, which at 16 tokens is under one percent of what they cost.
CHUNK = 16


class Extras(NamedTuple):
    """What a generation may need that is no parameter; :func:`tfgptj.generation.generate.generate` says what it is."""

    functions: Functions = Functions()
    criteria: tuple[Criterion, ...] = ()
    negative: tuple[Any, Any] = (None, None)
    tokenizer: GPTJTokenizer | None = None
    assistant: Any = None
    prefix_cache: PrefixCache | None = None


class Run:
    """One generation that chooses a token for each row and goes on with it, greedily or at random.

    Searches are subclasses: they have compiled functions of their own, and answer what differs for them.

    Args:
        config: the parameters, complete: see :func:`resolve_config`.
        extras: see there.
        model, input_ids, attention_mask, seed, jit_compile: see :func:`tfgptj.generation.generate.generate`.
    """

    functions: ModuleType = loop  # has the functions that `compiles` names, those of the whole loop
    compiles: tuple[str, ...] = ("prefill", "decode")
    steps: ModuleType = stepping  # has what makes one step
    streams = True  # whether tokens are final as they come
    needs_hidden = False  # whether it compares with the hidden states of the whole prompt

    def __init__(
        self,
        model: TFGPTJForCausalLM,
        input_ids: Any,
        attention_mask: Any,
        config: GenerationConfig,
        seed: int | None = None,
        jit_compile: bool | None = None,
        extras: Extras = Extras(),
    ) -> None:
        self.model, self.config, self.extras = model, config, extras
        self.jit_compile = _has_gpu() if jit_compile is None else jit_compile
        prefix_cache.check_cache(extras.prefix_cache)
        reading.check_reading(config, extras.prefix_cache is not None, self.needs_hidden)
        check_stops(config, extras.tokenizer)
        prompts.check_seed(seed)
        names, self.numbers = build_chain(config, extras.functions.names)
        self.plan = loop.Plan(do_sample=config.samples, processors=names, search=self.search)
        self.prompt, self.negative = self._rows(input_ids, attention_mask)
        every = self.prompt if self.negative is None else prompts.stacked(self.prompt, self.negative)
        self.room = prompts.room_after(every, model.config.n_positions, config)
        rows, size = len(self.prompt.ids), self.room * self.draws
        self.uniforms = (
            prompts.random_rows(seed, rows, size) if self.plan.do_sample else np.zeros((rows, size), "float32")
        )

    @property
    def search(self) -> Any:
        """What a search fixes in its graph: `Plan.search`."""
        return None

    @property
    def weight(self) -> float | None:
        """The number of a search: `Controls.search`."""
        return None

    @property
    def draws(self) -> int:
        """Random numbers for each row and step."""
        return 1

    @property
    def repeats(self) -> int:
        """Rows for each prompt."""
        return self.config.num_return_sequences

    @property
    def spare(self) -> int:
        """Slots after those of the new tokens."""
        return 0

    @property
    def owner(self) -> Any:
        """What compiled functions of `functions` are called with, and have the variables of."""
        return self.model

    def _slots(self, room: int) -> int:
        """Slots in the cache of a row, after its prompt, for so many new tokens."""
        return room

    def _beside(self, rows: int, prompt: int, room: int) -> int:
        """Bytes that are needed beside keys, values and attention, of so many rows."""
        return 0

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
        self.mark, self.reading = self._find()
        self._check_memory()
        rows, width = self.prompt.ids.shape
        self.state: loop.State | None = None
        self.new = np.zeros((rows, 0), "int32")  # the new tokens so far
        self.ends = self._new_ends()
        self.records = Records(self.config, rows * self.config.num_beams, width)
        self.stepper = self._new_stepper() if self._needs_steps() else None
        return self._chunks(1 if self.stepper or self.ends.step_by_step else size)

    def _new_ends(self) -> Ends:
        return Ends(self.config, len(self.prompt.ids), self.extras.tokenizer, self.extras.criteria)

    def _needs_steps(self) -> bool:
        """Whether the compiled loop does not do."""
        return self.records.wanted or bool(self.extras.functions.names) or runs_itself(self.model)

    def _new_stepper(self) -> stepping.Stepper:
        return stepping.Stepper(*self._of_steps())

    def _of_steps(self) -> tuple[Any, ...]:
        """The arguments of a :class:`tfgptj.generation.stepping.Stepper`."""
        return self._compiled, self.plan, self.extras.functions, self._controls(), self.records

    def result(self) -> np.ndarray | GenerationOutput:
        """What `generate` returns, once all chunks are there."""
        sequences = self._sequences()
        if not self.config.return_dict_in_generate:
            return sequences
        return self.records.output(sequences)

    def tokens(self, row: int) -> np.ndarray:
        """The new tokens of a row, int32 [n], the last of which may be an end-of-text token."""
        length = int(self.ends.lengths[row])
        return self.new[row] if length < 0 else self.new[row, :length]

    def _chunks(self, size: int) -> Iterator[np.ndarray]:
        controls = self._controls()
        done = 0
        try:
            while done < self.room and not self.ends.all_ended:
                self._advance(min(done + size, self.room), controls)
                self._take(done)
                yield self.new[:, done:]
                if self._is_cut_off():
                    break
                assert self.state is not None  # _advance made it
                done = int(self.state.step)
            self._keep()
        finally:
            self.stepper = None  # it knows the run: neither would be freed, and no cache, before garbage is collected

    def _find(self) -> tuple[bytes, reading.Reading]:
        """What tells the weights from others, and how the prompt is read."""
        rows, cache = self._aligned(), self.extras.prefix_cache
        prompt, columns = self._size(rows.longest), rows.longest
        mark, entry = b"", None
        if cache is not None:
            mark = cache.mark_of(self.model)
            texts = [ids[real] for ids, real in zip(rows.ids, rows.real, strict=True)]
            entry, columns = cache.find(self.model, mark, texts)
        piece = self.config.prefill_chunk_size
        found = reading.reading_of(columns, prompt, piece, self._size, entry, self.needs_hidden)
        if cache is not None:
            cache.last_call = found.reuse(rows.real.sum(axis=1))
        return mark, found

    def _is_cut_off(self) -> bool:
        """Whether time ends what has no end."""
        return self.ends.out_of_time

    def _advance(self, limit: int, controls: loop.Controls) -> None:
        """Run the model until the rows have `limit` new tokens, or have all ended."""
        if self.state is None:
            self.state = self._begin(controls)
            self._check(self.state)
            self._keep()
        elif self.stepper is not None:
            self.state = self.stepper.step(self.state)
        if self.stepper is None and int(self.state.step) < limit:
            bound = ops.convert_to_tensor(limit, dtype="int32")
            self.state = self._compiled("decode")(self.plan, self.state, bound, controls)
        self._check(self.state)

    def _begin(self, controls: loop.Controls) -> loop.State:
        """The state after the first new token."""
        ids, real = self._laid_out()
        past = reading.read_ahead(self.model, self._compiled, self.reading, ids, real)
        if self.stepper is not None:
            return self.stepper.step(None, ids, real, past)
        plan = self.plan._replace(resumed=bool(past))
        return self._compiled("prefill")(plan, ids, real, controls._replace(past=past))

    def _keep(self) -> None:
        """Leave the first row's text, as far as the model has read it, to later calls."""
        cache, state = self.extras.prefix_cache, self.state
        if cache is None or state is None:
            return
        stop = self._slots_read()
        ids, real = (to_numpy(table)[0, :stop] for table in (state.ids, state.real))
        slots = np.flatnonzero(real)[: int(self.prompt.real[0].sum()) + len(self.tokens(0))]

        def copied(count: int) -> Any:
            index = np.pad(slots[:count], (0, self._size(count) - count), mode="edge").astype("int32")
            return self._compiled("moved", caches)(None, state.caches, ops.convert_to_tensor(index[None]))

        cache.keep(self.model, self.mark, ids[slots], copied)

    def _slots_read(self) -> int:
        """The slots that the first row's text may have, of which the model has read it."""
        assert self.state is not None  # chunks() ran
        return int(self.state.slot) - 1  # the newest token is read in the next step

    def _take(self, done: int) -> None:
        """Bring the tokens after `done` to the host, and see which rows they end."""
        assert self.state is not None  # _advance made it
        stop = int(self.state.slot)
        self._append(to_numpy(self.state.ids)[: len(self.new), stop - int(self.state.step) + done : stop], done)
        if self.ends.beyond_the_loop:
            self.state = self.state._replace(finished=ops.convert_to_tensor(self.ends.lengths >= 0))

    def _append(self, fresh: np.ndarray, done: int) -> None:
        self.ends.look(fresh, done)
        self.new = self.ends.padded(np.concatenate([self.new, fresh], axis=1), self._pad_token())
        self.ends.ask(self._sequences(), self.records.so_far, self.new.shape[1])

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
        prompt, room = self._size(self.prompt.longest), self._size(self.room + self.spare)
        slots = self._slots(room)
        needed = self._beside(rows, prompt, room) + cast_bytes(self.model)
        # An assistant reads the prompt whole.
        reads = [(self.model, None if self.reading.whole else self.reading.width), (self.extras.assistant, None)]
        for model, queries in reads:
            if model is not None:
                itemsize = 4 if model.compute_dtype == "float32" else 2
                needed += memory.needed_memory(model.config, rows, prompt, slots, itemsize, queries)
        memory.check_memory(needed, memory.available_memory(), rows, prompt + slots)

    def _compiled(self, name: str, home: ModuleType | None = None) -> Compiled:
        """The program for a function of this search's own modules, or of `home`."""
        programs = self.model.__dict__.setdefault("_generation_programs", {})
        key = (name, self.jit_compile, (home or self.functions).__name__, self.extras.assistant is not None)
        own = home is None and name in self.compiles
        owner = self.owner if own else self.model
        if runs_itself(owner) and home is None and self.steps is stepping and name in stepping.WITHOUT_MODEL:
            owner = self.model.shapes
        if key not in programs or programs[key].model != owner:
            function = getattr(home or (self.functions if own else self.steps), name)
            programs[key] = Compiled(owner, function, self.jit_compile)
        return programs[key]

    def _rows(self, input_ids: Any, attention_mask: Any) -> tuple[Rows, Rows | None]:
        """Prompts, so many rows of each as the strategy needs; and negative prompts if there is guidance."""
        if input_ids is None:
            if self.config.bos_token_id is None:
                raise GenerationError("there is neither a prompt nor a bos_token_id to start from: give input_ids")
            input_ids = np.array([[self.config.bos_token_id]])
        prompt = prompts.read_rows(self.model.config, input_ids, attention_mask)
        if self.plan.guided:
            negative = prompts.negative_rows(self.model.config, *self.extras.negative, prompt)
            return prompt.repeated(self.repeats), negative.repeated(self.repeats)
        if any(given is not None for given in self.extras.negative):
            raise GenerationError("negative_prompt_ids have no effect without a guidance_scale")
        return prompt.repeated(self.repeats), None

    def _size(self, length: int) -> int:
        """Slots for so many tokens: rounded up where shapes are fixed."""
        return prompts.bucket(length) if self.fixed else length

    @property
    def fixed(self) -> bool:
        """Whether shapes are fixed in compiled programs."""
        backend = keras.backend.backend()
        return backend == "jax" or (backend == "tensorflow" and self.jit_compile)

    def _aligned(self) -> Rows:
        """Prompts aligned to the right, those that are negative after all others."""
        rows = prompts.align_right(self.prompt)
        return rows if self.negative is None else prompts.stacked(rows, prompts.align_right(self.negative))

    def _laid_out(self) -> tuple[Any, Any]:
        """Ids int32 [B, S] and where there are tokens, bool [B, S]: prompts to the right, then room for new tokens."""
        rows = self._aligned()
        width = rows.ids.shape[1]
        padding = ((0, 0), (self._size(width) - width, self._size(self.room + self.spare)))
        # A model may have no row for the pad token. In front of a prompt any other is masked just as well.
        ids = np.pad(rows.ids, padding, constant_values=((0, 0), (0, self._pad_token())))
        return ops.convert_to_tensor(ids), ops.convert_to_tensor(np.pad(rows.real, padding))

    def _pad_token(self) -> int:
        if self.config.pad_token_id is not None:
            return self.config.pad_token_id
        return self.config.eos_token_ids[0] if self.config.eos_token_ids else 0

    def _controls(self) -> loop.Controls:
        spare = (self._size(self.room + self.spare) - self.room) * self.draws
        uniforms = np.pad(self.uniforms, ((0, 0), (0, spare)))
        weight = self.weight
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


def _on_accelerator() -> bool:
    return "cpu" not in str(ops.zeros(()).device).lower()


def _has_gpu() -> bool:
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU"))
