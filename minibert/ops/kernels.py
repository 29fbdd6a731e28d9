"""Triton twins of the losses' inner loops: attention maps, hidden states, rows of the vocabulary.

Shapes: B batch, S sequence, N heads, D head size, H hidden, V vocabulary, m rows of a tile. Scores
exist only as tiles in registers. Sums are float32, and no two programs write to one place: the same
inputs give the same bits. The tensors lie on the current CUDA device. This file is imported only
where Triton is installed.

A softmax over tiles keeps the largest score so far and sums relative to it, and rescales the sums
when a larger one turns up (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., 2205.14135).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibert.ops.plain import IGNORED_LABEL, SHORTEST

# Queries and keys a tile. With 4 warps the registers of an Ampere or Hopper GPU hold the scores of
# both models and a sum of gradients, up to D = 128. tl.dot asks for powers of 2 from 16 up.
HALF_PRECISION_TILE = 64
FLOAT32_TILE = 32
MAP_LAUNCH = {"num_warps": 4, "num_stages": 2}
VOCABULARY_TILE = 4096
VOCABULARY_LAUNCH = {"num_warps": 8}

LOWEST = tl.constexpr(-1e30)  # below every score, yet finite: the difference of two is 0, not NaN


@triton.jit
def _load_rows(matrix, rows, row_stride, real, D: tl.constexpr, D_TILE: tl.constexpr):
    """Rows of a matrix (S, D) as (rows, D_TILE): 0 from column D on, and in rows that are not real.

    So what stands in padding, NaN included, is never read.
    """
    columns = tl.arange(0, D_TILE)
    places = matrix + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    return tl.load(places, mask=real[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _scores(rows, others, D: tl.constexpr):
    """rows others^T / sqrt(D) in float32; float32 is multiplied as such, never as TF32."""
    return tl.dot(rows, tl.trans(others), input_precision="ieee") * (D**-0.5)


@triton.jit
def _map_loss_kernel(student_query, student_key, teacher_query, teacher_key, attention_mask,
                     kl_parts, student_lse, teacher_lse,
                     student_batch_stride, student_head_stride, student_row_stride,
                     teacher_batch_stride, teacher_head_stride, teacher_row_stride, S,
                     STUDENT_D: tl.constexpr, TEACHER_D: tl.constexpr,
                     D_TILE: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """One program: a tile of queries, of one head of one sequence, with all its keys.

        KL_i = sum_j P_t (S_t - S_s) - lse_t + lse_s

    Where the maps are close, large numbers nearly cancel. So only differences are added up, each
    formed in float32 from two single numbers: S_t - S_s pair by pair, and at the end
    lse_s - lse_t = max_s - max_t + log(sum_s / sum_t).
    """
    n, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # B N S D may pass 2^31
    head = b * tl.num_programs(1) + n
    student_offset = b * student_batch_stride + n * student_head_stride
    teacher_offset = b * teacher_batch_stride + n * teacher_head_stride
    student_query += student_offset
    student_key += student_offset
    teacher_query += teacher_offset
    teacher_key += teacher_offset
    attention_mask += b * S
    queries = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real_query = tl.load(attention_mask + queries, mask=queries < S, other=0) != 0
    query_s = _load_rows(student_query, queries, student_row_stride, real_query, STUDENT_D, D_TILE)
    query_t = _load_rows(teacher_query, queries, teacher_row_stride, real_query, TEACHER_D, D_TILE)

    max_s = tl.full([TILE], LOWEST, tl.float32)
    max_t = tl.full([TILE], LOWEST, tl.float32)
    sum_s = tl.zeros([TILE], tl.float32)
    sum_t = tl.zeros([TILE], tl.float32)
    weighted = tl.zeros([TILE], tl.float32)  # sum_j exp(S_t - max_t) (S_t - S_s)
    for start in range(0, S, TILE):
        keys = start + tl.arange(0, TILE)
        real_key = tl.load(attention_mask + keys, mask=keys < S, other=0) != 0
        key_s = _load_rows(student_key, keys, student_row_stride, real_key, STUDENT_D, D_TILE)
        key_t = _load_rows(teacher_key, keys, teacher_row_stride, real_key, TEACHER_D, D_TILE)
        scores_s = tl.where(real_key[None, :], _scores(query_s, key_s, STUDENT_D), LOWEST)
        scores_t = tl.where(real_key[None, :], _scores(query_t, key_t, TEACHER_D), LOWEST)
        # Tiles of padding before the first real key add exp(LOWEST - LOWEST) = 1 a key to the
        # sums; the first real key rescales that by exp(LOWEST - max) = 0.
        new_max_s = tl.maximum(max_s, tl.max(scores_s, axis=1))
        new_max_t = tl.maximum(max_t, tl.max(scores_t, axis=1))
        rescale_t = tl.exp(max_t - new_max_t)
        exp_s = tl.exp(scores_s - new_max_s[:, None])
        exp_t = tl.exp(scores_t - new_max_t[:, None])
        sum_s = sum_s * tl.exp(max_s - new_max_s) + tl.sum(exp_s, axis=1)
        sum_t = sum_t * rescale_t + tl.sum(exp_t, axis=1)
        weighted = weighted * rescale_t + tl.sum(exp_t * (scores_t - scores_s), axis=1)
        max_s, max_t = new_max_s, new_max_t

    kl = weighted / sum_t + (max_s - max_t) + tl.log(sum_s / sum_t)
    kl = tl.where(real_query, kl, 0.0)
    tl.store(kl_parts + head * tl.num_programs(0) + tl.program_id(0), tl.sum(kl, axis=0))
    lse_s = tl.where(real_query, max_s + tl.log(sum_s), 0.0)
    lse_t = tl.where(real_query, max_t + tl.log(sum_t), 0.0)
    tl.store(student_lse + head * S + queries, lse_s, mask=queries < S)
    tl.store(teacher_lse + head * S + queries, lse_t, mask=queries < S)


@triton.jit
def _map_gradient_kernel(student_rows, teacher_rows, student_others, teacher_others,
                         attention_mask, student_lse, teacher_lse, upstream, gradient,
                         student_batch_stride, student_head_stride, student_row_stride,
                         teacher_batch_stride, teacher_head_stride, teacher_row_stride, S,
                         ROWS_ARE_QUERIES: tl.constexpr, STUDENT_D: tl.constexpr,
                         TEACHER_D: tl.constexpr, D_TILE: tl.constexpr,
                         TILE: tl.constexpr):  # fmt: skip
    """One program: the gradient of a tile of rows, the queries or the keys of one head.

        dS = P_s - P_t        dQ = upstream dS K / sqrt(D)        dK = upstream dS^T Q / sqrt(D)

    Both are one loop: rows are what the gradient is of, others what they were multiplied with.
    """
    n, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = b * tl.num_programs(1) + n
    student_offset = b * student_batch_stride + n * student_head_stride
    teacher_offset = b * teacher_batch_stride + n * teacher_head_stride
    student_rows += student_offset
    student_others += student_offset
    teacher_rows += teacher_offset
    teacher_others += teacher_offset
    attention_mask += b * S
    student_lse += head * S
    teacher_lse += head * S
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real_row = tl.load(attention_mask + rows, mask=rows < S, other=0) != 0
    row_s = _load_rows(student_rows, rows, student_row_stride, real_row, STUDENT_D, D_TILE)
    row_t = _load_rows(teacher_rows, rows, teacher_row_stride, real_row, TEACHER_D, D_TILE)

    total = tl.zeros([TILE, D_TILE], tl.float32)
    for start in range(0, S, TILE):
        others = start + tl.arange(0, TILE)
        real_other = tl.load(attention_mask + others, mask=others < S, other=0) != 0
        other_s = _load_rows(
            student_others, others, student_row_stride, real_other, STUDENT_D, D_TILE
        )
        other_t = _load_rows(
            teacher_others, others, teacher_row_stride, real_other, TEACHER_D, D_TILE
        )
        # A log-sum-exp belongs to a query. The loads are masked by what is inside, not by what is
        # real: Triton 3.2 cannot schedule one that waits for the mask beside those that do.
        if ROWS_ARE_QUERIES:
            lse_s = tl.load(student_lse + rows, mask=rows < S, other=0.0)[:, None]
            lse_t = tl.load(teacher_lse + rows, mask=rows < S, other=0.0)[:, None]
        else:
            lse_s = tl.load(student_lse + others, mask=others < S, other=0.0)[None, :]
            lse_t = tl.load(teacher_lse + others, mask=others < S, other=0.0)[None, :]
        probs_s = tl.exp(_scores(row_s, other_s, STUDENT_D) - lse_s)
        probs_t = tl.exp(_scores(row_t, other_t, TEACHER_D) - lse_t)
        pairs = real_row[:, None] & real_other[None, :]
        difference = tl.where(pairs, probs_s - probs_t, 0.0)  # dS, or dS^T, without upstream
        total += tl.dot(difference.to(other_s.dtype), other_s, input_precision="ieee")

    total *= tl.load(upstream) * (STUDENT_D**-0.5)
    columns = tl.arange(0, D_TILE)
    places = ((b * S + rows[:, None]) * tl.num_programs(1) + n) * STUDENT_D + columns[None, :]
    inside = (rows < S)[:, None] & (columns < STUDENT_D)[None, :]
    tl.store(gradient + places, total.to(gradient.dtype.element_ty), mask=inside)


def attention_map_loss_forward(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor,
    attention_mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`plain.attention_map_loss`, and what its gradient needs.

    queries and keys (B, N, S, D) in float32 or a half precision, in any layout, D may differ
    between the models; attention_mask (B, S), 1 = real. Returns kl_sum (a float32 scalar) and the
    log-sum-exp of each real query's scores, of student and teacher: (B, N, S) in float32, 0 in
    padding rows.
    """
    student_query, student_key = _one_layout(student_query, student_key)
    teacher_query, teacher_key = _one_layout(teacher_query, teacher_key)
    B, N, S, _ = student_query.shape
    sizes = _tile_sizes(student_query, teacher_query)
    grid = (triton.cdiv(S, sizes["TILE"]), N, B)
    kl_parts = student_query.new_empty(B, N, grid[0], dtype=torch.float32)
    student_lse = student_query.new_empty(B, N, S, dtype=torch.float32)
    teacher_lse = torch.empty_like(student_lse)
    models = (student_query, student_key, teacher_query, teacher_key)
    layout = (*student_query.stride()[:3], *teacher_query.stride()[:3], S)
    results = (kl_parts, student_lse, teacher_lse)
    _map_loss_kernel[grid](
        *models, attention_mask.contiguous(), *results, *layout, **sizes, **MAP_LAUNCH
    )
    return kl_parts.sum(), student_lse, teacher_lse


