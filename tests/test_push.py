"""push_to_hub: what save_pretrained writes arrives as one commit, over HTTP, and is loaded back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
from conftest import GOLDENS, numbers
from hub_server import Fault, HubServer, files_of

from tfgptj.checkpoints.push import push_to_hub, superseded
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, ConfigError
from tfgptj.generation.config import GenerationConfig
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering
from tfgptj.tokenizer import GPTJTokenizer

# The library's way to send large files is one that httpx deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

IDS = np.arange(8)[None]
BASE = GOLDENS / "base" / "causal_lm"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine, on which "secret" may write."""
    with hub_server.hub(tmp_path, monkeypatch) as server:
        server.writers = {"secret"}
        yield server


def content(server: HubServer, branch: str = "main", name: str = "owner/name") -> dict[str, bytes]:
    """What a branch holds, but for what every new repository has."""
    repository = server.repositories[name]
    files = repository.commits[repository.branches[branch]]
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def test_a_model_is_committed_and_loads(server: HubServer, tmp_path: Path) -> None:
    model = TFGPTJForCausalLM.from_pretrained(BASE)
    commit = model.push_to_hub("owner/name", token="secret", private=True)
    repository = server.repositories["owner/name"]
    assert repository.is_private
    assert commit.oid == repository.branches["main"]
    assert repository.messages == ["", "Upload TFGPTJForCausalLM"]
    model.save_pretrained(tmp_path / "saved")
    assert content(server) == files_of(tmp_path / "saved")
    back = TFGPTJForCausalLM.from_pretrained("owner/name", token="secret")
    assert np.array_equal(numbers(back(IDS)), numbers(model(IDS)))
    assert back.generation_config == model.generation_config


def test_the_options_of_save_pretrained(server: HubServer, tmp_path: Path) -> None:
    model = TFGPTJForCausalLM.from_pretrained(BASE)
    options = {"format": "msgpack", "max_shard_size": "10KB", "dtype": "bfloat16"}
    model.push_to_hub("owner/name", token="secret", commit_message="Small", **options)
    model.save_pretrained(tmp_path / "saved", **options)
    assert content(server) == files_of(tmp_path / "saved")
    assert "flax_model.msgpack.index.json" in content(server)
    assert server.repositories["owner/name"].messages[-1] == "Small"
    back = TFGPTJForCausalLM.from_pretrained("owner/name", dtype="auto")
    assert back.dtype_policy.name == "bfloat16"


def test_an_older_checkpoint_is_replaced_in_the_same_commit(server: HubServer, tmp_path: Path) -> None:
    model = TFGPTJForCausalLM.from_pretrained(BASE)
    others = {"README.md": b"about", "sub/model.safetensors": b"another", "vocab.json": b"{}"}
    older = files_of(GOLDENS / "loading" / "sharded") | files_of(GOLDENS / "formats" / "tensorflow" / "causal_lm")
    repository = server.add("owner/name", older | others)
    server.page = 2  # a listing comes in many
    head = TFGPTJForQuestionAnswering(model.config)
    head.push_to_hub("owner/name", token="secret", format="h5")
    head.save_pretrained(tmp_path / "saved", format="h5")
    assert content(server) == files_of(tmp_path / "saved") | others
    assert "generation_config.json" not in content(server)
    assert len(repository.commits) == 2
    # The same once more: nothing to commit.
    head.push_to_hub("owner/name", token="secret", format="h5")
    assert len(repository.commits) == 2


