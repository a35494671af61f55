"""A model on LiteRT's kernels: in float32 Hugging Face's numbers and texts, in few bits those of rounded weights."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import oracle
import pytest
from conftest import GOLDENS, Golden, assert_near
from generation_goldens import DIRECTORY, arrays, cases, check_full, inputs_of, parameters_of

from tfgptj.errors import CheckpointError, CheckpointFormatError, ConfigError, GenerationError
from tfgptj.generation.prefix_cache import PrefixCache
from tfgptj.generation.results import GenerationOutput
from tfgptj.litert.convert import convert
from tfgptj.litert.engine import LargePages, Program
from tfgptj.litert.graph import Graph
from tfgptj.litert.model import LiteRTGPTJForCausalLM
from tfgptj.litert.quantization import quantized

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="LiteRT computes, not a Keras backend")
MODEL = DIRECTORY / "model"
IDS = np.array([[5, 9, 3, 17, 9, 3]], "int32")

CASES = {case["name"]: (part, case) for part in ("strategies", "beams", "retired") for case in cases(part)}
REPRESENTATIVE = (
    *("greedy", "greedy_three_eos", "greedy_guidance_negative", "greedy_custom_processor", "greedy_full"),
    *("greedy_prefix_allowed_tokens_fn", "beams_3", "beams_full", "beams_custom_processor", "lookup_4_2", "groups"),
)


Converted = Callable[..., LiteRTGPTJForCausalLM]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Gives the model of a checkpoint with so many bits, converted once."""
    models: dict[Any, LiteRTGPTJForCausalLM] = {}

    def load(source: Path, **options: Any) -> LiteRTGPTJForCausalLM:
        key = (source, *options.items())
        if key not in models:
            directory = tmp_path_factory.mktemp("litert") / "model"
            convert(source, directory, **options)
            models[key] = LiteRTGPTJForCausalLM.from_pretrained(directory, threads=2)
        return models[key]

    return load


def forward(
    model: LiteRTGPTJForCausalLM, ids: np.ndarray, mask: np.ndarray | None = None, record: list[Any] | None = None
) -> np.ndarray:
    """Logits [B, T, V] of a text that is read at once."""
    rows, count = ids.shape
    visible = np.tril(np.ones((count, count), bool)) & (np.ones_like(ids) if mask is None else mask)[:, None, None] != 0
    positions = np.tile(np.arange(count, dtype="int32"), (rows, 1))
    return model.lm_head(model.transformer.step(ids, positions, visible, record=record)[0])


@pytest.mark.parametrize("name", ["base", "tied", "exact_gelu", "silu", "odd_sizes", "rotary_none", "wide_eps"])
def test_float32_gives_hugging_face_s_numbers(name: str, converted: Converted) -> None:
    golden = Golden(name)
    model = converted(GOLDENS / name / "causal_lm", bits=32)
    for padding in ("none", "left", "right"):
        inputs, key = golden.inputs(padding), f"{padding}/causal_lm"
        record: list[Any] = []
        assert_near(forward(model, inputs["input_ids"], inputs.get("attention_mask"), record), golden[f"{key}/logits"])
        for i, found in enumerate(record):
            assert_near(found, golden[f"{key}/{'attentions' if i % 2 else 'hidden_states'}/{i // 2}"])


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_float32_generates_hugging_face_s_texts(name: str, converted: Converted) -> None:
    part, case = CASES[name]
    given = parameters_of(case)
    if case.get("full"):
        given |= {"output_logits": True, "output_hidden_states": True, "output_attentions": True}
        given["return_dict_in_generate"] = True
    found = converted(MODEL, bits=32).generate(**inputs_of(part, name), **given)
    if isinstance(found, GenerationOutput):
        check_full(found, part, name)
        found = found.sequences
    np.testing.assert_array_equal(found, arrays(part)[f"{name}/sequences"])


