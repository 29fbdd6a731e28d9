"""The order of an epoch: a permutation of any size, made place by place, that looks drawn by lot.

Statistical bounds are five standard deviations; the draws are fixed, so a test that passes does so
always.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert.data import randomness
from minibert.data.randomness import hashed, permuted

PUBMED = 36_000_000  # documents


def order(size: int, epoch: int, seed: int = 0) -> np.ndarray:
    """(size,) a whole epoch."""
    return permuted(np.arange(size), size, np.repeat(hashed(seed, epoch), size))


def orders(size: int, epochs: int) -> np.ndarray:
    """(epochs, size) many epochs at once."""
    places = np.tile(np.arange(size), epochs)
    return permuted(places, size, np.repeat(hashed(0, np.arange(epochs)), size)).reshape(-1, size)


def taken_back(found: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """The places that a permutation takes to `found`: its steps in Python, the other way round."""
    width = math.isqrt(size - 1) + 1
    height = -(-size // width)
    places = []
    for place, one_key in zip(found.tolist(), key.tolist(), strict=True):
        while True:
            left, right = divmod(place, height)
            for number in reversed(range(randomness.ROUNDS)):
                digit = left if number % 2 else right
                draw = int(hashed(one_key, digit + (number << 32))[0]) >> 32
                if number % 2:
                    right = (right - draw) % height
                else:
                    left = (left - draw) % width
            place = left * height + right
            if place < size:
                break
        places.append(place)
    return np.array(places)


@settings(deadline=None)
@given(
    size=st.integers(1, 5_000),
    seed=st.integers(0, 1 << 70),
    epoch=st.integers(0, 1 << 62),
)
def test_an_order_is_a_permutation(size, seed, epoch):
    assert np.array_equal(np.sort(order(size, epoch, seed)), np.arange(size))


@pytest.mark.parametrize("size", [*range(1, 70), 4_095, 4_096, 4_097, 16_383, 16_385])
def test_sizes_around_squares_and_powers_of_two(size):
    assert np.array_equal(np.sort(order(size, epoch=3)), np.arange(size))


@given(data=st.data(), size=st.integers(1, 300))
def test_a_place_alone_is_taken_where_it_is_taken_among_others(data, size):
    """Whatever stands beside it, also places of other epochs."""
    some = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, size - 1)), max_size=9))
    epochs, places = np.array(some, dtype=np.int64).reshape(-1, 2).T
    found = permuted(places, size, hashed(0, epochs))
    whole = [order(size, epoch) for epoch in range(3)]
    assert found.dtype == np.int64
    assert found.tolist() == [whole[epoch][place] for epoch, place in some]


@pytest.mark.parametrize("size", [PUBMED, PUBMED + 1, 6_000**2, 2**31 + 11, 2**62])
def test_large_sizes_can_be_taken_back(size):
    """What has an inverse is a permutation."""
    places = np.concatenate([[0, size - 1], np.random.default_rng(0).integers(0, size, 100)])
    key = hashed(5, np.arange(len(places)))
    found = permuted(places, size, key)
    assert found.min() >= 0 and found.max() < size
    assert np.array_equal(taken_back(found, size, key), places)


@pytest.mark.slow
def test_all_of_pubmed_is_permuted():
    seen = np.zeros(PUBMED, dtype=bool)
    for first in range(0, PUBMED, 1_000_000):
        places = np.arange(first, first + 1_000_000)
        seen[permuted(places, PUBMED, np.repeat(hashed(0, 7), len(places)))] = True
    assert seen.all()


# It looks as if drawn by lot.


def deviation(counts: np.ndarray, expected: float, freedom: int) -> float:
    """Pearson's chi-square of counts, in standard deviations from what chance would give."""
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return (chi_square - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_permutation_of_a_few_is_as_likely(size):
    epochs = 20_000
    numbers = orders(size, epochs) @ size ** np.arange(size)
    _, counts = np.unique(numbers, return_counts=True)
    assert len(counts) == math.factorial(size)
    assert abs(deviation(counts, epochs / len(counts), len(counts) - 1)) < 5


@pytest.mark.parametrize("size", [7, 43])
def test_every_document_is_at_every_place_as_often(size):
    epochs = 8_000
    found = orders(size, epochs)
    counts = np.array([np.bincount(column, minlength=size) for column in found.T])
    assert abs(deviation(counts, epochs / size, (size - 1) ** 2)) < 5


@pytest.mark.parametrize("distance", [1, 2, 7])
def test_who_follows_whom_is_as_likely(distance):
    size, epochs = 23, 1_000
    found = orders(size, epochs)
    pairs = found * size + np.roll(found, -distance, axis=1)
    counts = np.bincount(pairs.reshape(-1), minlength=size * size).reshape(size, size)
    assert (np.diag(counts) == 0).all()
    others = counts[~np.eye(size, dtype=bool)]
    assert abs(deviation(others, epochs / (size - 1), size * (size - 3) + 1)) < 5


def test_neighbours_are_not_kept_together():
    """Of two documents side by side two an epoch stay side by side, by chance (Poisson)."""
    epochs, together = 60, 0
    for epoch in range(epochs):
        together += int((np.abs(np.diff(order(9_973, epoch))) == 1).sum())
    assert abs(together - 2 * epochs) < 5 * math.sqrt(2 * epochs)


def test_blocks_are_scattered():
    """Of 58,147 documents each 1/19 of an epoch has as many of each 1/23 of the corpus."""
    size = 58_147
    where, what = np.arange(size) * 19 // size, order(size, epoch=0) * 23 // size
    counts = np.bincount(where * 23 + what, minlength=19 * 23)
    assert abs(deviation(counts, size / (19 * 23), 18 * 22)) < 5


def test_epochs_and_seeds_have_nothing_in_common():
    size = 9_973
    one = order(size, epoch=0)
    for other in (np.arange(size), order(size, epoch=1), order(size, epoch=0, seed=1)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(size)
        assert (one == other).sum() < 9  # on average once
        distances = np.bincount((one - other) % size, minlength=size)
        assert distances.max() < 12  # none is the other, turned


# The hash.


def test_the_hash_is_splitmix64():
    """The first numbers of the published generator, begun at 1234567 and at 0."""
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip
    assert hashed(1234567, np.arange(5)).tolist() == published
    assert hashed(0, 0).tolist() == [0xE220A8397B1DCDAF]


@given(numbers=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=5))
def test_a_hash_of_many_numbers_is_one_of_the_next_after_another(numbers):
    key, *others = numbers
    expected = key
    for number in others:
        expected = int(hashed(expected, number)[0])
    assert hashed(key, *others).tolist() == [expected]
    arrays = [np.array([number] * 3, dtype=np.uint64) for number in numbers]
    assert hashed(*arrays).tolist() == [expected] * 3


@pytest.mark.parametrize("which", range(4))
def test_every_bit_of_every_number_counts(which):
    """One bit flipped flips half of the hash's bits, and each of them as often (avalanche)."""
    numbers = list(np.random.default_rng(0).integers(0, 2**40, (4, 1_000)))
    before = hashed(*numbers)
    for bit in range(40):
        changed = list(numbers)
        changed[which] = numbers[which] ^ (1 << bit)
        flipped = before ^ hashed(*changed)
        by_bit = (flipped[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).sum(axis=0)
        assert (np.abs(by_bit.astype(int) - 500) < 6 * math.sqrt(250)).all()
