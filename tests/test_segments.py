"""Several documents in one row: `segment_ids` keep attention from crossing between them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import assert_near, numbers

from tfgptj import GPTJConfig, TFGPTJForCausalLM
from tfgptj.errors import InputError

pytestmark = pytest.mark.usefixtures("eager_steps")

FIRST, SECOND = [3, 5, 7, 9], [2, 4, 6, 8, 1, 3]
PACKED = np.array([FIRST + SECOND, SECOND + FIRST])
SEGMENTS = np.array([[1] * 4 + [2] * 6, [7] * 6 + [0] * 4])


@pytest.fixture(scope="module")
def model() -> TFGPTJForCausalLM:
    return TFGPTJForCausalLM(
        GPTJConfig(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, initializer_range=0.5)
    )


@pytest.mark.core
def test_packed_documents_are_read_as_if_alone(model: TFGPTJForCausalLM) -> None:
    first, second = (numbers(model(np.array([ids])))[0] for ids in (FIRST, SECOND))
    packed = model({"input_ids": PACKED, "segment_ids": SEGMENTS})
    assert_near(packed, np.stack([np.concatenate([first, second]), np.concatenate([second, first])]))
    crossing = numbers(model(PACKED))
    assert np.abs(crossing[0, 4:] - second).max() > 0.1  # so that the test can fail


def test_segments_and_padding_together(model: TFGPTJForCausalLM) -> None:
    alone = numbers(model(np.array([SECOND[:4]])))[0]
    mask = np.array([[1] * 4 + [0, 0] + [1] * 4] * 2)
    ids, segments = np.array([FIRST + [11, 12] + SECOND[:4]] * 2), np.array([[1] * 4 + [2] * 6] * 2)
    packed = numbers(model({"input_ids": ids, "attention_mask": mask, "segment_ids": segments}))
    assert_near(packed[0, 6:], alone)


def test_one_segment_changes_nothing(model: TFGPTJForCausalLM) -> None:
    assert_near(model({"input_ids": PACKED, "segment_ids": np.full_like(PACKED, 3)}), numbers(model(PACKED)), 1e-6)


def test_negative_segments_are_refused(model: TFGPTJForCausalLM) -> None:
    with pytest.raises(InputError, match=re.escape("segment_ids[1, 6] is -2, outside 0…2147483647: they number")):
        model({"input_ids": PACKED, "segment_ids": SEGMENTS - 2})


@pytest.mark.core
def test_no_label_is_across_a_border(model: TFGPTJForCausalLM) -> None:
    model.compile()
    alone = [model.evaluate(np.array([ids]), verbose=0) * (len(ids) - 1) for ids in (FIRST, SECOND)]
    packed = model.evaluate({"input_ids": PACKED, "segment_ids": SEGMENTS}, verbose=0)
    assert packed == pytest.approx(sum(alone) / (PACKED.shape[1] - 2), rel=1e-5)
