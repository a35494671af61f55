"""`model.export()`: a SavedModel of the forward pass for every head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import assert_near, numbers
from test_models import CLASSES, IDS, config

MASK = np.array([[0, 1, 1, 1], [1, 1, 1, 1]], "int32")


@pytest.mark.parametrize("cls", CLASSES)
def test_saved_model_gives_the_same_numbers(cls: type, tmp_path: Path) -> None:
    model = cls(config())
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported").signatures["serving_default"]
    outputs = served(input_ids=tf.constant(IDS), attention_mask=tf.constant(MASK))
    expected = model({"input_ids": IDS, "attention_mask": MASK})
    if not isinstance(expected, dict):
        expected = {"output_0": expected}
    assert outputs.keys() == expected.keys()
    for name, wanted in expected.items():
        assert_near(outputs[name], numbers(wanted), 1e-6)
    longer = np.ones((1, 9), "int32")  # batch and length stay open
    served(input_ids=tf.constant(longer), attention_mask=tf.constant(longer))


def exported(cls: type, path: Path, form: str) -> list[Any]:
    """What a model gives for the inputs above; it is written for another runtime."""
    model = cls(config())
    model.export(str(path), format=form, verbose=False)
    expected = model({"input_ids": IDS, "attention_mask": MASK})
    return [expected[name] for name in sorted(expected)] if isinstance(expected, dict) else [expected]


@pytest.mark.filterwarnings("ignore:In the future .np.object:FutureWarning")  # tf2onnx 1.17 asks for it
@pytest.mark.parametrize("cls", CLASSES)
def test_onnx_gives_the_same_numbers(cls: type, tmp_path: Path) -> None:
    pytest.importorskip("tf2onnx", reason="needs pip install tf2onnx onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="needs pip install tf2onnx onnxruntime")
    expected = exported(cls, tmp_path / "model.onnx", "onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {"input_ids": IDS, "attention_mask": MASK})
    for values, wanted in zip(found, expected, strict=True):
        assert_near(values, numbers(wanted), 1e-5)
    longer = np.ones((1, 9), "int32")  # batch and length stay open
    session.run(None, {"input_ids": longer, "attention_mask": longer})


def test_openvino_gives_the_same_numbers(tmp_path: Path) -> None:
    runtime = pytest.importorskip("openvino", reason="needs pip install openvino")
    [expected] = exported(CLASSES[1], tmp_path / "model.xml", "openvino")
    precise = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors would take bfloat16
    compiled = runtime.Core().compile_model(tmp_path / "model.xml", "CPU", precise)
    found = compiled({"input_ids": IDS, "attention_mask": MASK})
    assert_near(found[0], numbers(expected), 1e-5)
    longer = np.ones((1, 9), "int32")
    assert compiled({"input_ids": longer, "attention_mask": longer})[0].shape[:2] == (1, 9)


def test_weights_are_stored_once(tmp_path: Path) -> None:
    model = CLASSES[1](config(n_embd=64, vocab_size=500))
    model.export(tmp_path / "exported", verbose=False)
    stored = sum(path.stat().st_size for path in (tmp_path / "exported" / "variables").iterdir())
    assert stored < 1.02 * 4 * model.num_parameters() + 8192


def test_a_signature_of_ones_own(tmp_path: Path) -> None:
    model = CLASSES[1](config())
    signature = [{"input_ids": keras.InputSpec(dtype="int32", shape=(None, 4), name="input_ids")}]
    model.export(tmp_path / "exported", verbose=False, input_signature=signature)
    served: Any = tf.saved_model.load(tmp_path / "exported").signatures["serving_default"]
    assert_near(next(iter(served(input_ids=tf.constant(IDS)).values())), numbers(model(IDS)), 1e-6)
