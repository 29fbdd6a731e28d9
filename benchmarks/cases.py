"""The operations that `losses.py` measures, what each is called with, and at which sizes.

Shapes: B batch, S sequence, N heads, D head size, H hidden, I intermediate, V vocabulary, M masked
positions.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minibert.ops import fused, plain

N, D, H, I, BIOBERT_V = 12, 64, 768, 3072, 28_996
DTYPES = (torch.float32, torch.bfloat16)


class Call(NamedTuple):
    """The arguments of a call; tensors of the student ask for their gradients."""

    arguments: list[Any]
    upstream: Tensor | None = None  # None: the value is a scalar


def normal(like: Tensor, *shape: int, scale: float = 1.0, learns: bool = False) -> Tensor:
    """Drawn in place, so that making it takes no memory beyond its own."""
    return like.new_empty(shape).normal_(0, scale).requires_grad_(learns)


def heads(like: Tensor, B: int, S: int, learns: bool = False) -> Tensor:
    """(B, N, S, D) as a model has it: a view of (B, S, N, D)."""
    return normal(like, B, S, N, D).transpose(1, 2).requires_grad_(learns)


def no_padding(like: Tensor, B: int, S: int) -> Tensor:
    """An attention_mask (B, S)."""
    return torch.ones(B, S, dtype=torch.long, device=like.device)


def for_vocabulary_loss(like: Tensor, M: int, V: int) -> Call:
    student, teacher = (
        [
            normal(like, M, H, learns=learns),
            normal(like, V, H, scale=0.05, learns=learns),  # logits are some 1.4
            normal(like, V, scale=0.1, learns=learns),
        ]
        for learns in (True, False)
    )
    labels = torch.randint(V, (M,), device=like.device)
    return Call([*student, *teacher, labels, 1.0, 1.0, 5.0])


def for_attention_map_loss(like: Tensor, B: int, S: int) -> Call:
    maps = [heads(like, B, S, learns) for learns in (True, True, False, False)]
    return Call([*maps, no_padding(like, B, S)])


def for_hidden_state_loss(like: Tensor, B: int, S: int) -> Call:
    student, teacher = (normal(like, B, S, H, learns=learns) for learns in (True, False))
    return Call([student, teacher, no_padding(like, B, S)])


def for_attention(like: Tensor, B: int, S: int, probability: float = 0.0) -> Call:
    parts = [heads(like, B, S, learns=True) for _ in range(3)]
    return Call([*parts, no_padding(like, B, S), probability], upstream=heads(like, B, S))


def for_attention_with_dropout(like: Tensor, B: int, S: int) -> Call:
    return for_attention(like, B, S, probability=0.1)


def for_attention_and_map_loss(like: Tensor, B: int, S: int) -> Call:
    """As in training: with dropout, and both losses learn."""
    student = [heads(like, B, S, learns=True) for _ in range(3)]
    teacher = [heads(like, B, S) for _ in range(2)]
    arguments = [*student, no_padding(like, B, S), 0.1, *teacher]
    return Call(arguments, upstream=heads(like, B, S))


def for_add_and_norm(like: Tensor, B: int, S: int) -> Call:
    residual, values = (normal(like, B, S, H, learns=True) for _ in range(2))
    weight, bias = (normal(like, H, learns=True) for _ in range(2))
    upstream = normal(like, B, S, H)
    return Call([residual, values, 0.1, weight, bias, 1e-12], upstream)


def for_feed_forward(like: Tensor, B: int, S: int) -> Call:
    """Weights of such a size that values stay near 1."""
    arguments = [normal(like, B, S, H, learns=True)]
    for shape in ((I, H), (H, I)):  # of each weight
        arguments.append(normal(like, *shape, scale=shape[1] ** -0.5, learns=True))
        arguments.append(normal(like, shape[0], learns=True))
    return Call(arguments, upstream=normal(like, B, S, H))


def of_five_tensors(
    feed_forward: Callable[..., Tensor], values: Tensor, *parameters: Tensor
) -> Tensor:
    """values, W_1, b_1, W_2, b_2."""
    return feed_forward(values, parameters[:2], parameters[2:])


def for_dropout(like: Tensor, B: int, S: int) -> Call:
    return Call([normal(like, B, S, H, learns=True), 0.1], upstream=normal(like, B, S, H))


@dataclass(frozen=True)
class Operation:
    """An operation of `plain.py` and `fused.py`."""

    name: str
    plain: Callable[..., Any]
    fused: Callable[..., Any]
    inputs: Callable[..., Call]  # of a tensor like theirs, and the sizes
    has_maps: bool = False  # plain's largest tensors are (B, N, S, S)
    has_kernels: bool = False
    torchs_in_float32: bool = False  # on a GPU it has kernels for half precisions alone
    is_random: bool = False


VOCABULARY_LOSS = Operation(
    "vocabulary_loss",
    plain.vocabulary_loss,
    fused.vocabulary_loss,
    for_vocabulary_loss,
    has_kernels=True,
)
ATTENTION_MAP_LOSS = Operation(
    "attention_map_loss",
    plain.attention_map_loss,
    fused.attention_map_loss,
    for_attention_map_loss,
    has_maps=True,
    has_kernels=True,
)
HIDDEN_STATE_LOSS = Operation(
    "hidden_state_loss",
    plain.hidden_state_loss,
    fused.hidden_state_loss,
    for_hidden_state_loss,
    has_kernels=True,
)
ATTENTION_MAP_MSE = Operation(
    "attention_map_mse",
    plain.attention_map_mse,
    fused.attention_map_mse,
    for_attention_map_loss,
    has_maps=True,
)
HIDDEN_STATE_MSE = Operation(
    "hidden_state_mse", plain.hidden_state_mse, fused.hidden_state_mse, for_hidden_state_loss
)
ATTENTION = Operation(
    "attention",
    plain.attention,
    fused.attention,
    for_attention,
    has_maps=True,
    has_kernels=True,
    torchs_in_float32=True,
)
ATTENTION_WITH_DROPOUT = Operation(
    "attention with dropout",
    plain.attention,
    fused.attention,
    for_attention_with_dropout,
    has_maps=True,
    has_kernels=True,
    torchs_in_float32=True,
    is_random=True,
)
ATTENTION_AND_MAP_LOSS = Operation(
    "attention_and_map_loss",
    partial(plain.attention_and_map_loss, map_loss=plain.attention_map_loss),
    partial(fused.attention_and_map_loss, map_loss=fused.attention_map_loss),
    for_attention_and_map_loss,
    has_maps=True,
    has_kernels=True,
    is_random=True,
)
ADD_AND_NORM = Operation(
    "add_and_norm",
    plain.add_and_norm,
    fused.add_and_norm,
    for_add_and_norm,
    has_kernels=True,
    is_random=True,
)
FEED_FORWARD = Operation(
    "feed_forward",
    partial(of_five_tensors, plain.feed_forward),
    partial(of_five_tensors, fused.feed_forward),
    for_feed_forward,
)
DROPOUT = Operation("dropout", plain.dropout, fused.dropout, for_dropout, is_random=True)


@dataclass(frozen=True)
class Case:
    """An operation at a size."""

    operation: Operation
    sizes: dict[str, int]  # by letter
    dtype: torch.dtype

    def call(self, device: torch.device) -> Call:
        """The same numbers each time."""
        torch.manual_seed(0)
        return self.operation.inputs(torch.empty(0, dtype=self.dtype, device=device), **self.sizes)

    def plain_bytes(self) -> int:
        """What maps or logits take in plain, roughly: five tensors in float64, for the truth."""
        elements = math.prod(self.sizes.values())
        if self.operation.has_maps:
            elements *= N * self.sizes["S"]
        return 5 * 8 * elements


def of_both_dtypes(operation: Operation, **sizes: int) -> list[Case]:
    return [Case(operation, sizes, dtype) for dtype in DTYPES]


def quick_cases() -> list[Case]:
    """A glance at each operation."""
    cases = []
    for M, V in ((0, BIOBERT_V), (32, BIOBERT_V), (32, 4096)):
        cases += of_both_dtypes(VOCABULARY_LOSS, M=M, V=V)
    for S in (64, 256):
        cases += of_both_dtypes(ATTENTION_MAP_LOSS, B=1, S=S)
    cases += of_both_dtypes(ATTENTION_MAP_MSE, B=1, S=256)
    for operation in (HIDDEN_STATE_LOSS, HIDDEN_STATE_MSE, ATTENTION, ATTENTION_WITH_DROPOUT):
        cases += of_both_dtypes(operation, B=1, S=256)
    for operation in (ATTENTION_AND_MAP_LOSS, FEED_FORWARD, ADD_AND_NORM, DROPOUT):
        cases += of_both_dtypes(operation, B=1, S=256)
    return cases


def all_cases() -> list[Case]:
    """How each operation grows with its sizes."""
    cases = []
    for M in (0, 32, 256, 1024):
        cases += of_both_dtypes(VOCABULARY_LOSS, M=M, V=BIOBERT_V)
    for V in (4096, 16_384, 65_536):
        cases += of_both_dtypes(VOCABULARY_LOSS, M=256, V=V)
    for operation in (ATTENTION_MAP_LOSS, ATTENTION_MAP_MSE):
        for S in (64, 256, 512, 1024, 2048, 4096):
            cases += of_both_dtypes(operation, B=1, S=S)
    for S in (64, 256, 1024, 2048):
        for operation in (ATTENTION, ATTENTION_WITH_DROPOUT, ATTENTION_AND_MAP_LOSS):
            cases += of_both_dtypes(operation, B=1, S=S)
    for operation in (HIDDEN_STATE_LOSS, HIDDEN_STATE_MSE, FEED_FORWARD, ADD_AND_NORM, DROPOUT):
        cases += of_both_dtypes(operation, B=8, S=256)
    return cases


def cases_of_a_step(B: int, S: int) -> list[Case]:
    """The sizes of a micro-batch, an eighth of whose positions are masked: M.

    That is 15 % of the real ones where texts fill five sixths of it, as random corpora do.
    """
    over_tokens = (
        ATTENTION_MAP_LOSS, ATTENTION_AND_MAP_LOSS, ADD_AND_NORM, HIDDEN_STATE_LOSS, ATTENTION,
        ATTENTION_WITH_DROPOUT, DROPOUT,
    )  # fmt: skip
    cases = [Case(VOCABULARY_LOSS, {"M": B * S // 8, "V": BIOBERT_V}, torch.bfloat16)]
    cases += [Case(operation, {"B": B, "S": S}, torch.bfloat16) for operation in over_tokens]
    return cases + [dataclasses.replace(case, dtype=torch.float32) for case in cases]
