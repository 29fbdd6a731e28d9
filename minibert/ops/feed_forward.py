"""The second part of a fused feed-forward network, on a CPU: GELU and the linear map after it.

Shapes: n rows, H hidden, I intermediate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable


class GeluThenLinear(Function):
    """Y = GELU(X) W^T + b:    dX = (dY W) GELU'(X),    dW = dY^T GELU(X),    db = sum of dY's rows.

    Of the two tensors (n, I) backward finds X alone, and forms GELU(X) anew. Gradients are of the
    dtype of the values, as torch's own; autograd gives them on in that of the weights.
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
        rows = values.reshape(-1, values.shape[-1])  # (n, I)
        d_output = upstream.reshape(-1, upstream.shape[-1])  # (n, H)
        d_weight = d_output.T @ F.gelu(rows)  # (H, I)
        d_rows = torch.ops.aten.gelu_backward(d_output @ weight, rows)  # (n, I)
        return d_rows.view(values.shape), d_weight, d_output.sum(0)
