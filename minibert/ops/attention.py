"""Fused attention and the losses of its maps: on a CPU one sequence after another.

As in `fused.py`: the maps of a batch are never one tensor, and the gradient of a loss is formed
with its value; where attention and a loss go together, that by the scores. On a GPU with Triton
`kernels/` does the same; without, attention is torch's own, and a loss goes over several masked
sequences at once.

Shapes: B batch, S sequence, N heads, D head size; of what is worked on at once b sequences, h
heads, n tokens of a sequence, m of them rounded up, r rows of a tile.
"""

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from minibert.ops.dropout import kept_values
from minibert.ops.tiles import (
    LN2,
    ON_GPU,
    in_cache,
    kernels_for,
    log2_softmax,
    precise,
    precise_dtype,
    scaled,
    tiles,
)

LENGTH_STEP = 16  # a CPU's sequences are filled up to multiples: each new size costs a new kernel


def attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, dropout: float
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V, with dropout on the attention probabilities.

    query, key, value (B, N, S, D); attention_mask (B, S) as in `plain.same_sequence`, on a GPU of 0
    and 1 alone. Returns the context (B, N, S, D). On a CPU one sequence at a time: its padding is
    not computed (the context there is 0), its maps, where it is short, stay in the cache, and one
    map of each, N m^2 values, is kept for backward. torch's own has no lean dropout there, and
    takes up to twice as long in bfloat16, and in float32 where products are oneDNN's.
    """
    heads = (query, key, value)
    if kernels := _attention_kernels(query):
        return kernels.attention(*heads, attention_mask, dropout)
    if not query.is_cuda:
        if dropout > 0 or (torch.is_grad_enabled() and any(part.requires_grad for part in heads)):
            return _Attention.apply(*heads, attention_mask, dropout)[0]
        return _attention_without_backward(*heads, attention_mask)
    real = attention_mask[:, None, None, :].bool()  # (B, 1, 1, S)
    return F.scaled_dot_product_attention(*heads, attn_mask=real, dropout_p=dropout)


def _attention_kernels(query: Tensor) -> ModuleType | None:
    """Triton's attention, of half precisions alone: in float32 torch's is faster."""
    return None if query.dtype == torch.float32 else kernels_for(query)


def _attention_without_backward(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor
) -> Tensor:
    """Attention without dropout: of one sequence so many heads at once as fit into the cache."""
    B, N, S, D = query.shape
    dtype = precise_dtype(query)
    context = query.new_zeros(B, S, N, D).transpose(1, 2)  # (B, N, S, D), laid out as (B, S, H)
    for b, real, n in _sequences(attention_mask):
        q, k = (_filled_up(part[b][:, real], dtype) for part in (query, key))  # (N, m, D)
        v = _filled_up(value[b][:, real])  # (N, m, D)
        m = q.shape[1]
        for heads in tiles(N, m * m, in_cache(q, times=4)):
            probs = _probs(q[heads], k[heads], n).to(v.dtype)  # (h, m, m)
            context[b][heads, real] = (probs @ v[heads])[:, :n]
    return context


def _probs(query: Tensor, key: Tensor, n: int) -> Tensor:
    """softmax(Q K^T / sqrt(D)) of some heads, (h, m, m), in the scores' own memory."""
    scores = _scores(query, key, n)
    return torch.softmax(scores, -1, out=scores)


