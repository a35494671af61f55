"""Mixed policies: weights cast once before a loop give what casting them at each step gives."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from conftest import elsewhere

from tfgptj.config import GPTJConfig
from tfgptj.generation import loop, memory
from tfgptj.generation.casting import cast_bytes, weights_cast
from tfgptj.heads import TFGPTJForCausalLM

TENSORFLOW = keras.backend.backend() == "tensorflow"
SIZES = {"vocab_size": 61, "n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
PROMPT = np.array([[5, 9, 3], [8, 2, 4]], "int32")


def new_model(tied: bool = False, dtype: str = "mixed_bfloat16") -> TFGPTJForCausalLM:
    keras.utils.set_random_seed(4)
    config = GPTJConfig(**SIZES, initializer_range=0.3, eos_token_id=None, tie_word_embeddings=tied)
    return TFGPTJForCausalLM(config, dtype=dtype)


def in_the_loop(model: TFGPTJForCausalLM) -> np.ndarray:
    return model.generate(PROMPT, max_new_tokens=12)


def step_by_step(model: TFGPTJForCausalLM) -> np.ndarray:
    """The same by single steps, which cast for themselves."""
    return model.generate(PROMPT, max_new_tokens=12, return_dict_in_generate=True, output_scores=True).sequences


@pytest.mark.core
@pytest.mark.parametrize("tied", elsewhere([False, True], False))
def test_a_loop_gives_the_tokens_of_its_steps(tied: bool) -> None:
    model = new_model(tied)
    np.testing.assert_array_equal(in_the_loop(model), step_by_step(model))


def test_weights_that_change_are_cast_anew() -> None:
    model = new_model()
    before = in_the_loop(model)
    for variable in model.trainable_variables:
        variable.assign(-1.5 * variable)
    after = in_the_loop(model)
    assert (before != after).any()
    np.testing.assert_array_equal(after, step_by_step(model))


def test_adapters_are_part_of_it() -> None:
    model = new_model()
    projection = model.transformer.blocks[0].attn.q_proj
    projection.enable_lora(2)
    projection.lora_kernel_b.assign(np.ones(projection.lora_kernel_b.shape, "float32"))
    np.testing.assert_array_equal(in_the_loop(model), step_by_step(model))


@pytest.mark.core
def test_matrices_are_cast_and_all_else_is_as_it_was() -> None:
    model = new_model()
    with weights_cast(model):
        dtypes = {v.path: keras.backend.standardize_dtype(v.value.dtype) for v in model.variables}
    matrices = {v.path for v in model.variables if len(v.shape) == 2}
    assert {path for path, dtype in dtypes.items() if dtype == "bfloat16"} == matrices
    assert {keras.backend.standardize_dtype(v.value.dtype) for v in model.variables} == {"float32"}


@pytest.mark.skipif(not TENSORFLOW, reason="graphs of TensorFlow")
@pytest.mark.parametrize(("dtype", "inside"), [("mixed_bfloat16", False), ("bfloat16", True)])
def test_nothing_is_cast_within_the_loop(dtype: str, inside: bool) -> None:
    model = new_model(dtype=dtype)
    in_the_loop(model)
    programs = model.__dict__["_generation_programs"]
    decode = next(compiled for compiled in programs.values() if compiled.function is loop.decode)
    (program,) = decode.programs.values()
    bodies = program.get_concrete_function().graph.as_graph_def().library.function
    reads = [node for body in bodies for node in body.node_def if node.op == "ReadVariableOp" and "q_proj" in node.name]
    assert bool(reads) is inside


def test_the_copies_are_counted_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = []
    monkeypatch.setattr(memory, "check_memory", lambda amount, *_: needed.append(amount))
    mixed, narrow = new_model(), new_model(dtype="bfloat16")
    for model in (mixed, narrow):
        model.generate(PROMPT, max_new_tokens=1)
    matrices = sum(int(np.prod(v.shape)) for v in mixed.variables if len(v.shape) == 2)
    assert (cast_bytes(mixed), cast_bytes(narrow)) == (2 * matrices, 0)
    assert needed[0] - needed[1] == 2 * matrices
