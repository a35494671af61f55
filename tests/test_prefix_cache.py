"""PrefixCache: what is not read again changes nothing, and is never of other weights."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import assert_near, elsewhere, foremost, numbers
from keras import ops

from tfgptj.backbone import TFGPTJModel
from tfgptj.config import GPTJConfig
from tfgptj.errors import GenerationError, NonFiniteLogitsError
from tfgptj.generation import prefix_cache
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.prefix_cache import PrefixCache, Reuse, weights_mark
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.pipelines import pipeline
from tfgptj.tokenizer import GPTJTokenizer

BACKEND = keras.backend.backend()
eager_generation = pytest.mark.usefixtures("eager_generation")
CONFIG = GPTJConfig(
    vocab_size=61,
    n_positions=96,
    n_embd=24,
    n_layer=2,
    n_head=3,
    rotary_dim=4,
    eos_token_id=None,
    initializer_range=0.3,
)
TEXT = np.random.default_rng(3).integers(1, 61, 40).astype("int32")
OTHER = (TEXT + 1) % 61
NEW = 6


def new_model(seed: int = 4, **options: Any) -> TFGPTJForCausalLM:
    keras.utils.set_random_seed(seed)
    return TFGPTJForCausalLM(CONFIG, **options)


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return new_model()


@pytest.fixture(scope="module")
def changing() -> TFGPTJForCausalLM:
    """A model for tests that leave it changed."""
    return new_model()


def generate(model: TFGPTJForCausalLM, *texts: Any, **options: Any) -> np.ndarray:
    width = max(map(len, texts))
    ids = [[0] * (width - len(text)) + list(text) for text in texts]
    mask = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
    return model.generate(ids, mask, **{"max_new_tokens": NEW, **options})


def beginning(shared: int, length: int) -> np.ndarray:
    """A text that begins as TEXT does, and goes on in another way."""
    return np.concatenate([TEXT[:shared], OTHER[shared:length]])


# The same results


@pytest.mark.core
@pytest.mark.parametrize("shared", elsewhere([0, 1, 2, 7, 19, 20], 7))
def test_each_step_equals_the_whole_text(model: TFGPTJForCausalLM, shared: int) -> None:
    cache = PrefixCache()
    generate(model, beginning(shared, 22), prefix_cache=cache)
    wanted = dict.fromkeys(("return_dict_in_generate", "output_logits"), True)
    output: Any = generate(model, TEXT[:20], prefix_cache=cache, **wanted)
    whole = numbers(model(output.sequences))[0]
    for step, logits in enumerate(output.logits):
        assert_near(logits[0], whole[19 + step], 1e-5)
    # Where shapes are fixed, 24 columns hold the prompt, and at least 16 of them are read.
    columns = 20 - min(shared, 19)
    read = columns if BACKEND != "jax" else 24 if columns > 16 else 16
    assert cache.last_call == Reuse(20, max(20 - read, 0))


@pytest.mark.parametrize("length", [1, 5, 10])
def test_every_length_of_a_prefix(model: TFGPTJForCausalLM, length: int) -> None:
    expected = generate(model, TEXT[:length])
    for shared in range(12):
        cache = PrefixCache()
        generate(model, beginning(shared, 12), prefix_cache=cache, max_new_tokens=1)
        np.testing.assert_array_equal(generate(model, TEXT[:length], prefix_cache=cache), expected)
        assert cache.last_call is not None
        assert cache.last_call.reused == min(shared, length - 1) or BACKEND == "jax"


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "seed": 5, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "guidance": {"guidance_scale": 1.5},
    "guidance_away_from_the_same": {"guidance_scale": 1.5, "negative_prompt_ids": TEXT[None, :9]},
    "penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "step_by_step": {"logits_processor": lambda ids, scores: -scores},
    "beams_step_by_step": {"num_beams": 2, "logits_processor": lambda ids, scores: -scores},
    "pieces": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "search", foremost(SEARCHES, "greedy", "guidance_away_from_the_same", "step_by_step", "pieces")
)
def test_a_batch_is_the_same_with_a_cache(model: TFGPTJForCausalLM, search: str, side: str) -> None:
    texts = [TEXT[:12], beginning(9, 14), TEXT[:3], OTHER[:2]]
    ids, mask = np.full((4, 15), 7), np.zeros((4, 15), int)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(15 - len(text), 15)
        ids[row, where], mask[row, where] = text, 1
    options = {"max_new_tokens": NEW, **SEARCHES[search]}
    expected, cache = model.generate(ids, mask, **options), PrefixCache()
    for _ in range(3):
        np.testing.assert_array_equal(model.generate(ids, mask, prefix_cache=cache, **options), expected)
    assert cache.last_call is not None
    assert cache.last_call.reused > 10 or BACKEND == "jax"


@pytest.mark.core
@pytest.mark.parametrize("search", elsewhere(["greedy", "sample", "beams"], "sample"))
def test_a_batch_is_the_same_on_any_backend(model: TFGPTJForCausalLM, search: str) -> None:
    # 16 columns are read, of the second row too: as many as the first needs, and where shapes are fixed no fewer.
    texts, cache = [beginning(24, 40), beginning(28, 33), TEXT[:2]], PrefixCache()
    expected = generate(model, *texts, **SEARCHES[search])
    generate(model, TEXT[:30], prefix_cache=cache)
    np.testing.assert_array_equal(generate(model, *texts, prefix_cache=cache, **SEARCHES[search]), expected)
    assert cache.last_call is not None
    assert cache.last_call.reused == (24 + 17) * (2 if search == "sample" else 1)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is a choice on TensorFlow only")
def test_the_same_with_xla(model: TFGPTJForCausalLM) -> None:
    cache = PrefixCache()
    expected = generate(model, TEXT)
    generate(model, beginning(30, 40), prefix_cache=cache, jit_compile=True)
    np.testing.assert_array_equal(generate(model, TEXT, prefix_cache=cache, jit_compile=True), expected)
    assert cache.last_call == Reuse(40, 24)


@eager_generation
def test_bfloat16() -> None:
    model, cache = new_model(dtype="bfloat16"), PrefixCache()
    generate(model, beginning(12, 20), prefix_cache=cache)
    wanted = dict.fromkeys(("return_dict_in_generate", "output_logits"), True)
    output: Any = generate(model, TEXT[:20], prefix_cache=cache, max_new_tokens=2, **wanted)
    assert_near(output.logits[0][0], numbers(model(TEXT[None, :20]))[0, -1], 2**-6)
    assert cache.nbytes == len(cache) * 2 * CONFIG.n_layer * CONFIG.n_embd * 2 or BACKEND == "jax"


# What is kept


def test_a_talk_that_grows_is_read_once(model: TFGPTJForCausalLM) -> None:
    cache, text = PrefixCache(), TEXT[:20]
    for _ in range(3):
        answer = generate(model, text, prefix_cache=cache)[0]
        np.testing.assert_array_equal(answer, generate(model, text)[0])
        text = np.concatenate([answer, OTHER[:2]])
        assert len(cache) == len(answer) - 1  # the last token was chosen, and not read
    assert cache.last_call is not None
    assert cache.last_call.reused == len(answer) - NEW - (3 if BACKEND != "jax" else 16)


@eager_generation
def test_drafts(model: TFGPTJForCausalLM) -> None:
    cache, drafts = PrefixCache(), {"prompt_lookup_num_tokens": 3, "max_new_tokens": 20}
    expected = generate(model, TEXT[:20], **drafts)
    for reused in (0, 19):
        np.testing.assert_array_equal(generate(model, TEXT[:20], prefix_cache=cache, **drafts), expected)
        assert len(cache) == 39
        assert cache.last_call == Reuse(20, reused) or BACKEND == "jax"
    longer = np.concatenate([expected[0], OTHER[:2]])
    np.testing.assert_array_equal(generate(model, longer, prefix_cache=cache), generate(model, longer))
    assert cache.last_call is not None
    assert cache.last_call.reused == 39 or BACKEND == "jax"
    generate(model, TEXT[:20], TEXT[:9], prefix_cache=cache, **drafts)  # one after the other


def test_of_a_row_that_ended_its_text_is_kept(model: TFGPTJForCausalLM) -> None:
    [first, second] = generate(model, TEXT[:8], OTHER[:5])[:, 8:]
    assert first[1] != first[0]
    assert first[1] not in second[:2]
    cache = PrefixCache()
    generate(model, TEXT[:8], OTHER[:5], eos_token_id=int(first[1]), prefix_cache=cache)
    assert len(cache) == 10  # with the token that ended it, which was read while the other row went on


@eager_generation
def test_of_beams_the_prompt_is_kept(model: TFGPTJForCausalLM) -> None:
    cache = PrefixCache()
    generate(model, TEXT[:8], prefix_cache=cache, num_beams=3)
    assert len(cache) == 8
    expected = generate(model, TEXT[:10])
    np.testing.assert_array_equal(generate(model, TEXT[:10], prefix_cache=cache), expected)


def test_texts_that_were_not_used_for_longest_give_way(model: TFGPTJForCausalLM) -> None:
    cache = PrefixCache(max_tokens=40)
    texts = [np.full(15, token) for token in (3, 4, 5)]

    def read(text: np.ndarray) -> int:
        generate(model, text, prefix_cache=cache, max_new_tokens=1)
        assert cache.last_call is not None
        return cache.last_call.tokens - cache.last_call.reused

    assert [read(texts[0]), read(texts[1]), read(texts[0]), read(texts[2])] == [15, 15, 1, 15]
    assert len(cache) == 30
    assert cache.nbytes == 30 * 2 * CONFIG.n_layer * CONFIG.n_embd * 4
    assert [read(texts[0]), read(texts[1])] == [1, 15]
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)
    assert read(texts[0]) == 15


def test_a_text_that_goes_on_takes_the_place_of_its_beginning(model: TFGPTJForCausalLM) -> None:
    cache = PrefixCache()
    for length, kept in ((10, 10), (15, 15), (12, 15)):
        generate(model, TEXT[:length], prefix_cache=cache, max_new_tokens=1)
        assert len(cache) == kept


def test_of_a_longer_text_the_beginning_is_kept(model: TFGPTJForCausalLM) -> None:
    cache = PrefixCache(max_tokens=7)
    for _ in range(2):
        generate(model, TEXT[:20], prefix_cache=cache)
        assert len(cache) == 7
    assert cache.last_call == Reuse(20, 7)


@eager_generation
def test_a_failed_call_leaves_nothing(changing: TFGPTJForCausalLM) -> None:
    model, cache = changing, PrefixCache()
    model.lm_head.dense.bias.assign(np.full(61, np.nan, "float32"))
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite logits"):
        generate(model, TEXT[:9], prefix_cache=cache)
    assert len(cache) == 0


# What is read


@pytest.fixture
def eager() -> Iterator[None]:
    """Programs are not compiled, so that each call of the model is one of Python's."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.run_functions_eagerly(True)
        yield
        tf.config.run_functions_eagerly(False)
    elif BACKEND == "jax":
        import jax

        with jax.disable_jit():
            yield
    else:
        yield


