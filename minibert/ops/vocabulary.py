"""The fused losses over the vocabulary: cross-entropy with the labels, distance to the teacher.

As in `fused.py`: formed with their gradient tile by tile, so that the logits of all masked
positions never exist at once; on a GPU with Triton the rows of a tile are those of `kernels/`.

Shapes: H hidden, V vocabulary, W width of a row of logits (at least V), M masked positions; r rows
of a tile.
"""

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from minibert.ops.plain import IGNORED_LABEL
from minibert.ops.tiles import (
    LN2,
    at_once,
    factors_of,
    in_cache,
    kernels_for,
    log2_softmax,
    precise,
    precise_dtype,
    scaled,
    tiles,
)

LOGITS_AT_ONCE = 2**25  # elements of a tile of logits: large enough for matrix products
LOGITS_AT_ONCE_ON_GPU = 2**27
ALIGNED = 64  # a GPU's matrix units are fed three times as fast by rows of so many elements
# Elements of a decoder that are rounded, or given a gradient, at once: 2,048 rows of 768.
DECODER_AT_ONCE = 3 * 2**19


def vocabulary_loss(
    student_head: Tensor,
    student_decoder: Tensor,
    student_bias: Tensor,
    teacher_head: Tensor | None,
    teacher_decoder: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    temperature: float = 1.0,
    mlm_weight: float = 1.0,
    output_weight: float = 1.0,
    teacher_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses over the vocabulary, as `plain.vocabulary_loss`; a tile of logits at once.

    Logits are float32 whatever comes in: where the models are close, the difference of their
    distributions is small. The products of the gradient are of the heads' dtype.
    """
    student = (student_head, student_decoder, student_bias)
    teacher = (teacher_head, teacher_decoder, teacher_bias)
    weights = (temperature, mlm_weight, output_weight)
    return _VocabularyLoss.apply(*student, *teacher, labels, *weights, teacher_entropy)


class _VocabularyLoss(Function):
    """With p = softmax(z) and q = softmax(z / T) of the logits z, for one row:

    d mlm / dz_s = p_s - onehot(label)        d output / dz_s = T^2 (q_s - q_t) / T
    """

    @staticmethod
    def forward(ctx, head, decoder, bias, teacher_head, teacher_decoder, teacher_bias, labels,
                temperature, mlm_weight, output_weight, teacher_entropy):  # fmt: skip
        V = len(decoder)
        weights = (temperature, mlm_weight, output_weight)
        sums = head.new_zeros(2, dtype=precise_dtype(head))  # mlm, output
        kernels = kernels_for(head)
        vocabulary_rows = _vocabulary_rows if kernels is None else kernels.vocabulary_rows
        d_head = torch.zeros_like(head, dtype=precise_dtype(head))
        d_decoder = torch.zeros_like(decoder) if len(head) == 0 else torch.empty_like(decoder)
        d_bias = torch.zeros_like(bias)
        aligned = 1 if kernels is None else ALIGNED
        decoder = _as_factor(decoder, head.dtype, aligned)  # (W, H)
        if teacher_head is not None:
            teacher_decoder = _as_factor(teacher_decoder, teacher_head.dtype, aligned)  # (W, H)
        columns = list(tiles(*decoder.shape, at_once(decoder, DECODER_AT_ONCE)))
        for rows in tiles(len(head), V, LOGITS_AT_ONCE_ON_GPU if head.is_cuda else LOGITS_AT_ONCE):
            logits, teacher_logits = _logits(head[rows], decoder, columns), None  # (r, W)
            if teacher_head is not None:
                teacher_logits = _logits(teacher_head[rows], teacher_decoder, columns)  # (r, W)
            d_logits = logits  # in place, but for a GPU's products rounded at once
            if kernels is not None and head.dtype != logits.dtype:
                d_logits = torch.empty_like(logits, dtype=head.dtype)
            models = (logits, teacher_logits, bias, teacher_bias)
            mlm, output = vocabulary_rows(*models, labels[rows], d_logits, *weights)  # (r,)
            if teacher_entropy and teacher_head is not None:
                entropy = _entropy_rows(teacher_logits, teacher_bias, labels[rows], temperature)
                output = output + temperature**2 * entropy
            sums += torch.stack([mlm.sum(), output.sum()])
            d_bias += d_logits.sum(0, dtype=sums.dtype)[:V]
            for part in columns:
                d_part = d_logits[:, part].to(head.dtype)  # (r, w)
                d_head[rows] += d_part @ decoder[part]
                there = max(0, V - part.start)  # rows of the decoder: behind them are those of 0
                d_rows = (d_part.T @ head[rows])[:there]  # (w, H)
                if rows.start == 0:
                    d_decoder[part] = d_rows
                else:
                    d_decoder[part] += d_rows
        ctx.save_for_backward(d_head.to(head.dtype), d_decoder, d_bias)
        mlm_sum, output_sum = sums.unbind()
        ctx.mark_non_differentiable(mlm_sum, output_sum)
        return mlm_weight * mlm_sum + output_weight * output_sum, mlm_sum, output_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _mlm, _output):
        gradients = ctx.saved_tensors
        if upstream.is_cuda or upstream != 1:  # on a GPU, asking would wait
            gradients = [scaled(gradient, upstream) for gradient in gradients]
        return *gradients, *[None] * 8


def _as_factor(decoder: Tensor, dtype: torch.dtype, aligned: int) -> Tensor:
    """The decoder (V, H) as it enters products: in `dtype`, and as (W, H) with rows of 0 from V on.

    W, the width of a row of logits, is V rounded up to a multiple of `aligned`.
    """
    V, H = decoder.shape
    if V % aligned == 0:
        return decoder.to(dtype)
    factor = decoder.new_zeros(V + -V % aligned, H, dtype=dtype)
    factor[:V] = decoder
    return factor


def _logits(head: Tensor, decoder: Tensor, columns: list[slice]) -> Tensor:
    """head (r, H), decoder (W, H) of one dtype; returns (r, W) in float32, without bias."""
    if head.is_cuda and head.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(head, decoder.T, out_dtype=torch.float32)
    logits = head.new_empty(len(head), len(decoder), dtype=precise_dtype(head))
    with factors_of(head.dtype):  # written out as float32, since a CPU's products keep a dtype
        for part in columns:
            torch.mm(precise(head), precise(decoder[part]).T, out=logits[:, part])
    return logits


def _vocabulary_rows(logits, teacher_logits, bias, teacher_bias, labels, gradient,
                     temperature, mlm_weight, output_weight):  # fmt: skip
    """Losses of each row, mlm (r,) and output (r,); their gradient is written to `gradient`.

    logits (r, V), float32 or float64, and biases of any dtype; gradient (r, V) is of the logits'
    dtype, and may be `logits`.
    """
    r, V = logits.shape
    T = temperature
    counts = (labels != IGNORED_LABEL)[:, None]  # (r, 1)
    labels = labels[:, None].where(counts, 0)  # (r, 1)
    mlm, output = logits.new_zeros(2, r, 1)
    for rows in tiles(r, V, in_cache(logits)):
        z = logits[rows] + bias  # (rows, V)
        log_p = log2_softmax(z)  # to the base 2, as log_q and log_q_t
        p = log_p.exp2()
        mlm[rows] = -LN2 * log_p.gather(1, labels[rows])
        d_logits = torch.mul(p, mlm_weight, out=gradient[rows])
        if teacher_logits is not None:
            log_q, q = log_p, p
            if T != 1:
                log_q = log2_softmax(z.div_(T), out=z)
                q = log_q.exp2()
            log_q_t = log2_softmax((teacher_logits[rows] + teacher_bias).div_(T))
            q_t = log_q_t.exp2()
            output[rows] = T**2 * LN2 * log_q_t.sub_(log_q).mul_(q_t).sum(-1, keepdim=True)
            d_logits.add_(q.sub_(q_t), alpha=output_weight * T)
        d_logits.scatter_add_(1, labels[rows], torch.full_like(mlm[rows], -mlm_weight))
        d_logits.mul_(counts[rows])
    return (mlm * counts).squeeze(1), (output * counts).squeeze(1)


def _entropy_rows(logits, bias, labels, temperature):
    """Entropy of softmax(logits / temperature) in each row, (r,); 0 in rows that do not count.

    The student has no part in it, nor has the gradient: so it stands apart from `_vocabulary_rows`
    and from its Triton twin.
    """
    entropy = logits.new_zeros(len(logits))
    for rows in tiles(*logits.shape, in_cache(logits)):
        log_q = log2_softmax((logits[rows, : len(bias)] + bias) / temperature)  # (rows, V)
        entropy[rows] = -LN2 * (log_q.exp2() * log_q).sum(-1)
    return entropy * (labels != IGNORED_LABEL)
