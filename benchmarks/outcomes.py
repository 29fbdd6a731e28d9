"""How a function's values and gradients are compared with those of a plain formula in float64."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from losses import relative_error
from torch import Tensor

SEED = 7
VALUE_TOLERANCE = 5e-6
# In half precision a gradient is rounded before it is multiplied.
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
MOST_STANDARD_DEVIATIONS = 4.5  # of the share that dropout drops

Row = dict[str, Any]
Outcome = list[Tensor]  # a value, or more, and gradients


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


def share_of_dropped(kept: Tensor, dropout: float) -> Row:
    """How far the share of zeros in `kept` (elements,) is from `dropout`."""
    deviation = math.sqrt(dropout * (1 - dropout) / len(kept))
    error = abs(1 - kept.double().mean().item() - dropout) / deviation
    return {
        "what": f"share of {len(kept)} that dropout {dropout} drops, standard deviations",
        "error": error,
        "allowed": MOST_STANDARD_DEVIATIONS,
        "right": error <= MOST_STANDARD_DEVIATIONS,
    }
