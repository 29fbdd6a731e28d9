"""Several linear maps of the same values as one product, for half precisions on a GPU.

Imported by `fused.py` where there are such values: what keeps torch.compile out of it takes two
seconds to import.

Shapes: n rows, in and out their widths before and after.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from minibert.ops.tiles import kernels_for


@torch.compiler.disable
def joint_projections(values: Tensor, *linears: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """As `plain.projections`: one product forward, one for each weight in backward.

    The gradients of float32 weights are then the float32 sums, not rounded in between.
    """
    weights, biases = zip(*linears, strict=True)
    return _Projections.apply(values, len(linears), *weights, *biases)


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
        rows = values.reshape(-1, values.shape[-1])  # (n, in)
        upstreams = [each.reshape(-1, each.shape[-1]) for each in upstreams]  # (n, out) each
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
