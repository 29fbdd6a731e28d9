"""Which tensors the fused operations hand to Triton's kernels."""

import sys

import torch

import minibert.ops
from minibert.ops import attention, tiles


class OnGPU:
    """What `kernels_for` asks of a tensor."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


def test_kernels_are_for_a_gpu_with_triton_where_nobody_forbids_them(monkeypatch):
    twins = object()
    monkeypatch.setitem(sys.modules, "minibert.ops.kernels", twins)
    monkeypatch.setattr(minibert.ops, "kernels", twins, raising=False)
    monkeypatch.setattr(tiles, "_has_triton", lambda: True)
    assert tiles.kernels_for(OnGPU(torch.float32)) is twins
    assert tiles.kernels_for(OnGPU(torch.bfloat16)) is twins
    assert tiles.kernels_for(OnGPU(torch.float64)) is None
    assert tiles.kernels_for(torch.zeros(1)) is None
    assert attention._attention_kernels(OnGPU(torch.bfloat16)) is twins
    assert attention._attention_kernels(OnGPU(torch.float32)) is None
    monkeypatch.setattr(tiles, "KERNELS", False)
    assert tiles.kernels_for(OnGPU(torch.float32)) is None
    monkeypatch.setattr(tiles, "KERNELS", True)
    monkeypatch.setattr(tiles, "_has_triton", lambda: False)
    assert tiles.kernels_for(OnGPU(torch.float32)) is None
