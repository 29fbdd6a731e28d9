"""Linear maps of a frozen model on a CPU: bias and GELU are part of the product, by oneDNN.

In bfloat16 its weights are laid out beforehand, too. oneDNN works on blocks of a weight: given it
row after row, it puts every block in order on the way, in each product anew. (In float32 that is
2 to 4 % of a product, and the model would be there twice.)

By the functions of torch that its compiler calls for the same. They are not of its public
interface: where they are not, or the CPU is of another kind than they were measured on, a model
stays as it is.
"""

import torch
from torch import Tensor, nn

FUNCTIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


class FrozenWeight(nn.Parameter):
    """A weight (out, in) that is given to `frozen_linear`; in float32 also one like any other."""


def can_freeze(weight: Tensor) -> bool:
    """Whether a weight is of a kind that this CPU's oneDNN multiplies by, and exactly."""
    functions = torch.ops.mkldnn
    if weight.device.type != "cpu" or not all(hasattr(functions, name) for name in FUNCTIONS):
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    if weight.dtype == torch.bfloat16:
        return functions._is_mkldnn_bf16_supported()
    # Other float32 products are oneDNN's only where it does not round them (`set_up_device`).
    return weight.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"


def freeze(model: nn.Module) -> None:
    """Make the weights of a model's linear maps, where they can be, `FrozenWeight`s, in place."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    linears = [linear for linear in linears if can_freeze(linear.weight)]
    # All before the first of the old is let go: into what one leaves, none of the new would fit.
    weights = [_laid_out(linear.weight.detach()) for linear in linears]
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight = FrozenWeight(weight, requires_grad=False)


def _laid_out(weight: Tensor) -> Tensor:
    """As products read it: bfloat16 in blocks, float32 as it is."""
    if weight.dtype == torch.float32:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def frozen_linear(values: Tensor, weight: FrozenWeight, bias: Tensor, gelu: bool = False) -> Tensor:
    """x W^T + b or its GELU, summed up in float32 and rounded once: values (..., in), bias (out,)
    of the weight's dtype; returns (..., out), without a gradient.
    """
    activation = ("gelu", [], "none") if gelu else ("none", [], "")  # "none": by the error function
    return torch.ops.mkldnn._linear_pointwise(values, weight, bias, *activation)
