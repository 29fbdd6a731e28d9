"""Triton kernels in the ledger: each launch is an operation with counts of its own.

FLOPs are those of the products that a kernel forms, also where it forms one once more, over all S^2
pairs of a head; what fills the last tiles up is not counted. Bytes are as in `counts.py`: those of
each tensor once.

Shapes: B batch, N heads, S sequence, D head size.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from minibert.ledger.counts import Cost, Traffic, size_in_bytes

MODULE = "minibert.ops.kernels"


class Kernel(NamedTuple):
    """What there is to know of a kernel in `kernels.py`."""

    name: str  # in the ledger
    written: tuple[int, ...]  # which of its arguments
    read_too: tuple[int, ...]  # which of those it also reads
    flops: Callable[..., int]


def _map_loss_flops(student_query: Tensor, _: Tensor, teacher_query: Tensor, *__: Any) -> int:
    """The scores of both models."""
    B, N, S, D = student_query.shape
    return 2 * B * N * S * S * (D + teacher_query.shape[-1])


def _map_gradient_flops(student_rows: Tensor, teacher_rows: Tensor, *_: Any) -> int:
    """The scores of both models once more, and one gradient."""
    B, N, S, D = student_rows.shape
    return 2 * B * N * S * S * (2 * D + teacher_rows.shape[-1])


def _no_flops(*_: Any) -> int:
    """No product."""
    return 0


KERNELS = {
    "_map_loss_kernel": Kernel("triton.map_loss", (5, 6, 7), (), _map_loss_flops),
    "_map_gradient_kernel": Kernel("triton.map_gradient", (8,), (), _map_gradient_flops),
    "_cosine_rows_kernel": Kernel("triton.cosine_rows", (2, 4), (), _no_flops),
    "_vocabulary_rows_kernel": Kernel("triton.vocabulary_rows", (0, 5, 6), (0,), _no_flops),
}


@contextmanager
def launches_told(note: Callable[..., None], timed: bool) -> Iterator[None]:
    """In here every launch is passed on to `note` (of a Ledger)."""
    kernels = sys.modules.get(MODULE)  # it is imported where there is a GPU and Triton
    if kernels is None and torch.cuda.is_available() and find_spec("triton"):
        kernels = import_module(MODULE)
    originals = {} if kernels is None else {name: getattr(kernels, name) for name in KERNELS}
    for name, kernel in originals.items():
        setattr(kernels, name, _Told(kernel, KERNELS[name], note, timed))
    try:
        yield
    finally:
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)


class _Told:
    """A kernel that tells of its launches: `kernel[grid](...)`."""

    def __init__(self, kernel: Any, description: Kernel, note: Callable[..., None], timed: bool):
        self.kernel, self.description = kernel, description
        self.note, self.timed = note, timed

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            began = time.perf_counter()
            if not any(isinstance(argument, FakeTensor) for argument in arguments):
                with _disable_current_modes():  # Triton's interpreter is itself made of operations
                    self.kernel[grid](*arguments, **options)
            seconds = time.perf_counter() - began if self.timed else None
            self._tell(arguments, seconds)

        return launch

    def _tell(self, arguments: tuple[Any, ...], seconds: float | None) -> None:
        name, written, read_too, flops = self.description
        tensors = {i: value for i, value in enumerate(arguments) if isinstance(value, Tensor)}
        results = [tensors[i] for i in written]
        read = [value for i, value in tensors.items() if i not in written or i in read_too]
        moved = Traffic(read, results, [])
        count = (sum(map(size_in_bytes, part)) for part in (read, results))
        cost = Cost(flops(*arguments), *count, seconds)
        self.note(name, list(arguments), results, moved, cost)
