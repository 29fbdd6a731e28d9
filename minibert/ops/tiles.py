"""What fused operations share: sizes of tiles, precision of sums, softmax, the Triton twins."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

KERNELS = True  # False: PyTorch alone, also on a GPU
IN_CACHE = 2**18  # elements that element-wise work goes over at once: 1 MB in float32
ON_GPU = 2**26  # elements of a tile on a GPU: large, for there each launch of a kernel costs
LN2 = math.log(2)


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The Triton twins, for a tensor on a GPU where Triton is installed and `KERNELS` allows."""
    if not (KERNELS and tensor.is_cuda and _has_triton()) or tensor.dtype == torch.float64:
        return None
    from minibert.ops import kernels

    return kernels


@cache
def _has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def tiles(num_rows: int, row_size: int, elements: int) -> Iterator[slice]:
    """All rows in order, in slices of at most `elements` elements, one row at least."""
    rows_at_once = max(1, elements // max(1, row_size))
    for first in range(0, num_rows, rows_at_once):
        yield slice(first, min(first + rows_at_once, num_rows))


def at_once(tensor: Tensor, elements: int) -> int:
    """Elements of a tile: `elements` on a CPU, `ON_GPU` on a GPU."""
    return ON_GPU if tensor.is_cuda else elements


def in_cache(tensor: Tensor, times: int = 1) -> int:
    """Elements of a tile for element-wise work: so many `IN_CACHE` on a CPU."""
    return at_once(tensor, times * IN_CACHE)


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream, a scalar, multiplied in upstream's dtype and then rounded.

    An upstream rounded to bfloat16 first, as torch does with a scalar, would put every element off
    by the same, up to 0.4 %: so it is a vector of one here.
    """
    return torch.mul(gradient, upstream.reshape(1), out=torch.empty_like(gradient))


def precise(tensor: Tensor) -> Tensor:
    """As sums and exponentials need it: half precisions become float32."""
    return tensor.to(precise_dtype(tensor))


def precise_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def log2_softmax(scores: Tensor, out: Tensor | None = None) -> Tensor:
    """Logarithms of softmax(scores) to the base 2; out: where to, `scores` itself for instance.

    So that `exp2` gives the probabilities: torch leaves `exp` to MKL on a CPU, which takes more
    than twice as long on AMD's. What the change of base rounds is in logarithms and probabilities
    alike.
    """
    return torch.log_softmax(scores, -1, out=out).mul_(1 / LN2)


@contextmanager
def factors_of(dtype: torch.dtype) -> Iterator[None]:
    """Products of float32 matrices on a CPU whose elements are numbers of `dtype`.

    Of bfloat16 numbers a CPU's matrix units make such products, with float32 sums, where oneDNN may
    round the factors to bfloat16: here that changes nothing.
    """
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