@pytest.mark.usefixtures("eager")
def test_no_token_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    read, step = [], TFGPTJModel.step

    def counted(self: TFGPTJModel, ids: Any, *arguments: Any, **options: Any) -> Any:
        read.append(tuple(ids.shape))
        return step(self, ids, *arguments, **options)

    monkeypatch.setattr(TFGPTJModel, "step", counted)
    model, cache = new_model(), PrefixCache()

    def columns(*texts: np.ndarray, **options: Any) -> list[tuple[int, ...]]:
        read.clear()
        generate(model, *texts, max_new_tokens=1, prefix_cache=cache, **options)
        return list(read)

    fixed = BACKEND == "jax"
    assert columns(TEXT[:30]) == [(1, 32 if fixed else 30)]
    assert columns(TEXT[:30]) == [(1, 16 if fixed else 1)]
    assert columns(beginning(25, 30)) == [(1, 16 if fixed else 5)]
    assert columns(TEXT[:30], beginning(24, 28), TEXT[:3]) == [(3, 16 if fixed else 4)]
    assert columns(beginning(10, 30), prefill_chunk_size=9) == [(1, 9)] * 3
    assert columns(OTHER[:30]) == [(1, 32 if fixed else 30)]


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="traces are counted on TensorFlow, whose graphs leave the shapes open"
)
def test_no_more_programs_than_needed() -> None:
    model, cache = new_model(), PrefixCache()
    for length in range(1, 12):
        generate(model, beginning(length // 2, length), TEXT[: 1 + length % 5], prefix_cache=cache, max_new_tokens=3)
    traces = {name: program.traces for (name, *_), program in model._generation_programs.items()}
    assert traces == {"prefill": 2, "moved": 1, "decode": 1}  # one begins, one goes on


# Other weights


def assign(model: TFGPTJForCausalLM) -> None:
    kernel = model.transformer.blocks[0].attn.k_proj.kernel
    kernel.assign(-5 * ops.convert_to_numpy(kernel))


def set_weights(model: TFGPTJForCausalLM) -> None:
    model.set_weights(new_model(5).get_weights())


def load_weights(model: TFGPTJForCausalLM, directory: Path) -> None:
    new_model(5).save_weights(directory / "other.weights.h5")
    model.load_weights(directory / "other.weights.h5")


def load_pretrained(model: TFGPTJForCausalLM, directory: Path) -> None:
    new_model(5).save_pretrained(directory)
    model.load_pretrained(directory)


def fit(model: TFGPTJForCausalLM) -> None:
    model.compile(keras.optimizers.Adam(0.1))
    model.fit(TEXT[None, :8], TEXT[None, :8], verbose=0)


CHANGES: dict[str, Callable[..., None]] = {
    change.__name__: change for change in (assign, set_weights, load_weights, load_pretrained, fit)
}


@pytest.mark.core
@pytest.mark.usefixtures("eager_steps")
@pytest.mark.parametrize("change", elsewhere(CHANGES, "assign", "load_pretrained"))
def test_changed_weights_are_noticed(changing: TFGPTJForCausalLM, change: str, tmp_path: Path) -> None:
    model, cache = changing, PrefixCache()
    model.set_weights(new_model().get_weights())
    before = generate(model, TEXT, prefix_cache=cache)
    CHANGES[change](model, tmp_path) if change.startswith("load") else CHANGES[change](model)
    after = generate(model, TEXT, prefix_cache=cache)
    assert cache.last_call == Reuse(40, 0)
    np.testing.assert_array_equal(after, generate(model, TEXT))
    assert (before != after).any()
    generate(model, TEXT, prefix_cache=cache)
    assert cache.last_call == Reuse(40, 39 if BACKEND != "jax" else 24)


@pytest.mark.core
def test_one_number_of_any_weight_is_enough(changing: TFGPTJForCausalLM) -> None:
    model = changing
    marks = {weights_mark(model)}
    weights = model.transformer.weights
    for weight in weights:
        value = numbers(weight.value)
        changed = value.copy()
        changed.flat[value.size // 2] = np.nextafter(changed.flat[value.size // 2], np.float32(9))
        weight.assign(changed)
        marks.add(weights_mark(model))
        weight.assign(value)
    assert len(marks) == 1 + len(weights)
    marks.add(weights_mark(model))
    assert len(marks) == 1 + len(weights)


@pytest.mark.core
@pytest.mark.parametrize("dtype", elsewhere(["bfloat16", "float16"], "bfloat16"))
def test_one_bit_of_a_narrow_weight_is_enough(dtype: str) -> None:
    model = new_model(dtype=dtype)
    mark, weight = weights_mark(model), model.transformer.blocks[1].mlp.fc_out.kernel
    value = weight.value
    weight.assign(ops.where(value == ops.max(value), value * 1.01, value))
    assert weights_mark(model) != mark


def test_rows_of_odd_length_are_summed_too() -> None:
    odd = GPTJConfig(vocab_size=61, n_embd=15, n_inner=7, n_layer=1, n_head=3, rotary_dim=4)
    model = TFGPTJForCausalLM(odd, dtype="bfloat16")
    mark = weights_mark(model)
    model.transformer.blocks[0].mlp.fc_in.bias.assign(np.ones(7))
    assert weights_mark(model) != mark


@eager_generation
def test_lora_and_quantization_are_noticed() -> None:
    model, cache = new_model(), PrefixCache()
    generate(model, TEXT[:20], prefix_cache=cache)
    marks = [weights_mark(model)]
    layer = model.transformer.blocks[0].attn.v_proj
    layer.enable_lora(2)
    marks.append(weights_mark(model))
    layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape, "float32"))
    marks.append(weights_mark(model))
    model.transformer.blocks[1].mlp.fc_in.quantize("int8")
    marks.append(weights_mark(model))
    assert len(set(marks)) == 4


@eager_generation
def test_another_model_finds_nothing(model: TFGPTJForCausalLM) -> None:
    cache, other = PrefixCache(check_weights=False), new_model(5)
    generate(model, TEXT[:20], prefix_cache=cache)
    np.testing.assert_array_equal(generate(other, TEXT[:20], prefix_cache=cache), generate(other, TEXT[:20]))
    assert cache.last_call == Reuse(20, 0)
    generate(model, TEXT[:20], prefix_cache=cache)
    assert cache.last_call == Reuse(20, 0)  # one at a time


@eager_generation
def test_a_cache_does_not_keep_a_model() -> None:
    import weakref

    cache, model = PrefixCache(), new_model()
    generate(model, TEXT[:5], prefix_cache=cache)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None or BACKEND != "tensorflow"  # other backends' compilers keep what they have compiled


def test_weights_are_looked_at_unless_the_caller_does(
    model: TFGPTJForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(prefix_cache, "weights_mark", lambda model: calls.append(model) or b"")
    generate(model, TEXT[:5], prefix_cache=PrefixCache(check_weights=False))
    assert not calls
    generate(model, TEXT[:5], prefix_cache=PrefixCache())
    assert calls == [model]


# Streams, pipelines, threads


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(["to be or not to be"], vocab_size=257)


@pytest.fixture(scope="module")
def writer() -> TFGPTJForCausalLM:
    keras.utils.set_random_seed(1)
    shape = {"vocab_size": 257, "n_positions": 96, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    return TFGPTJForCausalLM(GPTJConfig(**shape, eos_token_id=None, initializer_range=0.3))


def test_streams_and_stop_strings(writer: TFGPTJForCausalLM, tokenizer: GPTJTokenizer) -> None:
    cache, prompt = PrefixCache(), "to be or not to be, that is what they ask: "
    for options in ({}, {"stop_strings": "b"}, {"do_sample": True, "seed": 3}):
        expected = "".join(writer.stream(prompt, tokenizer=tokenizer, max_new_tokens=12, **options))
        for _ in range(2):
            pieces = writer.stream(prompt, tokenizer=tokenizer, max_new_tokens=12, prefix_cache=cache, **options)
            assert "".join(pieces) == expected
        assert cache.last_call is not None
        assert cache.last_call.reused >= 24


def test_of_a_stream_that_is_left_the_prompt_is_kept(writer: TFGPTJForCausalLM, tokenizer: GPTJTokenizer) -> None:
    cache = PrefixCache()
    stream = writer.stream("to be or not", tokenizer=tokenizer, max_new_tokens=40, prefix_cache=cache)
    next(stream)
    del stream
    assert len(cache) == len(tokenizer.encode("to be or not"))


def test_batches_of_a_pipeline_share_their_beginning(writer: TFGPTJForCausalLM, tokenizer: GPTJTokenizer) -> None:
    cache = PrefixCache()
    write = pipeline("text-generation", writer, tokenizer, max_new_tokens=5, batch_size=2, prefix_cache=cache)
    texts = ["to be or not to be, to be or not to be, " + text for text in ("who", "what", "why", "when")]
    expected = pipeline("text-generation", writer, tokenizer, max_new_tokens=5, batch_size=2)(texts)
    assert write(texts) == expected
    assert cache.last_call is not None
    assert cache.last_call.reused > cache.last_call.tokens / 2
    assert "".join(write.stream(texts[0])) == expected[0][0]["generated_text"].removeprefix(texts[0])


def test_threads_share_a_cache(model: TFGPTJForCausalLM) -> None:
    cache = PrefixCache(max_tokens=50)
    texts = [beginning(10, 20), beginning(15, 18), OTHER[:12], TEXT[:20]]
    expected = [generate(model, text) for text in texts]
    wrong: list[int] = []

    def work(first: int) -> None:
        for index in [first, 3 - first] * 3:
            if (generate(model, texts[index], prefix_cache=cache) != expected[index]).any():
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < len(cache) <= 50


# What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_cache": {}}, r"prefix_cache must be a tfgptj.PrefixCache, got dict"),
        ({"prefix_cache": PrefixCache}, r"prefix_cache must be a tfgptj.PrefixCache, got type"),
        (
            {"penalty_alpha": 0.5, "top_k": 4},
            r"prefix_cache cannot be combined with contrastive search \(penalty_alpha\), which compares",
        ),
        *(
            (
                {"return_dict_in_generate": True, name: True},
                f"{name} cannot be combined with prefix_cache: they are kept",
            )
            for name in ("output_hidden_states", "output_attentions")
        ),
        ({"generation_config": None, "max_new_tokens": 0}, "max_new_tokens must be between 1"),
    ],
)
def test_what_cannot_be_combined(model: TFGPTJForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.generate([[1, 2]], **{"prefix_cache": PrefixCache(), **options})


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "max_tokens must be between 1 and"),
        (-1, "max_tokens must be between 1 and"),
        (2.5, "max_tokens must be an integer, got 2.5"),
        (True, "max_tokens must be an integer, got True"),
    ],
)
def test_what_is_no_size(size: Any, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        PrefixCache(max_tokens=size)
    with pytest.raises(GenerationError, match="prefix_cache is an argument of generate, not a parameter"):
        GenerationConfig(prefix_cache=PrefixCache())
