"""Exported models on a server: 32 clients at once get what each gets alone, over gRPC and HTTP.

The server is the stand-in, and TensorFlow Serving itself where `tensorflow_model_server` is installed.
"""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from serving_standin import MESSAGES, StandIn

from tfgptj.config import GPTJConfig
from tfgptj.errors import ServerError
from tfgptj.heads import TFGPTJForCausalLM
from tfgptj.serving.client import Client, GrpcClient, RestClient
from tfgptj.serving.deployment import write_deployment
from tfgptj.serving.export import export_saved_model
from tfgptj.tokenizer import GPTJTokenizer

SHAPE: dict[str, Any] = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64}
SERVER = shutil.which("tensorflow_model_server")
CLIENTS = 32


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(["the king is in the garden, what a day it is " * 3], vocab_size=290)


@pytest.fixture(scope="module")
def exported(tokenizer: GPTJTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = TFGPTJForCausalLM(GPTJConfig(**SHAPE, initializer_range=0.3, bos_token_id=1, eos_token_id=7))
    directory = tmp_path_factory.mktemp("models") / "king"
    path = export_saved_model(model, directory, tokenizer, max_new_tokens=6, max_batch_size=8)
    write_deployment(directory, "king")
    return path


@pytest.fixture(scope="module")
def standin(exported: Path) -> Iterator[StandIn]:
    server = StandIn(exported, "king", {"stable": 1}, [1, 2, 4, 8])
    yield server
    server.close()


@pytest.fixture(scope="module", params=["standin", "tensorflow_model_server"])
def addresses(request: pytest.FixtureRequest, exported: Path) -> Iterator[tuple[str, str]]:
    """Those of a server that serves the export, for gRPC and for REST."""
    if request.param == "standin":
        standin = request.getfixturevalue("standin")
        yield standin.target, standin.url
    elif SERVER is None:
        pytest.skip("needs tensorflow_model_server on the PATH")
    else:
        yield from model_server(exported)


def model_server(exported: Path) -> Iterator[tuple[str, str]]:
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            ports.append(taken.getsockname()[1])
    options = [f"--port={ports[0]}", f"--rest_api_port={ports[1]}", "--enable_batching"]
    options += [f"--model_config_file={exported.parent / 'models.config'}", "--enable_per_model_batching_parameters"]
    options += ["--allow_version_labels_for_unavailable_models"]
    with subprocess.Popen([str(SERVER), *options]) as process:
        for _ in range(600):
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", ports[1])):
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
        process.terminate()


@pytest.fixture
def clients(addresses: tuple[str, str]) -> Iterator[list[Client]]:
    target, url = addresses
    with GrpcClient(target, "king", label="stable") as over_grpc:
        yield [over_grpc, RestClient(url, "king", version=1)]


def test_clients_at_once_get_what_each_gets_alone(clients: list[Client]) -> None:
    requests = [
        [f"the king {'is in the garden ' * ((n + row) % 3)}{n}" for row in range(1 + n % 3)] for n in range(CLIENTS)
    ]

    def ask(n: int) -> Any:
        client, rows = clients[n % 2], requests[n]
        if n % 4 < 2:
            return client.complete(rows)
        return client.generate(
            rows, max_new_tokens=1 + n % 7, temperature=0.2 * (n % 5), top_k=n % 9, top_p=0.9, seed=n
        )

    alone = [ask(n) for n in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        assert list(pool.map(ask, range(CLIENTS))) == alone
    assert len({answer for answers in alone for answer in answers}) > CLIENTS


def test_rows_of_tokens_are_merged_by_their_lengths(clients: list[Client]) -> None:
    rows = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6]]

    def ask(row: list[int]) -> tuple[list[int], int]:
        found = clients[0].predict("tokens", token_ids=[row], lengths=[len(row)])
        count = int(found["num_tokens"][0])
        return found["token_ids"][0, :count].tolist(), count

    alone = [ask(row) for row in rows]
    with ThreadPoolExecutor(len(rows)) as pool:
        assert list(pool.map(ask, rows)) == alone


def test_text_is_streamed(clients: list[Client], tokenizer: GPTJTokenizer) -> None:
    client = clients[0]
    assert isinstance(client, GrpcClient)
    prompt = "the king is"
    whole = client.generate([prompt], max_new_tokens=9, temperature=0)[0].text
    assert "".join(client.stream(tokenizer, prompt, max_new_tokens=9)) == whole
    assert list(client.stream(tokenizer, prompt, 3, choose=lambda logits: tokenizer.eos_token_id)) == [""]


def test_what_the_graph_refuses_is_said(clients: list[Client]) -> None:
    for client in clients:
        with pytest.raises(ServerError, match="temperature must be between"):
            client.generate(["the king"], temperature=-1)
        with pytest.raises(ServerError, match="n_positions=64"):
            client.complete(["a b c " * 40])


def test_the_warm_up_warms_every_signature(exported: Path, standin: StandIn) -> None:
    asked = []
    for record in tf.data.TFRecordDataset(str(exported / "assets.extra" / "tf_serving_warmup_requests")):
        request = MESSAGES["PredictionLog"].FromString(record.numpy()).predict_log.request
        asked.append(request.model_spec.signature_name)
        inputs = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
        assert standin.answer(request.model_spec.name, None, None, asked[-1], inputs)
    assert asked == sorted(standin.batchers)
