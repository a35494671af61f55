"""The graphs that a GPT-J is cut into, at its attentions: what stands between two of them, and the head.

    attention ─ out_proj ─ + ─┬────────────────────────────── + ─ …
                              └─ ln_1 ─┬─ fc_in ─ gelu ─ fc_out
                                       └─ q, k, v ─ attention ─ …

The first graph has no attention in front of it, the last one ln_f behind it. Attention has no weights, and the same
graph in all blocks; for a few tokens it is computed without a graph, see `attention.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

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

Shapes = tuple[tuple[int, ...], ...]


class Block(NamedTuple):
    """The weights of a block, in the form that graphs take them in."""

    matrices: Mapping[str, Matrix]  # `qkv` [3 D, D], `fc_in` [F, D], `out_proj` [D, D] and `fc_out` [D, F]
    vectors: Mapping[str, np.ndarray]  # `ln_1.gamma`, `ln_1.beta`, `mlp.fc_in.bias` and `mlp.fc_out.bias`


def segment_graph(config: GPTJConfig, before: Block | None, after: Block | None) -> tuple[Graph, list[Tensor]]:
    """What stands between the attention of a block and that of the next one.

    It takes x [rows, D] and, behind an attention, its mixed values [rows, D]. It gives the queries, keys and values in
    one [rows, 3 D], what to go on with as x, and the next block's input [rows, D]. Where the activation is no operator
    the feed-forward layer is cut too: a segment gives its middle [rows, F] behind x, and takes it behind the mixed
    values. The last segment gives x alone.

    Args:
        config: of the model.
        before: of the block whose attention stands before; None in the first graph.
        after: of the block whose attention comes next; None in the last graph.
    """
    graph, is_cut = Graph(), config.activation_function not in GELUS
    x = graph.input("x", -1, config.n_embd)
    if before is not None:
        mixed = graph.input("mixed", -1, config.n_embd)
        x = graph.add(x, graph.product("out_proj", mixed, before.matrices["out_proj"]))
        if is_cut:
            x = graph.add(x, fed(graph, graph.input("middle", -1, config.inner_dim), before))
    if after is None:
        return graph, [x]
    projected, middle = entered(graph, x, config, after)
    if is_cut:
        return graph, [projected, x, middle]
    middle = graph.gelu(middle, GELUS[config.activation_function])
    return graph, [projected, graph.add(x, fed(graph, middle, after)), x]


def entered(graph: Graph, x: Tensor, config: GPTJConfig, block: Block) -> tuple[Tensor, Tensor]:
    """Of a block's input [rows, D] its queries, keys and values [rows, 3 D], and its middle before the activation."""
    matrices, vectors = block
    normal = graph.normalised(x, vectors["ln_1.gamma"], vectors["ln_1.beta"], config.layer_norm_epsilon)
    projected = graph.product("qkv", normal, matrices["qkv"])
    return projected, graph.product("fc_in", normal, matrices["fc_in"], vectors["mlp.fc_in.bias"])


def fed(graph: Graph, middle: Tensor, block: Block) -> Tensor:
    """Of a block's middle [rows, F] what its feed-forward layer gives [rows, D]."""
    return graph.product("fc_out", middle, block.matrices["fc_out"], block.vectors["mlp.fc_out.bias"])


def segment_shapes(config: GPTJConfig) -> list[tuple[Shapes, Shapes]]:
    """What each segment takes and gives."""
    x, projected, middle = (-1, config.n_embd), (-1, 3 * config.n_embd), (-1, config.inner_dim)
    taken: Shapes = (x, x)
    given: Shapes = (projected, x, x)
    if config.activation_function not in GELUS:
        taken, given = (x, x, middle), (projected, x, middle)
    takes: list[Shapes] = [(x,), *[taken] * config.n_layer]
    gives: list[Shapes] = [*[given] * config.n_layer, (x,)]
    return list(zip(takes, gives, strict=True))


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
