"""The functions of `plain.py`, lean in memory and time.

A loss has a derivative that can be written down: it is formed together with the value, tile by
tile, so that the maps of a batch or all logits are never one tensor, and backward only multiplies
it by what comes from above. (Triton's kernels of maps and of hidden states form it in backward,
from sums that the value left; a loss of maps within a CPU's attention leaves its derivative by the
scores.) Each derivative stands beside the statement that computes it.
Products are of the dtype that comes in, sums and exponentials float32 (float64 for float64 inputs).

All is PyTorch; on a GPU with Triton most of it is handed to `kernels/`. Here they come together:
attention and the losses of its maps from `attention.py`, `dropout.py`, the losses of hidden states
from `hidden_states.py`, those over the vocabulary from `vocabulary.py`, and linear maps from
`projections.py` on a GPU, and for a frozen teacher on a CPU from `prepacked.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from minibert.ops import plain
from minibert.ops.attention import (
    attention,
    attention_and_map_loss,
    attention_map_loss,
    attention_map_mse,
)
from minibert.ops.dropout import dropout
from minibert.ops.hidden_states import hidden_state_loss, hidden_state_mse
from minibert.ops.prepacked import prepacked_linear
from minibert.ops.tiles import kernels_for
from minibert.ops.vocabulary import vocabulary_loss

__all__ = [
    "add_and_norm",
    "attention",
    "attention_and_map_loss",
    "attention_map_loss",
    "attention_map_mse",
    "dropout",
    "hidden_state_loss",
    "hidden_state_mse",
    "linear",
    "linear_gelu",
    "look_up",
    "projections",
    "vocabulary_loss",
]


def look_up(table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a table and the table, as `plain.look_up`.

    On a CPU the rows' gradient is added to that of the table's other use, in its memory: whoever
    that is must give it away, as `vocabulary_loss` does. By themselves there would be two tensors
    of the table's size, one of them zeros nearly everywhere.
    """
    return plain.look_up(table, ids) if table.is_cuda else _LookUp.apply(table, ids)


class _LookUp(Function):
    """Y_t = E[id_t], E:    dE = dE of the other use, plus dY_t in each row id_t."""

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        return F.embedding(ids, table), table

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows, d_table):
        (ids,) = ctx.saved_tensors
        rows = d_rows.reshape(-1, d_rows.shape[-1])  # (B S, H)
        return d_table.contiguous().index_add_(0, ids.flatten(), rows), None


def linear(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b, as `plain.linear`."""
    return projections(values, (weight, bias))[0]


def linear_gelu(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x W^T + b), as `plain.linear_gelu`."""
    if weight.is_mkldnn:
        return prepacked_linear(values, weight, bias, gelu=True)
    return F.gelu(linear(values, weight, bias))


def projections(values: Tensor, *linears: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Several linear maps of the same values, as `plain.projections`.

    Half precisions on a GPU are multiplied by all weights in one product. On a CPU weights may be
    those of `prepacked.py`.
    """
    if linears[0][0].is_mkldnn:
        return tuple(prepacked_linear(values, weight, bias) for weight, bias in linears)
    if values.is_cuda and values.dtype in (torch.bfloat16, torch.float16):
        from minibert.ops.projections import joint_projections

        return joint_projections(values, *linears)
    return plain.projections(values, *linears)


def add_and_norm(
    residual: Tensor, values: Tensor, probability: float, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm(residual + dropout(values)), as `plain.add_and_norm`.

    By Triton neither the sum nor the mask of dropout is ever in memory.
    """
    if kernels := kernels_for(values):
        return kernels.add_and_norm(residual, values, probability, weight, bias, eps)
    return plain.add_and_norm(residual, dropout(values, probability), 0.0, weight, bias, eps)