class _Attention(Function):
    """P = softmax(S), S = Q K^T / sqrt(D); context O = c (P * kept) V, with c = 1 / (1 - dropout).

    Beside it, where there is a teacher, the loss of the same maps by `loss_of_rows`. Scores and
    what is made of them are float32 whatever comes in. For backward are kept, of each sequence, one
    map, P where a probability stayed and -P where it was dropped, and the loss's dS.
    """

    @staticmethod
    def forward(ctx, query, key, value, attention_mask, dropout, teacher=None, loss_of_rows=None):
        B, N, S, D = query.shape
        ctx.scale, maps, loss_maps = 1.0, [], []
        dtype = precise_dtype(query)
        context = query.new_zeros(B, S, N, D).transpose(1, 2)  # (B, N, S, D), laid out as (B, S, H)
        loss_sum = None if teacher is None else query.new_zeros((), dtype=dtype)
        for b, real, n in _sequences(attention_mask):
            q, k = (_filled_up(part[b][:, real], dtype) for part in (query, key))
            v = _filled_up(value[b][:, real])  # (N, m, D), as q and k
            if teacher is None:
                probs = _probs(q, k, n)  # (N, m, m)
            else:
                guides = (_filled_up(part[b][:, real], dtype) for part in teacher)  # (N, m, D')
                scores = _scores(q, k, n), _scores(*guides, n)  # (N, m, m) each
                rows_loss, d_scores, probs = loss_of_rows(*scores)  # (), (N, m, m) twice
                loss_sum += rows_loss
                loss_maps.append(d_scores.to(v.dtype))
            probs = kept_probs = probs.to(v.dtype)
            if dropout > 0:
                kept, ctx.scale = kept_values(probs.shape, dropout, probs.dtype)
                kept_probs = probs * kept  # (N, m, m)
                probs = probs.neg_().add_(kept_probs, alpha=2)  # 2 P - P or 0 - P: exact
            context[b][:, real] = (kept_probs @ v)[:, :n].mul_(ctx.scale)
            maps.append(probs)
        ctx.save_for_backward(query, key, value, attention_mask, context, *maps, *loss_maps)
        return context, loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, loss_upstream):
        query, key, value, attention_mask, context, *maps = ctx.saved_tensors
        B, N, S, D = query.shape
        gradients = query.new_zeros(3, B, S, N, D).transpose(2, 3)  # (3, B, N, S, D)
        scale = 1 / math.sqrt(D)
        sequences = list(_sequences(attention_mask))
        loss_maps = maps[len(sequences) :]  # none without a teacher
        loss_weight = float(loss_upstream) if loss_maps else 0.0
        for number, (b, real, n) in enumerate(sequences):
            signed = maps[number]  # (N, m, m)
            q, k, v = (_filled_up(part[b][:, real]) for part in (query, key, value))  # (N, m, D)
            d_real, real_context = upstream[b][:, real], context[b][:, real]  # (N, n, D)
            d_context = _filled_up(d_real * ctx.scale)  # (N, m, D), with c
            d_value = signed.relu().transpose(1, 2) @ d_context  # (N, m, D); relu: P * kept
            gradients[2, b][:, real] = d_value[:, :n]
            d_kept = d_context @ v.transpose(1, 2)  # (N, m, m)
            d_probs = torch.ops.aten.threshold_backward(d_kept, signed, 0)  # 0 where dropped
            del d_kept  # a map less at once
            # Of a softmax: dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij), summed up in float32. That sum
            # is dO_i O_i, too; taken off before, it leaves less for the rounding of P to spoil.
            means = (precise(d_real) * real_context).sum(-1, keepdim=True)  # (N, n, 1)
            d_probs[:, :n] -= means.to(d_probs.dtype)
            d_scores = torch._softmax_backward_data(d_probs, signed.abs(), -1, signed.dtype)
            if loss_maps:  # not by add, which would round the factor to the maps' dtype
                d_scores.addcmul_(loss_maps[number], d_scores.new_ones(1), value=loss_weight)
            gradients[0, b][:, real] = (d_scores @ k)[:, :n].mul_(scale)
            gradients[1, b][:, real] = (d_scores.mT @ q)[:, :n].mul_(scale)
        return *gradients, *[None] * 4


def _sequences(attention_mask: Tensor) -> Iterator[tuple[int, slice | Tensor, int]]:
    """For each sequence its row, what picks its tokens there, and how many they are.

    That is a slice where they stand side by side.
    """
    for b, numbers in enumerate(attention_mask.long()):  # (S,), as in `plain.same_sequence`
        counts = [int(count) for count in numbers.bincount()]  # read from a CPU alone
        for real in numbers.argsort(stable=True).split(counts)[1:]:  # (n,); the first: padding
            if n := len(real):
                first, last = int(real[0]), int(real[-1])
                yield b, slice(first, last + 1) if last - first == n - 1 else real, n


