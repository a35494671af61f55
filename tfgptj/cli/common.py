"""What several verbs need."""

from __future__ import annotations

import logging
import os
import sys
from typing import IO

from tfgptj.errors import InputError


def text_lines(file: IO[str], name: str) -> list[str]:
    """The lines of a text in UTF-8; its name is for messages.

    Raises:
        InputError: if it is no such text.
    """
    try:
        return list(file)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not text in UTF-8: {error}") from None


def start_keras(debug: bool) -> None:
    """Import Keras and its backend, without the notices that TensorFlow gives when it starts.

    C++ initialisers write some of them before any log level counts, so standard error leads nowhere for as long as the
    import takes. --debug shows them, and a TF_CPP_MIN_LOG_LEVEL in the environment decides for itself.
    """
    if debug or "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import keras  # noqa: F401
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def amount(size: float) -> str:
    """A number of bytes as people read it.

    >>> amount(1536), amount(24 * 2**30)
    ('1.5 KiB', '24.0 GiB')
    """
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
