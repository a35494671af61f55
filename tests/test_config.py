"""GPTJConfig: Hugging Face's fields, their checks, config.json and the arithmetic of sizes."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import foremost

from tfgptj import limits
from tfgptj.config import ACTIVATIONS, ALIASES, GPTJConfig, read_json
from tfgptj.errors import ConfigError, TFGPTJError
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification, TFGPTJModel

GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
GOLDEN_CONFIGS = sorted(path for path in GOLDENS.glob("*/*/config.json") if "codegen" not in path.parts)

# transformers 4.57.6, `GPTJConfig().to_dict()`: the fields that its GPT-J reads.
HUGGING_FACE_DEFAULTS = {
    "model_type": "gptj",
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "problem_type": None,
    "output_hidden_states": False,
    "output_attentions": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
}


def tiny(**fields: Any) -> GPTJConfig:
    return GPTJConfig(**{"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, **fields})


def written(directory: Path, content: str | bytes | dict[str, Any]) -> Path:
    path = directory / "config.json"
    text = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_defaults_are_hugging_face_s() -> None:
    assert GPTJConfig().to_dict() == HUGGING_FACE_DEFAULTS
    assert GPTJConfig().num_labels == 2


def test_sizes_follow_from_the_fields() -> None:
    config = GPTJConfig()
    assert (config.head_dim, config.rotary_width, config.inner_dim) == (256, 64, 16384)
    assert tiny(n_inner=24).inner_dim == 24
    assert tiny(rotary_dim=None).rotary_width == 8


@pytest.mark.parametrize(("alias", "field"), ALIASES.items())
def test_an_alias_is_the_field_itself(alias: str, field: str) -> None:
    config = tiny(rotary_dim=2, **{alias: 4})
    assert getattr(config, alias) == getattr(config, field) == 4
    setattr(config, alias, 8)
    assert getattr(config, field) == config.to_dict()[field] == 8
    assert alias not in config.to_dict()


def test_an_override_wins_over_an_alias_in_the_file() -> None:
    assert GPTJConfig.from_dict({"hidden_size": 32, "n_head": 2, "rotary_dim": 4}, n_embd=64).n_embd == 64
    assert GPTJConfig.from_dict({"n_embd": 32, "n_head": 2, "rotary_dim": 4}, hidden_size=64).n_embd == 64


def test_unknown_fields_are_attributes_and_are_written_back() -> None:
    extra = {"gradient_checkpointing": False, "task_specific_params": {"text-generation": {"max_length": 50}}}
    config = tiny(**extra)
    assert config.gradient_checkpointing is False
    assert {name: config.to_dict()[name] for name in extra} == extra
    config.gradient_checkpointing = True
    assert config.to_dict()["gradient_checkpointing"] is True


@pytest.mark.parametrize("path", GOLDEN_CONFIGS, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_a_hugging_face_file_is_written_back_unchanged(path: Path, tmp_path: Path) -> None:
    original = json.loads(path.read_text())
    GPTJConfig.from_json_file(path).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in original} == original


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="GPTJConfig has no field 'n_heads'"):
        tiny().n_heads  # noqa: B018


@pytest.mark.parametrize("field", ["auto_map", "custom_pipelines"])
def test_fields_that_name_code_are_dropped(field: str) -> None:
    with pytest.warns(UserWarning, match=rf"names Python code of its own \({field}\)\. It is ignored: no code"):
        config = tiny(**{field: {"AutoModel": "evil.py"}})
    assert field not in config.to_dict()
    assert not hasattr(config, field)
    assert tiny(**{field: None}) == tiny(**{field: {}}) == tiny()


# Labels


def test_num_labels_makes_labels() -> None:
    config = tiny(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    config.num_labels = 1
    assert (config.id2label, config.label2id) == ({0: "LABEL_0"}, {"LABEL_0": 0})


def test_id2label_gives_num_labels_and_label2id() -> None:
    config = tiny(id2label={"0": "no", "1": "yes", "2": "maybe"})
    assert (config.num_labels, config.label2id) == (3, {"no": 0, "yes": 1, "maybe": 2})
    assert config.to_dict()["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}


def test_overriding_num_labels_discards_the_file_s_labels() -> None:
    config = GPTJConfig.from_dict({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, num_labels=3)
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": 0}, "num_labels must be between 1 and 65,536, got 0"),
        ({"num_labels": True}, "num_labels must be an integer, got True"),
        ({"num_labels": "3"}, "num_labels must be an integer, got '3'"),
        ({"num_labels": limits.MAX_LABELS + 1}, "num_labels must be between 1 and 65,536, got 65,537"),
        ({"id2label": ["no", "yes"]}, r"id2label must map ids to labels, got \['no', 'yes'\]"),
        ({"id2label": {"zero": "no"}}, "id2label must map ids to labels, got {'zero': 'no'}"),
        ({"id2label": {"1": "no", "2": "yes"}}, r"id2label must have the ids 0, 1, 2, …, got \[1, 2\]"),
        ({"id2label": {}}, r"id2label must have the ids 0, 1, 2, …, got \[\]"),
        ({"id2label": {"0": "no"}, "num_labels": 2}, "num_labels is 2, but id2label names 1 labels"),
        ({"label2id": "no"}, "label2id"),
        ({"label2id": ["no", "yes"]}, "label2id"),
    ],
)
def test_labels_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**fields)


def test_setting_an_impossible_number_of_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_labels must be between"):
        tiny().num_labels = 0


# Checks of single fields and of their combinations


@pytest.mark.parametrize(
    ("field", "highest"),
    [
        ("vocab_size", limits.MAX_VOCAB),
        ("n_positions", limits.MAX_POSITIONS),
        ("n_embd", limits.MAX_WIDTH),
        ("n_layer", limits.MAX_LAYERS),
        ("n_head", limits.MAX_HEADS),
        ("n_inner", limits.MAX_WIDTH),
    ],
)
@pytest.mark.parametrize("wrong", [0, -1, 10**9, "16", 16.0, True, [16]], ids=repr)
def test_sizes_must_be_integers_in_range(field: str, highest: int, wrong: Any) -> None:
    is_int = isinstance(wrong, int) and not isinstance(wrong, bool)
    message = f"{field} must be between 1 and {highest:,}, got" if is_int else f"{field} must be an integer, got"
    with pytest.raises(ConfigError, match=message):
        tiny(**{field: wrong})


def test_a_number_too_long_to_print_is_refused_all_the_same() -> None:
    with pytest.raises(ConfigError, match="n_embd must be between 1 and 131,072"):
        tiny(n_embd=10**5000)


@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_sizes_must_not_be_none(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be an integer, got None"):
        tiny(**{field: None})


def test_the_width_must_divide_among_the_heads() -> None:
    with pytest.raises(ConfigError, match="n_embd must be divisible by n_head, got n_embd=16 and n_head=3"):
        tiny(n_head=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotary_dim": 5}, "rotary_dim must be even and at most n_embd / n_head = 8, got 5$"),
        ({"rotary_dim": 10}, "rotary_dim must be even and at most n_embd / n_head = 8, got 10$"),
        ({"rotary_dim": None, "n_embd": 6}, r"at most n_embd / n_head = 3, got None \(None: the whole head\)"),
        ({"rotary_dim": 0}, "rotary_dim must be between 2 and 131,072, got 0"),
        ({"rotary_dim": "4"}, "rotary_dim must be an integer, got '4'"),
        ({"rotary_dim": True}, "rotary_dim must be an integer, got True"),
    ],
)
def test_the_rotary_width_must_fit_the_head(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**fields)


@pytest.mark.parametrize("wrong", ["geglu", None, ["gelu"], 1], ids=repr)
def test_the_activation_must_be_known(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"activation_function must be one of gelu, .*; got {re.escape(repr(wrong))}"):
        tiny(activation_function=wrong)


@pytest.mark.parametrize(
    ("field", "highest"),
    [
        ("resid_pdrop", "1"),
        ("embd_pdrop", "1"),
        ("attn_pdrop", "1"),
        ("layer_norm_epsilon", "1"),
        ("initializer_range", r"1e\+06"),
    ],
)
@pytest.mark.parametrize("wrong", [-0.1, 1e7, float("nan"), float("inf"), "0.1", True, None], ids=repr)
def test_rates_must_be_numbers_in_range(field: str, highest: str, wrong: Any) -> None:
    message = f"{field} must be a number between 0 and {highest}, got {re.escape(repr(wrong))}"
    with pytest.raises(ConfigError, match=message):
        tiny(**{field: wrong})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bos_token_id": -1}, "bos_token_id must be between 0 and 2,147,483,647, got -1"),
        ({"bos_token_id": "1"}, "bos_token_id must be an integer, got '1'"),
        ({"pad_token_id": -2}, "pad_token_id must be between -1 and 2,147,483,647, got -2"),
        ({"pad_token_id": 2**31}, "pad_token_id must be between -1 and 2,147,483,647, got 2,147,483,648"),
        ({"eos_token_id": -1}, "eos_token_id must be between 0 and 2,147,483,647, got -1"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id must be an integer, got '2'"),
        ({"eos_token_id": [1, None]}, "eos_token_id must be an integer, got None"),
        ({"eos_token_id": {"1": 2}}, "eos_token_id must be an integer, got {'1': 2}"),
    ],
)
def test_special_tokens_must_be_ids(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**fields)


def test_the_end_of_text_may_be_none_one_or_many() -> None:
    assert tiny(eos_token_id=None).eos_token_ids == ()
    assert tiny(eos_token_id=3).eos_token_ids == (3,)
    assert tiny(eos_token_id=[3, 5]).eos_token_ids == (3, 5)


def test_the_problem_type_must_be_known() -> None:
    message = "problem_type must be None or one of regression, single_label_.*, multi_label_.*; got 'ranking'"
    with pytest.raises(ConfigError, match=message):
        tiny(problem_type="ranking")


@pytest.mark.parametrize("field", ["use_cache", "tie_word_embeddings", "output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("wrong", [1, "true", None], ids=repr)
def test_switches_must_be_booleans(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be true or false, got {wrong!r}"):
        tiny(**{field: wrong})


def test_a_model_beyond_every_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has [\d,]+ parameters; at most 1,000,000,000,000 are allowed"):
        GPTJConfig(n_embd=limits.MAX_WIDTH, n_layer=limits.MAX_LAYERS, n_head=1024)


def test_another_model_s_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="model_type must be 'gptj': this is the configuration of another model"):
        GPTJConfig(model_type="gpt_neox")


@pytest.mark.core
def test_a_model_checks_its_configuration_again() -> None:
    config = tiny()
    config.n_layer = 0
    with pytest.raises(ConfigError, match="n_layer must be between 1"):
        TFGPTJModel(config)


# Sizes


def test_gpt_j_has_six_billion_parameters() -> None:
    assert GPTJConfig().num_parameters() == 6_050_882_784
    assert GPTJConfig().num_parameters("none") == 5_844_393_984  # less the head: 50,400 · 4,096 + 50,400


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="head must be one of none, causal_lm, .*, got 'lm'"):
        tiny().num_parameters("lm")


@pytest.mark.parametrize(
    ("cls", "head"),
    [
        (TFGPTJModel, "none"),
        (TFGPTJForCausalLM, "causal_lm"),
        (TFGPTJForSequenceClassification, "classification"),
        (TFGPTJForQuestionAnswering, "question_answering"),
    ],
)
@pytest.mark.parametrize(
    "fields",
    foremost(
        [
            {},
            {"tie_word_embeddings": True},
            {"activation_function": "prelu", "n_inner": 24},
            {"activation_function": "xielu", "n_layer": 1},
        ],
        *({"tie_word_embeddings": True}, {"activation_function": "xielu", "n_layer": 1}),
    ),
    ids=lambda fields: ",".join(fields) or "plain",
)
def test_num_parameters_counts_the_weights_of_a_model(cls: Any, head: str, fields: dict[str, Any]) -> None:
    model = cls(tiny(**fields))
    weights = sum(int(np.prod(weight.shape)) for weight in model.weights)
    assert model.config.num_parameters(head) == model.num_parameters() == weights


def test_num_parameters_follows_num_labels() -> None:
    assert TFGPTJForSequenceClassification(tiny(num_labels=7)).num_parameters() == tiny(num_labels=7).num_parameters(
        "classification"
    )


# Equality, copies, text


def test_equality_compares_all_fields() -> None:
    assert tiny() == tiny()
    assert tiny() != tiny(n_layer=3)
    assert tiny(extra_field=1) != tiny()
    assert tiny() != tiny().to_dict()


def test_a_configuration_is_mutable_and_so_not_hashable() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(tiny())


def test_copies_are_equal_and_independent() -> None:
    config = tiny(eos_token_id=[1, 2], extra_field={"a": 1})
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), GPTJConfig.from_dict(config.to_dict())):
        assert other == config
        other.n_layer = 5
        assert config.n_layer == 2


def test_repr_is_the_content_as_json() -> None:
    config = tiny(extra_field="x")
    text = repr(config)
    assert text.startswith("GPTJConfig({") and text.endswith("})")
    assert json.loads(text.removeprefix("GPTJConfig(").removesuffix(")")) == config.to_dict()


@pytest.mark.core
def test_a_configuration_goes_through_a_keras_model() -> None:
    config = tiny(extra_field="x", num_labels=3, eos_token_id=[1, 2])
    model = TFGPTJForSequenceClassification(config)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    assert again.config == config


# config.json


def test_files_round_trip(tmp_path: Path) -> None:
    config = tiny(extra_field=[1, 2], eos_token_id=[1, 2], id2label={0: "a", 1: "ü"}, rotary_dim=None)
    config.save_pretrained(tmp_path / "new" / "directory")
    path = tmp_path / "new" / "directory" / "config.json"
    assert GPTJConfig.from_json_file(path) == config
    assert GPTJConfig.from_pretrained(path.parent) == config
    assert GPTJConfig.from_pretrained(path.parent, n_layer=3).n_layer == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["config.json"]


def test_a_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbf" + json.dumps({"n_layer": 3}).encode())
    assert GPTJConfig.from_json_file(path).n_layer == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"n_layer": 1, "n_layer": 2}', "not valid JSON: the key 'n_layer' comes twice"),
        ('{"x": {"a": 1, "b": 2, "b": 3}}', "not valid JSON: the key 'b' comes twice"),
        ('{"layer_norm_epsilon": NaN}', "not valid JSON: NaN is not a JSON number"),
        ('{"layer_norm_epsilon": -Infinity}', "not valid JSON: -Infinity is not a JSON number"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"n_layer": ' + "1" * 10_000 + "}", "not valid JSON"),
        ('{"n_layer": 2', "not valid JSON"),
        ("", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, found list"),
        ("null", "expected a JSON object, found NoneType"),
        ('"gptj"', "expected a JSON object, found str"),
        ("<!DOCTYPE html>", "not valid JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_json_is_read_strictly(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: {message}") as caught:
        read_json(path)
    assert len(str(caught.value)) < 1000


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, {"n_layer": 2})
    monkeypatch.setattr(limits, "MAX_JSON_BYTES", 10)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: 14 bytes; at most 10 are allowed"):
        read_json(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GPTJConfig.from_json_file(tmp_path / "config.json")


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, {"n_layer": 0})
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: n_layer must be between 1 and 1,024, got 0"):
        GPTJConfig.from_json_file(path)


def test_the_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {"model_type": "gpt_neox"})
    with pytest.raises(
        ConfigError, match=f"^{re.escape(str(path))}: model_type is 'gpt_neox', expected 'gptj' or 'codegen'$"
    ):
        GPTJConfig.from_json_file(path)


@pytest.mark.parametrize("name", ["self", "cls", "fields", "extra", "__class__", "__deepcopy__", "_extra", "to_dict"])
def test_no_field_name_can_break_a_configuration(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, {**tiny().to_dict(), name: 1})
    try:
        config = GPTJConfig.from_json_file(path)
    except ConfigError:
        return
    assert copy.deepcopy(config) == config
    assert config.to_dict()["n_layer"] == 2


def test_what_was_read_can_be_written_and_read_again(tmp_path: Path) -> None:
    path = written(tmp_path, '{"n_layer": 2, "some_number": 1e999}')  # reads as infinity, which JSON cannot hold
    try:
        config = GPTJConfig.from_json_file(path)
    except ConfigError:
        return
    config.save_pretrained(tmp_path)
    assert GPTJConfig.from_json_file(path) == config


def test_every_activation_of_the_list_is_accepted() -> None:
    assert len(ACTIVATIONS) == len(set(ACTIVATIONS)) == 22
    assert [tiny(activation_function=name).activation_function for name in ACTIVATIONS] == list(ACTIVATIONS)


def test_errors_are_both_ours_and_value_errors() -> None:
    for expected in (TFGPTJError, ValueError):
        with pytest.raises(expected):
            tiny(n_layer=0)
