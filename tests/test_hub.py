"""Where checkpoints are looked for, and what is fetched of a repository."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from tfgptj.checkpoints import hub
from tfgptj.checkpoints.hub import packaged_models, resolve_directory, split_options
from tfgptj.errors import CheckpointError


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one model, and an empty working directory."""
    (tmp_path / "pretrained" / "tiny").mkdir(parents=True)
    (tmp_path / "pretrained" / "tiny" / "config.json").touch()
    (tmp_path / "pretrained" / "no-model").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(hub, "PACKAGED", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "pretrained"


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the Hub library was asked for; it answers with a directory."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append({"repository": repository, **options})
        (tmp_path / "snapshot" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "snapshot" / "config.json").touch()
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_directory(packaged: Path) -> None:
    path = packaged / "tiny"
    assert resolve_directory(path, "weights") == resolve_directory(str(path), "config") == path
    assert resolve_directory(packaged, "config", subfolder="tiny") == path


def test_a_packaged_model_unless_there_is_a_directory(packaged: Path) -> None:
    assert packaged_models() == ("tiny",)
    assert resolve_directory("tiny", "weights") == packaged / "tiny"
    Path("tiny").mkdir()
    assert resolve_directory("tiny", "weights") == Path("tiny")


def test_a_repository(packaged: Path, downloads: list[dict[str, Any]]) -> None:
    directory = resolve_directory(
        "owner/name", "config", revision="float16", cache_dir=Path("cache"), token="t", local_files_only=True
    )
    assert directory == packaged.parent / "snapshot"
    assert downloads == [
        {
            "repository": "owner/name", "allow_patterns": ["config.json"], "revision": "float16", "cache_dir": "cache",
            "token": "t", "local_files_only": True,
        }
    ]  # fmt: skip
    Path("owner/name").mkdir(parents=True)
    assert resolve_directory("owner/name", "weights") == Path("owner/name")
    assert len(downloads) == 1


@pytest.mark.parametrize("purpose", ["weights", "tokenizer", "generation"])
def test_only_what_is_needed_is_fetched(downloads: list[dict[str, Any]], purpose: str) -> None:
    assert resolve_directory("owner/name", purpose, subfolder="sub").name == "sub"
    repository = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                  "config.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.json",
                  "pytorch_model.bin", "model.fp16.safetensors", "tf_model.h5", "README.md"]  # fmt: skip
    patterns = downloads[0]["allow_patterns"]
    fetched = [name for name in repository if any(fnmatch.fnmatch(f"sub/{name}", pattern) for pattern in patterns)]
    assert fetched == {"weights": repository[:5], "tokenizer": repository[5:8], "generation": repository[4:5]}[purpose]


@pytest.mark.parametrize(
    "name", ["nothing-like-it", "a/b/c", "./owner/name", "/owner/name", "owner/", "../x", "own er/n", ""]
)
def test_what_is_none_of_these(packaged: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_directory(name, "weights")
    assert str(caught.value) == (
        f"{name!r} is neither a directory, nor a Hub id of the form owner/name, nor a packaged model; "
        "packaged are: tiny"
    )


def test_a_path_object_is_never_a_repository(packaged: Path) -> None:
    with pytest.raises(CheckpointError, match="'owner/name' is neither a directory"):
        resolve_directory(Path("owner/name"), "weights")


def test_other_mistakes(packaged: Path) -> None:
    with pytest.raises(CheckpointError, match="files must be one of config, .*; got 'all'"):
        resolve_directory("tiny", "all")
    Path("file").touch()
    with pytest.raises(CheckpointError, match="file: is a file; give the directory that holds it"):
        resolve_directory("file", "weights")
    with pytest.raises(CheckpointError, match="tiny: has no subfolder 'x'"):
        resolve_directory("tiny", "weights", subfolder="x")
    with pytest.raises(CheckpointError, match=r"no-model: holds no config\.json"):
        resolve_directory(packaged / "no-model", "config")
    for subfolder in ("../tiny", "/tiny", "a/../../b"):
        with pytest.raises(CheckpointError, match="subfolder must be a path below the checkpoint's own directory"):
            resolve_directory("tiny", "weights", subfolder=subfolder)


class Response:
    """As much of an answer as the Hub library's errors want."""

    headers: dict[str, str] = {}
    request = None


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.GatedRepoError, "owner/name: the repository is gated: accept its terms on its page, and give a token"),
        (errors.RepositoryNotFoundError, "owner/name: neither a local directory nor a repository of the Hub; if it is"),
        (errors.RevisionNotFoundError, "owner/name: has no branch, tag or commit 'main'"),
        (errors.LocalEntryNotFoundError, "owner/name: is not in the cache, and the Hub cannot be reached"),
        (PermissionError, "owner/name: cannot be downloaded: no"),
        (errors.HFValidationError, "owner/name: cannot be downloaded: no"),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: type[Exception], text: str) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise error("no", response=Response()) if issubclass(error, errors.HfHubHTTPError) else error("no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=text) as caught:
        resolve_directory("owner/name", "weights")
    assert isinstance(caught.value.__cause__, error)


def test_what_is_not_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="owner/name: is not in the cache$"):
        resolve_directory("owner/name", "weights", cache_dir=tmp_path, local_files_only=True)


def test_options_are_parted() -> None:
    options = {"revision": "a", "subfolder": "b", "cache_dir": "c", "token": "d", "local_files_only": True}
    assert split_options({**options, "n_layer": 2, "dtype": None}) == (options, {"n_layer": 2, "dtype": None})
    assert split_options({}) == ({}, {})


def test_a_path_may_be_any_path_like_object(packaged: Path) -> None:
    class Somewhere(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(packaged / "tiny")

    assert resolve_directory(Somewhere(), "weights") == packaged / "tiny"
