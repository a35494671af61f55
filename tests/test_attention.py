"""The attention layer against oracle.py: whole texts, steps with a cache, and when heads are taken in turn."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import oracle
import pytest
from conftest import assert_near, elsewhere, numbers
from keras import ops

from tfgptj.attention import WRITER, RotaryAttention, write_slots
from tfgptj.config import GPTJConfig
from tfgptj.rotary import RotaryEmbedding

pytestmark = pytest.mark.core
SHAPE: dict[str, Any] = {"vocab_size": 7, "n_layer": 1, "n_embd": 24, "n_head": 3, "rotary_dim": 4}
B, T = 2, 5
X = np.random.default_rng(0).standard_normal((B, T, 24)).astype("float32")
POSITIONS = np.array([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
CAUSAL = np.tril(np.ones((T, T), bool))[None, None]
# The second row begins with two tokens of padding, which may look at nothing.
MASK = CAUSAL & (np.arange(T) >= np.array([[0], [2]]))[:, None, None]


def layer_of(**changes: Any) -> RotaryAttention:
    layer = RotaryAttention(GPTJConfig(**{**SHAPE, "initializer_range": 0.3, **changes}), name="attn")
    layer.build((None, None, 24))
    return layer


def angles(layer: RotaryAttention, tokens: slice = slice(None)) -> Any:
    return RotaryEmbedding(layer.config.rotary_dim)(POSITIONS[:, tokens])


def expected(layer: RotaryAttention) -> tuple[np.ndarray, np.ndarray]:
    """[B, T, D], and the weights [B, N, T, T], in float64."""
    projections = {name: getattr(layer, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    weights = {f"attn.{name}.weight": numbers(p.base_kernel).astype("float64") for name, p in projections.items()}
    return oracle.attention(X.astype("float64"), weights, layer.config.to_dict(), "attn", MASK, POSITIONS)


@pytest.mark.parametrize("heads", [3, 1])
def test_a_whole_text_is_the_formula(heads: int) -> None:
    layer = layer_of(output_attentions=True, n_head=heads)
    x, weights = layer(X, *angles(layer), MASK)
    for actual, wanted in zip((x, weights), expected(layer), strict=True):
        assert_near(actual, wanted)
    plain = layer_of(n_head=heads)
    plain.set_weights(layer.get_weights())
    assert np.array_equal(numbers(plain(X, *angles(layer), MASK)), numbers(x))


@pytest.mark.parametrize("parts", elsewhere([(3, 2), (1, 1, 3), (2, 1, 1, 1)], (1, 1, 3)), ids=str)
def test_steps_are_the_whole_text(parts: tuple[int, ...]) -> None:
    layer = layer_of(attn_pdrop=0.5)  # which is for training
    x, weights = expected(layer)
    cache, begin = None, 0
    for count in parts:
        end, record = begin + count, []
        if cache is not None:
            cache = tuple(ops.pad(part, ((0, 0), (0, 0), (0, count), (0, 0))) for part in cache)
        tokens = slice(begin, end)
        given = (X[:, tokens], *angles(layer, tokens), MASK[:, :, tokens, :end], cache, begin)
        result, cache = layer.step(*given, record)
        seen = MASK[:, 0, tokens].any(-1)  # who may see nothing looks at each key that there is by then
        assert_near(numbers(result)[seen], x[:, tokens][seen])
        [step_weights] = record
        by_row = numbers(step_weights).swapaxes(1, 2)[seen], weights[:, :, tokens, :end].swapaxes(1, 2)[seen]
        np.testing.assert_allclose(*by_row, rtol=0, atol=1e-6)
        assert np.array_equal(numbers(layer.step(*given)[0]), numbers(result))
        begin = end
    assert [tuple(part.shape) for part in cache or ()] == [(B, 3, T, 8)] * 2


def test_a_program_may_have_a_writer_of_its_own() -> None:
    cache, new = np.zeros((B, 3, T, 8), "float32"), np.ones((B, 3, 2, 8), "float32")
    wanted = np.zeros_like(cache)
    wanted[:, :, 2:4] = 1
    assert np.array_equal(numbers(write_slots(ops.convert_to_tensor(cache), 2, ops.convert_to_tensor(new))), wanted)
    before = WRITER.set(lambda *given: given)
    try:
        assert write_slots("cache", "slot", "new") == ("cache", "slot", "new")
    finally:
        WRITER.reset(before)


@pytest.mark.parametrize(
    ("lean", "pays", "changes", "in_turn"),
    [
        (True, True, {}, True),
        (True, True, {"resid_pdrop": 0.5}, True),
        (True, True, {"attn_pdrop": 0.5}, False),
        (True, True, {"output_attentions": True}, False),
        (True, False, {}, False),
        (None, True, {}, False),
    ],
)
def test_heads_are_taken_in_turn_where_that_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, lean: bool | None, pays: bool, changes: dict[str, Any], in_turn: bool
) -> None:
    calls = []

    def mixed(query: Any, key: Any, value: Any, mask: Any, scale: float, masked: float) -> Any:
        calls.append(scale)
        scores = ops.where(mask, scale * ops.einsum("BNTH,BNSH->BNTS", query, key), masked)
        return ops.einsum("BNTS,BNSH->BNTH", ops.softmax(scores), value)

    monkeypatch.setattr("tfgptj.attention.mixed_by_heads", mixed)
    monkeypatch.setattr("tfgptj.attention.pays", lambda: pays)
    layer = layer_of(**changes)
    result = layer(X, *angles(layer), MASK, **({} if lean is None else {"lean": lean}))
    assert_near(result[0] if changes.get("output_attentions") else result, expected(layer)[0])
    assert len(calls) == in_turn


def test_a_single_head_of_a_text_whose_length_is_open() -> None:
    layer = layer_of(n_head=1)
    sin, cos = (keras.Input((None, 1, 4)) for _ in range(2))
    output = layer(keras.Input((None, 24)), sin, cos, keras.Input((1, None, None), dtype="bool"))
    assert output.shape[-1] == 24 and len(output.shape) == 3


def test_names_of_what_it_consists_of() -> None:
    layer = layer_of()
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert [v.path for v in layer.weights] == [f"attn/{name}/kernel" for name in names]
    for name in (*names, "attn_dropout", "resid_dropout"):
        assert getattr(layer, name).name == name


def test_the_layer_goes_through_its_configuration() -> None:
    layer = layer_of()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert (type(again), again.name, again.config) == (RotaryAttention, "attn", layer.config)
    assert again.get_config() == layer.get_config()
