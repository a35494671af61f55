"""Clients against a stand-in for TensorFlow Serving that serves a graph of a few operators."""

import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from serving_standin import StandIn

from tfgptj.errors import InputError, InputTypeError, ServerError
from tfgptj.serving.client import Client, Completion, GrpcClient, RestClient

LABELS = {"stable": 3}


class Echo(tf.Module):
    """Repeats the beginning of a prompt, with what else the row was given."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "prompt")])
    def complete(self, prompt: tf.Tensor) -> dict[str, tf.Tensor]:
        size = tf.strings.length(prompt)
        tf.debugging.assert_positive(size, "prompt: a text is empty")
        reason = tf.where(size < 5, "stop", "length")
        return {
            "text": prompt,
            "text_bytes": tf.strings.substr(prompt, 0, 3),
            "num_tokens": size,
            "finish_reason": reason,
        }

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, "prompt"),
            tf.TensorSpec([None], tf.int32, "max_new_tokens"),
            tf.TensorSpec([None], tf.float32, "temperature"),
            tf.TensorSpec([None], tf.int32, "top_k"),
            tf.TensorSpec([None], tf.float32, "top_p"),
            tf.TensorSpec([None], tf.int64, "seed"),
        ]
    )
    def generate(
        self,
        prompt: tf.Tensor,
        max_new_tokens: tf.Tensor,
        temperature: tf.Tensor,
        top_k: tf.Tensor,
        top_p: tf.Tensor,
        seed: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        shown = [tf.strings.as_string(number) for number in (temperature, top_k, top_p, seed)]
        most = max_new_tokens
        text = tf.strings.join([tf.strings.substr(prompt, 0 * most, most, "UTF8_CHAR"), *shown], "|")
        return {"text": text, "num_tokens": most, "finish_reason": tf.fill(tf.shape(most), "length")}

    @tf.function(
        input_signature=[tf.TensorSpec([None, None], tf.int32, "token_ids"), tf.TensorSpec([None], tf.int32, "lengths")]
    )
    def embed(self, token_ids: tf.Tensor, lengths: tf.Tensor) -> dict[str, tf.Tensor]:
        counted = tf.where(tf.sequence_mask(lengths, tf.shape(token_ids)[1]), token_ids, 0)
        return {"mean": tf.cast(tf.reduce_sum(counted, axis=1, keepdims=True), tf.float32) / 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    echo, version = Echo(), tmp_path_factory.mktemp("echo") / "3"
    signatures = {"serving_default": echo.complete, "generate": echo.generate, "embed": echo.embed}
    tf.saved_model.save(echo, str(version), signatures)
    standin = StandIn(version, "echo", LABELS, [1, 2, 4, 8])
    yield standin
    standin.close()


@pytest.fixture(params=["rest", "grpc"])
def client(request: pytest.FixtureRequest, server: StandIn) -> Iterator[Client]:
    with GrpcClient(server.target, "echo") as over_grpc:
        yield RestClient(server.url, "echo") if request.param == "rest" else over_grpc


def with_version(client: Client, server: StandIn, **which: Any) -> Client:
    if isinstance(client, RestClient):
        return RestClient(server.url, "echo", **which)
    return GrpcClient(server.target, "echo", **which)


def test_texts_go_and_come(client: Client) -> None:
    assert client.complete(["héé", "<\0🙂\n>", "naïve"]) == [
        Completion("héé", 5, "length"),
        Completion("<\0🙂\n>", 8, "length"),
        Completion("naïve", 6, "length"),
    ]
    outputs = client.predict("serving_default", prompt=["hé🙂", b"abcd"])
    assert outputs["text_bytes"].tolist() == ["hé".encode(), b"abc"]
    assert client.predict("serving_default", prompt=["né"[:1] + "🙂"])["text_bytes"].tolist() == [b"n\xf0\x9f"]


def test_each_row_has_its_own_numbers(client: Client) -> None:
    found = client.generate(["äbc", "def"], max_new_tokens=[1, 2], temperature=0.5, seed=[2**40, -1], top_k=(3, 4))
    assert found == [
        Completion("ä|0.500000|3|1.000000|1099511627776", 1, "length"),
        Completion("de|0.500000|4|1.000000|-1", 2, "length"),
    ]
    assert client.generate(["x" * 30])[0].text == "x" * 20 + "|1.000000|0|1.000000|-1"


def test_numbers_go_and_come(client: Client) -> None:
    outputs = client.predict("embed", token_ids=[[1, 2], [3, 4]], lengths=np.array([2, 1], np.int32))
    assert [array.tolist() for array in outputs.values()] == [[[1.5], [1.5]]]


def test_versions_and_labels_are_asked_for(client: Client, server: StandIn) -> None:
    for which in ({"version": 3}, {"label": "stable"}):
        assert with_version(client, server, **which).complete(["a"])[0].text == "a"
    for which, message in (
        ({"version": 4}, "Servable not found"),
        ({"label": "x"}, "Unrecognized servable version label"),
    ):
        with pytest.raises(ServerError, match=message):
            with_version(client, server, **which).complete(["a"])
    with pytest.raises(InputError, match="version=1 and label='a' exclude each other"):
        with_version(client, server, version=1, label="a")


def test_what_a_server_says_is_passed_on(client: Client) -> None:
    for signature, inputs, message in (
        ("no", {"prompt": ["a"]}, '"no" not found in signature def'),
        ("serving_default", {}, r"0!=1 Sent extra: \{\}. Missing but required: \{prompt\}"),
        ("serving_default", {"prompt": ["a"], "x": ["a"]}, r"Sent extra: \{x\}. Missing but required: \{\}"),
        ("serving_default", {"prompt": ["a", ""]}, "prompt: a text is empty"),
        ("embed", {"token_ids": [[1]], "lengths": np.int32(1)}, "input tensors must have at least one dimension"),
        ("embed", {"token_ids": [[1]], "lengths": [1, 1]}, "must have equal 0th-dimension size"),
    ):
        with pytest.raises(ServerError, match=message):
            client.predict(signature, **inputs)


def test_answers_are_looked_at(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "predict", lambda *_, **__: {"mean": np.zeros(1)})
    with pytest.raises(ServerError, match="The answer has no 'text', but mean: is it a language model"):
        client.complete(["a"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda client: client.complete("abc"), InputTypeError, "prompts is 'abc', expected a list of str"),
        (lambda client: client.generate([b"abc"]), InputTypeError, "expected a list of str"),
        (
            lambda client: client.generate(["a"], beams=3),
            InputError,
            "beams=3: expected one number .* of max_new_tokens, ",
        ),
        (
            lambda client: client.generate(["a"], seed=[1, 2]),
            InputError,
            r"seed=\[1, 2\]: expected one number or 1, one",
        ),
        (lambda client: client.predict("a", x=[None]), InputTypeError, r"x is \[None\], expected numbers or strings"),
        (lambda client: client.predict("a", x=[1j]), InputTypeError, "expected numbers or strings"),
    ],
)
def test_bad_requests_are_not_sent(client: Client, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(client)


def test_bad_urls_are_refused() -> None:
    with pytest.raises(InputError, match="url is 'localhost:8501', expected http://host:port or https://host:port"):
        RestClient("localhost:8501", "m")


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"http://127.0.0.1:{port}/v1/models/m:predict: .*refused"):
            RestClient(f"http://127.0.0.1:{port}", "m").complete(["a"])
        with (
            GrpcClient(f"127.0.0.1:{port}", "m") as client,
            pytest.raises(ServerError, match=f":{port}: UNAVAILABLE: "),
        ):
            client.complete(["a"])


def test_waiting_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        port = silent.getsockname()[1]
        with pytest.raises(ServerError, match="timed out"):
            RestClient(f"http://127.0.0.1:{port}", "m", timeout=0.1).complete(["a"])
        with GrpcClient(f"127.0.0.1:{port}", "m", timeout=0.1) as client, pytest.raises(ServerError, match="EXCEEDED"):
            client.complete(["a"])


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>", "the answer has no outputs: <html>"),
        (200, b'{"predictions": []}', "the answer has no outputs: {"),
        (502, b"Bad \xff Gateway", "502: Bad \ufffd Gateway"),
        (503, b'{"error": "busy"}', "503: busy"),
        (200, None, "closed|reset|IncompleteRead|without response"),
    ],
)
def test_other_servers_are_recognised(status: int, body: bytes | None, message: str) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if body is not None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        with pytest.raises(ServerError, match=re.escape(message) if body else message):
            RestClient(f"http://127.0.0.1:{other.server_port}", "m").complete(["a"])
        thread.join()


def test_merged_requests_answer_as_single_ones(server: StandIn) -> None:
    clients = [RestClient(server.url, "echo"), GrpcClient(server.target, "echo", label="stable")]
    requests = [[f"{'é' * (n % 7)}row {n}.{row}" for row in range(1 + n % 3)] for n in range(32)]
    alone = [clients[n % 2].generate(rows, max_new_tokens=n, seed=n) for n, rows in enumerate(requests)]
    batcher = server.batchers["generate"]
    batcher.batches, batcher.held = [], len(requests)
    with ThreadPoolExecutor(len(requests)) as pool:
        together = pool.map(
            lambda n: clients[n % 2].generate(requests[n], max_new_tokens=n, seed=n), range(len(requests))
        )
        assert list(together) == alone
    # 63 rows in batches of eight: some were split, and the last one was filled up.
    assert batcher.batches == [(8, 8)] * 7 + [(7, 8)]
    clients[1].close()


def test_rows_of_other_lengths_are_filled_up(server: StandIn) -> None:
    client = RestClient(server.url, "echo")
    batcher = server.batchers["embed"]
    batcher.batches, batcher.held = [], 3
    rows = [[5], [1, 2, 3], [4, 4]]
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda row: client.predict("embed", token_ids=[row], lengths=[len(row)]), rows)
        assert [outputs["output"].tolist() for outputs in found] == [[[2.5]], [[3.0]], [[4.0]]]
    assert batcher.batches == [(3, 4)]