@pytest.mark.parametrize(("bits", "block_size", "tolerance"), [(8, None, 0.04), (4, 32, 0.04)])
def test_few_bits_are_those_of_the_rounded_weights(
    bits: int,
    block_size: int | None,
    tolerance: float,
    converted: Converted,
) -> None:
    weights = oracle.load_weights(MODEL, np.float32)
    for name, matrix in weights.items():
        if matrix.ndim == 2 and name != "wte.weight":
            kind = (8, None) if name == "lm_head.weight" else (bits, block_size)
            weights[name] = quantized(matrix, *kind).floats()
    config = json.loads((MODEL / "config.json").read_text())
    expected = oracle.causal_lm_logits(weights, config, np.tile(IDS, (2, 4)))
    found = forward(converted(MODEL, bits=bits, block_size=block_size), np.tile(IDS, (2, 4)))
    assert_near(found, expected, tolerance)  # what goes into each product is rounded to 8 bits at run time
    assert_near(found[0], found[1], 1e-6)


def test_pieces_threads_and_the_graph_of_attention_change_nothing(
    converted: Converted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = converted(MODEL, bits=32), np.tile(IDS, (2, 8))
    mask = np.ones_like(ids)
    mask[1, :5] = 0
    by_graph, by_numpy = forward(model, ids, mask), forward(model, ids, mask, [])
    assert_near(by_graph[mask == 1], by_numpy[mask == 1], 1e-5)
    monkeypatch.setattr("tfgptj.litert.attention._MUCH", 1)  # numbers in the keys, from which threads share heads
    by_threads = forward(model, ids, mask, [])
    np.testing.assert_array_equal(by_threads[mask == 1], by_numpy[mask == 1])
    monkeypatch.setattr(model.transformer, "rows_at_once", 40)
    record: list[Any] = []
    assert_near(forward(model, ids, mask, record)[mask == 1], by_numpy[mask == 1], 1e-5)
    assert [x.shape for x in record[:2]] == [(2, 48, 32), (2, 4, 48, 48)]


def test_draws_do_not_depend_on_neighbours(converted: Converted) -> None:
    model = converted(MODEL, bits=8)
    options: dict[str, Any] = {"do_sample": True, "seed": 3, "max_new_tokens": 8, "eos_token_id": None}
    together = model.generate(np.concatenate([IDS, IDS[:, ::-1]]), **options)
    np.testing.assert_array_equal(model.generate(IDS, **options)[0], together[0])


def test_a_prefix_cache_and_pieces_change_nothing(converted: Converted) -> None:
    model, cache = converted(MODEL, bits=32), PrefixCache()
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None}
    alone = model.generate(IDS, **options)
    np.testing.assert_array_equal(model.generate(IDS, prefill_chunk_size=4, **options), alone)
    for _ in range(2):
        np.testing.assert_array_equal(model.generate(IDS, prefix_cache=cache, **options), alone)
    assert cache.last_call is not None and cache.last_call.reused == IDS.shape[1] - 1


def test_it_scores_as_it_computes(converted: Converted) -> None:
    model = converted(MODEL, bits=8)
    expected = oracle.log_softmax(forward(model, IDS).astype("float64"))[0, np.arange(5), IDS[0, 1:]]
    np.testing.assert_allclose(model.score(IDS).log_probabilities[0], expected, atol=0.02)


def test_two_generations_at_once(converted: Converted) -> None:
    from tfgptj.generation.strategies import new_run

    model = converted(MODEL, bits=32)
    parameters = {"max_new_tokens": 5, "eos_token_id": None}
    runs = [new_run(model, ids, parameters=parameters) for ids in (IDS, IDS[:, ::-1])]
    for _ in zip(*(run.chunks(1) for run in runs), strict=True):
        pass
    for run, ids in zip(runs, (IDS, IDS[:, ::-1]), strict=True):
        np.testing.assert_array_equal(run.result(), model.generate(ids, **parameters))


def test_two_threads_at_once(converted: Converted) -> None:
    model = converted(MODEL, bits=32)
    texts = [np.roll(IDS, shift, axis=1) for shift in range(4)]
    alone = [forward(model, ids) for ids in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: forward(model, texts[i % 4]), range(40)))
    for i, found in enumerate(together):
        np.testing.assert_array_equal(found, alone[i % 4])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is in memory")
