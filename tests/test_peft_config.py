"""`adapter_config.json`: what is read of it, and what is refused by its name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES

from tfgptj import limits
from tfgptj.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError
from tfgptj.training.lora import Adaptation, Settings
from tfgptj.training.peft_config import PeftConfig, peft_fields

GOLDENS = FIXTURES / "peft_goldens"
PLAIN = json.loads((GOLDENS / "plain" / "adapter_config.json").read_text())
Q, V = "transformer.h.1.attn.q_proj", "transformer.h.11.attn.v_proj"


def read(directory: Path, **fields: Any) -> PeftConfig:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(PLAIN | fields))
    return PeftConfig.read(path)


def test_what_counts_for_a_layer(tmp_path: Path) -> None:
    assert read(tmp_path).settings(Q) == Settings(4, 8, 0.0)
    config = read(tmp_path, lora_dropout=0.5, rank_pattern={"h.1.attn.q_proj": 2}, alpha_pattern={r"h\.\d+\.attn.*": 6})
    assert config.settings(Q) == Settings(2, 6, 0.5)
    assert config.settings(V) == Settings(4, 6, 0.5)
    assert config.settings("lm_head") == Settings(4, 8, 0.5)
    config = read(tmp_path, use_rslora=True, rank_pattern={"proj": 9, "attn.q_proj": 9})
    assert config.settings(Q) == Settings(9, pytest.approx(8 * math.sqrt(9)), 0.0)
    assert config.settings(V) == Settings(4, 16, 0.0)


def test_layers_that_are_named_must_be_there(tmp_path: Path) -> None:
    message = "target_modules names transformer.h.11.attn.v_proj, but the file has no adapters of it"
    with pytest.raises(CheckpointMismatchError, match=message):
        read(tmp_path).check_targets([Q, V], [Q])
    for fields in (
        {"target_modules": ".*proj"},
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": ".*v.*"},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["v_proj"]},
    ):
        read(tmp_path, **fields).check_targets([Q, V], [Q])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is supported"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"lora_bias": True}, "lora_bias is True, which is not supported"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication is \[\[0, 1\]\], which is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"of_the_future": 3}, "of_the_future is 3, which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changed the base model, too"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": True}, "r must be a positive integer, got True"),
        ({"lora_alpha": "8"}, "lora_alpha must be a positive number, got '8'"),
        ({"lora_dropout": 1}, "lora_dropout must be at least 0 and less than 1, got 1"),
        ({"bias": "some"}, "bias must be 'none', 'lora_only' or 'all', got 'some'"),
        ({"modules_to_save": "score"}, "modules_to_save must be a list of names, got 'score'"),
        ({"target_modules": [3]}, r"target_modules must be a list of names, got \[3\]"),
        ({"rank_pattern": ["q"]}, r"rank_pattern must map names to numbers, got \['q'\]"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern\['q_proj'\] must be a positive integer, got 1.5"),
        (
            {"alpha_pattern": {"(a*)*": 1}},
            r"alpha_pattern: '\(a\*\)\*' has more or other repetitions than a name needs",
        ),
        ({"alpha_pattern": {"a*" * 5: 1}}, ".* has more or other repetitions than a name needs"),
        ({"alpha_pattern": {"(a": 1}}, r"alpha_pattern: '\(a' is no regular expression: missing \)"),
    ],
)
def test_what_is_refused(tmp_path: Path, fields: Any, text: str) -> None:
    with pytest.raises(CheckpointFormatError, match=f"adapter_config.json: {text}"):
        read(tmp_path, **fields)


def test_dora_as_peft_writes_it() -> None:
    with pytest.raises(CheckpointFormatError, match="use_dora is True, which is not supported"):
        PeftConfig.read(GOLDENS / "dora" / "adapter_config.json")


def test_files_that_are_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter_config.json"
    with pytest.raises(CheckpointError, match="cannot be read: No such file or directory: is this a directory of adap"):
        PeftConfig.read(path)
    path.write_text('{"r": 1, "r": 2}')
    with pytest.raises(CheckpointFormatError, match="not valid JSON: the key 'r' comes twice"):
        PeftConfig.read(path)
    path.write_text("[]")
    with pytest.raises(CheckpointFormatError, match="expected a JSON object, found list"):
        PeftConfig.read(path)
    monkeypatch.setattr(limits, "MAX_JSON_BYTES", 1)
    with pytest.raises(CheckpointFormatError, match="at most 1 are allowed"):
        PeftConfig.read(path)


def test_what_peft_is_told() -> None:
    paths = [f"transformer.h.{i}.attn.{name}" for i in range(3) for name in ("q_proj", "v_proj")]
    weights = [f"{path}.weight" for path in paths] + [
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "score.weight",
    ]
    layers = dict.fromkeys(paths[::2], Settings(4, 8.0)) | {paths[0]: Settings(2, 2.5, 0.1)}
    fields = peft_fields(Adaptation(layers, ("score.weight",)), "classification", paths, weights, None)
    wanted = {
        **{"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8, "rank_pattern": {paths[0]: 2}, "lora_dropout": 0.1},
        **{"alpha_pattern": {paths[0]: 2.5}, "modules_to_save": ["score"], "bias": "none", "task_type": "SEQ_CLS"},
    }
    assert {name: fields[name] for name in wanted} == wanted
    one = Adaptation({paths[0]: Settings(4, 8.0)}, ("transformer.ln_f.bias",))
    fields = peft_fields(one, "classification", paths, weights, "owner/name")
    assert (fields["target_modules"], fields["bias"], fields["task_type"]) == ([paths[0]], "all", None)
    assert (fields["modules_to_save"], fields["base_model_name_or_path"]) == (None, "owner/name")
