"""Whether Triton's attention, the loss of its maps, and both at once are right.

What dropout drops is first recovered through the kernel itself; then the plain formula drops the
same.

Shapes: B batch, S sequence, N heads, D head size.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from outcomes import SEED, Row, compare, outcome, share_of_dropped
from torch import Tensor

from minibert.ops import kernels, plain
from minibert.ops.kernels.draws import dropped_draws

UPSTREAM = 0.37  # of the loss


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
    Maps(2, 3, 41, 64, 26, torch.float32, [[range(34, 41)], [range(20), range(25, 30)]]),
    Maps(2, 3, 1, 26, 64, torch.float32, [[range(1)]]),
    Maps(2, 1, 19, 26, 40, torch.float16, [[range(19)], [range(2, 17)]], dropout=0.1),
    Maps(2, 3, 70, 64, 64, torch.bfloat16, [[range(70)], [range(9)]], dropout=0.1),
]
LARGER_MAPS = [
    Maps(2, 3, 101, 26, 26, torch.float32, [[range(35, 98)], [range(70, 101)]], dropout=0.2),
    Maps(2, 3, 131, 64, 80, torch.bfloat16, [[range(66, 131)], [range(9), range(120, 130)]]),
    Maps(2, 3, 70, 80, 26, torch.float16, [[range(70)], [range(3, 50)]], dropout=0.1),
    Maps(24, 12, 256, 64, 64, torch.bfloat16, [[range(256)], [range(211)], [range(3)]], 0.1),
    Maps(6, 12, 512, 64, 64, torch.bfloat16, [[range(512)], [range(411)]], dropout=0.1),
]


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
        real = (mask[:, None, :, None] * mask[:, None, None, :]).expand_as(kept).bool()
        yield share_of_dropped(kept[real], dropout)
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