def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    matrix = quantized(np.random.default_rng(0).standard_normal((4096, 1024)).astype("float32"), 8)
    graph, path = Graph(), tmp_path / "product.tflite"
    graph.write(path, [graph.product("w", graph.input("x", -1, 1024), matrix)])
    program = Program(path, 1, ((-1, 1024),), ((-1, 4096),))
    resident = 0
    for text in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if str(path) in text:
            resident += int(re.search(r"Rss: +(\d+) kB", text)[1])  # type: ignore[index]
    assert resident < 1024
    [found] = program(np.eye(1, 1024, dtype="float32"))
    np.testing.assert_allclose(found[0], matrix.floats()[:, 0], atol=0.02)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no large pages here")
def test_what_is_allocated_comes_to_lie_in_large_pages() -> None:
    small, memories = in_large_pages(), []
    with LargePages() as pages:
        for size in (2**25, 2**22):
            memories.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            memories[-1].write(b"1" * size)
            pages.take()
    assert in_large_pages() - small >= 2**25
    assert [memory[:].count(b"1") for memory in memories] == [2**25, 2**22]


def in_large_pages() -> int:
    """Bytes of this process that are in large pages."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"AnonHugePages: +(\d+) kB", rollup)[1])  # type: ignore[index]


def test_it_drafts_for_nobody(converted: Converted) -> None:
    model = converted(MODEL, bits=8)
    with pytest.raises(GenerationError, match="assistant_model must be a TFGPTJForCausalLM, got a? ?LiteRT"):
        model.generate(IDS, assistant_model=model)


def test_what_is_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no LiteRT model, there is no litert.json; make one with"):
        LiteRTGPTJForCausalLM.from_pretrained(MODEL)
    with pytest.raises(ConfigError, match="threads must be an integer of at least 1, got 0"):
        LiteRTGPTJForCausalLM.from_pretrained(MODEL, threads=0)


def damaged(directory: Path, **fields: Any) -> Path:
    """A converted model with other fields in its `litert.json`."""
    convert(MODEL, directory)
    stored = json.loads((directory / "litert.json").read_text())
    (directory / "litert.json").write_text(json.dumps({**stored, **fields}))
    return directory


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "other"}, r"is of format 'other', version 2; expected 'tfgptj-litert', version 2"),
        ({"version": 1}, r"version 1; expected 'tfgptj-litert', version 2"),
        ({"files": {}}, r"lists 0 files, and a model of 2 layers has 6"),
        ({"files": None}, r"lacks bits, head_bits or files: convert"),
        ({"bits": 5}, r"lacks bits, head_bits or files: convert"),
        ({"block_size": 7}, r"block_size must be null or one of \(32, 64, 128\), got 7"),
    ],
)
def test_a_damaged_list_of_files(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match=message):
        LiteRTGPTJForCausalLM.from_pretrained(damaged(tmp_path / "model", **fields))


def test_damaged_files(tmp_path: Path) -> None:
    directory = damaged(tmp_path / "model")
    (directory / "litert.json").write_text("{")
    with pytest.raises(CheckpointFormatError, match=r"litert.json: not valid JSON"):
        LiteRTGPTJForCausalLM.from_pretrained(directory)
    directory = damaged(tmp_path / "other")
    head, block = directory / "head.tflite", directory / "segment-000.tflite"
    content = head.read_bytes()
    head.write_bytes(content[:-1])
    with pytest.raises(CheckpointFormatError, match=r"head.tflite: has [\d,]+ bytes, expected [\d,]+: convert"):
        LiteRTGPTJForCausalLM.from_pretrained(directory)
    head.write_bytes(bytes(len(content)))
    with pytest.raises(CheckpointFormatError, match=r"head.tflite: LiteRT cannot run it: "):
        LiteRTGPTJForCausalLM.from_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "n_embd": 64}))
    with pytest.raises(CheckpointFormatError, match=rf"{block.name}: takes and gives .*, and the configuration calls"):
        LiteRTGPTJForCausalLM.from_pretrained(directory)
