"""Exports that generate: served without Python, and without the package, they say what `generate` says."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import assert_near, numbers
from tensorflow.core.protobuf import saved_model_pb2

from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.serving.export import export_saved_model
from tfgptj.tokenizer import GPTJTokenizer

OPTIMIZED = True  # graphs run as they do for users: see conftest.py

TESTS = Path(__file__).parent
PROMPTS = ["ROMEO:", "To be, or not to be", "JULIET:\nO", "MENENIUS:\nWhat — “é” 🎭"]
NEW, COMMA = 14, ","
PENALTY = {"repetition_penalty": 1.2}
# Numbers of each row: (max_new_tokens, temperature, top_k, top_p, seed)
DRAWN = [(14, 0.8, 50, 1.0, 7), (5, 0.0, 0, 1.0, 0), (9, 1.3, 50, 0.7, 2**40 + 3), (14, 1.0, 50, 1.0, 1)]
NAMES = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
DTYPES = ("int32", "float32", "int32", "float32", "int64")

Request = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.from_pretrained("shakespeare")


@pytest.fixture(scope="module")
def model(tokenizer: GPTJTokenizer) -> TFGPTJForCausalLM:
    model = TFGPTJForCausalLM.from_pretrained("shakespeare")
    model.generation_config = None
    model.config.eos_token_id = tokenizer.encode(COMMA)[0]  # texts end soon
    return model


@pytest.fixture(scope="module")
def exported(model: TFGPTJForCausalLM, tokenizer: GPTJTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served")
    return export_saved_model(model, directory, tokenizer, max_new_tokens=NEW, max_batch_size=8, **PENALTY)


# Requests, to a process with TensorFlow alone


def tensor(dtype: str, values: Any) -> list[Any]:
    """A tensor as the process reads it."""
    if dtype != "string":
        array = np.asarray(values)
        return [dtype, list(array.shape), array.tolist()]

    def encoded(value: Any) -> Any:
        if isinstance(value, list):
            return [encoded(each) for each in value]
        return base64.b64encode(value if isinstance(value, bytes) else value.encode()).decode()

    return [dtype, list(np.shape(np.array(values, dtype=object))), encoded(values)]


def prompt(texts: list[Any], name: str = "prompt") -> dict[str, Any]:
    return {name: tensor("string", texts)}


def steered(texts: list[Any], rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    """A request to `generate`."""
    columns = zip(NAMES, DTYPES, zip(*rows, strict=True), strict=True)
    return {**prompt(texts), **{name: tensor(dtype, values) for name, dtype, values in columns}}


def id_rows(rows: list[list[int]], width: int = 0, fill: int = 0) -> dict[str, Any]:
    """Rows of tokens, filled up on the right."""
    width = max(width, *map(len, rows))
    ids = [row + [fill] * (width - len(row)) for row in rows]
    return {"token_ids": tensor("int32", ids), "lengths": tensor("int32", [len(row) for row in rows])}


def hostile_requests(tokenizer: GPTJTokenizer) -> list[tuple[Request, str]]:
    """Requests, each with what its error says."""
    row, ids = (3, 0.5, 5, 0.5, 1), tokenizer.encode("To be")
    long = "a" * 100_000
    texts: list[tuple[Any, str]] = [
        ([], "the request has no rows"),
        (["a"] * 9, "a request has at most 8 rows"),
        ([b"\xff\xfe"], "is not valid UTF-8"),
        ([b"good", b"ba\xc3"], "is not valid UTF-8"),
        ([b"\xed\xa0\x80"], "is not valid UTF-8"),
        ([long], "has more than n_positions=256 tokens"),
        (["x y z " * 150], "are more than n_positions=256"),
        ([["a"]], "rank|shape"),
        ("a", "rank|shape"),
    ]
    found: list[tuple[Request, str]] = []
    for name, argument in (("serving_default", "prompt"), ("score", "text"), ("embed", "text")):
        found += [((name, prompt(given, argument)), text) for given, text in texts]
        found.append(((name, {argument: tensor("int32", [1])}), "string"))
        found.append(((name, {}), argument))
        found.append(((name, {"wrong": tensor("string", ["a"])}), "wrong|" + argument))
    found += [((name, prompt([""], "text")), "each row needs at least one token") for name in ("score", "embed")]
    found.append((("score", prompt(["a"], "text")), "text of one token has no probability"))
    numbers: list[tuple[int, Any, str]] = [
        *((0, value, "max_new_tokens must be between 1 and 256") for value in (0, -1, 257, 2**31 - 1, -(2**31))),
        (0, 256, "are more than n_positions=256"),
        *((1, value, "temperature must be between") for value in (float("nan"), float("inf"), -1.0, -0.001, 2e6)),
        *((2, value, "top_k must be between") for value in (-1, -(2**31))),
        *((3, value, "top_p must be between") for value in (float("nan"), -0.1, 1.1, float("inf"))),
        *((4, value, "seed must be between") for value in (-2, -(2**63))),
    ]
    for place, value, text in numbers:
        bad = (*row[:place], value, *row[place + 1 :])
        found.append((("generate", steered(["a", "To be"], [row, bad])), text))
    found.append((("generate", steered(["a"], [row, row])), "there must be one for each row"))
    found.append((("generate", {**steered(["a"], [row]), "seed": tensor("int64", [[1]])}), "rank|shape"))
    found.append((("generate", {**steered(["a"], [row]), "seed": tensor("float32", [1.0])}), "int64"))
    tables: list[tuple[Any, Any, str]] = [
        ([[-1]], [1], "there is no token below 0"),
        ([[1024]], [1], "the model has the tokens 0…1,023"),
        ([[2**31 - 1, 1]], [2], "the model has the tokens 0…1,023"),
        ([ids], [0], "each row needs at least one token"),
        ([ids], [-5], "each row needs at least one token"),
        ([ids], [2**31 - 1], "a length is more than the columns"),
        ([ids], [len(ids) + 1], "a length is more than the columns"),
        ([ids], [1, 1], "lengths are of other rows"),
        ([ids, ids], [1], "lengths are of other rows"),
        (np.zeros((0, 4), int), np.zeros(0, int), "the request has no rows"),
        (np.zeros((2, 0), int), [1, 1], "a length is more than the columns"),
        ([[1] * 250], [250], "are more than n_positions=256"),
        ([[1]] * 9, [1] * 9, "a request has at most 8 rows"),
        (ids, [1], "rank|shape"),
    ]
    for name in ("tokens", "prefill"):
        for table, lengths, text in tables:
            if name == "prefill" and "n_positions" in text:
                table, lengths = [[1] * 257], [257]
            found.append(((name, {"token_ids": tensor("int32", table), "lengths": tensor("int32", lengths)}), text))
    cache = np.zeros((1, 4, 2, 4, 3, 64)).tolist()
    steps: list[tuple[Any, Any, Any, str]] = [
        ([5], [4], cache, "the cache has fewer slots"),
        ([5], [0], cache, "the cache of each row needs at least one token"),
        ([5, 5], [3, 3], cache, "there must be one for each row"),
        ([1024], [3], cache, "the model has the tokens"),
        ([5], [256], np.zeros((1, 4, 2, 4, 256, 1)).tolist(), "shape"),
    ]
    for tokens, lengths, table, text in steps:
        given = {"token_ids": tensor("int32", tokens), "lengths": tensor("int32", lengths)}
        found.append((("decode", {**given, "cache": tensor("float32", table)}), text))
    return found


@pytest.fixture(scope="module")
def requests(tokenizer: GPTJTokenizer) -> dict[str, Request]:
    """What is asked beside hostile things."""
    rows = [tokenizer.encode(text) for text in PROMPTS]
    return {
        "default": ("serving_default", prompt(PROMPTS)),
        "alone": ("serving_default", prompt(PROMPTS[2:3])),
        "merged": ("serving_default", prompt([PROMPTS[2], *PROMPTS, PROMPTS[3], PROMPTS[3]])),
        "empty": ("serving_default", prompt([""])),
        "drawn": ("generate", steered(PROMPTS, DRAWN)),
        "drawn turned": ("generate", steered(PROMPTS[::-1], DRAWN[::-1])),
        "drawn alone": ("generate", steered(PROMPTS[3:], DRAWN[3:])),
        "anew": ("generate", steered(["ROMEO:"] * 4, [(14, 1.5, 0, 1.0, -1)] * 4)),
        "tokens": ("tokens", id_rows(rows)),
        "tokens, filled up by the first": ("tokens", id_rows(rows, 30, rows[0][0])),
        "score": ("score", prompt(PROMPTS, "text")),
        "embed": ("embed", prompt(PROMPTS, "text")),
        "prefill": ("prefill", id_rows(rows)),
    }


@pytest.fixture(scope="module")
def answers(exported: Path, requests: dict[str, Request], tokenizer: GPTJTokenizer) -> dict[str, Any]:
    """The answers of a process that has TensorFlow alone, and "hostile": messages, expected texts and memory."""
    hostile = hostile_requests(tokenizer)
    random.Random(0).shuffle(hostile)
    rounds = -(-1000 // len(hostile))
    asked = [*requests.values(), *[request for request, _ in hostile] * rounds, requests["default"]]
    done = subprocess.run(
        [sys.executable, "-I", str(TESTS / "served_alone.py"), str(exported)],
        input=json.dumps(asked), capture_output=True, text=True, cwd=exported, env={**os.environ, "PYTHONPATH": ""},
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    named = dict(zip(requests, (answer for answer, _ in found), strict=False))
    rest = found[len(requests) : -1]
    expected = [text for _, text in hostile] * rounds
    named["hostile"] = [(answer, text, memory) for (answer, memory), text in zip(rest, expected, strict=True)]
    named["last"] = found[-1][0]
    return named


def values(answer: dict[str, Any], name: str) -> Any:
    assert "error" not in answer, answer
    dtype, found = answer[name]
    return [base64.b64decode(text) for text in found] if dtype == "string" else np.array(found, dtype)


Generate = Callable[[str, tuple[Any, ...] | None], list[int]]


@pytest.fixture(scope="module")
def own(model: TFGPTJForCausalLM, tokenizer: GPTJTokenizer) -> Generate:
    """The new tokens that `generate` gives a text by itself, padding cut off."""

    def generate(text: str, drawn: tuple[Any, ...] | None = None) -> list[int]:
        ids = tokenizer.encode(text)
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
        if drawn is not None:
            options = dict(zip(NAMES, drawn, strict=True), do_sample=True)
        new = model.generate([ids], **options, **PENALTY)[0, len(ids) :].tolist()
        ends = [index for index, token in enumerate(new) if token == model.config.eos_token_id]
        return new[: ends[0] + 1] if ends else new

    return generate


# What is said


def test_greedy_text_is_that_of_generate(answers: dict[str, Any], own: Generate, tokenizer: GPTJTokenizer) -> None:
    expected = [own(text, None) for text in PROMPTS]
    ended = [tokenizer.decode(row[-1:]) == COMMA for row in expected]
    assert any(ended) and not all(ended) and len(set(map(len, expected))) > 2
    assert values(answers["default"], "num_tokens").tolist() == [len(row) for row in expected]
    shown = [row[:-1] if end else row for row, end in zip(expected, ended, strict=True)]
    assert values(answers["default"], "text_bytes") == [tokenizer.decode_bytes(row) for row in shown]
    assert values(answers["default"], "text") == [tokenizer.decode(row).encode() for row in shown]
    assert values(answers["default"], "finish_reason") == [b"stop" if end else b"length" for end in ended]
    for ids, row in zip(values(answers["tokens"], "token_ids").tolist(), expected, strict=True):
        assert ids == row + [row[-1]] * (len(ids) - len(row))  # the pad token is the end-of-text token


def test_drawn_text_is_that_of_generate(answers: dict[str, Any], own: Generate, tokenizer: GPTJTokenizer) -> None:
    for index, (text, drawn) in enumerate(zip(PROMPTS, DRAWN, strict=True)):
        row = own(text, drawn)
        assert values(answers["drawn"], "num_tokens")[index] == len(row)
        shown = row[:-1] if values(answers["drawn"], "finish_reason")[index] == b"stop" else row
        assert values(answers["drawn"], "text_bytes")[index] == tokenizer.decode_bytes(shown)
    assert len(set(values(answers["anew"], "text"))) > 1


def test_no_row_depends_on_others(answers: dict[str, Any]) -> None:
    whole, merged, turned = answers["default"], answers["merged"], answers["drawn turned"]
    for name in ("text", "text_bytes", "finish_reason", "num_tokens"):
        rows = list(values(whole, name))
        assert list(values(answers["alone"], name)) == rows[2:3]
        assert list(values(merged, name)) == [rows[2], *rows, rows[3], rows[3]]
        assert list(values(turned, name))[::-1] == list(values(answers["drawn"], name))
        assert list(values(answers["drawn alone"], name)) == list(values(answers["drawn"], name))[3:]
    for name in ("token_ids", "num_tokens"):
        filled = values(answers["tokens, filled up by the first"], name)
        np.testing.assert_array_equal(filled, values(answers["tokens"], name))


def test_an_empty_prompt_begins_with_bos(model: TFGPTJForCausalLM, answers: dict[str, Any]) -> None:
    new = model.generate([[model.config.bos_token_id]], max_new_tokens=NEW, do_sample=False, **PENALTY)[0, 1:]
    assert values(answers["empty"], "num_tokens")[0] == len(new)


def test_scores_and_embeddings(model: TFGPTJForCausalLM, tokenizer: GPTJTokenizer, answers: dict[str, Any]) -> None:
    expected, answer = model.score(PROMPTS, tokenizer=tokenizer), answers["score"]
    assert_near(values(answer, "total"), expected.total, 1e-5)
    assert_near(values(answer, "perplexity"), expected.perplexity, 1e-5)
    for row, logs in zip(values(answer, "log_probabilities"), expected.log_probabilities, strict=True):
        assert_near(row[: len(logs)], logs, 1e-5)
        assert not row[len(logs) :].any()
    for index, text in enumerate(PROMPTS):
        hidden = numbers(model.transformer([tokenizer.encode(text)]))[0]
        assert_near(values(answers["embed"], "mean")[index], hidden.mean(axis=0), 1e-4)
        assert_near(values(answers["embed"], "last")[index], hidden[-1], 1e-4)


def test_prefill(model: TFGPTJForCausalLM, tokenizer: GPTJTokenizer, answers: dict[str, Any]) -> None:
    for index, text in enumerate(PROMPTS):
        expected = numbers(model([tokenizer.encode(text)]))[0, -1]
        assert_near(values(answers["prefill"], "logits")[index], expected, 1e-4)


def test_hostile_requests_are_errors_and_take_no_memory(answers: dict[str, Any]) -> None:
    hostile = answers["hostile"]
    assert len(hostile) >= 1000
    for answer, expected, _ in hostile:
        assert "error" in answer, expected
        assert any(text in answer["error"] for text in expected.split("|")), (expected, answer["error"][:500])
    half = len(hostile) // 2  # by then all has been compiled
    assert hostile[-1][2] - hostile[half][2] < 64 * 2**20
    assert answers["last"] == answers["default"]


# What is written


def served_graph(path: Path) -> Any:
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((path / "saved_model.pb").read_bytes())
    return saved.meta_graphs[0]


def operators(graph: Any) -> set[str]:
    functions = graph.graph_def.library.function
    return {node.op for nodes in (graph.graph_def.node, *(f.node_def for f in functions)) for node in nodes}


# All that the graphs may be made of: operators that every runtime of TensorFlow has, that read no files but the
# weights', and that run no Python and no compiler.
ALLOWED = """
    Abs AddV2 All Any ArgMax Assert AssignVariableOp BatchMatMulV2 BiasAdd BitwiseAnd BitwiseOr BitwiseXor
    BroadcastTo Cast ConcatV2 Const Cos Cumsum DecodeRaw DenseBincount DisableCopyOnRead Einsum EnsureShape Equal
    Exp ExpandDims Fill FloorDiv FloorMod GatherV2 Greater GreaterEqual Identity If IsFinite LeftShift Less
    LessEqual LogSoftmax LogicalAnd LogicalNot LogicalOr LowerBound MatMul Max Maximum Mean MergeV2Checkpoints Min
    Minimum Mul Neg NoOp NotEqual OnesLike Pack Pad PadV2 Placeholder Prod RaggedTensorToTensor RandomUniformInt
    Range ReadVariableOp RealDiv ReduceJoin Reshape RestoreV2 ReverseV2 RightShift Rsqrt SaveV2 SegmentMin Select
    SelectV2 Shape ShardedFilename Sigmoid Sin Size Softmax Square SquaredDifference Squeeze StatefulPartitionedCall
    StatelessIf StatelessWhile StaticRegexFullMatch StaticRegexReplace StopGradient StridedSlice StringJoin
    StringLength StringSplitV2 StringToHashBucketFast Sub Sum TensorScatterUpdate TensorStridedSliceUpdate Tile
    TopKV2 Transpose UnicodeTranscode Unpack UnsortedSegmentSum UpperBound VarHandleOp Where While ZerosLike