def rounded_up(n: int) -> int:
    """On how many tokens a CPU computes attention for a sequence of n."""
    return n + -n % LENGTH_STEP


def _filled_up(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(N, n, D), contiguous and with rows of 0 behind: (N, m, D), of their own dtype or another.

    The keys among these rows are masked. A query of 0 sees the others alike in both models, so that
    no loss and no gradient comes of it.
    """
    N, n, D = values.shape
    m = rounded_up(n)
    filled = values.new_empty(N, m, D, dtype=dtype)  # None: their own
    filled[:, :n] = values
    if n < m:
        filled[:, n:].zero_()
    return filled


def attention_map_loss(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """KL of the attention maps of one layer, as `plain.attention_map_loss`; memory linear in S."""
    models = (student_query, student_key, teacher_query, teacher_key)
    if kernels := kernels_for(student_query):
        return kernels.attention_map_loss(*models, attention_mask)
    return _AttentionMapLoss.apply(*models, attention_mask, _kl_of_rows)


def attention_map_mse(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """Squared differences of the attention maps of one layer, as `plain.attention_map_mse`;
    memory linear in S. There is no Triton twin of it.
    """
    models = (student_query, student_key, teacher_query, teacher_key)
    return _AttentionMapLoss.apply(*models, attention_mask, _squares_of_rows)


class _AttentionMapLoss(Function):
    """A loss of maps P = softmax(S), S = scale Q K^T, by `loss_of_rows`, which knows dS:

        dQ = scale dS K,    dK = scale dS^T Q

    Scores are float32 whatever comes in: where the maps are close, their difference is small.
    """

    @staticmethod
    def forward(
        ctx, student_query, student_key, teacher_query, teacher_key, attention_mask, loss_of_rows
    ):
        B, N, S, D = student_query.shape
        loss_sum = student_query.new_zeros((), dtype=precise_dtype(student_query))
        gradients = student_query.new_zeros(2, B, S, N, D).transpose(2, 3)  # (2, B, N, S, D)
        on_gpu = student_query.is_cuda
        parts = _masked_parts(attention_mask, N) if on_gpu else _real_parts(attention_mask)
        for place, padding in parts:
            query, key, guide_query, guide_key = (
                part[place].contiguous()
                for part in (student_query, student_key, teacher_query, teacher_key)
            )  # (b, N, n, D)
            if padding is not None:  # a query of 0 has the same map in both models: nothing to lose
                query = query.masked_fill(padding.mT, 0)
                guide_query = guide_query.masked_fill(padding.mT, 0)
            student = (precise(query), precise(key))
            teacher = (precise(guide_query), precise(guide_key))
            b, _, n, _ = query.shape
            d_query, d_key = torch.empty_like(query), torch.zeros_like(student[1])
            for rows in tiles(n, b * N * n, in_cache(key, times=4)):
                scores = (_scores(q[:, :, rows], k) for q, k in (student, teacher))  # (b, N, r, n)
                if padding is not None:
                    scores = (each.masked_fill_(padding, _masked_score(each)) for each in scores)
                rows_loss, d_scores, _ = loss_of_rows(*scores)  # (), (b, N, r, n) twice
                loss_sum += rows_loss
                d_scores = d_scores.to(gradients.dtype)  # subtracted before it is rounded
                d_query[:, :, rows] = d_scores @ key
                d_key += d_scores.mT @ query[:, :, rows]
            gradients[0][place] = d_query.div_(math.sqrt(D))
            gradients[1][place] = d_key.div_(math.sqrt(D)).to(gradients.dtype)
        ctx.save_for_backward(gradients)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradients,) = ctx.saved_tensors
        return *scaled(gradients, upstream), None, None, None, None


# A place in (B, N, S, D), and which tokens there are padding, (b, 1, 1, n): None where none is.
Part = tuple[tuple[slice | Tensor, ...], Tensor | None]


def _real_parts(attention_mask: Tensor) -> Iterator[Part]:
    """What is worked on at once: the real tokens of one sequence."""
    for b, real, _ in _sequences(attention_mask):
        yield (slice(b, b + 1), slice(None), real), None


def _masked_parts(attention_mask: Tensor, num_heads: int) -> Iterator[Part]:
    """The same for a GPU, where to ask for lengths is to wait: several whole sequences."""
    B, S = attention_mask.shape
    padding = ~attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
    for sequences in tiles(B, num_heads * S * S, ON_GPU):
        yield (sequences,), padding[sequences]


def _scores(query: Tensor, key: Tensor, n: int | None = None) -> Tensor:
    """scale Q K^T: query (..., r, D), key (..., m, D), of which n are real (None: all).

    Returns (..., r, m).
    """
    scores = (query / math.sqrt(query.shape[-1])) @ key.mT
    if n is not None:
        scores[..., n:].fill_(_masked_score(scores))
    return scores


def _masked_score(scores: Tensor) -> float:
    """The score of a key that is not to be seen: half of the lowest number there is, so that the
    logarithm of its probability is finite to the base 2 too.
    """
    return torch.finfo(scores.dtype).min / 2


# What a loss of maps returns: its sum, (), its dS and the student's map P_s, (..., r, m).
OfRows = tuple[Tensor, Tensor, Tensor]


def _kl_of_rows(student: Tensor, teacher: Tensor) -> OfRows:
    """sum P_t (log P_t - log P_s) and its dS = P_s - P_t, from the scores (..., r, m) of both,
    in whose memory all is made but one map.
    """
    student, teacher = (log2_softmax(scores, out=scores) for scores in (student, teacher))
    teacher_probs = teacher.exp2()  # (..., r, m)
    kl_sum = LN2 * teacher.sub_(student).mul_(teacher_probs).sum()
    student_probs = student.exp2_()
    difference = torch.sub(student_probs, teacher_probs, out=teacher_probs)  # (..., r, m)
    # The second sum is 0 but for the rounding of both softmaxes, which it takes back.
    return kl_sum + difference.sum(), difference, student_probs


def _squares_of_rows(student: Tensor, teacher: Tensor) -> OfRows:
    """sum (P_s - P_t)^2 and, with G = 2 (P_s - P_t) its derivative by the map,
    dS_ij = P_ij (G_ij - sum_k P_ik G_ik), from the scores (..., r, m) of both.
    """
    student_probs = student.softmax(-1)  # (..., r, m)
    difference = student_probs - teacher.softmax(-1)  # (..., r, m)
    square_sum = difference.square().sum()
    weighted = difference.mul_(student_probs)  # (..., r, m): P G / 2
    row_sums = weighted.sum(-1, keepdim=True)  # (..., r, 1)
    d_scores = weighted.addcmul_(student_probs, row_sums, value=-1).mul_(2)
    return square_sum, d_scores, student_probs


LOSS_OF_ROWS = {attention_map_loss: _kl_of_rows, attention_map_mse: _squares_of_rows}


def attention_and_map_loss(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float,
    teacher_query: Tensor,
    teacher_key: Tensor,
    map_loss: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """Attention and a loss of its maps, as `plain.attention_and_map_loss`.

    On a CPU the student's scores are made once for both, and backward has one gradient by them: for
    that the loss leaves its own, a map more of each sequence. By Triton the KL costs each of
    attention's three kernels one product more: the teacher's scores.
    """
    given, teacher = (query, key, value, attention_mask, dropout), (teacher_query, teacher_key)
    kernels = _attention_kernels(query)
    if kernels is not None and map_loss is attention_map_loss:
        return kernels.attention_and_map_loss(*given, *teacher)
    if not (query.is_cuda or kernels_for(query)) and map_loss in LOSS_OF_ROWS:
        return _Attention.apply(*given, teacher, LOSS_OF_ROWS[map_loss])
    return attention(*given), map_loss(query, key, *teacher, attention_mask)
