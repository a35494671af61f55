"""Training that is killed for real, as a power cut would: the run that goes on ends with the bits of one that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from killed_runs import bits, new_model, train

HERE = Path(__file__).parent
KILLS = [(5, "after"), (4, "within"), (10**6, "after")]  # the last one is not reached


def run(directory: Path, batch: int, when: str) -> int:
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "TF_CPP_MIN_LOG_LEVEL": "3"}
    program = [sys.executable, HERE / "killed_runs.py", directory, str(batch), when]
    done = subprocess.run(program, capture_output=True, text=True, cwd=HERE, env=environment, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def test_a_run_that_is_killed_and_started_again_ends_as_one_that_is_not(tmp_path: Path) -> None:
    codes, found = [], []
    for batch, when in KILLS:
        codes.append(run(tmp_path / "killed", batch, when))
        found.append(sorted(path.name for path in (tmp_path / "killed").glob("step-*")))
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert found[0] == ["step-00000004.safetensors"] and found[-1] == ["step-00000018.safetensors"]
    assert len(found[1]) == 1 and found[1] > found[0]
    alone = new_model()
    train(tmp_path / "alone", alone, save_freq=2)
    with np.load(tmp_path / "killed" / "end.npz") as end:
        expected = bits(alone)
        assert sorted(end) == sorted(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(end[name], value, err_msg=name)
