"""Whether every Triton kernel, on this very GPU, gives what the plain formula gives in float64.

Each value and gradient may err as much as the plain formula in the same precision, and a little
more. The sizes are awkward, as in tests/test_kernels.py, and one is a model's.

Shapes: B batch, S sequence, N heads, D head size, H hidden, V vocabulary, m rows (masked positions
or tokens).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from losses import relative_error
from torch import Tensor

from minibert.ops import kernels, plain

UPSTREAM = 0.37
VALUE_TOLERANCE = 5e-6
# In half precision the difference of the maps is rounded before it is multiplied.
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.5e-3, torch.float16: 2e-4}

# B, N, S, D of student and teacher, dtype; and the real positions of the sequences, in turn.
MAPS = [
    (2, 3, 37, 26, 40, torch.float32, [[range(37)], [range(21)]]),
    (2, 3, 37, 64, 26, torch.float32, [[range(37)], []]),
    (2, 3, 101, 26, 26, torch.float32, [[range(35, 98)], [range(20), range(70, 101)]]),
    (2, 3, 64, 40, 64, torch.float32, [[range(64)], [range(1, 2)]]),
    (2, 3, 1, 26, 64, torch.float32, [[range(1)], []]),
    (2, 3, 37, 26, 40, torch.bfloat16, [[range(37)], [range(21)]]),
    (2, 3, 131, 64, 80, torch.bfloat16, [[range(66, 131)], [range(9), range(129, 130)]]),
    (2, 3, 70, 80, 26, torch.float16, [[range(70)], [range(3, 50)]]),
    (24, 12, 256, 64, 64, torch.bfloat16, [[range(256)], [range(211)], [range(130)]]),
]
# m, V, temperature, whether there is a teacher.
ROWS = [
    (0, 97, 1.0, True),
    (7, 97, 1.0, True),
    (5, 131, 2.0, True),
    (1, 591, 1.0, True),
    (5, 97, 2.0, False),
    (64, 28_996, 1.0, True),
    (64, 28_996, 2.0, True),
]
# dtypes of the logits and of the teacher's bias; the last is what a run in bfloat16 has.
ROW_DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]
COSINES = [(0, 37), (53, 37), (211, 768)]  # m, H


def check_all(device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for each value and gradient of each size, as JSON holds it."""
    for B, N, S, student_D, teacher_D, dtype, real in MAPS:
        sizes = f"attention_map_loss B {B} N {N} S {S} D {student_D}/{teacher_D}"
        maps, mask = random_maps(B, N, S, (student_D, teacher_D), dtype, real, device)
        truths = plain_map_loss([part.double() for part in maps], mask)
        plains = plain_map_loss(maps, mask)
        found = kernel_map_loss(maps, mask)
        yield from compare(sizes, dtype, ("value", "d query", "d key"), found, plains, truths)
    for m, V, temperature, has_teacher in ROWS:
        for dtype, bias_dtype in ROW_DTYPES:
            sizes = f"vocabulary_rows m {m} V {V} T {temperature:g} teacher bias {bias_dtype}"
            rows = random_rows(m, V, has_teacher, dtype, bias_dtype, device)
            truths = plain_rows(
                [part if part is None else exact(part) for part in rows], temperature
            )
            plains = plain_rows(rows, temperature)
            found = kernel_rows(rows, temperature)
            yield from compare(sizes, dtype, ("mlm", "output", "d logits"), found, plains, truths)
    for m, H in COSINES:
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher, is_real = random_hidden(m, H, dtype, device)
            truths = plain_cosines(student.double(), teacher.double(), is_real)
            plains = plain_cosines(student, teacher, is_real)
            found = kernel_cosines(student, teacher, is_real)
            sizes = f"cosine_rows m {m} H {H}"
            yield from compare(sizes, dtype, ("value", "d student"), found, plains, truths)


def compare(
    sizes: str,
    dtype: torch.dtype,
    names: tuple[str, ...],
    found: list[Tensor],
    plains: list[Tensor],
    truths: list[Tensor],
) -> Iterator[dict[str, Any]]:
    """Errors, and whether they are right; an error that is not a number is not."""
    for name, ours, theirs, truth in zip(names, found, plains, truths, strict=True):
        tolerance = GRADIENT_TOLERANCE[dtype] if name.startswith("d ") else VALUE_TOLERANCE
        error, plain_error = (relative_error([value], [truth]) for value in (ours, theirs))
        yield {
            "what": f"{sizes} {dtype}: {name}".replace("torch.", ""),
            "error": error,
            "allowed": plain_error + tolerance,
            "right": error <= plain_error + tolerance,
        }


def exact(part: Tensor | None) -> Tensor | None:
    """In float64; labels, and what is missing, as they are."""
    return part.double() if part is not None and part.is_floating_point() else part


# The loss of the attention maps.


