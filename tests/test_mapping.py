"""The table of names: against the files that Hugging Face wrote, and against the variables of the models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS, GOLDENS, foremost
from safetensors.numpy import load_file

from tfgptj.backbone import TFGPTJModel
from tfgptj.checkpoints.flax_msgpack import FlaxFile
from tfgptj.checkpoints.hdf5 import HDF5File
from tfgptj.checkpoints.mapping import (
    ARCHITECTURES,
    HEADS,
    Layout,
    canonical_name,
    head_of,
    heads_in,
    is_ignorable,
    plan,
    stored_name,
    variable_of,
    written_buffers,
    written_weights,
)
from tfgptj.checkpoints.raw_file import RawFile
from tfgptj.checkpoints.safetensors import SafetensorsFile
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, ConfigError
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification

CLASSES = {
    "none": TFGPTJModel,
    "causal_lm": TFGPTJForCausalLM,
    "classification": TFGPTJForSequenceClassification,
    "question_answering": TFGPTJForQuestionAnswering,
}
TINY = GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_inner=24)


@pytest.mark.parametrize("head", ["causal_lm", "classification", "question_answering"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_is_what_hugging_face_writes(name: str, head: str) -> None:
    directory = GOLDENS / name / head
    config = GPTJConfig.from_pretrained(directory)
    assert json.loads((directory / "config.json").read_text())["architectures"] == [ARCHITECTURES[head]]
    stored = {canonical_name(key): array for key, array in load_file(directory / "model.safetensors").items()}
    buffers = {key: stored.pop(key) for key in stored.keys() & dict(written_buffers(config)).keys()}
    assert {key: np.float32(value) for key, value in written_buffers(config)} == buffers
    planned = {entry.names["torch"]: entry.stored_shape("torch") for entry in plan(config, head)}
    assert planned == {key: array.shape for key, array in stored.items()}


@pytest.mark.parametrize(
    ("layout", "head", "directory", "reader"),
    [
        ("torch", "none", "loading/headless", SafetensorsFile),
        ("torch", "causal_lm", "base/causal_lm", SafetensorsFile),
        ("torch", "classification", "base/classification", SafetensorsFile),
        ("torch", "question_answering", "base/question_answering", SafetensorsFile),
        ("tensorflow", "none", "formats/tensorflow/headless", HDF5File),
        ("tensorflow", "causal_lm", "formats/tensorflow/causal_lm", HDF5File),
        ("tensorflow", "classification", "formats/tensorflow/classification", HDF5File),
        ("tensorflow", "question_answering", "formats/tensorflow/question_answering", HDF5File),
        ("flax", "none", "formats/flax/headless", FlaxFile),
        ("flax", "causal_lm", "formats/flax/causal_lm", FlaxFile),
    ],
)
def test_files_of_each_framework_have_those_names_and_shapes(
    layout: Layout, head: str, directory: str, reader: Callable[[Path], RawFile]
) -> None:
    weights = written_weights(GPTJConfig.from_pretrained(GOLDENS / directory), head, layout)
    [path] = [path for path in (GOLDENS / directory).iterdir() if path.suffix != ".json"]
    with reader(path) as file:
        stored = {name: file.spec(name).shape for name in file.names}
    assert {name: entry.stored_shape(layout) for name, entry, _ in weights} == stored
    for _, entry, transposed in weights:
        assert entry.stored_shape(layout) == (entry.shape[::-1] if transposed else entry.shape)
    canonical = [canonical_name(name) for name, _, _ in weights]
    assert heads_in(canonical, layout) == ([] if head == "none" else [head])


@pytest.mark.parametrize("layout", ["torch", "tensorflow", "flax"])
def test_no_name_stands_for_two_weights(layout: str) -> None:
    for head in HEADS.values():
        names = [entry.names[layout] for entry in plan(TINY, head) if entry.names[layout]]
        assert len(set(names)) == len(names)
        assert all(canonical_name(f"transformer{'.' if layout == 'torch' else '/'}{name}") == name for name in names)


def test_a_tied_head_has_its_bias_alone() -> None:
    config = GPTJConfig.from_dict(TINY.to_dict(), tie_word_embeddings=True)
    [entry] = [entry for entry in plan(config, "causal_lm") if entry.in_head]
    assert entry.names == {"torch": "lm_head.bias", "tensorflow": "lm_head/bias:0", "flax": "lm_head/bias"}
    for layout, more in (("torch", []), ("flax", []), ("tensorflow", [("lm_head/kernel:0", "wte/weight:0", True)])):
        weights = written_weights(config, "causal_lm", layout)[len(plan(config, "causal_lm")) :]
        assert [(name, wte.names["tensorflow"], transposed) for name, wte, transposed in weights] == more
    assert len(written_weights(config, "classification", "tensorflow")) == len(plan(config, "classification"))


@pytest.mark.parametrize(("layout", "framework"), [("tensorflow", "TensorFlow"), ("flax", "Flax")])
def test_activations_with_weights_are_pytorchs_alone(layout: Layout, framework: str) -> None:
    config = GPTJConfig.from_dict(TINY.to_dict(), activation_function="prelu")
    entry = next(entry for entry in plan(config, "none") if entry.names[layout] is None)
    assert stored_name(entry, "none", "torch") == "h.0.mlp.act.weight"
    with pytest.raises(CheckpointError, match=f"blocks.0.mlp.act.slope: Hugging Face's {framework} classes have no"):
        written_weights(config, "none", layout)


def test_names_in_other_frameworks() -> None:
    entry = next(entry for entry in plan(TINY, "causal_lm") if entry.variable == "blocks.1.mlp.fc_in.kernel")
    assert entry.names == {
        "torch": "h.1.mlp.fc_in.weight",
        "tensorflow": "h_._1/mlp/fc_in/kernel:0",
        "flax": "h/1/mlp/fc_in/kernel",
    }
    assert entry.stored_shape("torch") == entry.shape == (24, 16)
    assert entry.stored_shape("tensorflow") == entry.stored_shape("flax") == (16, 24)


@pytest.mark.parametrize(
    "name",
    ["h.0.attn.bias", "h.11.attn.masked_bias", "h.0.mlp.act.beta", "h.0.mlp.act.eps", "lm_head.weight", "score.weight",
     "qa_outputs.bias", "lm_head/kernel:0", "score/kernel:0", "h.3.attn.embed_positions"],
)  # fmt: skip
def test_constants_and_other_heads_are_no_difference(name: str) -> None:
    assert is_ignorable(name)


@pytest.mark.parametrize(
    "name", ["h.0.attn.q_proj.bias", "wpe.weight", "h.0.attn.bias.x", "xh.0.attn.bias", "h.2.ln_1.bias", "CD"]
)
def test_other_weights_are_a_difference(name: str) -> None:
    assert not is_ignorable(name)


def test_a_subclass_has_its_parents_head() -> None:
    class Mine(TFGPTJForCausalLM):
        pass

    assert head_of(Mine) == ("causal_lm", "GPTJForCausalLM")
    assert head_of(TFGPTJModel) == ("none", "GPTJModel")
    with pytest.raises(ConfigError, match=re.escape("dict is none of TFGPTJModel, TFGPTJForCausalLM,")):
        head_of(dict)


def test_unknown_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="head must be one of none, causal_lm, .*; got 'tied_causal_lm'"):
        plan(TINY, "tied_causal_lm")


@pytest.mark.parametrize("head", CLASSES)
@pytest.mark.parametrize(
    "fields",
    foremost(
        [{}, {"tie_word_embeddings": True}, {"activation_function": "prelu"}, {"activation_function": "xielu"}],
        *({"tie_word_embeddings": True}, {"activation_function": "xielu"}),
    ),
)
def test_the_plan_is_the_models_own_variables(head: str, fields: dict[str, object]) -> None:
    config = GPTJConfig.from_dict(TINY.to_dict(), **fields)
    model = CLASSES[head](config)
    entries = plan(config, head)
    variables = [variable_of(model, entry) for entry in entries]
    assert {id(variable) for variable in variables} == {id(variable) for variable in model.trainable_variables}
    for entry, variable in zip(entries, variables, strict=True):
        assert tuple(variable.shape) == entry.shape
    size = sum(entry.shape[0] * (entry.shape[1] if len(entry.shape) == 2 else 1) for entry in entries)
    assert size == config.num_parameters(head)
