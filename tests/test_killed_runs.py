"""Training that is killed for real, as by power cuts: the run that goes on ends with the bits of an unbroken one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from conftest import run_python
from killed_runs import KILLS, bits, new_model, train


def test_a_run_that_is_killed_five_times_ends_as_one_that_is_not(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    done = run_python("killed_runs.py", killed, "0")
    assert done.returncode == 0, done.stderr[-3000:]
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kill["status"] for kill in kills] == [-9] * KILLS
    # Among them are kills between checkpoints and within one: of a file that has no name yet, and of one that has.
    assert {kill["moment"] for kill in kills} == {"batch", "sync"}
    assert any(name.startswith(".tfgptj-") for kill in kills for name in kill["left"])
    resumed, alone = (new_model() for _ in range(2))
    assert train(killed, resumed, save_freq=2).step > 0
    assert [path.name for path in killed.iterdir()] == ["step-00000018.safetensors"]
    train(tmp_path / "alone", alone, save_freq=2)
    found, expected = bits(resumed), bits(alone)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
