"""Whether every Triton kernel, on this very GPU, gives what the plain formula gives in float64.

Each value and gradient may err as much as the plain formula in the same precision, and a little
more. The sizes are awkward, as in tests/test_kernels.py, and some are a model's.

Shapes: B batch, S sequence, H hidden, V vocabulary, W width of a row of logits, m rows (masked
positions or tokens).
"""

import math
from collections.abc import Iterator

import torch
from attention_correctness import LARGER_MAPS, SMALL_MAPS, check_attention
from outcomes import SEED, Outcome, Row, compare, outcome, share_of_dropped
from torch import Tensor

from minibert.ops import kernels, plain
from minibert.ops.kernels.draws import dropped_draws

UPSTREAM = 0.37  # of a loss

# m, H, dtype, dropout
SMALL_NORMS = [
    (7, 37, torch.float32, 0.0),
    (53, 96, torch.bfloat16, 0.1),
    (0, 24, torch.float32, 0.0),
]
LARGER_NORMS = [
    (5000, 768, torch.bfloat16, 0.1),
    (5000, 768, torch.bfloat16, 0.0),
    (1500, 1024, torch.float32, 0.1),
    (1500, 312, torch.float16, 0.1),
]
# m, V, W, temperature, whether there is a teacher
SMALL_ROWS = [
    (0, 97, 97, 1.0, True),
    (7, 97, 128, 1.0, True),
    (5, 131, 131, 2.0, True),
    (5, 97, 103, 2.0, False),
]
LARGER_ROWS = [(64, 28_996, 29_056, 1.0, True), (64, 28_996, 28_996, 2.0, True)]
# dtypes of logits, of the teacher's bias and of the gradient; the last is a bfloat16 run's
ROW_DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
]
HIDDEN = [(3, 9, 37), (5, 43, 768)]  # B, S, H
COLUMNS = [(0, 5), (301, 133), (5000, 768)]  # m, n


def check_all(device: torch.device, small: bool = False) -> Iterator[Row]:
    """One row for each value and gradient of each size, as JSON holds it; small: a few sizes."""
    for case in SMALL_MAPS + ([] if small else LARGER_MAPS):
        yield from check_attention(case, device)
    for m, H, dtype, dropout in SMALL_NORMS + ([] if small else LARGER_NORMS):
        yield from check_norm(m, H, dtype, dropout, device)
    for m, V, W, temperature, has_teacher in SMALL_ROWS + ([] if small else LARGER_ROWS):
        for dtypes in ROW_DTYPES:
            yield from check_vocabulary_rows(m, V, W, temperature, has_teacher, dtypes, device)
    for B, S, H in HIDDEN[: 1 if small else None]:
        for dtype in (torch.float32, torch.bfloat16):
            yield from check_hidden_states(B, S, H, dtype, device)
    for m, n in COLUMNS[: 2 if small else None]:
        rows = torch.randn(m, n, device=device).bfloat16()
        outcomes = ([kernels.column_sums(rows)], [rows.sum(0, dtype=torch.float32)])
        truth = [rows.double().sum(0)]
        yield from compare(f"column_sums {m} x {n}", rows.dtype, ["value"], *outcomes, truth)


# Add & norm.


def check_norm(
    m: int, H: int, dtype: torch.dtype, dropout: float, device: torch.device
) -> Iterator[Row]:
    """LayerNorm(residual + dropout(values)); weight and bias are float32, as a student's."""
    torch.manual_seed(0)
    residual, values, d_result = (torch.randn(m, H, device=device).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(H, device=device) for _ in range(2))
    kept, factor = torch.ones((), device=device), dropped_draws(dropout)[1]
    if dropout > 0:  # a value that is dropped learns nothing
        leaf = values.detach().requires_grad_()
        torch.manual_seed(SEED)
        result = kernels.add_and_norm(residual, leaf, dropout, weight, bias, 1e-12)
        kept = torch.autograd.grad(result, leaf, d_result)[0] != 0
        yield share_of_dropped(kept.flatten(), dropout)

    def ours(residual, values, weight, bias):
        parts = (residual.to(dtype), values.to(dtype), dropout, weight.float(), bias.float())
        result = kernels.add_and_norm(*parts, 1e-12)
        return result, (result * d_result).sum()

    def theirs(residual, values, weight, bias):
        values = values * (kept * factor).to(values.dtype)
        result = plain.add_and_norm(residual, values, 0.0, weight, bias, 1e-12)
        return result, (result * d_result.to(result.dtype)).sum()

    inputs = (residual, values, weight, bias)
    outcomes = (outcome(ours, inputs, dtype), outcome(theirs, inputs, dtype))
    truth = outcome(theirs, inputs, torch.float64)
    names = ("result", "d residual", "d values", "d weight", "d bias")
    yield from compare(f"add_and_norm {m} x {H} dropout {dropout}", dtype, names, *outcomes, truth)


