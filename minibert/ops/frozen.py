"""Linear maps of a frozen model on a CPU: oneDNN adds the bias, and forms GELU, within the product.

In bfloat16 the weights are laid out beforehand, too. oneDNN works on blocks of a weight; given it
row after row, it puts every block in order on the way, in each product anew. (In float32 that takes
2 to 4 % of a product, and packed weights would stand beside those that evaluations need.)

This is done by the functions of torch that its own compiler calls, which are not public. Where
torch lacks them, or the CPU has no AVX-512, a model stays as it is.
"""

import torch
from torch import Tensor, nn

FUNCTIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


class FrozenWeight(nn.Parameter):
    """A weight (out, in) for `frozen_linear`; in float32 also one like any other."""


def can_freeze(weight: Tensor) -> bool:
    """Whether `frozen_linear` can multiply by weights of this kind, without rounding factors."""
    functions = torch.ops.mkldnn
    if weight.device.type != "cpu" or not all(hasattr(functions, name) for name in FUNCTIONS):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if weight.dtype == torch.bfloat16:
        return functions._is_mkldnn_bf16_supported()
    # Where float32 products are oneDNN's at all ("medium", see `set_up_device`).
    is_onednns = torch.get_float32_matmul_precision() == "medium"
    return weight.dtype == torch.float32 and is_onednns and _products_are_float32()


def _products_are_float32() -> bool:
    """As in `training.device`, of the product that is used here."""
    n = 256
    just_above_one = torch.full((n, n), 1 + 2**-20)
    return torch.equal(frozen_linear(just_above_one, torch.eye(n), torch.zeros(n)), just_above_one)


def freeze(model: nn.Module) -> None:
    """Make the weights of a model's linear maps, where they can be, `FrozenWeight`s, in place."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not can_freeze(linears[0].weight):  # all are of one device and dtype
        return
    # All at first, and only then the old ones are let go: a packed weight is a little too large for
    # the gap that another leaves, and such gaps would stay.
    weights = [_laid_out(linear.weight.detach()) for linear in linears]
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight = FrozenWeight(weight, requires_grad=False)


def _laid_out(weight: Tensor) -> Tensor:
    """As products read it: bfloat16 in oneDNN's blocks, float32 as it is."""
    if weight.dtype == torch.float32 or weight.is_mkldnn:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def frozen_linear(values: Tensor, weight: FrozenWeight, bias: Tensor, gelu: bool = False) -> Tensor:
    """x W^T + b or its GELU, summed up in float32 and rounded once.

    values (..., in), weight (out, in), bias (out,), all of one dtype; returns (..., out), without a
    gradient.
    """
    activation = ("gelu", [], "none") if gelu else ("none", [], "")  # "none": by the error function
    return torch.ops.mkldnn._linear_pointwise(values, weight, bias, *activation)
