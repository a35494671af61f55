"""Which layers are meant by names, paths, regular expressions and functions."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tfgptj import GPTJConfig, TFGPTJForCausalLM, TFGPTJModel
from tfgptj.errors import InputError, InputTypeError
from tfgptj.training.lora_targets import layers_of, matching, projections_of

SIZES: dict[str, Any] = {"vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2, "rotary_dim": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    return TFGPTJForCausalLM(GPTJConfig(**SIZES))


def found(model: Any, targets: Any) -> list[str]:
    projections = projections_of(model)
    others = {path: layer for path, layer in layers_of(model).items() if path not in projections}
    return [path.removeprefix("transformer.") for path in matching(targets, projections, others, "targets")]


PROJECTIONS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ["h.0.attn.q_proj", "h.1.attn.q_proj"]),
        (("fc_in", "q_proj"), ["h.0.attn.q_proj", "h.0.mlp.fc_in", "h.1.attn.q_proj", "h.1.mlp.fc_in"]),
        ("transformer.h.1.mlp.fc_in", ["h.1.mlp.fc_in"]),
        ("h.1.mlp.fc_in", ["h.1.mlp.fc_in"]),
        ("lm_head", ["lm_head"]),
        (r".*\.h\.1\.attn\.[qk]_proj", ["h.1.attn.q_proj", "h.1.attn.k_proj"]),
        ([re.compile(r".*\.0\..*fc_.*"), "lm_head"], ["h.0.mlp.fc_in", "h.0.mlp.fc_out", "lm_head"]),
        (lambda path, layer: layer.units == 32, ["h.0.mlp.fc_in", "h.1.mlp.fc_in"]),
        ("all-linear", [f"h.{i}.{name}" for i in range(2) for name in PROJECTIONS]),
        (["q_proj", "h.0.attn.q_proj"], ["h.0.attn.q_proj", "h.1.attn.q_proj"]),
    ],
)
def test_what_is_meant(model: Any, targets: Any, expected: list[str]) -> None:
    assert found(model, targets) == expected


def test_a_model_without_head_has_shorter_paths() -> None:
    model = TFGPTJModel(GPTJConfig(**SIZES))
    assert found(model, "h.0.attn.q_proj") == ["h.0.attn.q_proj"]
    assert list(layers_of(model))[:3] == ["wte", "h.0.ln_1", "h.0.attn.q_proj"]


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (
            ["q_proj", "query"],
            "targets: 'query' matches no layer; there are q_proj, k_proj, .*, lm_head, with paths",
        ),
        ("proj", r"'proj' matches no layer"),
        (re.compile("q_proj"), "'q_proj' matches no layer; .* a regular expression must match the whole path"),
        (lambda path, layer: False, "matches no layer"),
        ([], r"targets is empty: name at least one layer, such as 'transformer\.h\.0\.attn\.q_proj'"),
        ("*_proj", r"'\*_proj' is neither a name nor a regular expression: nothing to repeat"),
        ("ln_1", r"targets: transformer\.h\.0\.ln_1 has no kernel of its own that adapters could be added to"),
        (["q_proj", "wte"], r"transformer\.wte has no kernel of its own"),
    ],
)
def test_what_is_not(model: Any, targets: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        found(model, targets)


@pytest.mark.parametrize("targets", [3, [3], None])
def test_other_types(model: Any, targets: Any) -> None:
    with pytest.raises(InputTypeError, match="targets must be names, regular expressions or a function, got"):
        found(model, targets)


def test_a_tied_head_is_no_projection() -> None:
    model = TFGPTJForCausalLM(GPTJConfig(**SIZES, tie_word_embeddings=True))
    with pytest.raises(InputError, match="targets: lm_head has no kernel of its own"):
        found(model, "lm_head")
