"""Training that is killed for real, as by a power cut: the run that goes on ends with the bits of an unbroken one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from killed_runs import bits, new_model, train

HERE = Path(__file__).parent


def test_a_run_that_is_killed_while_it_saves_ends_as_one_that_is_not(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "TF_CPP_MIN_LOG_LEVEL": "3"}
    program = [sys.executable, HERE / "killed_runs.py", tmp_path / "killed", "4", "within"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=HERE, env=environment, check=False)
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