# The rows of the vocabulary loss.


def check_vocabulary_rows(
    m: int,
    V: int,
    W: int,
    temperature: float,
    has_teacher: bool,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    device: torch.device,
) -> Iterator[Row]:
    """The sums of both losses, and the gradient by the logits."""
    dtype, bias_dtype, gradient_dtype = dtypes
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(m, V, device=device).to(dtype) for _ in range(2))
    student_bias, teacher_bias = (torch.randn(V, device=device) for _ in range(2))
    teacher_bias = teacher_bias.to(bias_dtype)
    labels = torch.randint(V, (m,), device=device)
    labels[1::3] = plain.IGNORED_LABEL
    if not has_teacher:
        teacher = teacher_bias = None

    wide = [None if part is None else widened(part, W) for part in (student, teacher)]
    gradient = wide[0] if gradient_dtype == dtype else torch.empty_like(wide[0]).to(gradient_dtype)
    settings = (gradient, temperature, 1.0, 5.0)
    mlm, output = kernels.vocabulary_rows(*wide, student_bias, teacher_bias, labels, *settings)
    assert not gradient[:, V:].any()
    found = [mlm.sum(), output.sum(), gradient[:, :V]]

    def by_plain(precision: torch.dtype | None) -> Outcome:
        """With logits^T (V, m) as the decoder and the identity for heads, plain has these logits"""
        parts = (student, student_bias, teacher, teacher_bias)
        logits, bias, others, other_bias = (
            part if part is None or precision is None else part.to(precision) for part in parts
        )
        decoder = logits.T.detach().requires_grad_()  # (V, m)
        identity = torch.eye(m, dtype=logits.dtype, device=device)
        taught = (None,) * 3 if others is None else (identity, others.T, other_bias)
        weights = (temperature, 1.0, 5.0)
        loss, *sums = plain.vocabulary_loss(identity, decoder, bias, *taught, labels, *weights)
        loss.backward()
        return [*sums, decoder.grad.T]

    what = f"vocabulary_rows m {m} V {V} W {W} T {temperature:g} gradient {gradient_dtype}"
    names = ("mlm", "output", "d logits")
    outcomes = (found, by_plain(None), by_plain(torch.float64))
    yield from compare(what, gradient_dtype, names, *outcomes)


def widened(rows: Tensor, width: int) -> Tensor:
    """Rows (m, V) as (m, width), with what must not count behind them."""
    wide = rows.new_full((len(rows), width), math.nan)
    wide[:, : rows.shape[1]] = rows
    return wide


# The loss of the hidden states.


def check_hidden_states(
    B: int, S: int, H: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Row]:
    """Padding is not a number: it must not be read."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(B, S, H, device=device).to(dtype) for _ in range(2))
    mask = torch.ones(B, S, dtype=torch.long, device=device)
    mask[:, 2::5] = 0
    padding = mask[..., None] == 0

    def ours(hidden):
        parts = (part.masked_fill(padding, math.nan) for part in (hidden, teacher))
        loss = kernels.hidden_state_loss(*parts, mask)
        return loss, UPSTREAM * loss

    def theirs(hidden):
        loss = plain.hidden_state_loss(hidden, teacher.to(hidden.dtype), mask)
        return loss, UPSTREAM * loss

    outcomes = (outcome(ours, [student], dtype), outcome(theirs, [student], dtype))
    truth = outcome(theirs, [student], torch.float64)
    what = f"hidden_state_loss B {B} S {S} H {H}"
    yield from compare(what, dtype, ("value", "d student"), *outcomes, truth)
