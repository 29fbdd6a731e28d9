"""The machine a benchmark runs on: what it is, what it could do, and how its memory behaves.

Shapes: H hidden, I intermediate.
"""

import importlib.util
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from minibert.training.device import release_freed_memory

# glibc hands large freed blocks back at once, and faults them in again when they are next asked
# for. Told so, it keeps them. (It reads this when a process starts.)
TUNED_ALLOCATOR = {
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_MAX_": "0",  # older versions refuse a threshold above 32 MB
}


@contextmanager
def allocator(environment: dict[str, str]) -> Iterator[None]:
    """The environment in which a process starts: glibc's settings are these, not the caller's."""
    outside = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    for name in outside:
        del os.environ[name]
    os.environ.update(environment)
    try:
        yield
    finally:
        for name in environment:
            os.environ.pop(name, None)
        os.environ.update(outside)


def give_memory_back() -> None:
    """Hand what is free to the system, so that it serves the next."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    release_freed_memory()


def peak_of_process() -> int:
    """Bytes this process has held at once at most, Python and libraries too."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def tell(line: str) -> None:
    """Progress, for people who wait."""
    print(line, file=sys.stderr, flush=True)


# What it could do.

MATRIX_KINDS = {  # name -> dtype and float32 precision
    "float32": (torch.float32, "highest"),
    "float32 medium": (torch.float32, "medium"),
    "bfloat16": (torch.bfloat16, "highest"),
}


def matrix_rates(H: int, I: int, device: torch.device) -> dict[str, float]:
    """FLOP/s of the largest products of a model, warm: the better of two shapes' medians."""
    rows, calls = ((2048, 1680), 1) if device.type == "cpu" else ((49_152, 40_320), 20)
    shapes = ((rows[0], H, I), (rows[1], I, H))
    return {
        kind: max(matrix_rate(*shape, kind, device, calls) for shape in shapes)
        for kind in MATRIX_KINDS
    }


def matrix_rate(
    rows: int, width: int, width_out: int, kind: str, device: torch.device, calls: int
) -> float:
    """FLOP/s of F.linear from (rows, width) to (rows, width_out): the median of seven."""
    dtype, precision = MATRIX_KINDS[kind]
    like = {"dtype": dtype, "device": device}
    hidden, weight = torch.randn(rows, width, **like), torch.randn(width_out, width, **like)
    bias = torch.randn(width_out, **like)
    seconds = []
    with torch.inference_mode(), matmul_precision(precision):
        for _ in range(2 + 7):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                F.linear(hidden, weight, bias)
            synchronize(device)
            seconds.append((time.perf_counter() - start) / calls)
    return 2 * rows * width * width_out / median(seconds[2:])


def medium_error(H: int, I: int, device: torch.device) -> float:
    """Relative error of a float32 product under "medium", against float64.

    About 3e-7 is float32; about 2e-3 is bfloat16, which "medium" means on CPUs with AMX.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, I, generator=generator)
    right = torch.randn(H, I, generator=generator)
    exact = left.double() @ right.double().T
    with torch.inference_mode(), matmul_precision("medium"):
        found = F.linear(left.to(device), right.to(device)).cpu()
    return ((found - exact).norm() / exact.norm()).item()


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# What it is.


def circumstances(benchmark: str, device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and command line: what a figure means nothing without."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": {
            "cpu": models[0] if models else platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton") if installed("triton") else None,
            "transformers": version("transformers") if installed("transformers") else None,
        },
    }


def installed(package: str) -> bool:
    """Whether a package of that name can be imported."""
    return importlib.util.find_spec(package) is not None


def commit() -> str | None:
    """The git commit of this checkout, with -dirty where files differ from it."""
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        told = subprocess.run(ask, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return told.stdout.strip() or None
