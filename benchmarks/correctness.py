"""Whether every Triton kernel, on this very GPU, gives what the plain formula gives in float64.

Each value and gradient may err as much as the plain formula in the same precision, and a little
more. The sizes are awkward, as in tests/test_kernels.py, and some are a model's. What dropout drops
is first recovered through the kernels themselves; then the plain formulas drop the same.

Shapes: B batch, S sequence, N heads, D head size, H hidden, V vocabulary, W width of a row of
logits, m rows (masked positions or tokens).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from losses import relative_error
from torch import Tensor

from minibert.ops import kernels, plain
from minibert.ops.kernels.draws import dropped_draws

UPSTREAM = 0.37  # of each loss
SEED = 7
VALUE_TOLERANCE = 5e-6
# In half precision a gradient is rounded before it is multiplied.
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
MOST_STANDARD_DEVIATIONS = 4.5  # of the share that dropout drops


class Maps(NamedTuple):
    """Sizes of an attention, and the real positions of its sequences, in turn."""

    B: int
    N: int
    S: int
    D: int
    teacher_D: int
    dtype: torch.dtype
    real: list[list[range]]
    dropout: float = 0.0


SMALL_MAPS = [
    Maps(2, 3, 37, 26, 40, torch.float32, [[range(37)], [range(21)]], dropout=0.1),
    Maps(2, 3, 33, 64, 26, torch.float32, [[range(9, 33)], [range(20), range(25, 30)]]),
    Maps(2, 3, 1, 26, 64, torch.float32, [[range(1)]]),
    Maps(2, 3, 70, 64, 64, torch.bfloat16, [[range(70)], [range(9)]], dropout=0.1),
]
LARGER_MAPS = [
    Maps(2, 3, 101, 26, 26, torch.float32, [[range(35, 98)], [range(70, 101)]], dropout=0.2),
    Maps(2, 3, 131, 64, 80, torch.bfloat16, [[range(66, 131)], [range(9), range(120, 130)]]),
    Maps(2, 3, 70, 80, 26, torch.float16, [[range(70)], [range(3, 50)]], dropout=0.1),
    Maps(24, 12, 256, 64, 64, torch.bfloat16, [[range(256)], [range(211)], [range(3)]], 0.1),
    Maps(6, 12, 512, 64, 64, torch.bfloat16, [[range(512)], [range(411)]], dropout=0.1),
]
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

Row = dict[str, Any]
Outcome = list[Tensor]  # a value, or more, and gradients


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


def compare(
    what: str,
    dtype: torch.dtype,
    names: Sequence[str],
    found: Outcome,
    plains: Outcome,
    truths: Outcome,
) -> Iterator[Row]:
    """Errors, and whether they are right; one that is not a number is not."""
    for name, ours, theirs, truth in zip(names, found, plains, truths, strict=True):
        rounded = name.startswith("d ") or name in ("context", "result")
        tolerance = GRADIENT_TOLERANCE[dtype] if rounded else VALUE_TOLERANCE
        error, plain_error = (relative_error([value], [truth]) for value in (ours, theirs))
        yield {
            "what": f"{what} {dtype}: {name}".replace("torch.", ""),
            "error": error,
            "allowed": plain_error + tolerance,
            "right": error <= plain_error + tolerance,
        }


def outcome(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], dtype: torch.dtype
) -> Outcome:
    """What a function gives of these inputs in a dtype, and its gradients by them.

    function: returns values, and last the scalar that gradients are of, which is not told.
    """
    leaves = [each.detach().to(dtype).requires_grad_() for each in inputs]
    torch.manual_seed(SEED)
    *values, scalar = function(*leaves)
    gradients = torch.autograd.grad(scalar, leaves)
    return [*(value.detach() for value in values), *gradients]


# Attention and its maps.


def check_attention(case: Maps, device: torch.device) -> Iterator[Row]:
    """Attention, the loss of its maps, and both at once."""
    torch.manual_seed(0)
    B, N, S, D, teacher_D, dtype, _, dropout = case
    mask, behind = masks(case, device)
    student = [heads(B, N, S, D, dtype, device) for _ in range(3)]
    teacher = [heads(B, N, S, teacher_D, dtype, device) for _ in range(2)]
    d_context = heads(B, N, S, D, dtype, device) * mask[:, None, :, None]  # 0 in padding
    kept, factor = torch.ones((), device=device), 1.0
    if dropout > 0:
        kept = recovered_mask(case, mask, device)
        yield share_of_dropped(case, kept, mask)
        factor = dropped_draws(dropout)[1]

    def attention(query, key, value, ours):
        if ours:
            context = kernels.attention(query, key, value, mask, dropout)
            assert not context.masked_select(behind).any()
        else:
            probs = plain.attention_scores(query, key, mask).softmax(-1) * kept * factor
            context = probs.to(value.dtype) @ value
        context = context.masked_fill(mask[:, None, :, None] == 0, 0)  # there, it is nobody's
        return context, (context * d_context.to(context.dtype)).sum()

    def map_loss(query, key, ours):
        function = kernels.attention_map_loss if ours else plain.attention_map_loss
        loss = function(query, key, *(part.to(query.dtype) for part in teacher), mask)
        return loss, UPSTREAM * loss

    def both(query, key, value, ours):
        if not ours:
            context, by_context = attention(query, key, value, ours)
            loss, by_loss = map_loss(query, key, ours)
            return context, loss, by_context + by_loss
        # What stands behind the last real token is not read; the teacher's come as in a run.
        query, key, value = (part.masked_fill(behind, math.nan) for part in (query, key, value))
        with torch.inference_mode():
            taught = [part.masked_fill(behind, math.nan) for part in teacher]
        context, loss = kernels.attention_and_map_loss(query, key, value, mask, dropout, *taught)
        scalar = (context * d_context.to(context.dtype)).sum() + UPSTREAM * loss
        return context.masked_fill(mask[:, None, :, None] == 0, 0), loss, scalar

    gradients = ("d query", "d key", "d value")
    for function, inputs, names in (
        (attention, student, ("context", *gradients)),
        (map_loss, student[:2], ("value", *gradients[:2])),
        (both, student, ("context", "value", *gradients)),
    ):
        outcomes = [
            outcome(lambda *parts, f=function, o=ours: f(*parts, o), inputs, precision)
            for ours, precision in ((True, dtype), (False, dtype), (False, torch.float64))
        ]
        sizes = f"{function.__name__} B {B} N {N} S {S} D {D}/{teacher_D} dropout {dropout}"
        yield from compare(sizes, dtype, names, *outcomes)


def masks(case: Maps, device: torch.device) -> tuple[Tensor, Tensor]:
    """attention_mask (B, S), and what lies behind the last real token (B, 1, S, 1)."""
    mask = torch.zeros(case.B, case.S, dtype=torch.long, device=device)
    for b in range(case.B):
        for positions in case.real[b % len(case.real)]:
            mask[b, positions.start : positions.stop] = 1
    behind = mask.flip(1).cumsum(1).flip(1) == 0
    return mask, behind[:, None, :, None]


def heads(B: int, N: int, S: int, D: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(B, N, S, D) as a model makes it, a view of (B, S, N, D)."""
    return (1.5 * torch.randn(B, S, N, D, device=device)).to(dtype).transpose(1, 2)


