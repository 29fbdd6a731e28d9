"""The functions of `plain.py`, lean in memory and time.

A loss has a derivative that can be written down: it is formed together with the value, tile by
tile, so that the maps of a batch or all logits are never one tensor, and backward only multiplies
it by what comes from above. (Triton's kernels of maps and of hidden states form it in backward,
from sums that the value left; a loss of maps within a CPU's attention leaves its derivative by the
scores.) Each derivative stands beside the statement that computes it.
Products are of the dtype that comes in, sums and exponentials float32 (float64 for float64 inputs).

All is PyTorch; on a GPU with Triton most of it is handed to `kernels/`. Here they come together:
attention and the losses of its maps from `attention.py`, `dropout.py`, the losses of hidden states
from `hidden_states.py`, those over the vocabulary from `vocabulary.py`; of linear maps those of a
GPU from `projections.py`, those of a frozen model on a CPU from `frozen.py`, and GELU with the map
after it from `feed_forward.py`.
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
from minibert.ops.feed_forward import GeluThenLinear
from minibert.ops.frozen import FrozenWeight, frozen_linear
from minibert.ops.hidden_states import hidden_state_loss, hidden_state_mse
from minibert.ops.tiles import kernels_for
from minibert.ops.vocabulary import vocabulary_loss

__all__ = [
    "add_and_norm",
    "attention",
    "attention_and_map_loss",
    "attention_map_loss",
    "attention_map_mse",
    "dropout",
    "feed_forward",
    "hidden_state_loss",
    "hidden_state_mse",
    "linear",
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


def feed_forward(
    values: Tensor, inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor]
) -> Tensor:
    """GELU(x W_1^T + b_1) W_2^T + b_2, as `plain.feed_forward`.

    On a CPU a frozen model has GELU within its first product, and others form it anew in backward.
    """
    if isinstance(inner[0], FrozenWeight):
        return linear(frozen_linear(values, *inner, gelu=True), *outer)
    intermediate = linear(values, *inner)  # (..., I)
    if values.is_cuda:
        return linear(F.gelu(intermediate), *outer)
    return GeluThenLinear.apply(intermediate, *outer)


def projections(values: Tensor, *linears: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Several linear maps of the same values, as `plain.projections`.

    Half precisions on a GPU are multiplied by all weights in one product. On a CPU the weights may
    be those of a frozen model.
    """
    if isinstance(linears[0][0], FrozenWeight):
        return tuple(frozen_linear(values, weight, bias) for weight, bias in linears)
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