def attention_map_loss_backward(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor,
    attention_mask: Tensor, student_lse: Tensor, teacher_lse: Tensor, upstream: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of upstream * kl_sum by the student's queries and keys.

    The inputs and log-sum-exps of `attention_map_loss_forward`; upstream a float32 scalar tensor,
    read on the device. Returns two views (B, N, S, D) of (B, S, N, D), in the student's dtype.
    """
    student_query, student_key = _one_layout(student_query, student_key)
    teacher_query, teacher_key = _one_layout(teacher_query, teacher_key)
    B, N, S, D = student_query.shape
    query_gradient = student_query.new_empty(B, S, N, D)
    key_gradient = torch.empty_like(query_gradient)
    sizes = _tile_sizes(student_query, teacher_query)
    kernel = _map_gradient_kernel[(triton.cdiv(S, sizes["TILE"]), N, B)]
    constants = (attention_mask.contiguous(), student_lse, teacher_lse, upstream)
    layout = (*student_query.stride()[:3], *teacher_query.stride()[:3], S)
    queries = (student_query, teacher_query)
    keys = (student_key, teacher_key)
    options = sizes | MAP_LAUNCH
    kernel(*queries, *keys, *constants, query_gradient, *layout, ROWS_ARE_QUERIES=True, **options)
    kernel(*keys, *queries, *constants, key_gradient, *layout, ROWS_ARE_QUERIES=False, **options)
    return query_gradient.transpose(1, 2), key_gradient.transpose(1, 2)  # (B, N, S, D)


def _one_layout(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same strides, D contiguous. A model makes them so; others are copied."""
    assert query.shape == key.shape and query.dtype == key.dtype
    if query.stride() == key.stride() and query.stride(-1) == 1:
        return query, key
    return query.contiguous(), key.contiguous()


def _tile_sizes(student_query: Tensor, teacher_query: Tensor) -> dict[str, int]:
    """The sizes a kernel is compiled for: D of both models and the tiles that hold either."""
    assert student_query.shape[:3] == teacher_query.shape[:3]
    student_D, teacher_D = student_query.shape[-1], teacher_query.shape[-1]
    float32 = torch.float32 in (student_query.dtype, teacher_query.dtype)
    return {
        "STUDENT_D": student_D,
        "TEACHER_D": teacher_D,
        "D_TILE": triton.next_power_of_2(max(16, student_D, teacher_D)),
        "TILE": FLOAT32_TILE if float32 else HALF_PRECISION_TILE,
    }


@triton.jit
def _cosine_rows_kernel(student, teacher, gradient, is_real, losses, H: tl.constexpr,
                        TILE: tl.constexpr, SHORTEST_SQUARE: tl.constexpr):  # fmt: skip
    """One program: one row. With c its cosine: d(1 - c) / ds = c s / |s|^2 - t / (|s| |t|)."""
    row = tl.program_id(0).to(tl.int64)  # m H may pass 2^31
    columns = tl.arange(0, TILE)
    inside = columns < H
    real = tl.load(is_real + row) != 0
    places = row * H + columns
    s = tl.load(student + places, mask=inside & real, other=0.0).to(tl.float32)
    t = tl.load(teacher + places, mask=inside & real, other=0.0).to(tl.float32)
    s_square = tl.maximum(tl.sum(s * s, axis=0), SHORTEST_SQUARE)
    t_square = tl.maximum(tl.sum(t * t, axis=0), SHORTEST_SQUARE)
    inverse = 1.0 / tl.sqrt(s_square * t_square)
    cosine = tl.sum(s * t, axis=0) * inverse
    tl.store(losses + row, tl.where(real, 1.0 - cosine, 0.0))
    d_student = cosine / s_square * s - inverse * t  # 0 where not real: s and t are
    tl.store(gradient + places, d_student.to(gradient.dtype.element_ty), mask=inside)


def cosine_rows(student: Tensor, teacher: Tensor, gradient: Tensor, is_real: Tensor) -> Tensor:
    """1 - cosine of each row; its gradient by the student's row is written to `gradient`.

    student, teacher, gradient (m, H), contiguous, float32 or a half precision; is_real (m,). Rows
    that are not real are not read; their loss and gradient are 0. Returns (m,) in float32.
    """
    m, H = student.shape
    assert all(part.is_contiguous() and part.shape == (m, H) for part in (teacher, gradient))
    losses = student.new_empty(m, dtype=torch.float32)
    if m > 0:
        sizes = {"H": H, "TILE": triton.next_power_of_2(H), "SHORTEST_SQUARE": SHORTEST**2}
        _cosine_rows_kernel[(m,)](student, teacher, gradient, is_real, losses, **sizes)
    return losses


@triton.jit
def _load_logits(logits, bias, columns, V: tl.constexpr):
    """Logits with their bias, float32; from column V on the lowest number, of which exp is 0."""
    inside = columns < V
    tile = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
    tile += tl.load(bias + columns, mask=inside, other=0.0)
    return tl.where(inside, tile, LOWEST)


@triton.jit
def _vocabulary_rows_kernel(student_logits, teacher_logits, student_bias, teacher_bias, labels,
                            mlm_losses, output_losses, mlm_weight, output_weight,
                            V: tl.constexpr, TEMPERATURE: tl.constexpr,
                            IGNORED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """One program: one row. First the sums of its softmaxes, then its gradient over its logits."""
    row = tl.program_id(0).to(tl.int64)  # m V may pass 2^31
    student_logits += row * V
    label = tl.load(labels + row)
    counts = label != IGNORED
    label_logit = tl.load(student_logits + label, mask=counts, other=0.0).to(tl.float32)
    label_logit += tl.load(student_bias + label, mask=counts, other=0.0)

    # The largest z / T is the largest z, divided: one maximum serves both temperatures.
    max_s = tl.full([], LOWEST, tl.float32)
    max_t = tl.full([], LOWEST, tl.float32)
    sum_s = tl.full([], 0.0, tl.float32)  # sum_v exp(z_s - max_s)
    warm_sum_s = tl.full([], 0.0, tl.float32)  # sum_v exp((z_s - max_s) / T)
    warm_sum_t = tl.full([], 0.0, tl.float32)  # sum_v exp((z_t - max_t) / T)
    weighted = tl.full([], 0.0, tl.float32)  # sum_v exp((z_t - max_t) / T) (z_t - z_s)
    for start in range(0, V, TILE):
        columns = start + tl.arange(0, TILE)
        logits_s = _load_logits(student_logits, student_bias, columns, V)
        new_max_s = tl.maximum(max_s, tl.max(logits_s, axis=0))
        sum_s = sum_s * tl.exp(max_s - new_max_s) + tl.sum(tl.exp(logits_s - new_max_s), axis=0)
        if teacher_logits is not None:
            logits_t = _load_logits(teacher_logits + row * V, teacher_bias, columns, V)
            new_max_t = tl.maximum(max_t, tl.max(logits_t, axis=0))
            rescale_s = tl.exp((max_s - new_max_s) / TEMPERATURE)
            rescale_t = tl.exp((max_t - new_max_t) / TEMPERATURE)
            exp_s = tl.exp((logits_s - new_max_s) / TEMPERATURE)
            exp_t = tl.exp((logits_t - new_max_t) / TEMPERATURE)
            warm_sum_s = warm_sum_s * rescale_s + tl.sum(exp_s, axis=0)
            warm_sum_t = warm_sum_t * rescale_t + tl.sum(exp_t, axis=0)
            weighted = weighted * rescale_t + tl.sum(exp_t * (logits_t - logits_s), axis=0)
            max_t = new_max_t
        max_s = new_max_s

    mlm = max_s + tl.log(sum_s) - label_logit
    tl.store(mlm_losses + row, tl.where(counts, mlm, 0.0))
    if teacher_logits is not None:
        # KL = sum_v p_t (z_t - z_s) / T - lse(z_t / T) + lse(z_s / T), of differences as above
        kl = (weighted / warm_sum_t + (max_s - max_t)) / TEMPERATURE
        kl += tl.log(warm_sum_s / warm_sum_t)
        tl.store(output_losses + row, tl.where(counts, TEMPERATURE * TEMPERATURE * kl, 0.0))

    # d = mlm_weight (softmax(z_s) - onehot) + output_weight T (softmax(z_s / T) - softmax(z_t / T))
    for start in range(0, V, TILE):
        columns = start + tl.arange(0, TILE)
        logits_s = _load_logits(student_logits, student_bias, columns, V)
        onehot = tl.where(columns == label, 1.0, 0.0)
        gradient = mlm_weight * (tl.exp(logits_s - max_s) / sum_s - onehot)
        if teacher_logits is not None:
            logits_t = _load_logits(teacher_logits + row * V, teacher_bias, columns, V)
            probs_s = tl.exp((logits_s - max_s) / TEMPERATURE) / warm_sum_s
            probs_t = tl.exp((logits_t - max_t) / TEMPERATURE) / warm_sum_t
            gradient += output_weight * TEMPERATURE * (probs_s - probs_t)
        gradient = tl.where(counts, gradient, 0.0).to(student_logits.dtype.element_ty)
        tl.store(student_logits + columns, gradient, mask=columns < V)


def vocabulary_rows(
    student_logits: Tensor, teacher_logits: Tensor | None,
    student_bias: Tensor, teacher_bias: Tensor | None, labels: Tensor,
    temperature: float, mlm_weight: float, output_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both losses of `plain.vocabulary_loss` row by row; their gradient replaces the logits.

    logits (m, V), contiguous, before their biases, and biases (V,), float32 or a half precision;
    labels (m,) int64 or -100. teacher_logits and teacher_bias may be None.
    Afterwards student_logits holds the gradient of mlm_weight mlm + output_weight output by the
    logits. Returns the losses, unweighted: mlm (m,) and output (m,), float32; 0 in rows that do not
    count, and output 0 without a teacher.
    """
    m, V = student_logits.shape
    for logits, bias in ((student_logits, student_bias), (teacher_logits, teacher_bias)):
        if logits is not None:
            assert logits.is_contiguous() and logits.shape == (m, V) and bias.shape == (V,)
    mlm_losses = student_logits.new_zeros(m, dtype=torch.float32)
    output_losses = torch.zeros_like(mlm_losses)
    if m > 0:
        inputs = (student_logits, teacher_logits, student_bias, teacher_bias, labels)
        results = (mlm_losses, output_losses)
        sizes = {"V": V, "IGNORED": IGNORED_LABEL, "TILE": VOCABULARY_TILE}
        _vocabulary_rows_kernel[(m,)](
            *inputs, *results, mlm_weight, output_weight,
            TEMPERATURE=temperature, **sizes, **VOCABULARY_LAUNCH,
        )  # fmt: skip
    return mlm_losses, output_losses
