"""The README of an exported model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

TEMPLATE = """\
# {name}

A model for TensorFlow Serving, one numbered directory for each version. The graphs need TensorFlow's own operators
only, and read and write UTF-8 text.

## Serve

    tensorflow_model_server --port=8500 --rest_api_port=8501 --model_config_file=$PWD/models.config \\
        --enable_batching --enable_per_model_batching_parameters \\
        --allow_version_labels_for_unavailable_models

`models.config` holds the path of this directory: mend it if the directory moves. Each version has its batching
parameters in `batching_params.pbtxt`, and a warm-up in `assets.extra`: a version whose warm-up fails is not served.

Versions by label: {labels}. A new version is tried out under a label of its own, "canary"; point "stable" to it in
`models.config` to switch over, and back to undo that. The server reads the file again with
`--model_config_file_poll_wait_seconds=60`.

Requests that come within two milliseconds are merged into one run of the graph. No row depends on the others, but if
the graph refuses one of them, such as a prompt that is too long, it refuses those it was merged with, too.

## Ask

Signatures and their inputs, each with one value per row:

{signatures}

By REST:

    curl -d '{request}' \\
        http://localhost:8501/v1/models/{name}:predict

By gRPC or REST from Python, with tfgptj but without TensorFlow:

    from tfgptj.serving.client import GrpcClient, RestClient

    with GrpcClient("localhost:8500", "{name}", label="stable") as client:
        outputs = client.predict({call})

    client = RestClient("http://localhost:8501", "{name}", label="stable")

A language model also has `client.complete(["..."])` and `client.generate(["..."], max_new_tokens=40, temperature=0.8)`.
"""


def readme(name: str, signatures: Iterable[tuple[str, Iterable[str]]], example: Mapping[str, Any], labels: str) -> str:
    """Markdown on how to serve a model and ask it.

    Args:
        name: the model's on the server.
        signatures: their names, and those of their inputs.
        example: inputs for `serving_default`.
        labels: versions by label, in words.
    """
    return TEMPLATE.format(
        name=name,
        labels=labels,
        signatures="\n".join(f"- `{key}`: {', '.join(f'`{given}`' for given in names)}" for key, names in signatures),
        request=json.dumps({"signature_name": "serving_default", "inputs": example}),
        call=", ".join(['"serving_default"', *(f"{key}={value!r}" for key, value in example.items())]),
    )
