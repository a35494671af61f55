"""One compiled program for each set of static arguments."""

from __future__ import annotations

import pytest
import tensorflow as tf

from tfgptj.generation.compiling import Compiled


def test_tensorflow_does_not_take_many_programs_for_one(caplog: pytest.LogCaptureFixture) -> None:
    add = Compiled(None, lambda model, static, x: x + static, False)
    tf.get_logger().addHandler(caplog.handler)
    try:
        assert [int(add(number, tf.constant([0]))[0]) for number in range(8)] == list(range(8))
    finally:
        tf.get_logger().removeHandler(caplog.handler)
    assert add.traces == 8 and caplog.text == ""
