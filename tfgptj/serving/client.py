"""Clients of TensorFlow Serving: text in, text out, over REST or gRPC, without TensorFlow."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np

from tfgptj.errors import InputError, InputTypeError, ServerError
from tfgptj.serving.wire import ModelSpec, predict_request, predict_response
from tfgptj.text_stream import TextStream
from tfgptj.tokenizer import GPTJTokenizer

# What a request of `generate` says for each row, beside its prompt.
SAMPLING = {
    "max_new_tokens": np.int32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "seed": np.int64,
}
PREDICT = "/tensorflow.serving.PredictionService/Predict"
MAX_REASON = 500  # characters of an answer that are shown when it is not what was expected


class Completion(NamedTuple):
    """A continuation of a prompt: its text, its tokens with the end-of-text one, and "stop" or "length"."""

    text: str
    num_tokens: int
    finish_reason: str


class Client(ABC):
    """What both clients do; a server is asked once for each call, and never again if that fails.

    Args:
        model: the name under which it is served.
        version, label: which version of it; the newest if neither is given.
        timeout: seconds to wait for an answer.

    Raises:
        InputError: if both a version and a label are given.
    """

    def __init__(self, model: str, version: int | None, label: str | None, timeout: float) -> None:
        if version is not None and label is not None:
            raise InputError(f"version={version} and label={label!r} exclude each other: give one of them.")
        self.model, self.version, self.label, self.timeout = model, version, label, timeout

    @abstractmethod
    def predict(self, signature: str, **inputs: Any) -> dict[str, np.ndarray]:
        """Ask for any signature.

        Args:
            signature: its name.
            **inputs: arrays, lists of numbers, or lists of `str` or `bytes`; lists of int become int32, of float
                float32.

        Returns:
            Arrays of numbers, or of `bytes` with dtype object.

        Raises:
            ServerError: with the server's own words, if it refuses; or if it cannot be reached in time.
            InputTypeError: if an input is neither numbers nor strings.
        """

    def complete(self, prompts: Sequence[str]) -> list[Completion]:
        """Continue prompts with the parameters that the model was exported with; errors as in `predict`."""
        return _completions(self.predict("serving_default", prompt=_texts("prompts", prompts)))

    def generate(self, prompts: Sequence[str], **sampling: Any) -> list[Completion]:
        """Continue prompts.

        Args:
            prompts: B texts.
            **sampling: `max_new_tokens` (by default 20), `temperature` (1; 0 for the likeliest tokens), `top_k` (0, no
                cut), `top_p` (1, no cut) and `seed` (-1, drawn anew): one for all prompts, or B.

        Raises:
            InputError: if another parameter is given, or the numbers are not one or B.
            ServerError, InputTypeError: as in `predict`.
        """
        texts = _texts("prompts", prompts)
        values = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": -1} | sampling
        inputs = {}
        for name, value in values.items():
            if name not in SAMPLING or np.shape(value) not in ((), (len(texts),)):
                raise InputError(
                    f"{name}={value!r:.80}: expected one number or {len(texts)}, one for each prompt, of "
                    f"{', '.join(SAMPLING)}."
                )
            inputs[name] = np.broadcast_to(np.asarray(value, SAMPLING[name]), (len(texts),))
        return _completions(self.predict("generate", prompt=texts, **inputs))


class RestClient(Client):
    """A client over HTTP; it needs nothing but Python and NumPy.

    Args:
        url: the server's, such as "http://localhost:8501".
        model: the name under which it is served.
        version, label: which version of it; the newest if neither is given.
        timeout: seconds to wait for each part of an answer.

    Raises:
        InputError: if the URL is not one of HTTP, or both a version and a label are given.

    >>> RestClient("http://localhost:8501", "gptj", label="stable").url
    'http://localhost:8501/v1/models/gptj/labels/stable'
    """

    def __init__(
        self, url: str, model: str, *, version: int | None = None, label: str | None = None, timeout: float = 60.0
    ) -> None:
        super().__init__(model, version, label, timeout)
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise InputError(f"url is {url!r:.80}, expected http://host:port or https://host:port.")
        self.url = f"{url.rstrip('/')}/v1/models/{urllib.parse.quote(model, safe='')}"
        if version is not None:
            self.url += f"/versions/{version}"
        if label is not None:
            self.url += f"/labels/{urllib.parse.quote(label, safe='')}"

    def predict(self, signature: str, **inputs: Any) -> dict[str, np.ndarray]:
        columns = {name: _as_json(_as_array(name, value)) for name, value in inputs.items()}
        body = json.dumps({"signature_name": signature, "inputs": columns}).encode()
        request = urllib.request.Request(f"{self.url}:predict", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                data = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise ServerError(f"{request.full_url}: {error.code}: {_reason(error.read())}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{request.full_url}: {error or type(error).__name__}") from error
        return self._outputs(request.full_url, data)

    def _outputs(self, url: str, data: bytes) -> dict[str, np.ndarray]:
        try:
            outputs = json.loads(data)["outputs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{url}: the answer has no outputs: {_reason(data)}") from error
        if not isinstance(outputs, dict):  # servers leave out the name of a single output
            outputs = {"output": outputs}
        return {name: _from_json(value) for name, value in outputs.items()}


class GrpcClient(Client):
    """A client over gRPC, which is the faster one, and the one that can stream.

    Args:
        target: the server's, such as "localhost:8500".
        model: the name under which it is served.
        version, label: which version of it; the newest if neither is given.
        timeout: seconds to wait for an answer.
        credentials: gRPC's, for an encrypted connection.

    Raises:
        InputError: if both a version and a label are given.

    >>> with GrpcClient("localhost:8500", "gptj") as client:
    ...     client.model
    'gptj'
    """

    def __init__(
        self,
        target: str,
        model: str,
        *,
        version: int | None = None,
        label: str | None = None,
        timeout: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        super().__init__(model, version, label, timeout)
        self.target = target
        # gRPC's own limit is 4 MiB, less than the keys and values of five tokens of GPT-J.
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._call = self._channel.unary_unary(PREDICT)

    def __enter__(self) -> GrpcClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def predict(self, signature: str, **inputs: Any) -> dict[str, np.ndarray]:
        spec = ModelSpec(self.model, signature, self.version, self.label)
        arrays = {name: _as_array(name, value) for name, value in inputs.items()}
        try:
            data = self._call(predict_request(spec, arrays), timeout=self.timeout)
        except grpc.RpcError as error:
            raise ServerError(f"{self.target}: {error.code().name}: {error.details()}") from error
        return predict_response(data)

    def stream(
        self,
        tokenizer: GPTJTokenizer,
        prompt: str,
        max_new_tokens: int = 20,
        choose: Callable[[np.ndarray], int] = lambda logits: int(logits.argmax()),
    ) -> Iterator[str]:
        """Continue a prompt, one piece of text after the other, by the signatures `prefill` and `decode`.

        The server keeps nothing between steps: all keys and values travel with each, 0.9 MB a token for GPT-J-6B in
        float32. That suits short texts on a fast network; `generate` sends text alone.

        Args:
            tokenizer: the model's.
            prompt: the text.
            max_new_tokens: tokens to add at most.
            choose: the next token from logits, float32 [V]; by default the likeliest.

        Raises:
            ServerError: as in `predict`.
        """
        ids = tokenizer.encode(prompt)
        lengths = np.array([len(ids)], np.int32)
        found = self.predict("prefill", token_ids=np.array([ids], np.int32), lengths=lengths)
        cache, text = found["cache"], TextStream(tokenizer, skip_special_tokens=True)  # [B, L, 2, N, S, H]
        for count in range(max_new_tokens):
            token = choose(found["logits"][0])
            if token == tokenizer.eos_token_id:
                break
            yield text.put(token)
            if count + 1 < max_new_tokens:
                found = self.predict("decode", token_ids=np.array([token], np.int32), lengths=lengths, cache=cache)
                cache, lengths = np.concatenate([cache, found["cache"]], axis=4), lengths + 1
        yield text.end()


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputTypeError(f"{name} is {texts!r:.80}, expected a list of str.")
    return list(texts)


def _as_array(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind in "USO":
        texts = np.array([*np.asarray(value, object).ravel(), None], object)[:-1]
        if all(isinstance(text, str | bytes) for text in texts):
            encoded = [text.encode() if isinstance(text, str) else text for text in texts]
            return np.array([*encoded, None], object)[:-1].reshape(array.shape)
    elif isinstance(value, np.ndarray | np.generic):
        return array
    elif array.dtype.kind in "iufb":
        return array.astype({"f": np.float32, "b": np.bool_}.get(array.dtype.kind, np.int32))
    raise InputTypeError(f"{name} is {value!r:.80}, expected numbers or strings.")


def _as_json(array: np.ndarray) -> Any:
    if array.dtype != object:
        return array.astype(np.float32).tolist() if array.dtype.kind == "V" else array.tolist()
    flat = [{"b64": base64.b64encode(text).decode()} for text in array.ravel()]
    return np.array([*flat, None], object)[:-1].reshape(array.shape).tolist()


def _from_json(value: Any) -> np.ndarray:
    """An array of numbers, or of bytes, which stand as text or, if they are no text, in base64."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return np.array([_from_json(part) for part in value])
    if isinstance(value, list) and value and isinstance(value[0], str | dict):
        texts = [base64.b64decode(text["b64"]) if isinstance(text, dict) else text.encode() for text in value]
        return np.array([*texts, None], object)[:-1]
    array = np.array(value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _reason(data: bytes) -> str:
    """What a server says of an error, in full; or the beginning of what it sent instead."""
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return data[:MAX_REASON].decode("utf-8", "replace")


def _completions(outputs: dict[str, np.ndarray]) -> list[Completion]:
    try:
        columns = [outputs[name] for name in ("text", "num_tokens", "finish_reason")]
    except KeyError as error:
        raise ServerError(f"The answer has no {error}, but {', '.join(outputs)}: is it a language model?") from error
    return [
        Completion(text.decode(), int(count), reason.decode()) for text, count, reason in zip(*columns, strict=True)
    ]
