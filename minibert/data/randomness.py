"""Random numbers without a state: each is a hash of the whole numbers that say what it is for.

(seed, epoch, document, position), say. So any of them can be made alone, in any order, in any
process, and a whole batch of them by a few operations on arrays. Not for secrets.
"""

import math
from functools import reduce

import numpy as np

GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2^64 / 1.618..., odd
ROUNDS = 10  # of the network that permutes; four suffice for large sizes, small ones need more


def hashed(key: np.ndarray | int, *numbers: np.ndarray | int) -> np.ndarray:
    """A 64-bit number for each (key, *numbers); all arrays of one shape, or broadcast to it.

    hashed(key, 0), hashed(key, 1), ... is the generator SplitMix64 begun at `key`: a counter that
    goes up by the golden ratio, then a mixer of all bits (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014; the mixer is Stafford's variant 13 of
    MurmurHash3's). With several numbers each result is the next one's key.

    Whole numbers count modulo 2^64. Returns uint64, of shape (1,) where all numbers are single.
    """
    return reduce(_mixed, map(_as_uint64, numbers), _as_uint64(key))


def _as_uint64(number: np.ndarray | int) -> np.ndarray:
    """An array, not a scalar: those complain where a product wraps around, as it shall."""
    if isinstance(number, int):
        number = np.array([number % (1 << 64)], dtype=np.uint64)
    return number.astype(np.uint64, copy=False)


def _mixed(key: np.ndarray, number: np.ndarray) -> np.ndarray:
    bits = key + (number + 1) * GOLDEN_RATIO
    bits ^= bits >> 30
    bits *= 0xBF58476D1CE4E5B9
    bits ^= bits >> 27
    bits *= 0x94D049BB133111EB
    bits ^= bits >> 31
    return bits


def permuted(places: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where random permutations of 0 ... size - 1 take `places`; a permutation for each key.

    Nothing is shuffled and kept: a place is a number of two digits, left and right, and each
    in turn moves on by a hash of the other (a Feistel network: Luby and Rackoff, "How to construct
    pseudorandom permutations", 1988). It permutes the places of a rectangle hardly larger than
    `size`; who lands outside goes on until he is inside, as on the cycle of any permutation he must
    be at last (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002: both steps).

    Args:
        places: (n,) whole numbers below `size`.
        size: at least 1, at most 2^62.
        key: (n,) uint64.

    Returns (n,) int64.
    """
    found = _moved(places.astype(np.uint64), size, key)
    while (outside := found >= size).any():
        found[outside] = _moved(found[outside], size, key[outside])
    return found.astype(np.int64)


def _moved(places: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """One passage through the network, within the rectangle of width x height >= size places."""
    width = math.isqrt(size - 1) + 1
    height = -(-size // width)
    left, right = np.divmod(places, np.uint64(height))
    for number in range(0, ROUNDS, 2):  # in the upper 32 bits, a digit in the lower ones
        left = (left + (hashed(key, right + (number << 32)) >> 32)) % width
        right = (right + (hashed(key, left + (number + 1 << 32)) >> 32)) % height
    return left * height + right
