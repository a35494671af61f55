"""Exports of models that are killed for real: servers find a version that is whole, or none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tensorflow as tf
from conftest import assert_near, numbers, run_python
from killed_exports import new_model

from tfgptj.serving.versions import versions_in


def test_a_killed_export_is_no_version_and_the_next_one_is_whole(tmp_path: Path) -> None:
    done = run_python("killed_exports.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    kills = {kill["moment"]: kill for kill in map(json.loads, done.stdout.splitlines())}
    assert [kill["status"] for kill in kills.values()] == [-9] * 3
    for moment in ("amid_the_files", "amid_the_syncs"):
        assert all(name.startswith(".tfgptj-") for name in kills[moment]["left"])
    files = {moment: {name.partition("/")[2] for name in kill["left"]} for moment, kill in kills.items()}
    assert "variables/variables.index" in files["amid_the_files"] and "saved_model.pb" not in files["amid_the_files"]
    assert files["amid_the_syncs"] >= {"saved_model.pb", "variables/variables.index"}
    assert versions_in(tmp_path) == [1]
    served = tf.saved_model.load(tmp_path / "1").signatures["serving_default"]
    ids = np.array([[5, 6, 7]], "int32")
    found = served(token_ids=tf.constant(ids), lengths=tf.constant([3]))
    model = new_model()
    expected = np.sort(numbers(tf.nn.softmax(model(ids))))[:, ::-1]
    assert_near(found["scores"], expected, 1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]  # what earlier ones left unfinished is gone
