"""GenerationConfig: ranges and types of every parameter, files, and which of several sources wins."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import elsewhere

from tfgptj import limits
from tfgptj.config import GPTJConfig
from tfgptj.errors import GenerationError, TFGPTJError
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.parameters import ARGUMENTS, DEFAULTS, IGNORED, UNSUPPORTED
from tfgptj.generation.run import resolve_config
from tfgptj.heads import TFGPTJForCausalLM

# What Hugging Face's converters wrote for GPT-J, and what its warnings advise people to add.
HUGGING_FACE_FILE = {
    "_from_model_config": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "transformers_version": "4.57.6",
}


def written(directory: Path, content: Any) -> Path:
    path = directory / "generation_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_defaults_are_hugging_face_s() -> None:
    # transformers 4.57.6, `GenerationConfig()`; max_length is 20 there, which tfgptj counts without the prompt.
    none = ("max_new_tokens", "max_length", "min_new_tokens", "max_time", "stop_strings", "penalty_alpha", "min_p")
    none += ("prompt_lookup_num_tokens", "max_matching_ngram_size", "guidance_scale", "sequence_bias", "bad_words_ids")
    none += ("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens")
    none += ("begin_suppress_tokens", "output_logits", "bos_token_id", "eos_token_id", "pad_token_id")
    none += ("prefill_chunk_size", "vocabulary_limit")  # the last is tfgptj's own
    off = ("do_sample", "early_stopping", "remove_invalid_values", "renormalize_logits", "return_dict_in_generate")
    off += ("output_scores", "output_hidden_states", "output_attentions")
    zero = ("min_length", "diversity_penalty", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size")
    zero += ("encoder_no_repeat_ngram_size", "frequency_penalty", "presence_penalty")  # the last two are tfgptj's own
    one = ("num_beams", "num_beam_groups", "length_penalty", "num_return_sequences", "temperature", "top_p")
    one += ("typical_p", "encoder_repetition_penalty", "repetition_penalty")
    expected = {
        **{**dict.fromkeys(none), **dict.fromkeys(off, False), **dict.fromkeys(zero, 0), **dict.fromkeys(one, 1)},
        **{"top_k": 50, "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant"},
        "assistant_confidence_threshold": 0.4,
    }
    config = GenerationConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == expected
    assert config.to_dict() == {}


TOKENS = (0, 50256, None)
TOKEN_LISTS = ([0, 50256], [], None)
LENGTHS = (1, 7, limits.MAX_POSITIONS, np.int64(7), None)
FLAGS = (True, False)
SHARES = (0, 0.0, 1, 0.5, np.float32(0.5))
VALID = {
    **dict.fromkeys(("max_new_tokens", "max_length", "prompt_lookup_num_tokens", "max_matching_ngram_size"), LENGTHS),
    **dict.fromkeys(("min_new_tokens", "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0, 7)),
    **dict.fromkeys(("do_sample", "remove_invalid_values", "renormalize_logits", "return_dict_in_generate"), FLAGS),
    **dict.fromkeys(("output_scores", "output_hidden_states", "output_attentions"), FLAGS),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_assistant_tokens", "num_return_sequences"), (1, 4)),
    **dict.fromkeys(("top_p", "epsilon_cutoff", "eta_cutoff"), SHARES),
    **dict.fromkeys(("min_p", "penalty_alpha", "assistant_confidence_threshold"), (*SHARES, None)),
    **dict.fromkeys(("encoder_repetition_penalty", "repetition_penalty"), (1, 2, 0.5, 1000)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "length_penalty"), (0, -1, 0.5)),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "forced_bos_token_id"), TOKENS),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), (*TOKENS, [1, 2], [])),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), TOKEN_LISTS),
    "output_logits": (True, False, None),
    "temperature": (0, 0.0, 1, 2, 0.7, 1e6, np.float32(0.5)),
    "top_k": (0, 1, limits.MAX_VOCAB, None),
    "typical_p": (1, 0.2, 1e-6),
    "max_time": (0, 1, 0.5, None),
    "stop_strings": ("\n", ["a", "b"], [], None),
    "early_stopping": (True, False, "never"),
    "diversity_penalty": (0, 1, 0.5),
    "num_assistant_tokens_schedule": ("constant", "heuristic", "heuristic_transient"),
    "guidance_scale": (0, 1, 1.5, None),
    "sequence_bias": ([[[1, 2], 0.5], [[3], -2]], [], None),
    "bad_words_ids": ([[1], [2, 3]], [], None),
    "exponential_decay_length_penalty": ([3, 1.5], [0, 2], None),
    "vocabulary_limit": (1, 50257, None),
    "prefill_chunk_size": (1, 512, None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALID.items() for value in values])
def test_values_in_range_are_kept(name: str, value: Any) -> None:
    assert set(VALID) == set(DEFAULTS)
    config = GenerationConfig(**{name: value})
    assert getattr(config, name) == value
    assert config.to_dict() == {name: value}


def refused() -> list[tuple[str, Any, str]]:
    """Each parameter with values of a wrong type or range, and what the message says about them."""
    lengths = f"must be between 1 and {limits.MAX_POSITIONS:,}, got"
    ids = "must be between 0 and 2,147,483,647, got"
    sizes = [("max_new_tokens", lengths, 0), ("max_new_tokens", lengths, 10**9), ("max_length", lengths, -1)]
    sizes += [("top_k", f"must be between 0 and {limits.MAX_VOCAB:,}, got", -1)]
    sizes += [("num_return_sequences", "must be between 1 and 65,536, got", wrong) for wrong in (0, 65537)]
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    sizes += [(name, ids, wrong) for name in tokens for wrong in (-1, 2**31)]
    integers = ("max_new_tokens", "max_length", "top_k", "num_return_sequences", *tokens)
    return [
        *((name, wrong, f"{name} {message} {wrong:,}") for name, message, wrong in sizes),
        *(
            (name, wrong, f"{name} must be an integer, got {wrong!r}")
            for name in integers
            for wrong in (1.0, "5", True)
        ),
        ("num_return_sequences", None, "num_return_sequences must be an integer, got None"),
        ("eos_token_id", [1, "2"], "eos_token_id must be an integer, got '2'"),
        ("eos_token_id", [1, None], "eos_token_id must be an integer, got None"),
        ("eos_token_id", [[1]], "eos_token_id must be an integer, got [1]"),
        *(("do_sample", wrong, f"do_sample must be True or False, got {wrong!r}") for wrong in (1, "yes", None)),
        *(
            (name, wrong, f"{name} must be a number, got {wrong!r}")
            for name in ("temperature", "top_p")
            for wrong in ("0.5", True, None, 1j, [1.0])
        ),
        *(("temperature", wrong, f"temperature must be between 0 and 1e+06, got {wrong!r}") for wrong in (-1, 2e6)),
        *(("top_p", wrong, f"top_p must be between 0 and 1, got {wrong!r}") for wrong in (-0.1, 1.1, float("inf"))),
        *((name, float("nan"), f"{name} must be between 0 and") for name in ("temperature", "top_p")),
        ("early_stopping", 1, "early_stopping must be one of False, True, 'never', got 1"),
        ("num_assistant_tokens_schedule", "fast", "num_assistant_tokens_schedule must be one of 'constant', "),
        ("suppress_tokens", 3, "suppress_tokens must be a list of token ids, got 3"),
        ("suppress_tokens", [-1], f"suppress_tokens {ids} -1"),
        ("forced_eos_token_id", [1.5], "forced_eos_token_id must be an integer, got 1.5"),
        ("bad_words_ids", [1], "bad_words_ids must be a list of lists of token ids, none of them empty, got [1]"),
        ("bad_words_ids", [[]], "bad_words_ids must be a list of lists of token ids, none of them empty, got [[]]"),
        ("bad_words_ids", [["a"]], "bad_words_ids must be an integer, got 'a'"),
        ("sequence_bias", [[1], 2], "sequence_bias must be a dict of tuples of token ids and their biases, or a list"),
        ("sequence_bias", {(): 1.0}, "sequence_bias must be a list of lists of token ids, none of them empty"),
        ("sequence_bias", {(1,): float("inf")}, "sequence_bias must be between -1e+30 and 1e+06, got inf"),
        ("sequence_bias", {(1,): float("nan")}, "sequence_bias must be between -1e+30 and 1e+06, got nan"),
        ("exponential_decay_length_penalty", (1, float("nan")), "exponential_decay_length_penalty must be between 0"),
        ("sequence_bias", {(1,): "much"}, "sequence_bias must be a number, got 'much'"),
        ("exponential_decay_length_penalty", 5, "exponential_decay_length_penalty must be a pair of a number of"),
        ("exponential_decay_length_penalty", (1.5, 2), "exponential_decay_length_penalty must be an integer, got 1.5"),
        ("exponential_decay_length_penalty", (1, -2), "exponential_decay_length_penalty must be between 0 and 1e+06"),
        ("stop_strings", "", "stop_strings must be strings that are not empty, got ''"),
        ("stop_strings", ["a", 5], "stop_strings must be strings that are not empty, got ['a', 5]"),
        ("repetition_penalty", 0, "repetition_penalty must be between 0.001 and 1000, got 0"),
        ("min_p", 1.5, "min_p must be between 0 and 1, got 1.5"),
    ]


@pytest.mark.parametrize(("name", "value", "text"), refused())
def test_values_out_of_range_are_refused(name: str, value: Any, text: str) -> None:
    with pytest.raises(GenerationError, match=f"^{re.escape(text)}"):
        GenerationConfig(**{name: value})
    with pytest.raises(GenerationError, match=f"^{re.escape(text)}"):
        setattr(GenerationConfig(), name, value)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), [float("nan")], np.float32("nan")])
def test_what_is_no_number_is_no_value_of_any_parameter(name: str, value: Any) -> None:
    with pytest.raises(GenerationError, match=f"^{name} must be"):
        GenerationConfig(**{name: value})


def test_a_number_too_long_to_print_is_refused_all_the_same() -> None:
    with pytest.raises(GenerationError, match="max_new_tokens must be between 1 and"):
        GenerationConfig(max_new_tokens=10**5000)


def test_several_sequences_need_sampling() -> None:
    message = "num_return_sequences > 1 needs do_sample=True or num_beams > 1: otherwise all would be the same"
    several = GenerationConfig(num_return_sequences=2)  # the model's own configuration may sample
    with pytest.raises(GenerationError, match=message):
        resolve_config(Model(), several, {})
    with pytest.raises(GenerationError, match=message):
        resolve_config(Model(), several, {"do_sample": False})
    assert resolve_config(Model(), several, {"do_sample": True}).num_return_sequences == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max_new_token", "unknown generation parameter 'max_new_token'; did you mean max_new_tokens?"),
        ("do_samples", "unknown generation parameter 'do_samples'; did you mean do_sample?"),
        ("topk", "unknown generation parameter 'topk'; did you mean top_k?"),
        ("num_beam", "unknown generation parameter 'num_beam'; did you mean num_beams?"),
        ("zzz", "unknown generation parameter 'zzz'; known are max_new_tokens, max_length, min_new_tokens"),
    ],
)
def test_an_unknown_parameter_is_refused_with_a_hint(name: str, text: str) -> None:
    with pytest.raises(GenerationError, match=re.escape(text)):
        GenerationConfig(**{name: 1})


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_parameter_may_be_off(name: str) -> None:
    assert GenerationConfig(**{name: UNSUPPORTED[name]}).to_dict() == {}
    assert GenerationConfig(**{name: None}).to_dict() == {}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("value", ["strange", [[1]], np.ones(3)])
def test_an_unsupported_parameter_must_not_be_on(name: str, value: Any) -> None:
    message = f"^{name}=.* is not supported by tfgptj; leave it at {UNSUPPORTED[name]!r}"
    with pytest.raises(GenerationError, match=message):
        GenerationConfig(**{name: value})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_generate_is_no_parameter(name: str) -> None:
    with pytest.raises(GenerationError, match=f"^{name} is an argument of generate, not a parameter"):
        GenerationConfig(**{name: None})


def test_each_name_has_one_place() -> None:
    names = [*DEFAULTS, *UNSUPPORTED, *IGNORED, *ARGUMENTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", IGNORED)
def test_what_changes_no_token_is_passed_over(name: str) -> None:
    assert GenerationConfig(**{name: {"any": "thing"}}).to_dict() == {}


@pytest.mark.parametrize(
    ("parameters", "mode"),
    [
        ({}, "greedy"),
        ({"do_sample": True}, "sample"),
        ({"do_sample": True, "temperature": 0}, "greedy"),
        ({"num_beams": 3}, "beam"),
        ({"num_beams": 3, "do_sample": True}, "beam_sample"),
        ({"num_beams": 4, "num_beam_groups": 2}, "group_beam"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"penalty_alpha": 0.6, "top_k": 1}, "greedy"),
        ({"penalty_alpha": 0.0}, "greedy"),
        ({"penalty_alpha": 0.6, "do_sample": True}, "sample"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup"),
        ({"prompt_lookup_num_tokens": 3, "do_sample": True}, "prompt_lookup"),
    ],
)
def test_modes_are_hugging_face_s(parameters: dict[str, Any], mode: str) -> None:
    assert GenerationConfig(**parameters).mode == mode


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams=2"),
        ({"num_beam_groups": 2}, "num_beams=1 cannot be split into num_beam_groups=2 of equal size"),
        ({"num_beams": 3, "num_beam_groups": 2}, "num_beams=3 cannot be split into num_beam_groups=2 of equal size"),
        ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups > 1 needs a diversity_penalty above 0"),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True},
            "num_beam_groups > 1 cannot be combined with do_sample=True",
        ),
        ({"num_beams": 4, "diversity_penalty": 0.5}, "diversity_penalty acts between groups of beams"),
        ({"num_beams": 4, "prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens cannot be combined with beam"),
        ({"exponential_decay_length_penalty": (1, 2), "eos_token_id": None}, "needs an eos_token_id"),
    ],
)
def test_contradictions_are_refused(parameters: dict[str, Any], message: str) -> None:
    config = GenerationConfig(**parameters)  # another source may still complete it
    with pytest.raises(GenerationError, match=message):
        resolve_config(Model(), config, {})


def test_a_bias_may_be_minus_infinity_and_a_dict(tmp_path: Path) -> None:
    config = GenerationConfig(sequence_bias={(1, np.int64(2)): -np.inf, (3,): 2})
    assert config.sequence_bias == [[[1, 2], -1e30], [[3], 2]]
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config


def test_a_refused_update_changes_nothing() -> None:
    config = GenerationConfig(do_sample=True, top_k=7)
    with pytest.raises(GenerationError, match="top_p must be between"):
        config.update(top_k=9, top_p=3.0)
    assert config.to_dict() == {"do_sample": True, "top_k": 7}
    config.update(top_k=9, top_p=0.5)
    assert config.to_dict() == {"do_sample": True, "top_k": 9, "top_p": 0.5}


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="GenerationConfig has no parameter 'topk'"):
        GenerationConfig().topk  # noqa: B018
    with pytest.raises(GenerationError, match="did you mean top_k"):
        GenerationConfig().topk = 5


@pytest.mark.parametrize(("given", "expected"), [(None, ()), (3, (3,)), ([3, 4], (3, 4)), ((3, 4), (3, 4)), ([], ())])
def test_the_end_of_text_is_a_tuple(given: Any, expected: tuple[int, ...]) -> None:
    assert GenerationConfig(eos_token_id=given).eos_token_ids == expected


def test_copies_are_equal_and_independent() -> None:
    config = GenerationConfig(do_sample=True, eos_token_id=[1, 2])
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), GenerationConfig(**config.to_dict())):
        assert other == config
        other.top_k = 3
        assert other != config
        assert config.top_k == 50
    assert config != config.to_dict()


def test_it_is_mutable_and_so_not_hashable() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(GenerationConfig())


def test_repr_shows_what_was_set() -> None:
    assert repr(GenerationConfig(do_sample=True, top_k=3)) == "GenerationConfig(do_sample=True, top_k=3)"
    assert repr(GenerationConfig()) == "GenerationConfig()"


def test_errors_are_both_ours_and_value_errors() -> None:
    for expected in (TFGPTJError, ValueError):
        with pytest.raises(expected):
            GenerationConfig(top_k=-1)


# Files


def test_hugging_face_s_file_is_read(tmp_path: Path) -> None:
    config = GenerationConfig.from_json_file(written(tmp_path, HUGGING_FACE_FILE))
    assert config.to_dict() == {"bos_token_id": 50256, "eos_token_id": 50256}


def test_a_file_with_all_of_hugging_face_s_defaults_is_read(tmp_path: Path) -> None:
    assert GenerationConfig.from_json_file(written(tmp_path, {**UNSUPPORTED, "top_k": 5})).to_dict() == {"top_k": 5}


def test_files_round_trip(tmp_path: Path) -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=None, eos_token_id=[1, 2], max_new_tokens=7)
    config.save_pretrained(tmp_path / "new" / "directory")
    path = tmp_path / "new" / "directory" / "generation_config.json"
    assert json.loads(path.read_text()) == config.to_dict()
    assert GenerationConfig.from_json_file(path) == config
    assert GenerationConfig.from_pretrained(path.parent) == config
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_numpy_numbers_are_saved_like_python_s(tmp_path: Path) -> None:
    config = GenerationConfig(
        do_sample=True, max_new_tokens=np.int64(7), temperature=np.float32(0.5), eos_token_id=[np.int32(3)]
    )
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"top_k": -1}, "top_k must be between 0 and"),
        ({"token_healing": True}, "token_healing=True is not supported by tfgptj"),
        ({"topk": 4}, "unknown generation parameter 'topk'; did you mean top_k?"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ('{"top_k": 1, "top_k": 2}', "not valid JSON: the key 'top_k' comes twice"),
        ('{"temperature": NaN}', "not valid JSON: NaN is not a JSON number"),
        ("[]", "expected a JSON object, found list"),
        ("", "not valid JSON"),
    ],
)
def test_errors_in_a_file_name_it(content: Any, text: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(TFGPTJError, match=re.escape(f"{path}: {text}")):
        GenerationConfig.from_json_file(path)


@pytest.mark.parametrize("name", ["self", "cls", "parameters", "_given", "__class__", "update"])
def test_no_field_name_can_break_a_configuration(name: str, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=re.escape(name)):
        GenerationConfig.from_json_file(written(tmp_path, {name: 1}))


# Several sources


def test_later_ones_win() -> None:
    config = GenerationConfig(do_sample=True, top_k=5, top_p=0.9)
    merged = config.merged({"top_k": 7}, None, GenerationConfig(top_p=0.5))
    assert merged.to_dict() == {"do_sample": True, "top_k": 7, "top_p": 0.5}
    assert config.to_dict() == {"do_sample": True, "top_k": 5, "top_p": 0.9}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"max_length": 50}, {"max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_new_tokens": 5}, {"max_length": 50}, {"max_length": 50}),
        ({"max_new_tokens": 5}, {"max_new_tokens": 6}, {"max_new_tokens": 6}),
        ({"max_new_tokens": 5}, {"top_k": 3}, {"max_new_tokens": 5, "top_k": 3}),
        ({}, {"max_new_tokens": 5, "max_length": 50}, {"max_new_tokens": 5, "max_length": 50}),
    ],
)
def test_the_two_lengths_replace_each_other(
    first: dict[str, Any], second: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert GenerationConfig(**first).merged(second).to_dict() == expected
    assert GenerationConfig(**first).merged(GenerationConfig(**second)).to_dict() == expected


def test_an_explicit_none_switches_off() -> None:
    assert GenerationConfig(eos_token_id=3, max_new_tokens=5).merged({"eos_token_id": None}).eos_token_id is None


def test_merged_values_are_checked_together() -> None:
    with pytest.raises(GenerationError, match="top_p must be between 0 and 1"):
        GenerationConfig(do_sample=True).merged({"top_p": 2})
    assert GenerationConfig(do_sample=True).merged({"num_return_sequences": 2}).num_return_sequences == 2


def test_special_tokens_come_from_the_model_s_configuration() -> None:
    config = GPTJConfig(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=None)
    assert GenerationConfig.from_model_config(config).to_dict() == {"bos_token_id": 1, "eos_token_id": [2, 3]}


def test_a_padding_token_of_minus_one_means_none() -> None:
    config = GPTJConfig(bos_token_id=1, eos_token_id=2, pad_token_id=-1)  # as some Hugging Face configurations say it
    assert GenerationConfig.from_model_config(config).pad_token_id is None


class Model:
    """What `resolve_config` reads of a model."""

    config = GPTJConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    generation_config: GenerationConfig | None = None

    def resolved(self, given: Any = None, **parameters: Any) -> dict[str, Any]:
        return resolve_config(self, given, parameters).to_dict()  # type: ignore[arg-type]


def test_the_order_of_sources() -> None:
    model, tokens = Model(), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert model.resolved() == tokens
    model.generation_config = GenerationConfig(eos_token_id=4, top_k=5, max_length=50)
    assert model.resolved() == {**tokens, "eos_token_id": 4, "top_k": 5, "max_length": 50}
    given = GenerationConfig(top_k=6, max_new_tokens=7)
    assert model.resolved(given) == {**tokens, "eos_token_id": 4, "top_k": 6, "max_new_tokens": 7}
    assert model.resolved(given, top_k=8, eos_token_id=None, max_length=9) == {
        **tokens,
        **{"eos_token_id": None, "top_k": 8, "max_length": 9},
    }
    assert given.to_dict() == {"top_k": 6, "max_new_tokens": 7}


def test_keywords_are_judged_together_with_what_they_join() -> None:
    given = GenerationConfig(do_sample=True)
    assert Model().resolved(given, num_return_sequences=3)["num_return_sequences"] == 3


@pytest.mark.parametrize("given", [{"top_k": 1}, "greedy", 5])
def test_a_generation_config_must_be_one(given: Any) -> None:
    message = f"generation_config must be a GenerationConfig, got {type(given).__name__}"
    with pytest.raises(GenerationError, match=message):
        Model().resolved(given)


def test_keywords_are_checked_like_a_configuration() -> None:
    with pytest.raises(GenerationError, match="did you mean top_k"):
        Model().resolved(topk=1)
    with pytest.raises(GenerationError, match="top_k must be between"):
        Model().resolved(top_k=-1)
    with pytest.raises(GenerationError, match="dola_layers='high' is not supported"):
        Model().resolved(dola_layers="high")


# What parameters do at their extremes


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    shape = {"vocab_size": 61, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    model = TFGPTJForCausalLM(GPTJConfig(**shape, initializer_range=0.3))
    model.lm_head.dense.bias.assign(np.full(61, -20.0))  # all logits negative: dividing them by little makes them huge
    return model


@pytest.mark.core
@pytest.mark.parametrize("temperature", elsewhere([1e-3, 1e-10, 1e-20, 1e-30, 1e-38, 1e-300], 1e-38))
def test_the_colder_the_nearer_to_greedy(model: TFGPTJForCausalLM, temperature: float) -> None:
    options = {"max_new_tokens": 6, "eos_token_id": None}
    greedy = model.generate([[5, 9, 3]], **options)
    for top_k in (0, 5):
        sampled = model.generate([[5, 9, 3]], do_sample=True, temperature=temperature, top_k=top_k, seed=0, **options)
        np.testing.assert_array_equal(sampled, greedy)


def test_the_hottest_draws_every_token_alike(model: TFGPTJForCausalLM) -> None:
    ids = model.generate(
        np.full((400, 1), 5), do_sample=True, temperature=1e6, top_k=0, max_new_tokens=1, seed=0, eos_token_id=None
    )[:, 1]
    counts = np.bincount(ids, minlength=61)
    expected = 400 / 61
    # Chi-square with 60 degrees of freedom: 99.6 is exceeded once in a thousand seeds.
    assert ((counts - expected) ** 2 / expected).sum() < 99.6


@pytest.mark.parametrize("options", [{"top_k": limits.MAX_VOCAB}, {"top_k": None}, {"top_p": 1}, {"seed": 2**64}])
def test_extreme_options_are_taken(model: TFGPTJForCausalLM, options: dict[str, Any]) -> None:
    ids = model.generate([[5]], do_sample=True, max_new_tokens=2, eos_token_id=None, **options)
    assert ids.shape == (1, 3)
    assert ids.min() >= 0 and ids.max() < 61
