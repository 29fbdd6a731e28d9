"""Triton twins of loops over rows: of hidden states, of the vocabulary, of gradients.

Shapes: H hidden, V vocabulary, m rows (tokens, masked positions of a tile). Sums are float32, and
no two programs write to one place: the same inputs give the same bits.

A softmax over tiles is that of `attention_tiles.py`, of a single row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from minibert.ops.kernels.attention_tiles import LOWEST
from minibert.ops.plain import IGNORED_LABEL, SHORTEST

VOCABULARY_TILE = 4096
VOCABULARY_LAUNCH = {"num_warps": 8}
COLUMN_SUM_PARTS = 128  # programs that share the rows of a column
COLUMN_SUM_TILE = {"ROWS": 32, "COLUMNS": 128}


@triton.jit
def _cosine_of_row(student, teacher, is_real, row, columns, H: tl.constexpr,
                   SHORTEST_SQUARE: tl.constexpr):  # fmt: skip
    """Both vectors of a row, s and t (0 where it is not real); |s|^2; 1 / (|s| |t|)."""
    there = (columns < H) & (tl.load(is_real + row) != 0)
    s = tl.load(student + row * H + columns, mask=there, other=0.0).to(tl.float32)
    t = tl.load(teacher + row * H + columns, mask=there, other=0.0).to(tl.float32)
    s_square = tl.maximum(tl.sum(s * s, axis=0), SHORTEST_SQUARE)
    t_square = tl.maximum(tl.sum(t * t, axis=0), SHORTEST_SQUARE)
    return s, t, s_square, 1.0 / tl.sqrt(s_square * t_square)


@triton.jit
def _cosine_kernel(student, teacher, is_real, losses, H: tl.constexpr, TILE: tl.constexpr,
                   SHORTEST_SQUARE: tl.constexpr):  # fmt: skip
    """One program: one row, 1 - cosine; 0 where it is not real."""
    row = tl.program_id(0).to(tl.int64)  # m H may pass 2^31
    columns = tl.arange(0, TILE)
    s, t, _, inverse = _cosine_of_row(student, teacher, is_real, row, columns, H, SHORTEST_SQUARE)
    loss = 1.0 - tl.sum(s * t, axis=0) * inverse
    tl.store(losses + row, tl.where(tl.load(is_real + row) != 0, loss, 0.0))


@triton.jit
def _cosine_gradient_kernel(student, teacher, is_real, upstream, gradient, H: tl.constexpr,
                            TILE: tl.constexpr, SHORTEST_SQUARE: tl.constexpr):  # fmt: skip
    """One program: one row. With c its cosine: d(1 - c) / ds = c s / |s|^2 - t / (|s| |t|)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    s, t, s_square, inverse = _cosine_of_row(
        student, teacher, is_real, row, columns, H, SHORTEST_SQUARE
    )
    cosine = tl.sum(s * t, axis=0) * inverse
    d_student = (cosine / s_square * s - inverse * t) * tl.load(upstream)
    place = gradient + row * H + columns
    tl.store(place, d_student.to(gradient.dtype.element_ty), mask=columns < H)


def hidden_state_loss(
    student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor
) -> Tensor:
    """`plain.hidden_state_loss`, of hidden states in float32 or a half precision.

    Rows that are not real are not read. The gradient is formed in backward, already multiplied by
    what comes from above.
    """
    return _HiddenStateLoss.apply(student_hidden, teacher_hidden, attention_mask)


class _HiddenStateLoss(Function):
    @staticmethod
    def forward(ctx, student_hidden, teacher_hidden, attention_mask):
        H = student_hidden.shape[-1]
        student, teacher = (
            part.reshape(-1, H).contiguous() for part in (student_hidden, teacher_hidden)
        )  # (B S, H)
        is_real = attention_mask.flatten()
        losses = student.new_zeros(len(student), dtype=torch.float32)
        ctx.sizes = {"H": H, "TILE": triton.next_power_of_2(H), "SHORTEST_SQUARE": SHORTEST**2}
        if len(student) > 0:
            _cosine_kernel[(len(student),)](student, teacher, is_real, losses, **ctx.sizes)
        ctx.save_for_backward(student)
        ctx.constants = (teacher, is_real)  # made in inference mode, perhaps
        ctx.shape = student_hidden.shape
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (student,) = ctx.saved_tensors
        gradient = torch.empty_like(student)
        if len(student) > 0:
            _cosine_gradient_kernel[(len(student),)](
                student, *ctx.constants, upstream, gradient, **ctx.sizes
            )
        return gradient.view(ctx.shape), None, None


