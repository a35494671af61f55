"""The graphs that a GPT-J is cut into: two of each block, around its attention, and that of the head.

    x ─ ln_1 ─┬─ q, k, v ─────────── attention ─┐
              └─ fc_in ─ activation ────────────┴─ out_proj + fc_out + x

The first graph of a block is what stands left of its attention, the second what stands right of it. Attention
has no weights, and the same graph in all blocks; for a few tokens it is computed without a graph, see `attention.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tfgptj.config import GPTJConfig
from tfgptj.litert.graph import Graph, Tensor
from tfgptj.litert.quantization import Matrix

# Activations that are an operator of the graph, and whether it is GELU by the hyperbolic tangent. Others are computed
# between the graphs.
GELUS = {
    **dict.fromkeys(("gelu_new", "gelu_accurate", "gelu_fast", "gelu_python_tanh", "gelu_pytorch_tanh"), True),
    **dict.fromkeys(("gelu", "gelu_python"), False),
}

# The weights of a block, as the plan of a checkpoint calls them.
WEIGHTS = (
    *("ln_1.gamma", "ln_1.beta", "attn.q_proj.kernel", "attn.k_proj.kernel", "attn.v_proj.kernel"),
    *("mlp.fc_in.kernel", "mlp.fc_in.bias", "attn.out_proj.kernel", "mlp.fc_out.kernel", "mlp.fc_out.bias"),
)

Weights = Mapping[str, np.ndarray]
Matrices = Mapping[str, Matrix]


def inner_graph(config: GPTJConfig, matrices: Matrices, vectors: Weights) -> tuple[Graph, list[Tensor]]:
    """Of x [rows, D] the queries, keys and values in one [rows, 3 D], and the feed-forward layer's middle [rows, F].

    Args:
        config: of the model.
        matrices: `qkv` [3 D, D] and `fc_in` [F, D].
        vectors: `ln_1.gamma`, `ln_1.beta` [D] and `mlp.fc_in.bias` [F].
    """
    graph = Graph()
    x = graph.input("x", -1, config.n_embd)
    x = graph.normalised(x, vectors["ln_1.gamma"], vectors["ln_1.beta"], config.layer_norm_epsilon)
    projected = graph.product("qkv", x, matrices["qkv"])
    middle = graph.product("fc_in", x, matrices["fc_in"], vectors["mlp.fc_in.bias"])
    if config.activation_function in GELUS:
        middle = graph.gelu(middle, GELUS[config.activation_function])
    return graph, [projected, middle]


def outer_graph(config: GPTJConfig, matrices: Matrices, vectors: Weights) -> tuple[Graph, list[Tensor]]:
    """Of x [rows, D], the mixed values [rows, D] and the middle [rows, F] the block's output [rows, D].

    Args:
        config: of the model.
        matrices: `out_proj` [D, D] and `fc_out` [D, F].
        vectors: `mlp.fc_out.bias` [D].
    """
    graph = Graph()
    x, mixed = graph.input("x", -1, config.n_embd), graph.input("mixed", -1, config.n_embd)
    middle = graph.input("middle", -1, config.inner_dim)
    attended = graph.product("out_proj", mixed, matrices["out_proj"])
    fed = graph.product("fc_out", middle, matrices["fc_out"], vectors["mlp.fc_out.bias"])
    return graph, [graph.add(graph.add(x, attended), fed)]


def head_graph(config: GPTJConfig, matrix: Matrix, bias: np.ndarray) -> tuple[Graph, list[Tensor]]:
    """Of last hidden states [rows, D] the logits [rows, V]; the matrix is [V, D]."""
    graph = Graph()
    return graph, [graph.product("head", graph.input("x", -1, config.n_embd), matrix, bias)]


def attention_graph(config: GPTJConfig) -> tuple[Graph, list[Tensor]]:
    """Of queries [B, N, T, H], keys and values [B, N, S, H], and what is added to the scores, [B, 1, T, S]:
    the mixed values [B, N, T, H]. Queries are scaled already."""
    graph, heads, width = Graph(), config.n_head, config.head_dim
    query = graph.input("query", -1, heads, -1, width)
    key, value = graph.input("key", -1, heads, -1, width), graph.input("value", -1, heads, -1, width)
    scores = graph.add(graph.scores(query, key), graph.input("mask", -1, 1, -1, -1))
    return graph, [graph.mixed(graph.softmax(scores), value)]
