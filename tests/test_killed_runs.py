"""Training that is killed for real, as by a power cut: the run that goes on ends with the bits of an unbroken one."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
from conftest import run_python
from killed_runs import bits, new_model, train


def test_a_run_that_is_killed_while_it_saves_ends_as_one_that_is_not(tmp_path: Path) -> None:
    done = run_python("killed_runs.py", tmp_path / "killed", "4", "within")
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    half, whole = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert half.startswith(".tfgptj-") and whole == "step-00000002.safetensors"
    resumed, alone = new_model(), new_model()
    train(tmp_path / "killed", resumed, save_freq=2)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["step-00000018.safetensors"]
    train(tmp_path / "alone", alone, save_freq=2)
    found, expected = bits(resumed), bits(alone)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
