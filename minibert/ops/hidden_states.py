"""The fused losses of hidden states: by the cosine of each token's two vectors, or by squares.

As in `fused.py`: formed with their gradient, a tile of rows at once.

Shapes: B batch, S sequence, H hidden; r rows of a tile.
"""

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from minibert.ops.plain import SHORTEST
from minibert.ops.tiles import in_cache, kernels_for, precise, precise_dtype, scaled, tiles


def hidden_state_loss(
    student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor
) -> Tensor:
    """Sum over real tokens of 1 - cosine, as `plain.hidden_state_loss`."""
    if kernels := kernels_for(student_hidden):
        return kernels.hidden_state_loss(student_hidden, teacher_hidden, attention_mask)
    return _HiddenStateLoss.apply(student_hidden, teacher_hidden, attention_mask, _cosine_rows)


def hidden_state_mse(
    student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor
) -> Tensor:
    """Sum over real tokens of the mean squared difference, as `plain.hidden_state_mse`."""
    return _HiddenStateLoss.apply(student_hidden, teacher_hidden, attention_mask, _square_rows)


class _HiddenStateLoss(Function):
    """A loss of each token's two vectors by `loss_of_rows`, which fills in its gradient too."""

    @staticmethod
    def forward(ctx, student_hidden, teacher_hidden, attention_mask, loss_of_rows):
        H = student_hidden.shape[-1]
        student, teacher = (
            part.reshape(-1, H).contiguous() for part in (student_hidden, teacher_hidden)
        )  # (B S, H)
        gradient = torch.empty_like(student)
        loss_sum = loss_of_rows(student, teacher, gradient, attention_mask.flatten()).sum()
        ctx.save_for_backward(gradient.view(student_hidden.shape))
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return scaled(gradient, upstream), None, None, None


def _cosine_rows(student, teacher, gradient, is_real):
    """1 - cosine of each row, (rows,), 0 where not real; `gradient` (rows, H) is filled.

    With s, t the two vectors of a token and c their cosine:
    d(1 - c) / ds = c s / |s|^2 - t / (|s| |t|).
    """
    losses = student.new_empty(len(student), dtype=precise_dtype(student))
    for rows in tiles(*student.shape, in_cache(student)):
        s, t = precise(student[rows]), precise(teacher[rows])  # (r, H)
        real = is_real[rows].bool()  # (r,)
        s_square = (s * s).sum(-1).clamp_min(SHORTEST**2)  # (r,)
        t_square = (t * t).sum(-1).clamp_min(SHORTEST**2)  # (r,)
        inverse = (s_square * t_square).rsqrt()  # (r,)
        cosine = (s * t).sum(-1) * inverse  # (r,)
        losses[rows] = torch.where(real, 1 - cosine, 0)
        to_student = torch.where(real, cosine / s_square, 0)[:, None]  # (r, 1)
        to_teacher = torch.where(real, inverse, 0)[:, None]  # (r, 1)
        gradient[rows] = (s * to_student).addcmul_(t, to_teacher, value=-1)
    return losses


def _square_rows(student, teacher, gradient, is_real):
    """Mean of (s - t)^2 of each row, (rows,), 0 where not real; `gradient` (rows, H) is filled
    with 2 (s - t) / H.
    """
    losses = student.new_empty(len(student), dtype=precise_dtype(student))
    for rows in tiles(*student.shape, in_cache(student)):
        real = is_real[rows, None].bool()  # (r, 1)
        difference = precise(student[rows]) - precise(teacher[rows])  # (r, H)
        difference = torch.where(real, difference, 0)
        losses[rows] = difference.square().mean(-1)
        gradient[rows] = difference.mul_(2 / student.shape[1])
    return losses
