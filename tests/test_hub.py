"""Where checkpoints are looked for, and what is fetched of a repository: over HTTP, from a Hub on this machine."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
from conftest import GOLDENS, numbers
from hub_server import Fault, Files, HubServer, digest, files_of
from huggingface_hub import constants, file_download

from tfgptj.checkpoints import hub
from tfgptj.checkpoints.hub import packaged_models, resolve_directory, split_options
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, CheckpointFormatError
from tfgptj.generation.config import GenerationConfig
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.tokenizer import GPTJTokenizer

WHOLE = {
    "safetensors": "base/causal_lm",
    "bin": "formats/torch/float32",
    "h5": "formats/tensorflow/causal_lm",
    "msgpack": "formats/flax/causal_lm",
}
SHARDED = {
    "safetensors": "loading/sharded",
    "bin": "formats/torch/sharded",
    "h5": "formats/tensorflow/sharded",
    "msgpack": "formats/flax/sharded",
}
DOCUMENTS = ["config.json", "generation_config.json"]
# What lies about in repositories and is never wanted.
OTHERS = dict.fromkeys(
    (
        *("README.md", "model.fp16.safetensors", "model-00001-of-00009.safetensors", "pytorch_model.fp16.bin"),
        *("pytorch_model-00004-of-00003.bin", "rust_model.ot", "onnx/model.onnx", "old/model.safetensors"),
    ),
    b"not wanted",
)
IDS = np.arange(8)[None]


def golden(path: str) -> Files:
    return files_of(GOLDENS / path)


def weight_names(path: str) -> list[str]:
    return [name for name in golden(path) if name not in DOCUMENTS]


def cached(name: str, cache: Path) -> list[Path]:
    """What a cache holds of a file as ready to be read."""
    return [path for path in cache.rglob(name) if "snapshots" in path.parts]


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
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine."""
    with hub_server.hub(tmp_path, monkeypatch) as server:
        yield server


def test_a_directory(packaged: Path) -> None:
    path = packaged / "tiny"
    assert resolve_directory(path, "weights") == resolve_directory(str(path), "config") == path
    assert resolve_directory(packaged, "config", subfolder="tiny") == path


def test_a_packaged_model_unless_there_is_a_directory(packaged: Path) -> None:
    assert packaged_models() == ("tiny",)
    assert resolve_directory("tiny", "weights") == packaged / "tiny"
    Path("tiny").mkdir()
    assert resolve_directory("tiny", "weights") == Path("tiny")


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
    for purpose, name in (("config", "config"), ("generation", "generation_config")):
        with pytest.raises(CheckpointError, match=rf"no-model: holds no {name}\.json"):
            resolve_directory(packaged / "no-model", purpose)
    for subfolder in ("../tiny", "/tiny", "a/../../b"):
        with pytest.raises(CheckpointError, match="subfolder must be a path below the checkpoint's own directory"):
            resolve_directory("tiny", "weights", subfolder=subfolder)


def test_options_are_parted() -> None:
    options = {"revision": "a", "subfolder": "b", "cache_dir": "c", "token": "d", "local_files_only": True}
    assert split_options({**options, "n_layer": 2, "dtype": None}) == (options, {"n_layer": 2, "dtype": None})
    assert split_options({}) == ({}, {})


