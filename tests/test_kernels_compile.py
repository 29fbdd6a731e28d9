"""Every Triton kernel compiles for GPUs that are not here, and fits into their shared memory.

The kernels are called as a run calls them; in place of a launch stands the compiler's whole way, to
ptxas. What they compute is for test_kernels.py and test_attention_kernels.py.
"""

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are written in Triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402

from minibert.ops import kernels  # noqa: E402

# Compute capability: bytes of shared memory that a program may have (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability").
GPUS = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 120: 99 << 10}
OF_ATTENTION = {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel"}


class AbsentGPU:
    """What Triton asks of a driver before it launches anything."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(gpu, monkeypatch, tmp_path) -> set[str]:
    """The names of the kernels that were asked for so far, each of which compiles and fits."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # so that all are compiled
    found, run = set(), JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **options):
        made = run(kernel, *arguments, grid=grid, warmup=True, **options)
        assert made.asm["cubin"]
        assert made.metadata.shared <= GPUS[gpu], kernel.__name__
        found.add(kernel.__name__)
        return made

    monkeypatch.setattr(JITFunction, "run", compile_only)
    place = "_active" if hasattr(driver, "_active") else "active"  # before Triton 3.4
    monkeypatch.setattr(driver, place, AbsentGPU(gpu))
    return found


def emptied(names: set[str]) -> set[str]:
    """What was in it."""
    found = set(names)
    names.clear()
    return found


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "D", "dtype"),
    [
        *((gpu, 64, torch.bfloat16) for gpu in GPUS),
        (86, 128, torch.bfloat16),  # most to hold where there is least room
        (90, 26, torch.float16),
        (90, 64, torch.float32),
    ],
)
def test_attention(compiled, gpu, D, dtype):
    """Alone and with the loss of its maps, with dropout and without; each kernel of its gradient"""
    query, key, value = (leaf(2, 3, 70, D, dtype=dtype) for _ in range(3))
    taught = [torch.zeros(2, 3, 70, D, dtype=dtype) for _ in range(2)]
    mask = torch.ones(2, 70, dtype=torch.long)
    kernels.attention_map_loss(query, key, *taught, mask).backward()
    assert emptied(compiled) == OF_ATTENTION
    if dtype == torch.float32:
        return  # its attention is torch's
    for dropout in (0.0, 0.1):
        kernels.attention(query, key, value, mask, dropout).sum().backward()
        assert emptied(compiled) == OF_ATTENTION
        context, loss = kernels.attention_and_map_loss(query, key, value, mask, dropout, *taught)
        (context.sum() + loss).backward()
        assert emptied(compiled) == OF_ATTENTION


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gpu", GPUS)
def test_add_and_norm(compiled, gpu, dtype):
    rows, values = (leaf(70, 768, dtype=dtype) for _ in range(2))
    weight, bias = (leaf(768, dtype=torch.float32) for _ in range(2))
    for dropout in (0.0, 0.1):
        kernels.add_and_norm(rows, values, dropout, weight, bias, 1e-12).sum().backward()
        assert emptied(compiled) == {"_add_and_norm_kernel", "_add_and_norm_gradient_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_rows_of_losses(compiled, gpu):
    """Logits in float32, their gradient in bfloat16, as in a bfloat16 run, and all in float32."""
    hidden, other = (leaf(2, 35, 768, dtype=torch.bfloat16) for _ in range(2))
    mask = torch.ones(2, 35, dtype=torch.long)
    kernels.hidden_state_loss(hidden, other.detach(), mask).backward()
    kernels.column_sums(other.detach().flatten(0, 1))
    losses = {"_cosine_kernel", "_cosine_gradient_kernel", "_column_sums_kernel"}
    assert emptied(compiled) == losses
    V, W = 28_996, 29_056
    logits, taught = torch.zeros(2, 7, W)
    labels, bias = torch.zeros(7, dtype=torch.long), torch.zeros(V)
    for gradient in (logits, torch.zeros(7, W, dtype=torch.bfloat16)):
        for temperature in (1.0, 2.0):
            weights = (labels, gradient, temperature, 1.0, 5.0)
            for others in ((taught, bias), (None, None)):
                kernels.vocabulary_rows(logits, others[0], bias, others[1], *weights)
                assert emptied(compiled) == {"_vocabulary_rows_kernel"}
