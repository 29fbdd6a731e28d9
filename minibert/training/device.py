"""Where to compute, what a float32 product is there, and memory: kept, and not enough."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from minibert.errors import InputError

# How many tokens go through the models at once where nobody says: a CPU's cache is small, and a GPU
# waits for its next launch where there are few.
MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 49_152}

# After how many updates freed memory is given back, by the run's operations: gaps between tensors
# of ever new sizes add up, and packed micro-batches come in few sizes.
RELEASE_MEMORY_EVERY = {"fused": 100, "plain": 10}


def device_type(name: str) -> str:
    """`cpu` or `cuda`; `auto` is the GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def set_up_device(name: str, number: int = 0) -> torch.device:
    """`auto` is the GPU where there is one; `cuda` without one, or without `number`: InputError.

    On a CPU freed memory is kept. A product of float32 matrices stays one of float32: TF32 is off
    on GPUs, and a CPU takes oneDNN where that does not round (on some CPUs twice as fast as MKL;
    on others, those with matrix units for bfloat16, it would round to that).
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no CUDA device that torch can use")
    name = device_type(name)
    if name == "cuda" and number > 0:
        if number >= torch.cuda.device_count():
            raise InputError(f"no GPU {number} (counted from 0) for this process on this machine")
        torch.cuda.set_device(number)  # from here on `cuda` is that one
    torch.set_float32_matmul_precision("highest")
    if name == "cpu":
        keep_freed_memory()
        torch.set_float32_matmul_precision("medium")
        if not _products_are_float32():
            torch.set_float32_matmul_precision("highest")
    return torch.device(name)


@contextmanager
def out_of_memory_is_told(advice: str) -> Iterator[None]:
    """Memory that is not there is the user's to mend: an InputError with `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own for GPUs is a RuntimeError
        told = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # CPU, CUDA, cuBLAS
        told += ("could not create a primitive",)  # oneDNN
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in told):
            raise
        raise InputError(f"out of memory; {advice}") from None


def _products_are_float32() -> bool:
    """Whether a matrix product keeps what bfloat16 and TF32 would round away."""
    n = 256  # large enough to be treated like those of a model
    just_above_one = torch.full((n, n), 1 + 2**-20)
    return torch.equal(just_above_one @ torch.eye(n), just_above_one)


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next ones.

    Left alone, glibc returns it to the system again and again, and each step pays anew for every
    page it touches: a seventh of the time of a step on a CPU. Other C libraries stay as they are.
    """
    if mallopt := _of_glibc("mallopt"):
        trim_threshold, mmap_max = -1, -4  # malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def release_freed_memory() -> None:
    """Return all of it at once, since tensors of ever new sizes leave gaps that add up."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, where that is glibc."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)
