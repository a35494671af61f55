"""Cross-entropy over a large vocabulary without its logits: chunk by chunk, the gradient along with the loss.

The logits of a batch are many times its hidden states: 6.6 GB in float32 for 16 rows of 2048 tokens of GPT-J, and
automatic differentiation keeps them two or three times. Here the tokens that count are taken in chunks. Each chunk's
logits are turned into their own gradient, softmax - one-hot, and multiplied with hidden states and kernel at once, so
that nothing of a chunk outlives it and nothing is computed twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
from keras import ops, tree

from tfgptj.losses import IGNORE_INDEX, Smoothing

# Logits of a chunk: 128 MiB in float32, 665 tokens of GPT-J's vocabulary; a quarter of it where no wide kernel is
# trained, and so no gradient of its size is added up for each chunk.
CHUNK = 2**25
_WIDE = 256


class Product(NamedTuple):
    """One of the products whose sum, with a bias, the logits are."""

    x: Any  # float [N, D]
    kernel: Any  # float [D, V], or [V, D] where transposed
    transposed: bool = False
    trained: bool = True  # whether the kernel's gradient is wanted


class _Task(NamedTuple):
    """What the chunks have in common."""

    kernels: tuple[Any, ...]
    bias: Any  # float [V]
    transposed: tuple[bool, ...]
    trained: tuple[bool, ...]  # of each kernel, and last of the bias
    smoothing: Smoothing
    with_hits: bool
    with_gradients: bool


def fused_cross_entropy(
    products: list[Product],
    bias: Any,
    labels: Any,
    weights: Any,
    smoothing: Smoothing = Smoothing(),
    *,
    trained_bias: bool = True,
    with_hits: bool = False,
    with_gradients: bool = True,
    chunk: int | None = None,
) -> Any:
    """Sums over tokens, of which the first is a loss that gradients flow through.

    Args:
        products: what makes the logits, with the bias.
        bias: float [V].
        labels: int32 [N]; -100 does not count.
        weights: float32 [N], of each token's loss.
        smoothing: label smoothing and z-loss.
        trained_bias: whether the bias's gradient is wanted.
        with_hits: whether to count the tokens whose label has the highest logit.
        with_gradients: whether gradients are wanted at all.
        chunk: logits that may be held at a time; None is CHUNK, or less.

    Returns:
        float32 [3]: the weighted losses' sum; the cross-entropies' sum, without weights and smoothing; the hits.
    """
    flags = tuple(p.transposed for p in products), (*(p.trained for p in products), trained_bias)
    count, is_wide = len(products), any(p.trained and p.x.shape[-1] >= _WIDE for p in products)

    def sums(labels: Any, weights: Any, bias: Any, *tensors: Any) -> Any:
        xs = tensors[:count]
        kernels = tuple(ops.cast(kernel, x.dtype) for x, kernel in zip(xs, tensors[count:], strict=True))
        task = _Task(kernels, bias, *flags, smoothing, with_hits, with_gradients)
        return _over_chunks(task, xs, labels, weights, chunk or (CHUNK if is_wide else CHUNK // 4))

    def sums_and_gradient(*args: Any) -> Any:
        result, (dxs, dkernels, dbias) = sums(*args)

        def gradient(*upstreams: Any, upstream: Any = None) -> Any:
            scale = (upstreams[0] if upstream is None else upstream)[0]
            scaled = [None if d is None else d * ops.cast(scale, d.dtype) for d in (dbias, *dxs, *dkernels)]
            dtypes = [t.dtype for t in args[2:]]
            return None, None, *(d if d is None else ops.cast(d, t) for d, t in zip(scaled, dtypes, strict=True))

        return result, gradient

    # The casts change nothing: they make tensors of variables, which TensorFlow wants here.
    tensors = [ops.cast(t, t.dtype) for t in (bias, *(p.x for p in products), *(p.kernel for p in products))]
    args = (ops.convert_to_tensor(labels), ops.stop_gradient(ops.convert_to_tensor(weights)), *tensors)
    return ops.custom_gradient(sums_and_gradient)(*args) if with_gradients else sums(*args)[0]


def _over_chunks(task: _Task, xs: tuple[Any, ...], labels: Any, weights: Any, chunk: int) -> Any:
    """The sums [3], and the gradients of inputs, kernels and bias; None where they are not wanted."""
    tokens, most = ops.shape(labels)[0], max(1, chunk // task.bias.shape[0])
    chunks = -(-tokens // most)
    if isinstance(chunks, int) and chunks <= 1:
        return _chunk(task, xs, labels, weights)
    if not isinstance(chunks, int):
        chunks = ops.maximum(chunks, 1)
    size = -(-tokens // chunks)  # chunks of one size; the last is filled up with tokens that do not count
    order = ops.argsort(ops.cast(labels == IGNORE_INDEX, "int32"))  # what counts comes first
    places = ops.arange(chunks * size)
    filled = ops.take(order, ops.where(places < tokens, places, 0))
    labels = ops.where(places < tokens, ops.take(labels, filled), IGNORE_INDEX)
    rows = [ops.reshape(ops.take(x, filled, axis=0), (chunks, size, x.shape[1])) for x in xs]
    labels, weights = (ops.reshape(t, (chunks, size)) for t in (labels, ops.take(weights, filled)))
    sums, (dxs, *dtask) = _loop(task, rows, labels, weights)
    back = ops.argsort(order)
    dxs = [dx if dx is None else ops.take(ops.reshape(dx, (-1, dx.shape[2])), back, axis=0) for dx in dxs]
    return sums, (dxs, *dtask)


def _loop(task: _Task, rows: list[Any], labels: Any, weights: Any) -> Any:
    """As :func:`_chunk`, for inputs [chunks, size, D]; chunks in which nothing counts are left out."""
    size = ops.shape(labels)[1]
    used = (ops.sum(ops.cast(labels != IGNORE_INDEX, "int32")) + size - 1) // ops.maximum(size, 1)

    def at(i: Any) -> Any:
        return _chunk(task, [x[i] for x in rows], labels[i], weights[i])

    # The first chunk stands before the loop, so that a single one is not added to zeros.
    sums, (dxs, dkernels, dbias) = at(0)
    if not task.with_gradients:
        sums = _in_turn(lambda i, _: i < used, lambda i, sums: (i + 1, sums + at(i)[0]), (1, sums))[1]
        return sums, (dxs, dkernels, dbias)
    places = [ops.scatter_update(ops.zeros_like(x), [[0]], dx[None]) for x, dx in zip(rows, dxs, strict=True)]
    wanted = [d for d in (*dkernels, dbias) if d is not None]

    def body(i: Any, sums: Any, places: Any, wanted: Any) -> Any:
        more, (dxs, dkernels, dbias) = at(i)
        row, added = ops.reshape(i, (1, 1)), [d for d in (*dkernels, dbias) if d is not None]
        places = [ops.scatter_update(all_dx, row, dx[None]) for all_dx, dx in zip(places, dxs, strict=True)]
        return i + 1, sums + more, places, [a + b for a, b in zip(wanted, added, strict=True)]

    _, sums, places, wanted = _in_turn(lambda i, *_: i < used, body, (1, sums, places, wanted))
    left = iter(wanted)
    dkernels, dbias = [d if d is None else next(left) for d in dkernels], None if dbias is None else next(left)
    return sums, (places, dkernels, dbias)


def _in_turn(condition: Any, body: Any, state: Any) -> Any:
    """`ops.while_loop`, of which no turn begins before the last one, and what made the state, has ended."""
    if keras.backend.backend() != "tensorflow":
        return ops.while_loop(condition, body, state)
    import tensorflow as tf

    state = tree.map_structure(tf.convert_to_tensor, state)
    with tf.control_dependencies(tree.flatten(state)):
        state = tree.map_structure(tf.identity, state)
    return tf.while_loop(condition, body, state, parallel_iterations=1)


def _chunk(task: _Task, xs: Any, labels: Any, weights: Any) -> Any:
    """One chunk's sums, and its gradients for a loss that is the sum."""
    counts = labels != IGNORE_INDEX
    labels, weights = ops.where(counts, labels, 0), ops.where(counts, weights, 0.0)
    logits = ops.cast(task.bias, "float32") + sum(
        ops.cast(ops.einsum("ND,VD->NV" if transposed else "ND,DV->NV", x, kernel), "float32")
        for x, kernel, transposed in zip(xs, task.kernels, task.transposed, strict=True)
    )  # [N, V]
    shares = ops.softmax(logits, axis=-1)
    # The largest share is never rounded to 0, so that this is finite; on the CPU it is faster than a sum of powers.
    log_total = ops.max(logits, axis=-1) - ops.log(ops.max(shares, axis=-1))  # [N]
    nats = log_total - _at(logits, labels)
    losses = task.smoothing.applied(nats, log_total, logits)
    hits = ops.cast(ops.argmax(logits, axis=-1) == labels, "float32") if task.with_hits else ops.zeros_like(nats)
    kept = ops.cast(counts, "float32")
    sums = ops.stack([ops.sum(losses * weights), ops.sum(nats * kept), ops.sum(hits * kept)])
    if not task.with_gradients:
        return sums, ([None] * len(xs), [None] * len(xs), None)
    return sums, _gradients(task, xs, _slopes(task.smoothing, shares, log_total, labels), weights)


