"""Attention and the loss of its maps, in one pass over tiles of scores.

Three functions of `plain.py` are three settings of the same kernels: attention alone, the loss of
its maps alone, and both at once. Together each kernel has one product more than for attention
alone: the teacher's scores. The student's are there already, and in backward both gradients are
one. Scores exist only as tiles in registers.

Shapes: B batch, S sequence, N heads, D head size. Every tensor of heads lies in memory as
(B, S, N, D), as a model makes it; a query, key or value may be a part of wider rows.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from minibert.ops.kernels.attention_forward import forward_kernel
from minibert.ops.kernels.attention_gradients import key_gradient_kernel, query_gradient_kernel
from minibert.ops.kernels.draws import draw_seed, dropped_draws

# Queries and keys a tile, and how a kernel is launched. tl.dot asks for powers of 2 from 16 up.
FLOAT32 = {"QUERIES": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1}
FORWARD = {"QUERIES": 64, "KEYS": 32, "num_warps": 4, "num_stages": 3}
QUERY_GRADIENT = {"QUERIES": 64, "KEYS": 32, "num_warps": 4, "num_stages": 3}
KEY_GRADIENT = {"QUERIES": 32, "KEYS": 64, "num_warps": 4, "num_stages": 3}

Heads = Sequence[Tensor | None]  # (B, N, S, D) each; None where it is not asked for


@torch.compiler.disable
def attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, dropout: float
) -> Tensor:
    """`plain.attention`; the context of padding behind the last real token is 0.

    In a sequence of padding alone it is the mean of the values, which get no gradient from it.
    """
    return _Attention.apply(query, key, value, None, None, attention_mask, dropout)[0]


@torch.compiler.disable
def attention_map_loss(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor,
    attention_mask: Tensor,
) -> Tensor:  # fmt: skip
    """`plain.attention_map_loss`, of inputs in float32 or a half precision."""
    models = (student_query, student_key, None, teacher_query, teacher_key)
    return _Attention.apply(*models, attention_mask, 0.0)[1]


@torch.compiler.disable
def attention_and_map_loss(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, dropout: float,
    teacher_query: Tensor, teacher_key: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both at once: the context (B, N, S, D) and the loss, a scalar."""
    teacher = (teacher_query, teacher_key)
    return _Attention.apply(query, key, value, *teacher, attention_mask, dropout)


class _Attention(Function):
    """(context, kl_sum), each None where it is not asked for: without value, without teacher."""

    @staticmethod
    def forward(ctx, query, key, value, teacher_query, teacher_key, attention_mask, dropout):
        for each in (key, value):
            assert each is None or each.shape == query.shape, (query.shape, each.shape)
        for each in (teacher_query, teacher_key):
            assert each is None or each.shape[:3] == query.shape[:3], (query.shape, each.shape)
        student, row_stride = _as_rows((query, key, value))
        call = _Call(student[0], row_stride, (teacher_query, teacher_key), attention_mask, dropout)
        B, S, N, D = student[0].shape
        options = call.options(FORWARD)
        grid = (triton.cdiv(S, options["QUERIES"]), N, B)
        float32 = {"dtype": torch.float32}
        context = None if value is None else query.new_empty(B, S, N, D)
        kl_parts = lse = teacher_lse = None
        if teacher_query is not None:
            kl_parts = query.new_empty(B, N, grid[0], **float32)
        if any(ctx.needs_input_grad):
            lse = query.new_empty(B, N, S, **float32)
            teacher_lse = None if teacher_query is None else torch.empty_like(lse)
        results = (context, kl_parts, lse, teacher_lse)
        forward_kernel[grid](*student, *call.constants, *results, *call.numbers, **options)
        # The teacher's, made in inference mode, cannot be saved in the usual way.
        ctx.save_for_backward(*student, context, lse)
        ctx.call, ctx.teacher_lse = call, teacher_lse
        context = None if context is None else context.transpose(1, 2)
        return context, None if kl_parts is None else kl_parts.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_context, d_kl):
        *student, context, lse = ctx.saved_tensors
        call = ctx.call
        B, S, N, D = student[0].shape
        if context is not None:
            d_context = d_context.transpose(1, 2).contiguous()  # (B, S, N, D)
        d_query, d_key, d_value = (
            None if part is None else part.new_empty(B, S, N, D) for part in student
        )
        shifts = torch.empty_like(lse)
        saved = (*student, *call.constants, lse, ctx.teacher_lse)
        options = call.options(QUERY_GRADIENT)
        query_gradient_kernel[triton.cdiv(S, options["QUERIES"]), N, B](
            *saved, context, d_context, d_kl, shifts, d_query, *call.numbers, **options
        )
        options = call.options(KEY_GRADIENT)
        key_gradient_kernel[triton.cdiv(S, options["KEYS"]), N, B](
            *saved, d_context, d_kl, shifts, d_key, d_value, *call.numbers, **options
        )
        gradients = (d_query, d_key, d_value)
        gradients = (each if each is None else each.transpose(1, 2) for each in gradients)
        return *gradients, None, None, None, None


class _Call:
    """What all kernels of one call are given beside the student's query, key and value."""

    def __init__(
        self, query: Tensor, row_stride: int, teacher: Heads, attention_mask: Tensor, dropout: float
    ):
        """query (B, S, N, D) of rows so far apart; teacher: query and key (B, N, S, D), or None."""
        teacher, teacher_row_stride = _as_rows(teacher)
        S, D = query.shape[1], query.shape[3]
        teacher_D = D if teacher[0] is None else teacher[0].shape[3]
        D_TILE = triton.next_power_of_2(max(16, D, teacher_D))
        self.sizes = {"D": D, "TEACHER_D": teacher_D, "D_TILE": D_TILE}
        models = (query, *teacher)
        self.float32 = any(each is not None and each.dtype == torch.float32 for each in models)
        attention_mask = attention_mask.contiguous()
        version = 0 if attention_mask.is_inference() else attention_mask._version
        seed = draw_seed() if dropout > 0 else None
        self.constants = (*teacher, attention_mask, _ends(attention_mask, version), seed)
        self.numbers = (row_stride, teacher_row_stride, S, *dropped_draws(dropout))

    def options(self, half_precision: dict[str, int]) -> dict[str, Any]:
        """The sizes a kernel is compiled for."""
        options = self.sizes | (FLOAT32 if self.float32 else half_precision)
        if self.sizes["D_TILE"] > 64:  # wide tiles loaded far ahead pass the memory of small GPUs
            options["num_stages"] = min(2, options["num_stages"])
        return options


@lru_cache(maxsize=1)  # all layers are given the same mask
def _ends(attention_mask: Tensor, version: int) -> Tensor:
    """(B,): one behind the last real token of each sequence; S where there is none.

    version: how often the mask was changed in place, so that it is looked at again.
    """
    return attention_mask.shape[1] - (attention_mask != 0).int().flip(1).argmax(1)


def _as_rows(heads: Heads) -> tuple[list[Tensor | None], int]:
    """Tensors (B, N, S, D) as (B, S, N, D) with equal strides, and the stride of a row.

    As a model makes them they are views, perhaps of parts of wider rows; others are copied.
    """
    rows = [None if each is None else each.transpose(1, 2) for each in heads]
    there = [each for each in rows if each is not None]
    if not there:
        return rows, 0
    _, S, N, D = there[0].shape
    row_stride = there[0].stride(1)
    if all(each.stride() == (S * row_stride, row_stride, D, 1) for each in there):
        return rows, row_stride
    return [None if each is None else each.contiguous() for each in rows], N * D