def test_a_path_may_be_any_path_like_object(packaged: Path) -> None:
    class Somewhere(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(packaged / "tiny")

    assert resolve_directory(Somewhere(), "weights") == packaged / "tiny"


# What is fetched


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("kind", [pytest.param(WHOLE, marks=pytest.mark.slow), SHARDED], ids=["whole", "sharded"])
def test_one_format_is_fetched_and_loads(server: HubServer, kind: dict[str, str], form: str) -> None:
    files: Files = dict(OTHERS)
    for path in (*kind.values(), kind[form]):
        files |= golden(path)
    server.add("owner/name", files)
    model = TFGPTJForCausalLM.from_pretrained("owner/name", weights=form)
    assert server.fetched() == sorted([*DOCUMENTS, *weight_names(kind[form])])
    expected = TFGPTJForCausalLM.from_pretrained(GOLDENS / kind[form])
    assert np.array_equal(numbers(model(IDS)), numbers(expected(IDS)))


@pytest.mark.parametrize(
    ("paths", "fetched"),
    [
        ([WHOLE["msgpack"], WHOLE["h5"]], ["tf_model.h5"]),
        ([WHOLE["h5"], SHARDED["bin"]], weight_names(SHARDED["bin"])),
        ([SHARDED["safetensors"], WHOLE["safetensors"], WHOLE["bin"]], ["model.safetensors"]),
    ],
)
def test_auto_takes_the_first_format_that_there_is(
    server: HubServer, caplog: pytest.LogCaptureFixture, paths: list[str], fetched: list[str]
) -> None:
    server.add("owner/name", {name: content for path in paths for name, content in golden(path).items()} | OTHERS)
    with caplog.at_level(logging.INFO, logger="tfgptj"):
        resolve_directory("owner/name", "weights")
    assert server.fetched() == sorted([*DOCUMENTS, *fetched])
    head = next(name for name in fetched if "-of-" not in name)
    assert caplog.messages == [f"owner/name: its weights are in {head}"]


@pytest.mark.parametrize("purpose", ["config", "generation", "tokenizer"])
def test_other_purposes_need_no_weights(server: HubServer, purpose: str) -> None:
    tokenizer = ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"]
    server.add("owner/name", golden(WHOLE["bin"]) | OTHERS | {name: name.encode() for name in tokenizer})
    resolve_directory("owner/name", purpose)
    wanted = {"config": DOCUMENTS[:1], "generation": DOCUMENTS[1:], "tokenizer": tokenizer}[purpose]
    assert server.fetched() == sorted(wanted)


def test_the_classes_take_their_own_files(server: HubServer) -> None:
    small = files_of(GOLDENS.parent / "small_vocab")
    server.add("owner/name", golden(WHOLE["safetensors"]) | small)
    assert GPTJConfig.from_pretrained("owner/name", n_layer=1).n_layer == 1
    assert GenerationConfig.from_pretrained("owner/name").eos_token_id is not None
    assert len(GPTJTokenizer.from_pretrained("owner/name")) == len(json.loads(small["vocab.json"])) + len(
        json.loads(small["added_tokens.json"])
    )
    assert "model.safetensors" not in server.fetched()


def test_a_local_directory_of_that_name_comes_first(server: HubServer, packaged: Path) -> None:
    Path("owner/name").mkdir(parents=True)
    assert resolve_directory("owner/name", "weights") == Path("owner/name")
    assert not server.requests


def test_nothing_is_fetched_twice(server: HubServer) -> None:
    files = golden(SHARDED["safetensors"])
    repository = server.add("owner/name", files)
    first = resolve_directory("owner/name", "weights")
    server.requests.clear()
    assert resolve_directory("owner/name", "weights") == first
    assert not server.fetched()
    # Another commit, in which one file differs.
    repository.commit(files | {"config.json": files["config.json"] + b"\n"})
    second = resolve_directory("owner/name", "weights")
    assert second != first
    assert server.fetched() == ["config.json"]
    assert sorted(path.name for path in second.iterdir()) == sorted(files)


def test_revision_subfolder_cache_and_token(server: HubServer, tmp_path: Path) -> None:
    server.add("owner/name", golden(WHOLE["safetensors"]))
    half = golden("formats/torch/float16")
    server.add("owner/name", {f"a/b/{name}": content for name, content in half.items()}, "float16").is_private = True
    server.readers = {"secret"}
    options = {"revision": "float16", "subfolder": "a/./b/", "cache_dir": tmp_path / "here", "token": "secret"}
    model = TFGPTJForCausalLM.from_pretrained("owner/name", dtype="auto", **options)
    assert model.dtype_policy.name == "float16"
    assert server.fetched() == ["a/b/config.json", "a/b/generation_config.json", "a/b/pytorch_model.bin"]
    assert cached("pytorch_model.bin", tmp_path / "here")
    assert not (tmp_path / "cache").exists()
    [stored] = [request for request in server.requests if request.path.startswith("/lfs/")]
    asked = [request for request in server.requests if "owner/name" in request.path]
    assert {request.headers.get("authorization") for request in asked} == {"Bearer secret"}
    assert "authorization" not in stored.headers  # that is another host


def test_a_commit_is_a_revision(server: HubServer) -> None:
    repository = server.add("owner/name", golden(SHARDED["bin"]))
    commit = repository.branches["main"]
    repository.commit({"README.md": b""})
    assert resolve_directory("owner/name", "weights", revision=commit).name == commit


# Connections that break


@pytest.fixture
def large(server: HubServer) -> str:
    """Where the content of the one large file of owner/name is."""
    files = golden(WHOLE["safetensors"])
    server.add("owner/name", files)
    return f"/lfs/{digest(files['model.safetensors'])}"


def fetch_at_last(errors: list[str] | None = None) -> bytes | None:
    """The weights of owner/name, tried again as a user would: the oldest library goes on in the next call only."""
    for _ in range(3):
        try:
            return (resolve_directory("owner/name", "weights") / "model.safetensors").read_bytes()
        except CheckpointError as error:
            assert not cached("model.safetensors", Path(constants.HF_HUB_CACHE))
            if errors is not None:
                errors.append(str(error))
    return None


def test_a_cut_connection_is_taken_up_where_it_broke(server: HubServer, large: str) -> None:
    server.faults = [Fault(large, cut_after=5000)]
    errors: list[str] = []
    assert fetch_at_last(errors) == golden(WHOLE["safetensors"])["model.safetensors"]
    first, second = server.contents_asked("model.safetensors")
    assert "range" not in first.headers
    assert second.headers["range"] == "bytes=4096-"
    assert second.status == 206
    assert all("owner/name: the connection to the Hub failed: " in text for text in errors)


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_that_lasts_is_an_error_and_can_be_mended(server: HubServer, large: str, reset: bool) -> None:
    server.faults = [Fault(large, cut_after=5000), Fault(large, times=99, cut_after=0, reset=reset)]
    with pytest.raises(CheckpointError, match=r"owner/name: the connection to the Hub failed: .*; try again$"):
        for _ in range(2):  # the first cut may be mended
            resolve_directory("owner/name", "weights")
    assert not cached("model.safetensors", Path(constants.HF_HUB_CACHE))
    with pytest.raises(CheckpointError, match="only in part, without any of model.safetensors, "):
        resolve_directory("owner/name", "weights", local_files_only=True)
    server.faults = []
    assert fetch_at_last() == golden(WHOLE["safetensors"])["model.safetensors"]


def test_a_server_that_ignores_ranges_damages_nothing(server: HubServer, large: str) -> None:
    server.faults = [Fault(large, cut_after=5000), Fault(large, times=99, ignores_range=True)]
    errors: list[str] = []
    content = fetch_at_last(errors)
    if content is None:  # the oldest library never gets out of this by itself
        assert errors[-1].endswith("; if it fails again, remove the *.incomplete files from the cache")
        for path in Path(constants.HF_HUB_CACHE).rglob("*.incomplete"):
            path.unlink()
        content = fetch_at_last()
    assert content == golden(WHOLE["safetensors"])["model.safetensors"]
    assert any(request.headers.get("range") and request.status == 200 for request in server.asked("GET", large))


def test_less_than_was_announced_is_not_taken_for_the_whole(server: HubServer, large: str) -> None:
    server.faults = [Fault(large, shorter_by=10)]
    errors: list[str] = []
    assert fetch_at_last(errors) == golden(WHOLE["safetensors"])["model.safetensors"]
    assert len(errors) == 1
    assert "owner/name: the Hub library failed: Consistency check failed: file should be of size" in errors[0]


def test_a_change_or_loss_between_listing_and_download(server: HubServer) -> None:
    files = golden(SHARDED["safetensors"])
    repository = server.add("owner/name", files)
    listing = Fault("/revision/main")  # which goes well
    server.faults = [
        listing,
        Fault("/revision/main", before=lambda: repository.commit({"config.json": b"{}"}) and None),
    ]
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json did not arrive: .* try again$"):
        resolve_directory("owner/name", "weights")
    repository.commit(files)
    resolve_directory("owner/name", "config")
    server.faults = [Fault("/revision/main"), Fault("/revision/main", status=503, times=99)]
    with pytest.raises(CheckpointError, match="did not arrive|is in the cache only in part; the Hub cannot be reached"):
        resolve_directory("owner/name", "weights")


# Without a connection


def offline(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return {}


def unreachable(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    server.close()
    return {}


def out_of_order(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    server.faults = [Fault("", status=503, times=999)]
    return {}


def local_only(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"local_files_only": True}


without_a_connection = pytest.mark.parametrize(
    ("lose", "reason"),
    [
        (local_only, "local_files_only forbids a download"),
        (offline, "the Hub cannot be reached: Cannot reach .* offline mode is enabled"),
        (unreachable, "the Hub cannot be reached: .*refused"),
        (out_of_order, "the Hub cannot be reached: .*503"),
    ],
)
Lose = Callable[[HubServer, pytest.MonkeyPatch], dict[str, Any]]


@without_a_connection
@pytest.mark.parametrize("path", [WHOLE["h5"], SHARDED["bin"]])
def test_what_is_cached_loads(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, lose: Lose, reason: str, path: str
) -> None:
    server.add("owner/name", golden(path) | files_of(GOLDENS.parent / "small_vocab"))
    first = resolve_directory("owner/name", "weights")
    GPTJTokenizer.from_pretrained("owner/name")
    options = lose(server, monkeypatch)
    server.requests.clear()
    assert resolve_directory("owner/name", "weights", **options) == first
    GPTJConfig.from_pretrained("owner/name", **options)
    GPTJTokenizer.from_pretrained("owner/name", **options)
    assert not server.fetched()
    assert not server.pauses
    if path == WHOLE["h5"]:
        TFGPTJForCausalLM.from_pretrained("owner/name", **options)


@without_a_connection
def test_what_is_not_cached_is_an_error(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, lose: Lose, reason: str
) -> None:
    server.add("owner/name", golden(WHOLE["bin"]))
    options = lose(server, monkeypatch)
    for purpose in ("weights", "config", "tokenizer"):
        with pytest.raises(CheckpointError, match=f"^owner/name: is not in the cache; {reason}"):
            resolve_directory("owner/name", purpose, **options)


@without_a_connection
def test_what_is_cached_in_part_is_an_error(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, lose: Lose, reason: str
) -> None:
    server.add("owner/name", golden(SHARDED["safetensors"]) | golden(WHOLE["bin"]))
    directory = resolve_directory("owner/name", "weights")
    resolve_directory("owner/name", "weights", weights="bin")
    options = lose(server, monkeypatch)
    with pytest.raises(CheckpointError, match=f"only in part, without any of tf_model.h5, tf_model.*; {reason}"):
        resolve_directory("owner/name", "weights", weights="h5", **options)
    with pytest.raises(CheckpointError, match=f"in the cache only in part, without any of tokenizer.json.*; {reason}"):
        GPTJTokenizer.from_pretrained("owner/name", **options)
    # An unfinished download of one format is not made up for by another one.
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"only in part, without model-00002-of-00003.safetensors; {reason}"):
        resolve_directory("owner/name", "weights", **options)
    (directory / "generation_config.json").unlink()
    (directory / "model.safetensors.index.json").unlink()
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=f"owner/name: is in the cache only in part.*; {reason}"):
        resolve_directory("owner/name", "weights", **options)


def test_as_a_user_does_it(server: HubServer, tmp_path: Path) -> None:
    server.add("owner/name", golden(SHARDED["msgpack"]))
    program = "from tfgptj.checkpoints.hub import resolve_directory; print(resolve_directory('owner/name', 'weights'))"
    environment = os.environ | {
        "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"
    }  # fmt: skip
    printed = []
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment | variables, capture_output=True, text=True, check=True
        )
        printed.append(Path(result.stdout.strip()))
    assert printed[0] == printed[1]
    assert files_of(printed[0]) == golden(SHARDED["msgpack"])


# What the Hub refuses, and what a repository lacks


def test_gated_private_and_missing_repositories(server: HubServer) -> None:
    server.add("owner/gated", golden(WHOLE["bin"])).is_gated = True
    server.add("owner/private", golden(WHOLE["bin"])).is_private = True
    server.readers = {"right"}
    for purpose in ("weights", "config"):
        reason = "the repository is gated: accept its terms on its page, and give a token$"
        with pytest.raises(CheckpointError, match=f"^owner/gated: {reason}"):
            resolve_directory("owner/gated", purpose, token="wrong")
        reason = "neither a local directory nor a repository of the Hub; if it is private, give a token$"
        for name, token in (("owner/private", None), ("owner/private", "wrong"), ("owner/missing", "right")):
            with pytest.raises(CheckpointError, match=f"^{name}: {reason}"):
                resolve_directory(name, purpose, token=token)
    for name in ("owner/gated", "owner/private"):
        assert resolve_directory(name, "weights", token="right") == resolve_directory(name, "config", token="right")
        # As the library has it, what is cached is taken without permission, too.
        resolve_directory(name, "weights")
    reason = "without any of model.safetensors, .*; the repository is gated: accept its terms"
    with pytest.raises(CheckpointError, match=f"only in part, {reason}"):
        resolve_directory("owner/gated", "weights", weights="safetensors")


def test_a_token_that_is_not_valid_or_not_there(server: HubServer) -> None:
    server.add("owner/name", golden(WHOLE["bin"]))
    for status in (401, 403):
        server.faults = [Fault("", times=99, status=status, message="Invalid credentials in Authorization header")]
        reason = "the Hub refuses this; give a token that is valid and has the permission: .*Invalid credentials"
        for purpose in ("weights", "config"):
            with pytest.raises(CheckpointError, match=f"^owner/name: {reason}"):
                resolve_directory("owner/name", purpose, token="x")
    with pytest.raises(CheckpointError, match=r"owner/name: the Hub library failed: Token is required"):
        resolve_directory("owner/name", "weights", token=True)


def test_a_missing_revision(server: HubServer) -> None:
    server.add("owner/name", golden(WHOLE["bin"]))
    for purpose in ("weights", "config", "tokenizer"):
        with pytest.raises(CheckpointError, match="^owner/name: has no branch, tag or commit 'float32'$"):
            resolve_directory("owner/name", purpose, revision="float32")


def test_files_that_a_repository_lacks(server: HubServer) -> None:
    server.add("owner/name", golden(WHOLE["bin"]) | OTHERS | {f"{i}.txt": b"" for i in range(30)})
    has = r"has at revision 'main' none of"
    with pytest.raises(CheckpointError, match=rf"^owner/name: {has} tf_model\.h5, tf_model\.h5\.index\.json; it has 0"):
        resolve_directory("owner/name", "weights", weights="h5")
    with pytest.raises(CheckpointError, match=r"it has 0\.txt, .* and 21 more$"):
        resolve_directory("owner/name", "tokenizer")
    with pytest.raises(CheckpointError, match="has at revision 'main' in 'sub' none of model.safetensors, .* it has "):
        resolve_directory("owner/name", "weights", subfolder="sub")
    with pytest.raises(CheckpointError, match="has at revision 'main' in 'old' none of config.json; it has "):
        resolve_directory("owner/name", "config", subfolder="old")
    with pytest.raises(CheckpointError, match="weights must be one of auto, safetensors, .*; got 'tf'"):
        resolve_directory("owner/name", "weights", weights="tf")
    server.add("owner/empty", {})
    with pytest.raises(CheckpointError, match="owner/empty: has at revision 'main' none of .*; it has nothing"):
        resolve_directory("owner/empty", "weights")
    assert server.fetched() == []


@pytest.mark.parametrize("named", ["model-00004-of-00003.safetensors", "../model.safetensors", "/etc/x.safetensors"])
def test_an_index_that_names_what_is_not_there(server: HubServer, named: str) -> None:
    files = golden(SHARDED["safetensors"])
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["transformer.wte.weight"] = named
    server.add("owner/name", files | {"model.safetensors.index.json": json.dumps(index).encode()})
    reason = f"model.safetensors.index.json names shards that the repository lacks: {named}"
    with pytest.raises(CheckpointError, match=f"^owner/name: {reason}$"):
        resolve_directory("owner/name", "weights")
    assert not server.asked("GET", ".safetensors")


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1, "b": "x.bin"}}']
)
def test_a_damaged_index_is_the_loader_s_to_refuse(server: HubServer, index: bytes) -> None:
    server.add("owner/name", golden(SHARDED["safetensors"]) | {"model.safetensors.index.json": index, "x.bin": b""})
    with pytest.raises(CheckpointFormatError, match=r"model\.safetensors\.index\.json: "):
        TFGPTJForCausalLM.from_pretrained("owner/name")
    assert server.fetched() == [*DOCUMENTS, "model.safetensors.index.json"]


def test_something_else_than_a_hub_answers(server: HubServer) -> None:
    server.add("owner/name", golden(WHOLE["bin"]))
    server.faults = [Fault("/revision/main", times=99, cut_after=3)]
    with pytest.raises(CheckpointError, match="owner/name: is not in the cache; the Hub cannot be reached: "):
        resolve_directory("owner/name", "weights")
    with pytest.raises(CheckpointError, match="owner--name/name: the Hub library failed: .*'owner--name/name'"):
        resolve_directory("owner--name/name", "weights")


def test_a_disk_that_does_not_take_it(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("owner/name", golden(WHOLE["bin"]))
    (tmp_path / "file").touch()
    for purpose in ("weights", "config"):
        with pytest.raises(CheckpointError, match="owner/name: a file cannot be written or read: .*/file/.*; is"):
            resolve_directory("owner/name", purpose, cache_dir=tmp_path / "file" / "cache")

    def fill(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", fill)
    with pytest.raises(CheckpointError, match="a file cannot be written or read: .*No space left on device; is there"):
        resolve_directory("owner/name", "weights")
