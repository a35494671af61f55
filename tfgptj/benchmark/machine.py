"""What a benchmark runs on: processor, memory, versions; and the bandwidth that weights can be read with."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
from keras import ops

from tfgptj import __version__
from tfgptj.errors import ResourceLimitError
from tfgptj.generation.compiling import to_numpy
from tfgptj.generation.memory import available_memory

CPUINFO = Path("/proc/cpuinfo")

# The matrix that the bandwidth is measured with: several times the largest caches (server processors have up to half a
# gigabyte), but a small part of the free memory.
LARGEST_MATRIX, SMALLEST_MATRIX = 2**31, 2**28  # bytes
PART_OF_FREE = 4

# Products in one measurement: what it costs to start and to end one is then lost in the time of reading.
PRODUCTS = 4


def describe_machine() -> dict[str, Any]:
    """Processor, memory and device, by plain values; nothing that tells whose machine it is."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _total_memory(),
        "device": _device(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """Versions of all that a measurement depends on."""
    found = {name: _version(name) for name in ("keras", "numpy", keras.backend.backend())}
    return {"tfgptj": __version__, **found, "python": platform.python_version()}


def peak_memory() -> int | None:
    """The largest resident size of this process so far in bytes, or None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device_memory() -> int | None:
    """The most memory that TensorFlow took on its first GPU so far in bytes, or None without one."""
    if not _gpus():
        return None
    import tensorflow as tf

    return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])


class ReadBandwidth:
    """How fast weights can be read: the speed of a float32 matrix-vector product, where the models compute.

    Args:
        clock: gives seconds.

    Raises:
        ResourceLimitError: if there is no memory for a matrix beyond the caches.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        side = matrix_side(available_memory())
        self.matrix = ops.full((side, side), 1 / side, dtype="float32")
        self.vector = ops.ones((side, 1), dtype="float32")
        self()  # touches every page

    def __call__(self) -> float:
        """Measure once: bytes per second."""
        start, vector = self.clock(), self.vector
        for _ in range(PRODUCTS):  # each reads the result of the one before, so that none is left out
            vector = ops.matmul(self.matrix, vector)
        to_numpy(vector)  # devices work behind the program's back; this waits
        return PRODUCTS * 4 * math.prod(self.matrix.shape) / (self.clock() - start)


def matrix_side(free: int | None) -> int:
    """Rows and columns of the matrix that the bandwidth is measured with.

    Args:
        free: bytes that may be taken, or None where that is not known.

    Raises:
        ResourceLimitError: if they are too few for a matrix beyond the caches.

    >>> matrix_side(None), matrix_side(2**31)
    (23170, 11585)
    """
    size = LARGEST_MATRIX if free is None else min(LARGEST_MATRIX, free // PART_OF_FREE)
    if size < SMALLEST_MATRIX:
        raise ResourceLimitError(
            f"the memory's bandwidth is measured with a matrix of at least {SMALLEST_MATRIX / 2**20:,.0f} MiB in "
            f"{PART_OF_FREE} times as much free memory, and {(free or 0) / 2**20:,.0f} MiB are free: "
            "take a smaller model, or dtype='bfloat16'"
        )
    return math.isqrt(size // 4)


def _processor() -> str:
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or "unknown"


def _total_memory() -> int | None:
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device() -> str:
    """Where tensors are by default, with the name of TensorFlow's first GPU."""
    gpus = _gpus()
    if not gpus:
        return str(ops.zeros(()).device).split("device:")[-1]  # TensorFlow says, too, which job and task it is of
    import tensorflow as tf

    return str(tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU"))


def _gpus() -> list[Any]:
    """The GPUs that TensorFlow uses, if Keras runs on TensorFlow."""
    if keras.backend.backend() != "tensorflow":
        return []
    import tensorflow as tf

    return list(tf.config.get_visible_devices("GPU"))


def _version(name: str) -> str:
    """Of a library; TensorFlow comes under several names."""
    for distribution in (name, f"{name}-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
