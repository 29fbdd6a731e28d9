"""Attention and the loss of its maps, in one pass over tiles of scores.

Three functions of `plain.py` are three settings of the same kernels: attention alone, the loss of
its maps alone, and both at once. Together they cost one product more than attention does: the
teacher's scores. The student's are there already, and in backward both gradients are one.

Shapes: B batch, S sequence, N heads, D head size. Every tensor of heads lies in memory as
(B, S, N, D), as a model makes it; a query, key or value may be a part of wider rows. Scores exist
only as tiles in registers, in units of log 2, since a GPU exponentiates to base 2.

A softmax over tiles keeps the largest score so far and sums relative to it, and rescales the sums
when a larger one turns up (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., 2205.14135).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from minibert.ops.kernels.draws import draw_seed, dropped_draws, kept, keys_of_rows

LOG_2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1e30)  # below every score, yet finite: the difference of two is 0, not NaN

# Queries and keys a tile, and how a kernel is launched. tl.dot asks for powers of 2 from 16 up.
FLOAT32 = {"QUERIES": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1}
FORWARD = {"QUERIES": 64, "KEYS": 32, "num_warps": 4, "num_stages": 3}
QUERY_GRADIENT = {"QUERIES": 64, "KEYS": 32, "num_warps": 4, "num_stages": 3}
KEY_GRADIENT = {"QUERIES": 32, "KEYS": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def _load_rows(matrix, rows, row_stride, inside, D: tl.constexpr, D_TILE: tl.constexpr):
    """Rows of a matrix (S, D) as (rows, D_TILE): 0 from column D on, and in rows not `inside`."""
    columns = tl.arange(0, D_TILE)
    places = matrix + rows[:, None] * row_stride + columns[None, :]
    there = inside[:, None]
    if D < D_TILE:
        there = there & (columns < D)[None, :]
    return tl.load(places, mask=there, other=0.0)


@triton.jit
def _store_rows(matrix, values, rows, row_stride, inside, D: tl.constexpr, D_TILE: tl.constexpr):
    """The inverse of `_load_rows`."""
    columns = tl.arange(0, D_TILE)
    places = matrix + rows[:, None] * row_stride + columns[None, :]
    there = inside[:, None]
    if D < D_TILE:
        there = there & (columns < D)[None, :]
    tl.store(places, values.to(matrix.dtype.element_ty), mask=there)


@triton.jit
def _product(left, right):
    """left right^T with float32 sums; float32 is multiplied as such, never as TF32."""
    return tl.dot(left, tl.trans(right), input_precision="ieee")


@triton.jit(do_not_specialize=["S", "seed", "dropped"])
def _forward_kernel(query, key, value, teacher_query, teacher_key, attention_mask, ends, seed,
                    context, kl_parts, student_lse, teacher_lse, row_stride, teacher_row_stride, S,
                    dropped, scale_of_kept,
                    D: tl.constexpr, TEACHER_D: tl.constexpr, D_TILE: tl.constexpr,
                    QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """One program: a tile of queries, of one head of one sequence, with all its keys.

        O_i = sum_j c kept_ij P_ij V_j / sum_j P_ij      c = 1 / (1 - dropout)
        KL_i = sum_j P_t (S_t - S_s) - lse_t + lse_s

    Where the maps are close, large numbers nearly cancel. So only differences are added up, each
    formed in float32 from two single numbers: S_t - S_s pair by pair, and at the end
    lse_s - lse_t = max_s - max_t + log(sum_s / sum_t).
    """
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)  # B S N D may pass 2^31
    N = tl.num_programs(1)
    head = b * N + n
    offset = b * S * row_stride + n * D
    teacher_offset = b * S * teacher_row_stride + n * TEACHER_D
    place = (b * S * N + n) * D  # in what is made here
    attention_mask += b * S
    end = tl.load(ends + b).to(tl.int32)
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside_query = queries < end
    query_s = _load_rows(query + offset, queries, row_stride, inside_query, D, D_TILE)
    max_s = tl.full([QUERIES], LOWEST, tl.float32)
    sum_s = tl.zeros([QUERIES], tl.float32)
    if value is not None:
        total = tl.zeros([QUERIES, D_TILE], tl.float32)
        if seed is not None:
            first_key, second_key = keys_of_rows(seed, head * S + queries)
    if teacher_query is not None:
        query_t = _load_rows(
            teacher_query + teacher_offset,
            queries,
            teacher_row_stride,
            inside_query,
            TEACHER_D,
            D_TILE,
        )
        max_t = tl.full([QUERIES], LOWEST, tl.float32)
        sum_t = tl.zeros([QUERIES], tl.float32)
        weighted = tl.zeros([QUERIES], tl.float32)  # sum_j exp(S_t - max_t) (S_t - S_s)

    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        inside_key = keys < end
        real_key = tl.load(attention_mask + keys, mask=inside_key, other=0) != 0
        key_s = _load_rows(key + offset, keys, row_stride, inside_key, D, D_TILE)
        scores_s = _product(query_s, key_s) * (D**-0.5 / LOG_2)
        scores_s = tl.where(real_key[None, :], scores_s, LOWEST)
        # Tiles of padding before the first real key add exp(LOWEST - LOWEST) = 1 a key to the
        # sums; the first real key rescales that by exp(LOWEST - max) = 0.
        new_max_s = tl.maximum(max_s, tl.max(scores_s, axis=1))
        rescale_s = tl.exp2(max_s - new_max_s)
        exp_s = tl.exp2(scores_s - new_max_s[:, None])
        sum_s = sum_s * rescale_s + tl.sum(exp_s, axis=1)
        max_s = new_max_s
        if teacher_query is not None:
            key_t = _load_rows(
                teacher_key + teacher_offset,
                keys,
                teacher_row_stride,
                inside_key,
                TEACHER_D,
                D_TILE,
            )
            scores_t = _product(query_t, key_t) * (TEACHER_D**-0.5 / LOG_2)
            scores_t = tl.where(real_key[None, :], scores_t, LOWEST)
            new_max_t = tl.maximum(max_t, tl.max(scores_t, axis=1))
            rescale_t = tl.exp2(max_t - new_max_t)
            exp_t = tl.exp2(scores_t - new_max_t[:, None])
            sum_t = sum_t * rescale_t + tl.sum(exp_t, axis=1)
            weighted = weighted * rescale_t + tl.sum(exp_t * (scores_t - scores_s), axis=1)
            max_t = new_max_t
        if value is not None:
            value_s = _load_rows(value + offset, keys, row_stride, inside_key, D, D_TILE)
            if seed is not None:
                stays = kept(first_key[:, None], second_key[:, None], keys[None, :], dropped)
                exp_s = tl.where(stays, exp_s, 0.0)
            total = total * rescale_s[:, None]
            total += tl.dot(exp_s.to(value_s.dtype), value_s, input_precision="ieee")

    inside = queries < S
    if value is not None:
        factor = tl.where(inside_query, scale_of_kept / sum_s, 0.0)
        _store_rows(context + place, total * factor[:, None], queries, N * D, inside, D, D_TILE)
    if student_lse is not None:
        lse_s = tl.where(inside_query, max_s + tl.log2(sum_s), 0.0)
        tl.store(student_lse + head * S + queries, lse_s, mask=inside)
    if teacher_query is not None:
        real_query = tl.load(attention_mask + queries, mask=inside_query, other=0) != 0
        kl = weighted / sum_t + (max_s - max_t) + tl.log2(sum_s / sum_t)
        kl = tl.where(real_query, kl * LOG_2, 0.0)
        tl.store(kl_parts + head * tl.num_programs(0) + tl.program_id(0), tl.sum(kl, axis=0))
        if teacher_lse is not None:
            lse_t = tl.where(inside_query, max_t + tl.log2(sum_t), 0.0)
            tl.store(teacher_lse + head * S + queries, lse_t, mask=inside)


@triton.jit(do_not_specialize=["S", "seed", "dropped"])
def _query_gradient_kernel(query, key, value, teacher_query, teacher_key, attention_mask, ends,
                           seed, student_lse, teacher_lse, context, d_context, d_kl,
                           shifts, d_query, row_stride, teacher_row_stride, S,
                           dropped, scale_of_kept,
                           D: tl.constexpr, TEACHER_D: tl.constexpr, D_TILE: tl.constexpr,
                           QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """One program: the gradient of a tile of queries, of one head of one sequence.

        dP = c kept dO V^T,    w = d_kl of the row
        dS = P_s (dP - sum_j P_s dP) + w (P_s - P_t) = P_s (dP - shift) - w P_t
        dQ = dS K / sqrt(D)

    The sum over j is that over D of O dO, so that shift = sum_d O dO - w. It is left in `shifts`
    for `_key_gradient_kernel`.
    """
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    N = tl.num_programs(1)
    head = b * N + n
    offset = b * S * row_stride + n * D
    teacher_offset = b * S * teacher_row_stride + n * TEACHER_D
    place = (b * S * N + n) * D  # in what is made here
    attention_mask += b * S
    end = tl.load(ends + b).to(tl.int32)
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside_query = queries < end
    query_s = _load_rows(query + offset, queries, row_stride, inside_query, D, D_TILE)
    lse_s = tl.load(student_lse + head * S + queries, mask=inside_query, other=0.0)
    shift = tl.zeros([QUERIES], tl.float32)
    if value is not None:
        d_out = _load_rows(d_context + place, queries, N * D, inside_query, D, D_TILE)
        out = _load_rows(context + place, queries, N * D, inside_query, D, D_TILE)
        shift += tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
        if seed is not None:
            first_key, second_key = keys_of_rows(seed, head * S + queries)
    if teacher_query is not None:
        query_t = _load_rows(
            teacher_query + teacher_offset,
            queries,
            teacher_row_stride,
            inside_query,
            TEACHER_D,
            D_TILE,
        )
        lse_t = tl.load(teacher_lse + head * S + queries, mask=inside_query, other=0.0)
        real_query = tl.load(attention_mask + queries, mask=inside_query, other=0) != 0
        w = tl.where(real_query, tl.load(d_kl), 0.0)
        shift -= w
    tl.store(shifts + head * S + queries, shift, mask=inside_query)

    total = tl.zeros([QUERIES, D_TILE], tl.float32)
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        inside_key = keys < end
        real_key = tl.load(attention_mask + keys, mask=inside_key, other=0) != 0
        key_s = _load_rows(key + offset, keys, row_stride, inside_key, D, D_TILE)
        scores_s = _product(query_s, key_s) * (D**-0.5 / LOG_2)
        probs_s = tl.exp2(scores_s - lse_s[:, None])
        if value is not None:
            value_s = _load_rows(value + offset, keys, row_stride, inside_key, D, D_TILE)
            d_probs = _product(d_out, value_s)
            if seed is not None:
                stays = kept(first_key[:, None], second_key[:, None], keys[None, :], dropped)
                d_probs *= tl.where(stays, scale_of_kept, 0.0)
            d_scores = probs_s * (d_probs - shift[:, None])
        else:
            d_scores = -probs_s * shift[:, None]
        if teacher_query is not None:
            key_t = _load_rows(
                teacher_key + teacher_offset,
                keys,
                teacher_row_stride,
                inside_key,
                TEACHER_D,
                D_TILE,
            )
            scores_t = _product(query_t, key_t) * (TEACHER_D**-0.5 / LOG_2)
            d_scores -= w[:, None] * tl.exp2(scores_t - lse_t[:, None])
        d_scores = tl.where(real_key[None, :], d_scores, 0.0)
        total += tl.dot(d_scores.to(key_s.dtype), key_s, input_precision="ieee")

    _store_rows(d_query + place, total * (D**-0.5), queries, N * D, queries < S, D, D_TILE)


@triton.jit(do_not_specialize=["S", "seed", "dropped"])
def _key_gradient_kernel(query, key, value, teacher_query, teacher_key, attention_mask, ends,
                         seed, student_lse, teacher_lse, d_context, d_kl, shifts,
                         d_key, d_value, row_stride, teacher_row_stride, S,
                         dropped, scale_of_kept,
                         D: tl.constexpr, TEACHER_D: tl.constexpr, D_TILE: tl.constexpr,
                         QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """One program: the gradients of a tile of keys and values, of one head of one sequence.

        dK = dS^T Q / sqrt(D),    dV = (c kept P_s)^T dO

    with dS as in `_query_gradient_kernel`. Here every tile of maps is transposed: (keys, queries).
    A query behind the end has a log-sum-exp so large that its P is 0.
    """
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    N = tl.num_programs(1)
    head = b * N + n
    offset = b * S * row_stride + n * D
    teacher_offset = b * S * teacher_row_stride + n * TEACHER_D
    place = (b * S * N + n) * D  # in what is made here
    attention_mask += b * S
    end = tl.load(ends + b).to(tl.int32)
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    inside_key = keys < end
    real_key = tl.load(attention_mask + keys, mask=inside_key, other=0) != 0
    key_s = _load_rows(key + offset, keys, row_stride, inside_key, D, D_TILE)
    key_total = tl.zeros([KEYS, D_TILE], tl.float32)
    if value is not None:
        value_s = _load_rows(value + offset, keys, row_stride, inside_key, D, D_TILE)
        value_total = tl.zeros([KEYS, D_TILE], tl.float32)
    if teacher_query is not None:
        key_t = _load_rows(
            teacher_key + teacher_offset, keys, teacher_row_stride, inside_key, TEACHER_D, D_TILE
        )
        upstream = tl.load(d_kl)

    for start in range(0, end, QUERIES):
        queries = start + tl.arange(0, QUERIES)
        inside_query = queries < end
        query_s = _load_rows(query + offset, queries, row_stride, inside_query, D, D_TILE)
        lse_s = tl.load(student_lse + head * S + queries, mask=inside_query, other=-LOWEST)
        shift = tl.load(shifts + head * S + queries, mask=inside_query, other=0.0)
        scores_s = _product(key_s, query_s) * (D**-0.5 / LOG_2)
        probs_s = tl.exp2(scores_s - lse_s[None, :])
        if value is not None:
            d_out = _load_rows(d_context + place, queries, N * D, inside_query, D, D_TILE)
            d_probs = _product(value_s, d_out)
            dropped_probs = probs_s
            if seed is not None:
                first_key, second_key = keys_of_rows(seed, head * S + queries)
                stays = kept(first_key[None, :], second_key[None, :], keys[:, None], dropped)
                d_probs *= tl.where(stays, scale_of_kept, 0.0)
                dropped_probs = tl.where(stays, probs_s, 0.0)
            value_total += tl.dot(dropped_probs.to(d_out.dtype), d_out, input_precision="ieee")
            d_scores = probs_s * (d_probs - shift[None, :])
        else:
            d_scores = -probs_s * shift[None, :]
        if teacher_query is not None:
            real_query = tl.load(attention_mask + queries, mask=inside_query, other=0) != 0
            query_t = _load_rows(
                teacher_query + teacher_offset, queries, teacher_row_stride, inside_query,
                TEACHER_D, D_TILE,
            )  # fmt: skip
            lse_t = tl.load(teacher_lse + head * S + queries, mask=inside_query, other=-LOWEST)
            scores_t = _product(key_t, query_t) * (TEACHER_D**-0.5 / LOG_2)
            w = tl.where(real_query, upstream, 0.0)
            d_scores -= w[None, :] * tl.exp2(scores_t - lse_t[None, :])
        key_total += tl.dot(d_scores.to(query_s.dtype), query_s, input_precision="ieee")

    inside = keys < S
    key_total = tl.where(real_key[:, None], key_total * (D**-0.5), 0.0)
    _store_rows(d_key + place, key_total, keys, N * D, inside, D, D_TILE)
    if value is not None:
        value_total = tl.where(real_key[:, None], value_total * scale_of_kept, 0.0)
        _store_rows(d_value + place, value_total, keys, N * D, inside, D, D_TILE)


@torch.compiler.disable
def attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, dropout: float
) -> Tensor:
    """`plain.attention`; the context of padding behind the last real token is 0."""
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
        _forward_kernel[grid](*student, *call.constants, *results, *call.numbers, **options)
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
        _query_gradient_kernel[triton.cdiv(S, options["QUERIES"]), N, B](
            *saved, context, d_context, d_kl, shifts, d_query, *call.numbers, **options
        )
        options = call.options(KEY_GRADIENT)
        _key_gradient_kernel[triton.cdiv(S, options["KEYS"]), N, B](
            *saved, d_context, d_kl, shifts, d_key, d_value, *call.numbers, **options
        )
        gradients = (d_query, d_key, d_value)
        gradients = (each if each is None else each.transpose(1, 2) for each in gradients)
        return *gradients, None, None, None, None


Heads = Sequence[Tensor | None]


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
        self.float32 = query.dtype == torch.float32
        attention_mask = attention_mask.contiguous()
        seed = draw_seed() if dropout > 0 else None
        self.constants = (*teacher, attention_mask, _ends(attention_mask), seed)
        self.numbers = (row_stride, teacher_row_stride, S, *dropped_draws(dropout))

    def options(self, half_precision: dict[str, int]) -> dict[str, Any]:
        """The sizes a kernel is compiled for."""
        return self.sizes | (FLOAT32 if self.float32 else half_precision)


@lru_cache(maxsize=1)  # all layers are given the same mask
def _ends(attention_mask: Tensor) -> Tensor:
    """(B,): one behind the last real token of each sequence; S where there is none."""
    return attention_mask.shape[1] - attention_mask.flip(1).argmax(1)


def _as_rows(heads: Heads) -> tuple[list[Tensor | None], int]:
    """Tensors (B, N, S, D) as (B, S, N, D) with equal strides, and that from row to row.

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
