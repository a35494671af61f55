"""The machine that reads PyTorch's pickles as data: hostile, broken and boundless ones."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from malformed import torch_cases as cases
from malformed.torch_files import (
    EMPTY_DICT,
    archive,
    call,
    dict_of,
    members,
    name,
    number,
    program,
    save,
    storage,
    tensor,
    text,
    torch_file,
)

from tfgptj import limits
from tfgptj.checkpoints.restricted_pickle import load_pickle
from tfgptj.checkpoints.torch_zip import TorchZipFile
from tfgptj.errors import CheckpointFormatError, TFGPTJError, UnsafeCheckpointError


def test_python_reads_the_hand_made_pickles_the_same_way() -> None:
    value = dict_of({"a": number(-1), "b": text("ü"), "c": b"\x88", "d": EMPTY_DICT, "e": b"](N)e"})
    assert load_pickle(program(value), "") == pickle.loads(program(value)) == load_pickle(program(value, 5), "")


@pytest.mark.parametrize("case", cases.UNSAFE)
def test_pickles_that_could_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    value, said = cases.UNSAFE[case]
    modules = set(sys.modules)
    with pytest.raises(UnsafeCheckpointError, match=said) as caught:
        TorchZipFile(save(tmp_path, torch_file(value)))
    assert "pytorch_model.bin: data.pkl: byte " in str(caught.value)
    assert str(caught.value).endswith(
        "nothing was run. If you trust where the file comes from, save its weights as safetensors with PyTorch."
    )
    assert os.listdir(tmp_path) == ["pytorch_model.bin"]
    assert set(sys.modules) == modules


def test_the_payloads_do_run_where_a_file_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for case in ("os.system", "subprocess.getoutput", "before a corrupt tail", "stack global", "inst"):
        with pytest.raises(pickle.UnpicklingError) if "tail" in case else contextlib.nullcontext():
            pickle.loads(program(cases.UNSAFE[case][0]))
        Path(cases.SENTINEL).unlink()


@pytest.mark.parametrize("case", cases.BROKEN)
def test_broken_pickles_are_refused(tmp_path: Path, case: str) -> None:
    pickled, said = cases.BROKEN[case]
    with pytest.raises(CheckpointFormatError, match=said) as caught:
        TorchZipFile(save(tmp_path, archive(members(pickled))))
    assert "pytorch_model.bin: data.pkl: byte " in str(caught.value)


def test_the_number_of_opcodes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PICKLE_OPCODES", 5)
    assert load_pickle(program(b"NNN\x87"), "a.bin") == (None,) * 3
    with pytest.raises(CheckpointFormatError, match="a.bin: byte 6: more than 5 opcodes; no checkpoint of weights"):
        load_pickle(program(b"NNN\x87\x85"), "a.bin")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    parts=st.lists(
        st.sampled_from(
            [b"N", b"\x88", b")", b"]", b"}", b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"q\x00"]
            + [b"\x94", b"h\x00", b"h\x01", b"R", b"b", b"Q", b"\x93", b"o", b"0", b"."]
            + [text("a"), number(3), storage(), tensor(), name("torch", "Size"), name("collections", "OrderedDict")]
            + [call("os", "system", text("false"))]
        ),
        max_size=30,
    )
)
@example(parts=[b"]", b"q\x00", b"h\x00", b"a"])
def test_any_program_is_an_error_or_a_value(parts: list[bytes]) -> None:
    try:
        load_pickle(program(b"".join(parts)), "a.bin")
    except TFGPTJError as error:
        assert isinstance(error, (CheckpointFormatError, UnsafeCheckpointError))