@triton.jit(do_not_specialize=["m"])
def _column_sums_kernel(rows, parts, m, n: tl.constexpr, ROWS: tl.constexpr,
                        COLUMNS: tl.constexpr):  # fmt: skip
    """One program: some columns of every COLUMN_SUM_PARTS-th tile of rows."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tl.program_id(0) * ROWS, m, tl.num_programs(0) * ROWS):
        numbers = start + tl.arange(0, ROWS)
        places = rows + numbers[:, None].to(tl.int64) * n + columns[None, :]
        inside = (numbers < m)[:, None] & (columns < n)[None, :]
        total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    sums = tl.sum(total, axis=0)
    tl.store(parts + tl.program_id(0) * n + columns, sums, mask=columns < n)


def column_sums(rows: Tensor) -> Tensor:
    """The sum over rows (m, n) in float32: (n,)."""
    m, n = rows.shape
    grid = (COLUMN_SUM_PARTS, triton.cdiv(n, COLUMN_SUM_TILE["COLUMNS"]))
    parts = rows.new_empty(COLUMN_SUM_PARTS, n, dtype=torch.float32)
    _column_sums_kernel[grid](rows.contiguous(), parts, m, n, **COLUMN_SUM_TILE)
    return parts.sum(0)


@triton.jit
def _load_logits(logits, bias, columns, V: tl.constexpr):
    """Logits with their bias, float32; from column V on the lowest number, of which exp is 0."""
    inside = columns < V
    tile = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
    tile += tl.load(bias + columns, mask=inside, other=0.0)
    return tl.where(inside, tile, LOWEST)


@triton.jit
def _vocabulary_rows_kernel(student_logits, teacher_logits, student_bias, teacher_bias, labels,
                            gradient, mlm_losses, output_losses, mlm_weight, output_weight,
                            V: tl.constexpr, WIDTH: tl.constexpr, TEMPERATURE: tl.constexpr,
                            IGNORED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """One program: one row. First the sums of its softmaxes, then its gradient."""
    row = tl.program_id(0).to(tl.int64)  # m WIDTH may pass 2^31
    student_logits += row * WIDTH
    gradient += row * WIDTH
    if teacher_logits is not None:
        teacher_logits += row * WIDTH
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
            logits_t = _load_logits(teacher_logits, teacher_bias, columns, V)
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
    for start in range(0, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        logits_s = _load_logits(student_logits, student_bias, columns, V)
        onehot = tl.where(columns == label, 1.0, 0.0)
        d_logits = mlm_weight * (tl.exp(logits_s - max_s) / sum_s - onehot)
        if teacher_logits is not None:
            logits_t = _load_logits(teacher_logits, teacher_bias, columns, V)
            probs_s = tl.exp((logits_s - max_s) / TEMPERATURE) / warm_sum_s
            probs_t = tl.exp((logits_t - max_t) / TEMPERATURE) / warm_sum_t
            d_logits += output_weight * TEMPERATURE * (probs_s - probs_t)
        d_logits = tl.where(counts & (columns < V), d_logits, 0.0)
        tl.store(gradient + columns, d_logits.to(gradient.dtype.element_ty), mask=columns < WIDTH)


def vocabulary_rows(
    student_logits: Tensor, teacher_logits: Tensor | None,
    student_bias: Tensor, teacher_bias: Tensor | None, labels: Tensor, gradient: Tensor,
    temperature: float, mlm_weight: float, output_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both losses of `plain.vocabulary_loss` row by row; their gradient is written to `gradient`.

    logits (m, W), contiguous, of which the first V columns count, before their biases (V,); float32
    or a half precision. labels (m,) int64 or -100. teacher_logits and teacher_bias may be None.
    gradient (m, W), which may be student_logits: afterwards it holds that of mlm_weight mlm +
    output_weight output by the logits, 0 from column V on. Returns the losses, unweighted: mlm (m,)
    and output (m,), float32; 0 in rows that do not count, and output 0 without a teacher.
    """
    m, width = student_logits.shape
    (V,) = student_bias.shape
    for logits in (student_logits, teacher_logits, gradient):
        assert logits is None or (logits.is_contiguous() and logits.shape == (m, width))
    mlm_losses = student_logits.new_zeros(m, dtype=torch.float32)
    output_losses = torch.zeros_like(mlm_losses)
    if m > 0:
        inputs = (student_logits, teacher_logits, student_bias, teacher_bias, labels)
        results = (gradient, mlm_losses, output_losses)
        sizes = {"V": V, "WIDTH": width, "IGNORED": IGNORED_LABEL, "TILE": VOCABULARY_TILE}
        _vocabulary_rows_kernel[(m,)](
            *inputs, *results, mlm_weight, output_weight,
            TEMPERATURE=temperature, **sizes, **VOCABULARY_LAUNCH,
        )  # fmt: skip
    return mlm_losses, output_losses