def random_maps(
    B: int,
    N: int,
    S: int,
    head_sizes: tuple[int, int],
    dtype: torch.dtype,
    real: list[list[range]],
    device: torch.device,
) -> tuple[list[Tensor], Tensor]:
    """Queries and keys of both models, as a model makes them and 0 in padding; attention_mask."""
    torch.manual_seed(0)
    mask = torch.zeros(B, S, dtype=torch.long, device=device)
    for b in range(B):
        for positions in real[b % len(real)]:
            mask[b, positions.start : positions.stop] = 1
    student_D, teacher_D = head_sizes
    maps = []
    for D in (student_D, student_D, teacher_D, teacher_D):
        part = 1.5 * torch.randn(B, S, N, D, device=device)
        maps.append((part * mask[:, :, None, None]).to(dtype).transpose(1, 2))  # (B, N, S, D)
    return maps, mask


def plain_map_loss(maps: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Value, and gradients by the student's queries and keys."""
    student = [part.detach().requires_grad_() for part in maps[:2]]
    loss = plain.attention_map_loss(*student, *maps[2:], mask)
    return [loss.detach(), *torch.autograd.grad(UPSTREAM * loss, student)]


def kernel_map_loss(maps: list[Tensor], mask: Tensor) -> list[Tensor]:
    """The same by the kernels, where padding is not a number: they must not read it."""
    padding = mask[:, None, :, None] == 0  # (B, 1, S, 1)
    maps = [part.masked_fill(padding, math.nan) for part in maps]
    loss, *lse = kernels.attention_map_loss_forward(*maps, mask)
    upstream = torch.tensor(UPSTREAM, device=mask.device)
    return [loss, *kernels.attention_map_loss_backward(*maps, mask, *lse, upstream)]


# The rows of the vocabulary loss.


def random_rows(
    m: int,
    V: int,
    has_teacher: bool,
    dtype: torch.dtype,
    bias_dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor | None]:
    """Logits (m, V) and biases (V,) of student and teacher, labels (m,), some of them ignored.

    The student's bias is a weight, and float32; the teacher's has `bias_dtype`.
    """
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(m, V, device=device).to(dtype) for _ in range(2))
    student_bias, teacher_bias = (torch.randn(V, device=device) for _ in range(2))
    teacher_bias = teacher_bias.to(bias_dtype)
    labels = torch.randint(V, (m,), device=device)
    labels[1::3] = plain.IGNORED_LABEL
    if not has_teacher:
        teacher = teacher_bias = None
    return [student, teacher, student_bias, teacher_bias, labels]


def plain_rows(rows: list[Tensor | None], temperature: float) -> list[Tensor]:
    """The sums of both losses, and the gradient by the logits.

    With logits^T (V, m) as the decoder and the identity (m, m) for heads, plain has these logits.
    """
    student, teacher, student_bias, teacher_bias, labels = rows
    decoder = student.T.detach().requires_grad_()  # (V, m)
    identity = torch.eye(len(labels), dtype=student.dtype, device=student.device)  # (m, m)
    taught = (None, None, None) if teacher is None else (identity, teacher.T, teacher_bias)
    loss, mlm_sum, output_sum = plain.vocabulary_loss(
        identity, decoder, student_bias, *taught, labels, temperature, 1.0, 5.0
    )
    loss.backward()
    return [mlm_sum, output_sum, decoder.grad.T]


def kernel_rows(rows: list[Tensor | None], temperature: float) -> list[Tensor]:
    """The same by the kernel, which puts the gradient in the logits' place."""
    student, *others = rows
    gradient = student.clone()
    mlm, output = kernels.vocabulary_rows(gradient, *others, temperature, 1.0, 5.0)
    return [mlm.sum(), output.sum(), gradient]


# The rows of the loss of the hidden states.


def random_hidden(
    m: int, H: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (m, H) of student and teacher, and which rows are real (m,)."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(m, H, device=device).to(dtype) for _ in range(2))
    is_real = torch.ones(m, dtype=torch.long, device=device)
    is_real[2::5] = 0
    return student, teacher, is_real


def plain_cosines(student: Tensor, teacher: Tensor, is_real: Tensor) -> list[Tensor]:
    """The sum of the losses, and the gradient by the student's rows."""
    student = student.detach().requires_grad_()
    loss = plain.hidden_state_loss(student[None], teacher[None], is_real[None])
    return [loss.detach(), *torch.autograd.grad(loss, student)]


def kernel_cosines(student: Tensor, teacher: Tensor, is_real: Tensor) -> list[Tensor]:
    """The same by the kernel, where padding is not a number, nor what the gradient replaces."""
    padding = is_real[:, None] == 0  # (m, 1)
    student, teacher = (part.masked_fill(padding, math.nan) for part in (student, teacher))
    gradient = torch.full_like(student, math.nan)
    losses = kernels.cosine_rows(student, teacher, gradient, is_real)
    return [losses.sum(), gradient]
