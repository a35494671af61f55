"""Attention that never has the scores of more than one head: for training in little memory, on TensorFlow.

Automatic differentiation holds six or more matrices [B, N, T, T] at once, 64 MiB each in float32 for 16 heads and 1,024
tokens. Here the heads are taken in turn, and the backward pass computes the weights again instead of keeping them.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", for a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tfgptj.in_turn import in_turn


class _Heads(NamedTuple):
    """What the heads of all rows have in common."""

    query: Any  # float [B N, T, H], and so on
    key: Any
    value: Any
    mask: Any  # bool [B or 1, T, S]
    count: Any  # heads of a row
    scale: float
    masked: float


def mixed_by_heads(query: Any, key: Any, value: Any, mask: Any, scale: float, masked: float) -> Any:
    """Softmax of the scores, times the values.

    Args:
        query, key, value: float [B, N, T, H].
        mask: bool [B or 1, 1, T, T].
        scale: factor of the scores.
        masked: a score for what must not be seen.

    Returns:
        float [B, N, T, H], of the values' dtype; scores and softmax are float32 in between.
    """
    import tensorflow as tf

    mask = tf.squeeze(mask, 1)

    @tf.custom_gradient
    def mixed(query: Any, key: Any, value: Any) -> Any:
        shape = tf.shape(query)
        heads = _Heads(_rows(query), _rows(key), _rows(value), mask, shape[1], scale, masked)
        mix = lambda i: [tf.matmul(tf.cast(_weights(heads, i), value.dtype), heads.value[i])]  # noqa: E731
        [result] = in_turn(mix, [heads.value])

        def gradient(upstream: Any) -> Any:
            upstream = _rows(upstream)
            found = in_turn(lambda i: _gradients(heads, i, upstream[i]), [*heads[:3]])
            return [tf.reshape(x, shape) for x in found]

        return tf.reshape(result, shape), gradient

    return mixed(query, key, value)


def _rows(x: Any) -> Any:
    """[B, N, T, H] → [B N, T, H]."""
    import tensorflow as tf

    return tf.reshape(x, (-1, tf.shape(x)[2] if x.shape[2] is None else x.shape[2], x.shape[3]))


def _weights(heads: _Heads, i: Any) -> Any:
    """A head's attention weights, float32 [T, T]."""
    import tensorflow as tf

    query = tf.cast(heads.query[i], "float32") * heads.scale
    scores = tf.matmul(query, tf.cast(heads.key[i], "float32"), transpose_b=True)
    return tf.nn.softmax(tf.where(_mask(heads, i), scores, heads.masked))


def _mask(heads: _Heads, i: Any) -> Any:
    """A head's mask, bool [T, T]."""
    import tensorflow as tf

    return heads.mask[tf.minimum(i // heads.count, tf.shape(heads.mask)[0] - 1)]


def _gradients(heads: _Heads, i: Any, upstream: Any) -> list[Any]:
    """Of a head's query, key and value, each [T, H]."""
    import tensorflow as tf

    weights, value = _weights(heads, i), heads.value[i]
    dvalue = tf.matmul(tf.cast(weights, value.dtype), upstream, transpose_a=True)
    slopes = tf.cast(tf.matmul(upstream, value, transpose_b=True), "float32")
    slopes = weights * (slopes - tf.reduce_sum(slopes * weights, -1, keepdims=True))
    slopes = tf.where(_mask(heads, i), slopes, 0.0)  # where nothing may be seen, weights are not 0
    query, key = (tf.cast(x[i], "float32") for x in (heads.query, heads.key))
    dquery = tf.matmul(slopes, key) * heads.scale
    dkey = tf.matmul(slopes, query * heads.scale, transpose_a=True)
    return [tf.cast(dquery, heads.query.dtype), tf.cast(dkey, heads.key.dtype), dvalue]
