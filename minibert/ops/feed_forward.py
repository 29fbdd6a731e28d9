"""The fused feed-forward network of a layer, on a CPU.

Shapes: n rows, H hidden, I intermediate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable


class GeluThenLinear(Function):
    """Y = GELU(X) W^T + b:    dX = (dY W) GELU'(X),    dW = dY^T GELU(X),    db = sum of dY's rows.

    For backward X alone is kept, GELU(X) is formed anew: of a layer's values it would be one of the
    two largest, (n, I).
    """

    @staticmethod
    def forward(ctx, values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight.to(values.dtype)  # (H, I)
        ctx.save_for_backward(values, weight)
        return F.linear(F.gelu(values), weight, bias.to(values.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, weight = ctx.saved_tensors
        d_rows = upstream.reshape(-1, upstream.shape[-1])  # (n, H)
        d_weight = d_rows.T @ F.gelu(values).view(-1, values.shape[-1])  # (H, I)
        d_values = torch.ops.aten.gelu_backward(upstream @ weight, values)
        return d_values, d_weight, d_rows.sum(0)