def test_what_is_superseded() -> None:
    present = ["a.txt", "added_tokens.json", "config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    assert superseded(present, {"model.safetensors"}) == ["config.json", "model-00001-of-00002.safetensors"]
    assert superseded(present, {"tokenizer.json"}) == ["added_tokens.json"]
    assert superseded(present, {"config.json"}) == []


@pytest.mark.parametrize(
    "source",
    [
        GPTJConfig(n_embd=8, n_layer=1, n_head=1, rotary_dim=4),
        GenerationConfig(do_sample=True, temperature=0.5),
        GPTJTokenizer.from_directory(GOLDENS.parent / "small_vocab"),
    ],
    ids=lambda source: type(source).__name__,
)
def test_tokenizer_and_configurations(server: HubServer, tmp_path: Path, source: Any) -> None:
    server.add("owner/name", {"tf_model.h5": b"weights", "vocab.bpe": b"old"})
    source.push_to_hub("owner/name", token="secret")
    source.save_pretrained(tmp_path / "saved")
    kept = {"tf_model.h5": b"weights"}
    if not isinstance(source, GPTJTokenizer):
        kept["vocab.bpe"] = b"old"
    assert content(server) == files_of(tmp_path / "saved") | kept
    back = type(source).from_pretrained("owner/name")
    if isinstance(source, GPTJTokenizer):
        assert back.get_vocab() == source.get_vocab()
    else:
        assert back == source


def test_branches_and_pull_requests(server: HubServer) -> None:
    config = GPTJConfig(n_layer=3)
    for _ in range(2):  # once with a new branch, once with an old one
        config.push_to_hub("owner/name", token="secret", revision="float16")
    assert GPTJConfig.from_pretrained("owner/name", revision="float16").n_layer == 3
    assert content(server) == {}
    commit = config.push_to_hub("owner/name", token="secret", create_pr=True)
    assert commit.pr_url == f"{server.url}/owner/name/discussions/1"
    assert json.loads(content(server, "refs/pr/1")["config.json"])["n_layer"] == 3
    assert content(server) == {}
    GPTJConfig(n_layer=4).push_to_hub("owner/name", token="secret", revision="refs/pr/1")
    assert json.loads(content(server, "refs/pr/1")["config.json"])["n_layer"] == 4


def test_a_name_without_owner_is_one_s_own(server: HubServer) -> None:
    GPTJConfig().push_to_hub("name", token="secret")
    assert "config.json" in content(server, name="me/name")


def test_what_goes_wrong(server: HubServer) -> None:
    config = GPTJConfig()
    for token in (False, "wrong"):
        with pytest.raises(CheckpointError, match="^owner/name: the Hub refuses this; give a token that is valid"):
            config.push_to_hub("owner/name", token=token)
    server.add("owner/name", {})
    with pytest.raises(CheckpointError, match="^owner/name: the Hub refuses this; give a token that is valid"):
        config.push_to_hub("owner/name", token="wrong")
    with pytest.raises(CheckpointError, match="repo_id must be a string of the form owner/name, got PosixPath"):
        config.push_to_hub(Path("owner/name"), token="secret")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"^a/b/c: the Hub library failed: .*'a/b/c'"):
        config.push_to_hub("a/b/c", token="secret")
    with pytest.raises(CheckpointError, match="^format must be one of"):
        TFGPTJForCausalLM.from_pretrained(BASE).push_to_hub("owner/new", token="secret", format="bin")
    with pytest.raises(ConfigError, match="JSON cannot hold"):
        odd = GPTJConfig(n_embd=8, n_layer=1, n_head=1, rotary_dim=4, odd=object())
        TFGPTJForCausalLM(odd).push_to_hub("owner/new", token="secret")
    with pytest.raises(TypeError, match="dtype"):
        config.push_to_hub("owner/new", token="secret", dtype="float16")
    assert "owner/new" not in server.repositories
    server.faults = [Fault("/commit/main", status=500, times=99)]
    with pytest.raises(CheckpointError, match="^owner/name: the Hub library failed: .*500"):
        config.push_to_hub("owner/name", token="secret")
    assert content(server) == {}
    server.close()
    with pytest.raises(CheckpointError, match="^owner/name: the connection to the Hub failed: .*refused"):
        config.push_to_hub("owner/name", token="secret")


def test_a_broken_upload_commits_nothing(server: HubServer) -> None:
    model = TFGPTJForCausalLM.from_pretrained(BASE)
    with pytest.raises(CheckpointError, match="^owner/name: the Hub library failed: .*500"):
        server.faults = [Fault("/batch", status=500, times=99)]
        push_to_hub(model, "owner/name", token="secret")
    reason = "Error while uploading 'model.safetensors' to the Hub. the Hub refuses this; give a token .*403"
    with pytest.raises(CheckpointError, match=f"^owner/name: {reason}"):
        server.faults = [Fault(hub_server.digest((BASE / "model.safetensors").read_bytes()), status=403, times=99)]
        push_to_hub(model, "owner/name", token="secret")
    assert content(server) == {}
    server.faults = []
    push_to_hub(model, "owner/name", token="secret")
    assert content(server)
