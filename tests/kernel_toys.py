"""What the tests of the Triton kernels share: where the kernels run, and helpers.

They run on the GPU where there is one, elsewhere in Triton's interpreter. Triton reads whether to
interpret when it is imported, and keeps to it: so that happens in a process of its own.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
sys.path.insert(0, str(ROOT / "benchmarks"))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
RUNS_HERE = INTERPRETED or ON_GPU
DEVICE = "cuda" if ON_GPU else "cpu"
if INTERPRETED:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def dot_of_bfloat16(builder, left, right, *rest):
        """As a GPU forms it. The interpreter by itself multiplies the bits, as integers."""
        if left.dtype.scalar == tl.bfloat16:
            left, right = (builder.cast_impl(part, tl.float32) for part in (left, right))
        return dot(builder, left, right, *rest)

    def cast_to_bfloat16(builder, source, dtype):
        """To the nearest, as a GPU does. The interpreter by itself cuts the last bits off."""
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(builder, source, dtype)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot = dot_of_bfloat16
    InterpreterBuilder.cast_impl = cast_to_bfloat16


def run_in_the_interpreter(file: str) -> None:
    """The tests of a file, in a process of their own."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(value: torch.Tensor, truth: torch.Tensor) -> float:
    """The norm of the error, relative to the truth's (absolute where the truth is 0)."""
    return ((value.cpu().double() - truth).norm() / (truth.norm() or 1)).item()


def assert_drawn_independently(dropped: torch.Tensor, probability: float) -> None:
    """The share is right, and no two rows, columns, ... of the mask, near or far, are alike.

    Within 4 standard deviations the one, within 5 each of the others, of which there are many.
    """
    draws = (dropped.double() - probability) / math.sqrt(probability * (1 - probability))
    assert abs(draws.sum().item()) < 4 * math.sqrt(draws.numel())
    for dim in range(draws.ndim):
        slices = draws.movedim(dim, 0).flatten(1)  # (slices, elements of each)
        correlations = (slices @ slices.T).triu(1) / math.sqrt(slices.shape[1])
        assert correlations.abs().max() < 5


def assert_no_worse(ours, plains, truth, tolerance):
    """Ours is as near to the truth as the plain formula in the same precision, but for a little."""
    assert distance(ours, truth) <= distance(plains, truth) + tolerance
