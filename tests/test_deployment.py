"""Files for TensorFlow Serving: what they hold, and that a graph takes the warm-up."""

import re
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from serving_standin import MESSAGES

from tfgptj.errors import CheckpointError, InputError
from tfgptj.serving.deployment import add_serving_files, batching_parameters, model_config, write_deployment


class Model(tf.Module):
    """Two signatures."""

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.string, "prompt"), tf.TensorSpec([None], tf.float32, "top_p")]
    )
    def text(self, prompt: tf.Tensor, top_p: tf.Tensor) -> dict[str, tf.Tensor]:
        tf.debugging.assert_positive(top_p)
        return {"text": prompt}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.int32, "token_ids"),
            tf.TensorSpec([None], tf.int32, "lengths"),
            tf.TensorSpec([None, 2, None], tf.bfloat16, "cache"),
        ]
    )
    def tokens(self, token_ids: tf.Tensor, lengths: tf.Tensor, cache: tf.Tensor) -> dict[str, tf.Tensor]:
        tf.debugging.assert_positive(lengths)
        return {"sum": tf.reduce_sum(token_ids, axis=1) + tf.cast(cache[:, 0, 0], tf.int32)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, directory = Model(), tmp_path_factory.mktemp("models") / "m"
    for version in ("2", "10"):
        path = directory / version
        tf.saved_model.save(model, str(path), {"serving_default": model.text, "tokens": model.tokens})
    (directory / "tmp-x").mkdir()
    add_serving_files(directory / "10", "m", 4)
    return directory


def test_a_graph_takes_its_warm_up(base: Path) -> None:
    loaded = tf.saved_model.load(str(base / "10")).signatures
    records = tf.data.TFRecordDataset(str(base / "10" / "assets.extra" / "tf_serving_warmup_requests"))
    asked = []
    for record in records:
        request = MESSAGES["PredictionLog"].FromString(record.numpy()).predict_log.request
        assert request.model_spec.name == "m"
        asked.append(request.model_spec.signature_name)
        inputs = {name: tf.constant(tf.make_ndarray(proto)) for name, proto in request.inputs.items()}
        assert {len(value) for value in loaded[asked[-1]](**inputs).values()} == {1}
    assert asked == ["serving_default", "tokens"]
    assert (base / "10" / "batching_params.pbtxt").read_text() == batching_parameters(4)


def test_a_server_s_configuration_names_versions_and_labels(base: Path) -> None:
    write_deployment(base, "m", {"stable": 2, "canary": 10})
    text = (base / "models.config").read_text()
    assert text == model_config("m", base.resolve(), [2, 10], {"stable": 2, "canary": 10})
    assert 'version_labels { key: "canary" value: 10 }' in text
    write_deployment(base, "m")
    assert 'version_labels { key: "stable" value: 10 }' in (base / "models.config").read_text()


def test_the_readme_says_how_to_ask(base: Path) -> None:
    write_deployment(base, "m")
    text = (base / "README.md").read_text()
    assert "- `tokens`: `cache`, `lengths`, `token_ids`" in text
    assert '"inputs": {"prompt": ["The mill"], "top_p": [1.0]}' in text
    assert """predict("serving_default", prompt=['The mill'], top_p=[1.0])""" in text


@pytest.mark.parametrize("size", [0, True, 2.0])
def test_bad_batch_sizes_are_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"max_batch_size is {size}, expected an integer from 1 on"):
        add_serving_files(tmp_path, "m", size)


def test_batches_grow_by_powers_of_two() -> None:
    sizes = [re.findall(r"sizes: (\d+)", batching_parameters(most)) for most in (1, 2, 8)]
    assert sizes == [["1"], ["1", "2"], ["1", "2", "4", "8"]]


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no version; export the model first"):
        write_deployment(tmp_path / "nowhere", "m")
    with pytest.raises(CheckpointError, match="found no version; export the model first"):
        write_deployment(tmp_path, "m")
    (tmp_path / "1").mkdir()
    with pytest.raises(CheckpointError, match="found no saved_model.pb; give the directory of a version"):
        write_deployment(tmp_path, "m")


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("m", {"stable": 3}, r"The label 'stable' is of version 3, but there are \[1\]"),
        ('a"b', {}, """'a"b' cannot be a name on a server: it is empty, or holds quotes or controls"""),
        ("m", {"": 1}, "'' cannot be a name on a server"),
        ("m\n", {}, r"'m\\n' cannot be a name on a server"),
    ],
)
def test_bad_names_are_refused(name: str, labels: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_config(name, Path("/m"), [1], labels)
