"""What is served of each head, the options of an export, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import assert_near, foremost, numbers

from tfgptj.backbone import TFGPTJModel
from tfgptj.base import GPTJBase
from tfgptj.config import GPTJConfig
from tfgptj.errors import BackendError, CheckpointError, GenerationError, InputError, InputTypeError
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.prompts import random_rows
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification
from tfgptj.pipelines import pipeline
from tfgptj.serving import streams
from tfgptj.serving.export import export_saved_model
from tfgptj.tokenizer import GPTJTokenizer

SHAPE: dict[str, Any] = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64}
TEXTS = ["What a day!", "no — nothing", "Ah"]


def config(**changes: Any) -> GPTJConfig:
    return GPTJConfig(**{**SHAPE, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": None, **changes})


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(["the king is in the garden, what a day it is " * 3], vocab_size=290)


def served(path: Path) -> Any:
    return tf.saved_model.load(str(path)).signatures


def id_rows(tokenizer: GPTJTokenizer) -> dict[str, Any]:
    rows = [tokenizer.encode(text) for text in TEXTS]
    return {"token_ids": tf.ragged.constant(rows, tf.int32).to_tensor(), "lengths": tf.constant([*map(len, rows)])}


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_classifier(tokenizer: GPTJTokenizer, tmp_path: Path, problem_type: str) -> None:
    names = {0: "bad", 1: "good", 2: "neither"}
    model = TFGPTJForSequenceClassification(config(id2label=names, problem_type=problem_type))
    signatures = served(export_saved_model(model, tmp_path, tokenizer))
    assert set(signatures) == {"serving_default", "tokens", "embed"}
    expected = pipeline("text-classification", model, tokenizer)(TEXTS, top_k=None)
    for found in (signatures["serving_default"](text=tf.constant(TEXTS)), signatures["tokens"](**id_rows(tokenizer))):
        for index, labels in enumerate(expected):
            assert [label.decode() for label in found["labels"][index].numpy()] == [each["label"] for each in labels]
            np.testing.assert_allclose(found["scores"][index], [each["score"] for each in labels], rtol=1e-5)


def test_question_answering(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    model = TFGPTJForQuestionAnswering(config())
    signatures = served(export_saved_model(model, tmp_path, tokenizer))
    assert set(signatures) == {"serving_default", "tokens", "embed"}
    questions, contexts = ["where?", "what is it?"], ["the king is in the garden", "it is a day — a “good” one"]
    answers = signatures["serving_default"](question=tf.constant(questions), context=tf.constant(contexts))
    expected = pipeline("question-answering", model, tokenizer)(questions, contexts, align_to_words=False)
    for index, wanted in enumerate(expected):
        found = {name: values[index].numpy() for name, values in answers.items()}
        assert found["answer"].decode() == wanted["answer"]
        assert (found["start"], found["end"]) == (wanted["start"], wanted["end"])
        assert found["score"] == pytest.approx(wanted["score"], rel=1e-5)
    logits = signatures["tokens"](**id_rows(tokenizer))
    alone = model([tokenizer.encode(TEXTS[0])])
    for name, wanted in alone.items():
        assert_near(logits[name][0, : wanted.shape[1]], numbers(wanted)[0], 1e-5)
    for question, context, text in (
        ([""], ["a"], "question: a text is empty"),
        (["a"], [""], "context: a text is empty"),
        (["a"], ["a", "a"], "context: there must be one for each row"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=text):
            signatures["serving_default"](question=tf.constant(question), context=tf.constant(context))


WEIGHTS = [("bfloat16", False), ("mixed_bfloat16", False), ("float32", True)]


@pytest.mark.parametrize(("policy", "adapted"), foremost(WEIGHTS, ("mixed_bfloat16", False), ("float32", True)))
@pytest.mark.usefixtures("eager_generation")
def test_other_weights_are_served_as_they_are(
    tokenizer: GPTJTokenizer, tmp_path: Path, policy: str, adapted: bool
) -> None:
    rows = id_rows(tokenizer)
    mask = np.arange(rows["token_ids"].shape[1]) < rows["lengths"].numpy()[:, None]
    model = TFGPTJForCausalLM(config(), dtype=policy)
    if adapted:
        model.quantize("int8")
        model.add_lora(rank=2, targets=["q_proj"])
    path = export_saved_model(model, tmp_path, max_new_tokens=6, do_sample=False)
    found = served(path)["tokens"](**rows)["token_ids"]
    expected = model.generate(rows["token_ids"].numpy(), mask, max_new_tokens=6, do_sample=False)
    np.testing.assert_array_equal(found, expected[:, mask.shape[1] :])
    stored = sum(file.stat().st_size for file in (path / "variables").iterdir())
    weights = sum(np.prod(weight.shape) * tf.as_dtype(weight.dtype).size for weight in model.weights)
    assert stored < 1.02 * weights + 8192


def test_many_layers_take_little_room_in_the_graph(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    path = export_saved_model(TFGPTJForCausalLM(config(n_layer=28)), tmp_path, tokenizer)
    assert (path / "saved_model.pb").stat().st_size < 3 * 10**6


def test_numpys_random_numbers() -> None:
    seeds = [0, 1, 2**31, 2**32, 2**40 + 3, 2**63 - 1]
    expected = np.concatenate([random_rows(seed, 1, 33) for seed in seeds])
    np.testing.assert_array_equal(streams.random_rows(tf.constant(seeds, tf.int64), 33, 40), expected)


def test_what_an_export_refuses(tokenizer: GPTJTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bare = TFGPTJForCausalLM(config(n_layer=1)), TFGPTJModel(config(n_layer=1))

    def refused(kind: type[Exception], text: str, what: GPTJBase = model, **options: Any) -> None:
        with pytest.raises(kind, match=text):
            export_saved_model(what, tmp_path, **options)
        assert not list(tmp_path.iterdir())

    refused(InputTypeError, "model must be one of the package's models, got a Sequential", keras.Sequential())  # type: ignore[arg-type]
    refused(InputTypeError, "tokenizer must be a GPTJTokenizer, got a str", tokenizer="mine")
    refused(InputError, "max_batch_size must be an integer of at least 1, got 0", max_batch_size=0)
    refused(InputError, "max_total_tokens must be an integer of at least 1, got True", max_total_tokens=True)
    refused(GenerationError, "seed must be an integer of at least 0", seed=-1)
    refused(GenerationError, "seed must be below 2\\^63", seed=2**63)
    refused(GenerationError, "max_new_tokens=64 leaves no room for a prompt", max_new_tokens=64)
    refused(GenerationError, "max_length=9 cannot be served: set max_new_tokens", max_length=9)
    refused(GenerationError, "stop_strings=.* cannot be served: leave it at None", stop_strings=["a"])
    refused(InputError, "a TFGPTJModel generates no text, and has no use for top_k, generation_config, seed", bare,
            tokenizer=tokenizer, top_k=5, generation_config=GenerationConfig(), seed=0)  # fmt: skip
    refused(InputError, "can be asked for nothing but its embeddings of texts: give a tokenizer", bare)

    def full(*_: Any, **__: Any) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", full)
    refused(CheckpointError, "could not be written: No space left on device", bare, tokenizer=tokenizer)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    refused(BackendError, "SavedModels are written on TensorFlow only, not on jax")