"""


def test_the_graph_has_allowed_operators_only(exported: Path) -> None:
    functions = served_graph(exported).graph_def.library.function
    assert operators(served_graph(exported)) - {function.signature.name for function in functions} <= {*ALLOWED.split()}
    assert not any(function.attr["_XlaMustCompile"].b for function in functions)


def test_weights_are_stored_once(model: TFGPTJForCausalLM, exported: Path) -> None:
    files = [path for path in exported.rglob("*") if path.is_file()]
    variables = {"variables.index", "variables.data-00000-of-00001"}
    assert {path.name for path in files} >= {"saved_model.pb", *variables}
    stored = sum(path.stat().st_size for path in files if path.parent.name == "variables")
    assert stored <= 1.02 * 4 * model.count_params()


def test_signatures_are_listed(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorflow.python.tools import saved_model_cli

    saved_model_cli._show_inputs_outputs(str(exported), "serve", "generate")
    shown = capsys.readouterr().out
    for name in ("prompt", *NAMES, "text_bytes", "finish_reason"):
        assert f"['{name}'] tensor_info" in shown
    signatures = dict(served_graph(exported).signature_def)
    expected = {"serving_default", "generate", "score", "tokens", "embed", "prefill", "decode"}
    assert set(signatures) - {"__saved_model_init_op"} == expected
    assert not served_graph(exported).asset_file_def


# Without Python


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "served"
    home = Path(tf.sysconfig.get_lib())
    libraries = [home / "libtensorflow_cc.so.2", home / "libtensorflow_framework.so.2"]
    headers, search = f"-I{tf.sysconfig.get_include()}", f"-Wl,-rpath,{home}"
    subprocess.run(["gcc", TESTS / "served.c", headers, "-o", path, *libraries, search], check=True)
    return path


def test_a_program_in_c_says_the_same(exported: Path, program: Path, answers: dict[str, Any]) -> None:
    signature = served_graph(exported).signature_def["serving_default"]
    given, found = signature.inputs["prompt"].name.split(":")[0], signature.outputs["text"].name
    command: list[Any] = [program, exported, given, found]
    done = subprocess.run([*command, *PROMPTS], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == values(answers["default"], "text")
    refused = subprocess.run([*command, "x y z " * 150], capture_output=True)
    assert refused.returncode == 1 and b"are more than n_positions=256" in refused.stderr
