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

PACKAGE = "minibert.ops.kernels"


class Kernel(NamedTuple):
    """What there is to know of a kernel."""

    file: str  # of PACKAGE
    name: str  # in the ledger
    written: tuple[int, ...]  # which of its arguments, where they are not None
    flops: Callable[..., int]


def _products(
    student: int, of_values: int, query: Tensor, value: Tensor | None, teacher: Tensor | None
) -> int:
    """FLOPs of so many products over all pairs with the student's queries and keys, so many with
    its values, and the teacher's scores, where there are values and a teacher.
    """
    B, S, N, D = query.shape
    widths = student * D + (0 if value is None else of_values * D)
    widths += 0 if teacher is None else teacher.shape[-1]
    return 2 * B * N * S * S * widths


def _forward_flops(query: Tensor, _: Tensor, value: Any, teacher: Any, *__: Any) -> int:
    """Scores, and P V."""
    return _products(1, 1, query, value, teacher)


def _query_gradient_flops(query: Tensor, _: Tensor, value: Any, teacher: Any, *__: Any) -> int:
    """Scores once more and dQ; dP."""
    return _products(2, 1, query, value, teacher)


def _key_gradient_flops(query: Tensor, _: Tensor, value: Any, teacher: Any, *__: Any) -> int:
    """Scores once more and dK; dP and dV."""
    return _products(2, 2, query, value, teacher)


def _no_flops(*_: Any) -> int:
    """No product."""
    return 0


ATTENTION, NORM, LOSSES = "attention_maps", "norm_rows", "loss_rows"
KERNELS = {
    "forward_kernel": Kernel(ATTENTION, "attention", (8, 9, 10, 11), _forward_flops),
    "query_gradient_kernel": Kernel(ATTENTION, "query_gradient", (13, 14), _query_gradient_flops),
    "key_gradient_kernel": Kernel(ATTENTION, "key_gradient", (13, 14), _key_gradient_flops),
    "_add_and_norm_kernel": Kernel(NORM, "add_and_norm", (5, 6, 7), _no_flops),
    "_add_and_norm_gradient_kernel": Kernel(
        NORM, "add_and_norm_gradient", (7, 8, 9, 10), _no_flops
    ),
    "_cosine_kernel": Kernel(LOSSES, "cosine", (3,), _no_flops),
    "_cosine_gradient_kernel": Kernel(LOSSES, "cosine_gradient", (4,), _no_flops),
    "_column_sums_kernel": Kernel(LOSSES, "column_sums", (1,), _no_flops),
    "_vocabulary_rows_kernel": Kernel(LOSSES, "vocabulary_rows", (5, 6, 7), _no_flops),
}


@contextmanager
def launches_told(note: Callable[..., None], timed: bool) -> Iterator[None]:
    """In here every launch is passed on to `note` (of a Ledger)."""
    there = PACKAGE in sys.modules  # it is imported where there is a GPU and Triton
    if not there and torch.cuda.is_available() and find_spec("triton"):
        import_module(PACKAGE)
        there = True
    originals = {}
    for name, description in KERNELS.items() if there else ():
        module = sys.modules[f"{PACKAGE}.{description.file}"]
        originals[module, name] = kernel = getattr(module, name)
        setattr(module, name, _Told(kernel, description, note, timed))
    try:
        yield
    finally:
        for (module, name), kernel in originals.items():
            setattr(module, name, kernel)


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
        _, name, written, flops = self.description
        tensors = {i: value for i, value in enumerate(arguments) if isinstance(value, Tensor)}
        results = list({id(tensors[i]): tensors[i] for i in written if i in tensors}.values())
        read = [value for i, value in tensors.items() if i not in written]
        moved = Traffic(read, results, [])
        count = (sum(map(size_in_bytes, part)) for part in (read, results))
        cost = Cost(flops(*arguments), *count, seconds)
        self.note(f"triton.{name}", list(arguments), results, moved, cost)
