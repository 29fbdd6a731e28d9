"""The linear maps of `fused.py`: several of the same values are one product on a GPU.

Shapes: n rows, in and out their widths before and after.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from minibert.ops import plain
from minibert.ops.tiles import kernels_for


def linear(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b, as `plain.linear`."""
    return projections(values, (weight, bias))[0]


def projections(values: Tensor, *linears: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Several linear maps of the same values, as `plain.projections`.

    On a GPU they are one product. Of float32 weights that learn from half precisions the gradients
    are the float32 sums, not rounded in between.
    """
    weights, biases = zip(*linears, strict=True)
    if not values.is_cuda or values.dtype not in (torch.bfloat16, torch.float16):
        return plain.projections(values, *linears)
    return _joint_projections(values, len(linears), *weights, *biases)


@torch.compiler.disable
def _joint_projections(*inputs: Any) -> tuple[Tensor, ...]:
    return _Projections.apply(*inputs)


class _Projections(Function):
    """Y = X W^T + b:    dX = dY W,    dW = dY^T X,    db = sum of the rows of dY."""

    @staticmethod
    def forward(ctx, values, number, *weights_and_biases):
        weights, biases = weights_and_biases[:number], weights_and_biases[number:]
        sizes = [len(weight) for weight in weights]
        joint = torch.cat(weights) if number > 1 else weights[0]
        weight = joint.to(values.dtype)  # (out, in)
        bias = torch.cat(biases) if number > 1 else biases[0]
        ctx.save_for_backward(values, *weight.split(sizes))
        return F.linear(values, weight, bias.to(values.dtype)).split(sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstreams):
        values, *weights = ctx.saved_tensors
        rows = values.flatten(0, -2)  # (n, in)
        upstreams = [upstream.flatten(0, -2) for upstream in upstreams]  # (n, out) each
        kernels = kernels_for(values)
        column_sums = _column_sums if kernels is None else kernels.column_sums
        d_rows = upstreams[0] @ weights[0]  # (n, in)
        for upstream, weight in zip(upstreams[1:], weights[1:], strict=True):
            d_rows.addmm_(upstream, weight)
        d_weights = [_float32_product(each.T, rows) for each in upstreams]
        d_biases = [column_sums(each) for each in upstreams]
        return d_rows.view(values.shape), None, *d_weights, *d_biases


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left (m, n), right (n, k) of one half precision; returns (m, k), the float32 sums."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _column_sums(rows: Tensor) -> Tensor:
    """The sum over rows (n, out) in float32: (out,)."""
    return rows.sum(0, dtype=torch.float32)
