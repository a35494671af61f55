"""What tests share that compare with `fixtures/goldens_generation`: its cases, its model, and functions by name."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from conftest import FIXTURES

from tfgptj.generation.results import GenerationOutput
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.tokenizer import GPTJTokenizer

DIRECTORY = FIXTURES / "goldens_generation"


def cases(part: str) -> list[dict[str, Any]]:
    """The cases of "processors", "strategies", "beams", "retired", "sampling" or "stop_strings"."""
    return json.loads((DIRECTORY / f"{part}.json").read_text(encoding="utf-8"))


@functools.cache
def arrays(part: str) -> Any:
    """Their arrays, keyed `<case>/<array>`."""
    return np.load(DIRECTORY / f"{part}.npz")


def load(name: str = "model") -> TFGPTJForCausalLM:
    """The checkpoint "model" or "draft"."""
    return TFGPTJForCausalLM.from_pretrained(DIRECTORY / name, dtype="float32")


def residue(batch_id: int, input_ids: np.ndarray) -> list[int]:
    """As in `make_generation_goldens.py`, for a vocabulary of 64, or 20 where all tokens are lower."""
    start = (batch_id + int(input_ids[-1])) % 3
    return list(range(start, 20 if input_ids.max() < 20 else 64, 3))


def favour_odd(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """As in `make_generation_goldens.py`."""
    return scores + np.arange(scores.shape[-1]) % 2


# As in `make_generation_goldens.py`.
CRITERIA: dict[str, Callable[[np.ndarray, Any], Any]] = {
    "residue": lambda ids, scores: ids[:, -1] % 7 == 3,
    "often": lambda ids, scores: ids[:, -1] % 3 != 0,
    "length": lambda ids, scores: ids.shape[1] >= 13,
    "scores": lambda ids, scores: (ids[:, -1] % 5 == 0) & (scores[-1].max() > -1) & (len(scores) >= 4),
}


def parameters_of(case: dict[str, Any]) -> dict[str, Any]:
    """A case's parameters, with functions in place of their names."""
    given = dict(case["parameters"])
    if "prefix_allowed_tokens_fn" in given:
        given["prefix_allowed_tokens_fn"] = residue
    if "logits_processor" in given:
        given["logits_processor"] = favour_odd
    if "stopping_criteria" in given:
        if given["stopping_criteria"] == "scores":
            given |= {"return_dict_in_generate": True, "output_scores": True}
        given["stopping_criteria"] = CRITERIA[given["stopping_criteria"]]
    if "stop_strings" in given:
        given["tokenizer"] = GPTJTokenizer.from_pretrained("shakespeare")
    return given


def inputs_of(part: str, name: str, rows: int | None = None) -> dict[str, np.ndarray]:
    """The first rows, or all, of a case's prompts, masks, and negative prompts if it has any."""
    names = ("input_ids", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask")
    found = arrays(part)
    return {key: found[f"{name}/{key}"][:rows] for key in names if f"{name}/{key}" in found}


def check_full(output: GenerationOutput, part: str, name: str) -> None:
    """Compare all that a case marked `full` has with Hugging Face's."""
    found, mask = arrays(part), arrays(part)[f"{name}/attention_mask"].astype(bool)
    assert output.logits is not None and output.hidden_states is not None and output.attentions is not None
    mask = np.repeat(mask, len(output.logits[0]) // len(mask), axis=0)
    np.testing.assert_allclose(np.stack(output.logits), found[f"{name}/logits"], rtol=1e-4, atol=1e-4)
    for step in range(len(output.logits)):
        real = mask if step == 0 else np.ones((len(mask), 1), bool)  # what stands at padding says nothing
        for layer, states in enumerate(output.hidden_states[step]):
            expected = found[f"{name}/hidden_states/{step}/{layer}"]
            assert states.shape == expected.shape
            np.testing.assert_allclose(states[real], expected[real], rtol=1e-4, atol=1e-4)
        for layer, weights in enumerate(output.attentions[step]):
            expected = found[f"{name}/attentions/{step}/{layer}"]
            assert weights.shape == expected.shape
            by_query = (np.moveaxis(x, 1, 2)[real] for x in (weights, expected))
            np.testing.assert_allclose(*by_query, rtol=1e-4, atol=1e-4)
    assert len(output.hidden_states) == len(output.attentions) == len(output.logits)