def recovered_mask(case: Maps, mask: Tensor, device: torch.device) -> Tensor:
    """Which elements of the maps stay, (B, N, S, S): values of one 1 each show D columns a call."""
    B, N, S, D = case[:4]
    nothing = torch.zeros(B, N, S, D, dtype=case.dtype, device=device)
    kept = torch.zeros(B, N, S, S, device=device)
    for first in range(0, S, D):
        columns = torch.arange(first, min(first + D, S), device=device)
        value = torch.zeros_like(nothing)
        value[:, :, columns, columns - first] = 1
        torch.manual_seed(SEED)
        context = kernels.attention(nothing, nothing, value, mask, case.dropout)
        kept[..., columns] = (context[..., : len(columns)] > 0).float()
    return kept


def share_of_dropped(case: Maps, kept: Tensor, mask: Tensor) -> Row:
    """How far that is from what it should be, in standard deviations."""
    real = (mask[:, None, :, None] * mask[:, None, None, :]).expand_as(kept).bool()
    elements = kept[real]
    p = case.dropout
    error = abs(1 - elements.mean().item() - p) / math.sqrt(p * (1 - p) / len(elements))
    return {
        "what": f"share of {len(elements)} that dropout {p} drops, standard deviations",
        "error": error,
        "allowed": MOST_STANDARD_DEVIATIONS,
        "right": error <= MOST_STANDARD_DEVIATIONS,
    }


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
