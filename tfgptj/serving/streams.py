"""NumPy's random numbers within a TensorFlow graph: what `generate(seed=...)` draws with, bit for bit.

`np.random.default_rng` spreads a seed over 128 bits by hashing and steps through them with PCG64, a linear congruential
generator: state · M + increment modulo 2^128. After n steps it is Mⁿ · state + (1 + M + … + Mⁿ⁻¹) · increment, so that
all numbers of a stream are computed at once.

Source: O'Neill 2014, "PCG: A Family of Simple Fast Space-Efficient Statistically Good Algorithms for Random Number
Generation", section 6.3 (XSL RR); numpy/random/bit_generator.pyx, `SeedSequence`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

MULTIPLIER = 2549297995355413924 << 64 | 4865540595714422341  # of PCG64 (M)
POOL, XSHIFT = 4, 16  # words of a seed's entropy; bits
WORD, LONG, WIDE = 2**32, 2**64, 2**128

Pair: TypeAlias = tuple[Any, Any]  # the high and the low 64 bits of a number, uint64


def random_rows(seeds: Any, count: Any, most: int) -> Any:
    """Random numbers as :func:`tfgptj.generation.prompts.random_rows` draws them for the one row of each seed.

    Args:
        seeds: int64 [B], at least 0.
        count: int32 scalar (M), at most `most`.
        most: what tables are made for.

    Returns:
        float32 [B, M] in [0, 1).
    """
    state, increment = _start(_pool(seeds))  # [B, 1]
    powers, sums = _tables(-(-most // 2))  # [1, most / 2]
    needed = (count + 1) // 2  # of 64 bits each is two numbers
    powers, sums = ((high[:, :needed], low[:, :needed]) for high, low in (powers, sums))
    high, low = _add(_multiply(state, powers), _multiply(increment, sums))  # [B, M / 2]
    bits = _rotated(high ^ low, _shifted(high, 58))
    halves = tf.stack([_low(bits), _shifted(bits, 32)], axis=2)  # [B, M / 2, 2]
    numbers = tf.reshape(tf.cast(_shifted(halves, 8), "float32") * 2.0**-24, (-1, 2 * needed))
    return numbers[:, :count]


def _pool(seeds: Any) -> list[Any]:
    """`SeedSequence(seed, spawn_key=(0,))`, which `spawn` gives to the first row: four words, uint32 [B] each."""
    seeds = tf.cast(seeds, "uint64")
    words = [tf.cast(_low(seeds), "uint32"), tf.cast(_shifted(seeds, 32), "uint32")]
    words += [tf.zeros_like(words[0])] * 3  # seeds are filled up to a pool; then the number of the row
    constant = 0x43B0D7E5

    def hashed(word: Any) -> Any:
        nonlocal constant
        before, constant = constant, constant * 0x931E8875 % WORD
        return _folded((word ^ _word(before)) * _word(constant))

    def mixed(word: Any, other: Any) -> Any:
        return _folded(_word(0xCA01F9DD) * word - _word(0x4973F715) * hashed(other))

    pool = [hashed(word) for word in words[:POOL]]
    for source in range(POOL):
        for i in (i for i in range(POOL) if i != source):
            pool[i] = mixed(pool[i], pool[source])
    return [mixed(word, words[POOL]) for word in pool]


def _start(pool: list[Any]) -> tuple[Pair, Pair]:
    """State and increment of PCG64, uint64 [B, 1] each."""
    constant, longs = 0x8B51F9DD, []
    words: list[Any] = []
    for i in range(8):
        before, constant = constant, constant * 0x58F38DED % WORD
        words.append(tf.cast(_folded((pool[i % POOL] ^ _word(before)) * _word(constant)), "uint64")[:, None])
    for i in range(4):
        longs.append(words[2 * i] | tf.bitwise.left_shift(words[2 * i + 1], _long(32)))
    one = _long(1)
    increment = (
        tf.bitwise.left_shift(longs[2], one) | _shifted(longs[3], 63),
        tf.bitwise.left_shift(longs[3], one) | one,
    )
    multiplier = (_long(MULTIPLIER >> 64), _long(MULTIPLIER % LONG))
    state = _add(_multiply(_add((longs[0], longs[1]), increment), multiplier), increment)
    return state, increment


def _tables(count: int) -> tuple[Pair, Pair]:
    """Mⁿ and 1 + M + … + Mⁿ⁻¹ for n = 1, 2, …, uint64 [1, count] each."""
    powers, sums = [MULTIPLIER], [1]
    for _ in range(count - 1):
        sums.append((sums[-1] + powers[-1]) % WIDE)
        powers.append(powers[-1] * MULTIPLIER % WIDE)

    def split(numbers: list[int]) -> Pair:
        parts = [[x >> 64 for x in numbers], [x % LONG for x in numbers]]
        return tuple(tf.constant(np.array([part], "uint64")) for part in parts)

    return split(powers), split(sums)


def _multiply(a: Pair, b: Pair) -> Pair:
    """The product modulo 2^128."""
    high = _high_product(a[1], b[1]) + a[0] * b[1] + a[1] * b[0]
    return high, a[1] * b[1]


def _add(a: Pair, b: Pair) -> Pair:
    """The sum modulo 2^128."""
    low = a[1] + b[1]
    return a[0] + b[0] + tf.cast(low < a[1], "uint64"), low


def _high_product(a: Any, b: Any) -> Any:
    """The high 64 bits of a product of two 64-bit numbers, from those of their halves."""
    a_high, a_low, b_high, b_low = _shifted(a, 32), _low(a), _shifted(b, 32), _low(b)
    cross = a_high * b_low + _shifted(a_low * b_low, 32)
    other = a_low * b_high + _low(cross)
    return a_high * b_high + _shifted(cross, 32) + _shifted(other, 32)


def _rotated(x: Any, by: Any) -> Any:
    """Bits turned to the right by 0…63 places."""
    back = (_long(64) - by) & _long(63)
    return tf.bitwise.right_shift(x, by) | tf.bitwise.left_shift(x, back)


def _folded(word: Any) -> Any:
    return word ^ tf.bitwise.right_shift(word, _word(XSHIFT))


def _shifted(x: Any, places: int) -> Any:
    return tf.bitwise.right_shift(x, _long(places))


def _low(x: Any) -> Any:
    return x & _long(WORD - 1)


def _word(value: int) -> Any:
    return tf.constant(value, "uint32")


def _long(value: int) -> Any:
    return tf.constant(value, "uint64")
