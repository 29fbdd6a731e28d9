"""The kernels of the gradients of attention and of the loss of its maps.

Shapes and arguments as in `attention_forward.py`; d_context is like the context, d_kl a scalar. No
two programs write to one place, so that the same inputs give the same bits: a kernel for queries,
and one for keys and values, each of which forms the scores anew.
"""

import triton
import triton.language as tl

from minibert.ops.kernels.attention_tiles import (
    LOWEST,
    load_rows,
    place_of_program,
    product,
    scores,
    store_rows,
)
from minibert.ops.kernels.draws import kept, keys_of_rows


@triton.jit(do_not_specialize=["S", "seed", "dropped"])
def query_gradient_kernel(query, key, value, teacher_query, teacher_key, attention_mask, ends, seed,
                          student_lse, teacher_lse, context, d_context, d_kl, shifts, d_query,
                          row_stride, teacher_row_stride, S, dropped, scale_of_kept,
                          D: tl.constexpr, TEACHER_D: tl.constexpr, D_TILE: tl.constexpr,
                          QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """One program: the gradient of a tile of queries, of one head of one sequence.

        dP = c kept dO V^T,    w = d_kl, and 0 in a row of padding
        dS = P_s (dP - sum_j P_s dP) + w (P_s - P_t) = P_s (dP - shift) - w P_t
        dQ = dS K / sqrt(D)

    sum_j P_ij dP_ij = sum_j c kept_ij P_ij (dO_i . V_j) = dO_i . O_i, so that shift = dO . O - w.
    It is left in `shifts` for `key_gradient_kernel`.
    """
    N = tl.num_programs(1)
    b, head, offset, teacher_offset, place = place_of_program(
        S, row_stride, teacher_row_stride, D, TEACHER_D
    )
    attention_mask += b * S
    end = tl.load(ends + b).to(tl.int32)
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = queries < end
    query_s = load_rows(query + offset, queries, row_stride, inside, D, D_TILE)
    lse_s = tl.load(student_lse + head * S + queries, mask=inside, other=0.0)
    shift = tl.zeros([QUERIES], tl.float32)
    if value is not None:
        d_out = load_rows(d_context + place, queries, N * D, inside, D, D_TILE)
        out = load_rows(context + place, queries, N * D, inside, D, D_TILE)
        shift += tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
        if seed is not None:
            first_key, second_key = keys_of_rows(seed, head * S + queries)
    if teacher_query is not None:
        teacher_query += teacher_offset
        teacher_key += teacher_offset
        query_t = load_rows(teacher_query, queries, teacher_row_stride, inside, TEACHER_D, D_TILE)
        lse_t = tl.load(teacher_lse + head * S + queries, mask=inside, other=0.0)
        w = tl.where(tl.load(attention_mask + queries, mask=inside, other=0) != 0, tl.load(d_kl), 0)
        shift -= w
    tl.store(shifts + head * S + queries, shift, mask=inside)

    total = tl.zeros([QUERIES, D_TILE], tl.float32)
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        inside_key = keys < end
        real_key = tl.load(attention_mask + keys, mask=inside_key, other=0) != 0
        key_s = load_rows(key + offset, keys, row_stride, inside_key, D, D_TILE)
        probs_s = tl.exp2(scores(query_s, key_s, D) - lse_s[:, None])
        if value is not None:
            value_s = load_rows(value + offset, keys, row_stride, inside_key, D, D_TILE)
            d_probs = product(d_out, value_s)
            if seed is not None:
                stays = kept(first_key[:, None], second_key[:, None], keys[None, :], dropped)
                d_probs *= tl.where(stays, scale_of_kept, 0.0)
            d_scores = probs_s * (d_probs - shift[:, None])
        else:
            d_scores = -probs_s * shift[:, None]
        if teacher_query is not None:
            key_t = load_rows(teacher_key, keys, teacher_row_stride, inside_key, TEACHER_D, D_TILE)
            probs_t = tl.exp2(scores(query_t, key_t, TEACHER_D) - lse_t[:, None])
            d_scores -= w[:, None] * probs_t
        d_scores = tl.where(real_key[None, :], d_scores, 0.0)
        total += tl.dot(d_scores.to(key_s.dtype), key_s, input_precision="ieee")
    store_rows(d_query + place, total * (D**-0.5), queries, N * D, queries < S, D, D_TILE)


@triton.jit(do_not_specialize=["S", "seed", "dropped"])
def key_gradient_kernel(query, key, value, teacher_query, teacher_key, attention_mask, ends, seed,
                        student_lse, teacher_lse, d_context, d_kl, shifts, d_key, d_value,
                        row_stride, teacher_row_stride, S, dropped, scale_of_kept,
                        D: tl.constexpr, TEACHER_D: tl.constexpr, D_TILE: tl.constexpr,
                        QUERIES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """One program: the gradients of a tile of keys and values, of one head of one sequence.

        dK = dS^T Q / sqrt(D),    dV = (c kept P_s)^T dO

    with dS as in `query_gradient_kernel`. Here every tile of maps is transposed: (keys, queries).
    A query behind the end has a log-sum-exp so large that its P is 0.
    """
    N = tl.num_programs(1)
    b, head, offset, teacher_offset, place = place_of_program(
        S, row_stride, teacher_row_stride, D, TEACHER_D
    )
    attention_mask += b * S
    end = tl.load(ends + b).to(tl.int32)
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    inside_key = keys < end
    real_key = tl.load(attention_mask + keys, mask=inside_key, other=0) != 0
    key_s = load_rows(key + offset, keys, row_stride, inside_key, D, D_TILE)
    key_total = tl.zeros([KEYS, D_TILE], tl.float32)
    if value is not None:
        value_s = load_rows(value + offset, keys, row_stride, inside_key, D, D_TILE)
        value_total = tl.zeros([KEYS, D_TILE], tl.float32)
    if teacher_query is not None:
        teacher_query += teacher_offset
        teacher_key += teacher_offset
        key_t = load_rows(teacher_key, keys, teacher_row_stride, inside_key, TEACHER_D, D_TILE)
        upstream = tl.load(d_kl)

    for start in range(0, end, QUERIES):
        queries = start + tl.arange(0, QUERIES)
        inside = queries < end
        query_s = load_rows(query + offset, queries, row_stride, inside, D, D_TILE)
        lse_s = tl.load(student_lse + head * S + queries, mask=inside, other=-LOWEST)
        shift = tl.load(shifts + head * S + queries, mask=inside, other=0.0)
        probs_s = tl.exp2(scores(key_s, query_s, D) - lse_s[None, :])
        if value is not None:
            d_out = load_rows(d_context + place, queries, N * D, inside, D, D_TILE)
            d_probs = product(value_s, d_out)
            kept_probs = probs_s
            if seed is not None:
                first_key, second_key = keys_of_rows(seed, head * S + queries)
                stays = kept(first_key[None, :], second_key[None, :], keys[:, None], dropped)
                d_probs *= tl.where(stays, scale_of_kept, 0.0)
                kept_probs = tl.where(stays, probs_s, 0.0)
            value_total += tl.dot(kept_probs.to(d_out.dtype), d_out, input_precision="ieee")
            d_scores = probs_s * (d_probs - shift[None, :])
        else:
            d_scores = -probs_s * shift[None, :]
        if teacher_query is not None:
            real_query = tl.load(attention_mask + queries, mask=inside, other=0) != 0
            query_t = load_rows(
                teacher_query, queries, teacher_row_stride, inside, TEACHER_D, D_TILE
            )
            lse_t = tl.load(teacher_lse + head * S + queries, mask=inside, other=-LOWEST)
            probs_t = tl.exp2(scores(key_t, query_t, TEACHER_D) - lse_t[None, :])
            d_scores -= tl.where(real_query, upstream, 0.0)[None, :] * probs_t
        key_total += tl.dot(d_scores.to(query_s.dtype), query_s, input_precision="ieee")

    key_total = tl.where(real_key[:, None], key_total * (D**-0.5), 0.0)
    store_rows(d_key + place, key_total, keys, N * D, keys < S, D, D_TILE)
    if value is not None:
        value_total = tl.where(real_key[:, None], value_total * scale_of_kept, 0.0)
        store_rows(d_value + place, value_total, keys, N * D, keys < S, D, D_TILE)
