"""Files that are replaced in one step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tfgptj.files import remove_temporaries, replaced_file, write_json


def test_json_has_hugging_faces_form(tmp_path: Path) -> None:
    fields = {"b": [1], "a": {"d": None, "c": "é"}}
    write_json(tmp_path / "config.json", fields)
    assert (tmp_path / "config.json").read_text() == json.dumps(fields, indent=2, sort_keys=True) + "\n"


def test_a_new_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replaced_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_reads_the_old_file_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        with replaced_file(path) as file:
            file.write(b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_after_a_failure_only_the_old_file_is_there(tmp_path: Path, exception: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replaced_file(path) as file:
            file.write(b"new")
            raise exception

    with pytest.raises(exception):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replaced_file(tmp_path / "missing" / "file"):
        pass


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".tfgptj-0123.tmp", "model.tmp", ".other.tmp", "config.json"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.tmp", "config.json", "model.tmp"]