def _at(x: Any, labels: Any) -> Any:
    """x [N, V] at each row's label, [N]."""
    return ops.take_along_axis(x, labels[:, None], axis=-1)[:, 0]


def _slopes(smoothing: Smoothing, shares: Any, log_total: Any, labels: Any) -> Any:
    """The gradient of each loss by the logits, [N, V]: softmax - one-hot, and what the smoothing adds."""
    smooth, z = smoothing
    if z:
        shares = shares * (1 + 2 * z * log_total)[:, None]
    if smooth:
        shares = shares - smooth / shares.shape[-1]
    places = ops.stack([ops.arange(ops.shape(labels)[0], dtype="int32"), labels], axis=-1)
    return ops.scatter_update(shares, places, _at(shares, labels) - (1 - smooth))


def _gradients(task: _Task, xs: Any, slopes: Any, weights: Any) -> Any:
    """By inputs, kernels and bias. The weights are multiplied with what is narrow, not with the slopes."""
    dbias = ops.einsum("N,NV->V", weights, slopes) if task.trained[-1] else None
    dxs, dkernels = [], []
    for x, kernel, transposed, trained in zip(xs, task.kernels, task.transposed, task.trained[:-1], strict=True):
        narrow = ops.cast(slopes, x.dtype)
        dx = ops.einsum("NV,VD->ND" if transposed else "NV,DV->ND", narrow, kernel)
        dxs.append(ops.cast(ops.cast(dx, "float32") * weights[:, None], x.dtype))
        weighted = ops.cast(ops.cast(x, "float32") * weights[:, None], x.dtype)
        equation = "NV,ND->VD" if transposed else "ND,NV->DV"
        operands = (narrow, weighted) if transposed else (weighted, narrow)
        dkernels.append(ops.cast(ops.einsum(equation, *operands), "float32") if trained else None)
    return dxs, dkernels, dbias
