"""GPT-J in plain NumPy: slow, short, and independent of every framework; the other tests are measured against it.

Everything is computed in the dtype of the weights, float64 unless asked otherwise. ``config`` is a parsed
``config.json``. Source: Hugging Face's PyTorch GPT-J, whose masking is kept: a query that may look at nothing (a
left-padded position) looks at every key alike.

B batch · T tokens (queries) · S keys · D model width · N heads · H head width · R rotary width · F feed-forward width ·
V vocabulary · C classes
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray
Weights = dict[str, Array]
Config = dict[str, Any]

LOWEST = float(np.finfo(np.float32).min)
erf = np.vectorize(math.erf, otypes=[float])


def load_weights(directory: Path | str, dtype: Any = np.float64) -> Weights:
    """All tensors of a directory of safetensors files, by their PyTorch names less the prefix ``transformer.``"""
    tensors = {name: array for file in Path(directory).glob("*.safetensors") for name, array in load_file(file).items()}
    return {name.removeprefix("transformer."): array.astype(dtype) for name, array in tensors.items()}


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def softplus(x: Array | float) -> Array:
    return np.asarray(np.logaddexp(0, x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def prelu(x: Array, weight: Array | float = 0.25) -> Array:
    return np.where(x > 0, x, weight * x)


def xielu(x: Array, alpha_p: Array | float = 0.2041015625, alpha_n: Array | float = -1.046875,
          beta: Array | float = 0.5, eps: float = -9.98377799987793e-07) -> Array:  # fmt: skip
    """The defaults are those of PyTorch, rounded to bfloat16 as there."""
    negative = (np.expm1(np.minimum(x, eps)) - x) * (softplus(alpha_n) + beta)
    return np.where(x > 0, softplus(alpha_p) * x * x, negative) + beta * x


ACTIVATIONS: dict[str, Callable[..., Array]] = {
    **dict.fromkeys(("gelu", "gelu_python"), gelu),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), gelu_tanh),
    "gelu_10": lambda x: np.clip(gelu(x), -10, 10),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "laplace": lambda x: 0.5 * (1 + erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(softplus(x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": lambda x: prelu(x, 0.01),
    "sigmoid": sigmoid,
    **dict.fromkeys(("silu", "swish"), silu),
    "tanh": np.tanh,
    "prelu": prelu,
    "xielu": xielu,
}


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def layer_norm(x: Array, weights: Weights, prefix: str, epsilon: float) -> Array:
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)  # [B, T, D]
    return normal * weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]  # [B, T, D]


def linear(x: Array, weights: Weights, prefix: str) -> Array:
    return x @ weights[f"{prefix}.weight"].T + weights.get(f"{prefix}.bias", 0)


def rotate(x: Array, position_ids: Array, width: int) -> Array:
    """Turns the pairs (0, 1), (2, 3) … of the first ``width`` features of ``x`` [B, T, N, H] by their angles."""
    frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)  # [R/2]
    angles = position_ids[:, :, None, None] * frequencies  # [B, T, 1, R/2]
    turned = (x[..., 0:width:2] + 1j * x[..., 1:width:2]) * np.exp(1j * angles)  # [B, T, N, R/2]
    rotated = np.stack([turned.real, turned.imag], -1).reshape(*x.shape[:-1], width)  # [B, T, N, R]
    return np.concatenate([rotated, x[..., width:]], -1).astype(x.dtype)  # [B, T, N, H]


def attention(
    x: Array, weights: Weights, config: Config, prefix: str, allowed: Array, position_ids: Array
) -> tuple[Array, Array]:
    """The attention's contribution [B, T, D] and its probabilities [B, N, T, S]."""
    width = config["n_embd"] // config["n_head"]
    q, k, v = (
        linear(x, weights, f"{prefix}.{name}_proj").reshape(*x.shape[:2], config["n_head"], width) for name in "qkv"
    )  # each [B, T, N, H]
    q, k = (rotate(part, position_ids, config["rotary_dim"] or width) for part in (q, k))  # each [B, T, N, H]
    scores = np.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(width)  # [B, N, T, S]
    probabilities = np.exp(log_softmax(np.where(allowed, scores, LOWEST)))  # [B, N, T, S]
    mixed = np.einsum("BNTS,BSNH->BTNH", probabilities, v).reshape(x.shape)  # [B, T, D]
    return linear(mixed, weights, f"{prefix}.out_proj"), probabilities


def feed_forward(x: Array, weights: Weights, config: Config, prefix: str) -> Array:
    learned = {name: weights[f"{prefix}.act.{name}"] for name in ("weight", "alpha_p", "alpha_n", "beta", "eps")
               if f"{prefix}.act.{name}" in weights}  # fmt: skip
    inner = ACTIVATIONS[config["activation_function"]](linear(x, weights, f"{prefix}.fc_in"), **learned)  # [B, T, F]
    return linear(inner, weights, f"{prefix}.fc_out")  # [B, T, D]


