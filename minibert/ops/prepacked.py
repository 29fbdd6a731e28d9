"""Weights of a frozen model on a CPU, laid out beforehand as its products read them.

oneDNN works on blocks of a weight. Given it row after row, it puts every block in order on the way,
in each product anew; a weight that does not change is put in order once. By the functions of torch
that its compiler calls for the same: they are not of its public interface, so that where they are
not, or the CPU is of another kind than they were measured on, weights stay as they are.
"""

import torch
from torch import Tensor, nn

FUNCTIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


def can_prepack(weight: Tensor) -> bool:
    """Whether a weight is of a kind that is laid out beforehand: bfloat16, on an x86 CPU that has
    AVX-512. In float32 a product is 2 to 4 % faster by it, and the model would be there twice.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    functions = torch.ops.mkldnn
    if not all(hasattr(functions, name) for name in FUNCTIONS):
        return False
    of_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return of_avx512 and functions._is_mkldnn_bf16_supported()


def prepack(model: nn.Module) -> None:
    """Lay out the weights of a model's linear maps, in place, where that can be done.

    From then on `prepacked_linear` alone knows what to do with them.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    linears = [linear for linear in linears if can_prepack(linear.weight)]
    # All before the first of the old is let go: into what one leaves, none of the new would fit.
    packed = [torch.ops.mkldnn._reorder_linear_weight(each.weight.detach()) for each in linears]
    for linear, weight in zip(linears, packed, strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)


def prepacked_linear(values: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x W^T + b or its GELU, computed in float32 and rounded once: values (..., in), a weight
    (out, in) of `prepack`, bias (out,), all bfloat16; returns (..., out).
    """
    activation = ("gelu", [], "none") if gelu else ("none", [], "")  # "none": by the error function
    return torch.ops.mkldnn._linear_pointwise(values, weight, bias, *activation)
