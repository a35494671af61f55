"""Virtual environments with the libraries that tfgptj is compared with, each built once and then kept."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

# What pip is given, by the name of the option that benchmarks take an interpreter with; versions as in tests/fixtures.
ENVIRONMENTS = {
    "reference": (
        *("torch==2.13.0", "transformers==4.57.6", "safetensors==0.8.0", "numpy"),
        *("tensorflow-cpu==2.21.0", "tf-keras==2.21.0"),
    ),
    "ctranslate2": ("ctranslate2==4.8.5", "torch==2.13.0", "transformers==4.57.6", "safetensors==0.8.0"),
    # Ready binaries know no more than AVX2; compiled for a processor with AVX-VNNI it decodes up to 40 % faster.
    "ggml": (
        *("--no-binary=ctransformers", "--no-cache-dir"),
        *("ctransformers==0.2.27", "safetensors==0.8.0", "numpy"),
    ),
    "kerashub": ("keras-hub==0.32.0", "keras==3.15.1", "tensorflow-cpu==2.21.0"),
}
COMPILED = {"CFLAGS": "-march=native", "CXXFLAGS": "-march=native"}  # what is compiled, is for this processor
DONE = "packages.txt"  # in an environment that has all of its packages: which ones


class EnvironmentFailed(Exception):
    """An environment could not be built."""


def python_of(name: str, home: Path) -> Path:
    """The interpreter of an environment, which is built if it is not there.

    A directory that has no list of packages was made by somebody else, and is taken as it is; one whose list is another
    is built anew.

    Args:
        name: one of `ENVIRONMENTS`.
        home: where environments are.

    Raises:
        EnvironmentFailed: with pip's last words.
    """
    directory = home / name
    python = directory / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    wanted = "\n".join(ENVIRONMENTS[name])
    done = directory / DONE
    if python.exists() and (not done.exists() or done.read_text() == wanted):
        return python
    try:
        venv.create(directory, clear=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EnvironmentFailed(f"{directory}: {error}") from None
    done.write_text("")  # ours, and not finished
    command = [str(python), "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]]
    found = subprocess.run(command, capture_output=True, text=True, errors="replace", env=os.environ | COMPILED)
    if found.returncode:
        raise EnvironmentFailed((found.stderr.strip() or "pip said nothing").splitlines()[-1])
    done.write_text(wanted)
    return python