def hidden_states(
    weights: Weights,
    config: Config,
    input_ids: Array | None = None,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    token_type_ids: Array | None = None,
    inputs_embeds: Array | None = None,
) -> tuple[list[Array], list[Array]]:
    """What enters each block and, last, what leaves ``ln_f``, each [B, T, D]; and the attentions, each [B, N, T, S]."""
    x = weights["wte.weight"][input_ids] if inputs_embeds is None else inputs_embeds  # [B, T, D]
    batch, length = x.shape[:2]
    if token_type_ids is not None:
        x = x + weights["wte.weight"][token_type_ids]  # [B, T, D]
    if position_ids is None:
        position_ids = np.arange(length)[None]  # [1, T]
    if attention_mask is None:
        attention_mask = np.ones((batch, length))  # [B, S]
    allowed = np.tril(np.ones((length, length), bool)) & (attention_mask[:, None, None] != 0)  # [B, 1, T, S]
    states, attentions = [x], []
    for layer in range(config["n_layer"]):
        normal = layer_norm(x, weights, f"h.{layer}.ln_1", config["layer_norm_epsilon"])  # [B, T, D]
        attended, probabilities = attention(normal, weights, config, f"h.{layer}.attn", allowed, position_ids)
        x = x + attended + feed_forward(normal, weights, config, f"h.{layer}.mlp")  # [B, T, D]
        states.append(x)
        attentions.append(probabilities)
    states[-1] = layer_norm(x, weights, "ln_f", config["layer_norm_epsilon"])  # [B, T, D]
    return states, attentions


def causal_lm_logits(weights: Weights, config: Config, *inputs: Any, **named_inputs: Any) -> Array:
    """Logits [B, T, V]; the inputs of this and the other heads are those of ``hidden_states``."""
    kernel = weights["wte.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]  # [V, D]
    return hidden_states(weights, config, *inputs, **named_inputs)[0][-1] @ kernel.T + weights["lm_head.bias"]


def classification_logits(
    weights: Weights, config: Config, input_ids: Array | None = None, *inputs: Any, **named_inputs: Any
) -> Array:
    """Logits [B, C] at each row's last token that is not padding, or at the last of all where no padding is known."""
    states, _ = hidden_states(weights, config, input_ids, *inputs, **named_inputs)
    logits = linear(states[-1], weights, "score")  # [B, T, C]
    if input_ids is None or config.get("pad_token_id") is None:
        return logits[:, -1]
    last = (np.arange(input_ids.shape[1]) * (input_ids != config["pad_token_id"])).argmax(-1)  # [B]
    return logits[np.arange(len(logits)), last]  # [B, C]


def question_answering_logits(
    weights: Weights, config: Config, *inputs: Any, **named_inputs: Any
) -> tuple[Array, Array]:
    """Start and end logits, each [B, T]."""
    logits = linear(hidden_states(weights, config, *inputs, **named_inputs)[0][-1], weights, "qa_outputs")  # [B, T, 2]
    return logits[..., 0], logits[..., 1]


def cross_entropy(logits: Array, labels: Array, ignored: int = -100) -> float:
    """Mean over the labels [...] that are not ``ignored``, of logits [..., C]."""
    kept = labels != ignored
    chosen = np.take_along_axis(log_softmax(logits), np.where(kept, labels, 0)[..., None], -1)[..., 0]  # [...]
    return -float(chosen[kept].mean())


def causal_lm_loss(logits: Array, labels: Array) -> float:
    """Each position predicts the label of the next one; ``-100`` is ignored."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def classification_loss(logits: Array, labels: Array, problem_type: str | None = None) -> float:
    """As ``problem_type`` says or, without one, as the number of classes and the dtype of the labels do."""
    if problem_type is None:
        several = "single_label_classification" if labels.dtype.kind == "i" else "multi_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else several
    if problem_type == "regression":
        return float(((logits.reshape(labels.shape) - labels) ** 2).mean())
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    return float((softplus(logits) - logits * labels).mean())


def question_answering_loss(start_logits: Array, end_logits: Array, starts: Array, ends: Array) -> float:
    """Positions are clamped to [0, T], and T is ignored."""
    length = start_logits.shape[1]
    pairs = ((start_logits, starts), (end_logits, ends))
    return sum(cross_entropy(logits, np.clip(positions, 0, length), length) for logits, positions in pairs) / 2


def greedy(weights: Weights, config: Config, ids: Array, mask: Array, steps: int) -> Array:
    """The ``steps`` likeliest next tokens [B, steps], without a cache, each row by itself and unpadded."""
    rows = [row[kept != 0] for row, kept in zip(ids, mask, strict=True)]
    for _ in range(steps):
        rows = [np.append(row, causal_lm_logits(weights, config, row[None])[0, -1].argmax()) for row in rows]
    return np.stack([row[len(row) - steps :] for row in rows])
