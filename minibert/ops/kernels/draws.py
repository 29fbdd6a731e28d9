"""Dropout without a mask in memory: which elements stay is a hash, formed anew where it is needed.

A row of elements (of a map, of hidden states) has two keys of 32 bits, mixed from its number and a
seed; each element's bits are its column mixed into these. Backward mixes the same bits again.
"""

import torch
import triton
import triton.language as tl

DRAWS = 2**32


@triton.jit
def _mixed(bits):
    """A permutation of the numbers of 32 bits: each bit of the result depends on all that came in.

    Multipliers and shifts: Wellons, "Prospecting for hash functions", 2018 (lowbias32).
    """
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def keys_of_rows(seed, rows):
    """Two keys of 32 bits for each row; seed is a number of 64 bits."""
    first = _mixed(rows.to(tl.uint32) ^ seed.to(tl.uint32))
    return first, _mixed(first ^ (seed >> 32).to(tl.uint32))


@triton.jit
def kept(first_key, second_key, columns, dropped):
    """Whether elements stay: `dropped` (of 2^32) do not.

    The mixer once more, as far as its upper bits go, with the second key between its halves.
    """
    bits = (columns.to(tl.uint32) ^ first_key) * 0x7FEB352D
    bits = ((bits ^ (bits >> 15)) ^ second_key) * 0x846CA68B
    return bits >= dropped


def draw_seed() -> int:
    """A seed by torch's generator for the CPU: no launch, and nothing waits.

    It is always longer than 32 bits, for Triton compiles anew for numbers of another size.
    """
    return int(torch.randint(2**32, 2**63 - 1, ()))


def dropped_draws(probability: float) -> tuple[int, float]:
    """How many of DRAWS draws are dropped, and the factor for those that stay."""
    dropped = min(round(probability * DRAWS), DRAWS - 1)
    return dropped, DRAWS / (DRAWS - dropped)
