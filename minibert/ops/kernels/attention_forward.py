"""The forward kernel of attention and of the loss of its maps.

Shapes: B batch, S sequence, N heads, D head size. Tensors of heads are (B, S, N, D) in memory. A
tensor that is None is not asked for: without value no context, without teacher no loss, without
seed no dropout.
"""

import triton
import triton.language as tl

from minibert.ops.kernels.attention_tiles import (
    LOG_2,
    LOWEST,
    load_rows,
    place_of_program,
    scores,
    softmax_of_nothing,
    softmax_so_far,
    store_rows,
)
from minibert.ops.kernels.draws import kept, keys_of_rows


@triton.jit(do_not_specialize=["S", "seed", "dropped"])
def forward_kernel(query, key, value, teacher_query, teacher_key, attention_mask, ends, seed,
                   context, kl_parts, student_lse, teacher_lse, row_stride, teacher_row_stride, S,
                   dropped, scale_of_kept, D: tl.constexpr, TEACHER_D: tl.constexpr,
                   D_TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """One program: a tile of queries, of one head of one sequence, with all its keys.

        E_ij = exp(S_ij - max_i),   P_ij = E_ij / sum_j E_ij,   c = 1 / (1 - dropout)
        O_i = sum_j c kept_ij P_ij V_j
        KL_i = sum_j P_t (S_t - S_s) - lse_t + lse_s

    Where the maps are close, large numbers nearly cancel. So only differences are added up, each
    formed in float32 from two single numbers: S_t - S_s pair by pair, and at the end
    lse_s - lse_t = max_s - max_t + log(sum_s / sum_t).
    """
    N = tl.num_programs(1)
    b, head, offset, teacher_offset, place = place_of_program(
        S, row_stride, teacher_row_stride, D, TEACHER_D
    )
    attention_mask += b * S
    end = tl.load(ends + b).to(tl.int32)
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside_query = queries < end
    query_s = load_rows(query + offset, queries, row_stride, inside_query, D, D_TILE)
    max_s, sum_s = softmax_of_nothing(QUERIES)
    if value is not None:
        total = tl.zeros([QUERIES, D_TILE], tl.float32)
        if seed is not None:
            first_key, second_key = keys_of_rows(seed, head * S + queries)
    if teacher_query is not None:
        teacher_query += teacher_offset
        teacher_key += teacher_offset
        query_t = load_rows(
            teacher_query, queries, teacher_row_stride, inside_query, TEACHER_D, D_TILE
        )
        max_t, sum_t = softmax_of_nothing(QUERIES)
        weighted = tl.zeros([QUERIES], tl.float32)  # sum_j exp(S_t - max_t) (S_t - S_s)

    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        inside_key = keys < end
        real_key = tl.load(attention_mask + keys, mask=inside_key, other=0) != 0
        key_s = load_rows(key + offset, keys, row_stride, inside_key, D, D_TILE)
        scores_s = tl.where(real_key[None, :], scores(query_s, key_s, D), LOWEST)
        exp_s, rescale_s, max_s, sum_s = softmax_so_far(scores_s, max_s, sum_s)
        if teacher_query is not None:
            key_t = load_rows(teacher_key, keys, teacher_row_stride, inside_key, TEACHER_D, D_TILE)
            scores_t = tl.where(real_key[None, :], scores(query_t, key_t, TEACHER_D), LOWEST)
            exp_t, rescale_t, max_t, sum_t = softmax_so_far(scores_t, max_t, sum_t)
            weighted = weighted * rescale_t + tl.sum(exp_t * (scores_t - scores_s), axis=1)
        if value is not None:
            value_s = load_rows(value + offset, keys, row_stride, inside_key, D, D_TILE)
            if seed is not None:
                stays = kept(first_key[:, None], second_key[:, None], keys[None, :], dropped)
                exp_s = tl.where(stays, exp_s, 0.0)
            total = total * rescale_s[:, None]
            total += tl.dot(exp_s.to(value_s.dtype), value_s, input_precision="ieee")

    if value is not None:
        factor = tl.where(inside_query, scale_of_kept / sum_s, 0.0)
        store_rows(context + place, total * factor[:, None], queries, N * D, queries < S, D, D_TILE)
    if student_lse is not None:
        _store_log_sums(student_lse + head * S, max_s, sum_s, queries, inside_query, S)
    if teacher_query is not None:
        real_query = tl.load(attention_mask + queries, mask=inside_query, other=0) != 0
        kl = weighted / sum_t + (max_s - max_t) + tl.log2(sum_s / sum_t)
        kl = tl.where(real_query, kl * LOG_2, 0.0)
        tl.store(kl_parts + head * tl.num_programs(0) + tl.program_id(0), tl.sum(kl, axis=0))
        if teacher_lse is not None:
            _store_log_sums(teacher_lse + head * S, max_t, sum_t, queries, inside_query, S)


@triton.jit
def _store_log_sums(lse, largest, total, queries, inside_query, S):
    """log2 sum_j 2^score of each query, as scores are to base 2; 0 behind the last real token."""
    values = tl.where(inside_query, largest + tl.log2(total), 0.0)
    tl.store(lse + queries, values, mask=queries < S)
