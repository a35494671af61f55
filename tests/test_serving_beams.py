"""Exports that search with beams: Hugging Face's texts, and those of `generate` whatever else is asked at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import FIXTURES
from generation_goldens import arrays, cases, load
from test_serving_export import ALLOWED, operators, served_graph

from tfgptj import cli
from tfgptj.errors import GenerationError
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.serving.export import export_saved_model

NAME = "beams_penalty_2.0_stopping_True"
[GIVEN] = (case["parameters"] for case in cases("strategies") if case["name"] == NAME)
Rows = list[list[int]]


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return load()


@pytest.fixture(scope="module")
def exported(model: TFGPTJForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {**GIVEN, "num_return_sequences": 1, "max_total_tokens": 1000}
    return export_saved_model(model, tmp_path_factory.mktemp("served"), **options)


@pytest.fixture(scope="module")
def served(exported: Path) -> Any:
    return tf.saved_model.load(exported).signatures["tokens"]


def ask(served: Any, rows: Rows) -> Rows:
    """What is added to rows, up to its end."""
    width = max(map(len, rows)) + 2
    table = np.array([row + [0] * (width - len(row)) for row in rows], "int32")
    found = served(token_ids=tf.constant(table), lengths=tf.constant([len(row) for row in rows]))
    texts = zip(found["token_ids"].numpy().tolist(), found["num_tokens"].numpy().tolist(), strict=True)
    new = [ids[:count] for ids, count in texts]
    reasons = [b"stop" if ids[-1] == GIVEN["eos_token_id"] else b"length" for ids in new]
    assert found["finish_reason"].numpy().tolist() == reasons
    return new


def up_to_the_end(ids: np.ndarray) -> list[int]:
    """New tokens without what fills them up."""
    ends = np.flatnonzero(ids == GIVEN["eos_token_id"])
    return ids[: ends[0] + 1 if len(ends) else None].tolist()


def test_texts_are_hugging_face_s(served: Any) -> None:
    ids, mask = (arrays("strategies")[f"{NAME}/{key}"] for key in ("input_ids", "attention_mask"))
    sequences = arrays("strategies")[f"{NAME}/sequences"][:: GIVEN["num_return_sequences"], ids.shape[1] :]
    expected = [up_to_the_end(row) for row in sequences]
    rows = [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]
    assert len({len(row) for row in expected}) > 1
    assert ask(served, rows) == expected
    assert [ask(served, [row])[0] for row in rows] == expected


def test_no_row_depends_on_others(served: Any, model: TFGPTJForCausalLM) -> None:
    chance = np.random.default_rng(0)
    rows = [chance.integers(0, 64, size).tolist() for size in (1, 7, 3, 12, 5)]
    expected = []
    for row in rows:
        found = model.generate([row], **{**GIVEN, "num_return_sequences": 1})
        expected.append(up_to_the_end(found[0, len(row) :]))
    assert ask(served, rows) == expected
    assert ask(served, [rows[2], *rows[::-1], rows[0]]) == [expected[2], *expected[::-1], expected[0]]


def test_memory_has_a_cap(served: Any) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="rows times tokens, .* are more than 1,000"):
        ask(served, [[5]] * 14)  # of 24 new tokens and three beams each


def test_the_graph_has_allowed_operators_only(exported: Path) -> None:
    graph = served_graph(exported)
    functions = {function.signature.name for function in graph.graph_def.library.function}
    assert operators(graph) - functions <= {*ALLOWED.split(), "Pow"}
    assert set(graph.signature_def) >= {"serving_default", "tokens", "prefill", "decode"}


def test_the_command_hands_over_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("tfgptj.serving.export.export_saved_model", lambda *_, **options: given.update(options))
    command = ["export", str(FIXTURES / "pipeline_goldens" / "causal_lm"), str(tmp_path), "--num-beams", "3"]
    command += ["--tokenizer", str(FIXTURES / "small_vocab")]
    assert cli.main([*command, "--length-penalty", "0.5", "--early-stopping", "never"]) == 0
    assert given == {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never", "do_sample": False}
    assert cli.main([*command, "--early-stopping", "yes"]) == 0
    assert given["early_stopping"] is True
    for flags in (["--top-k", "5"], ["--do-sample"]):
        with pytest.raises(SystemExit):
            cli.main([*command, *flags])
        assert "--num-beams searches for the likeliest text, and draws nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "do_sample": True}, "do_sample=True cannot be served with num_beams=2: set do_sample=False"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "num_beam_groups=2 cannot be served: leave"),
        ({"num_beams": 2, "num_return_sequences": 2}, "num_return_sequences=2 cannot be served: leave it at 1"),
    ],
)
def test_what_cannot_be_searched(
    options: dict[str, Any], message: str, model: TFGPTJForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(GenerationError, match=message):
        export_saved_model(model, tmp_path, **options)
    assert not list(tmp_path.iterdir())
