"""Triton twins of "add & norm": LayerNorm(residual + dropout(values)), forward and backward.

Shapes: m rows (tokens), H hidden. A program has a row in its registers; neither the sum nor the
mask of dropout is ever in memory. Sums are float32, and no two programs write to one place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from minibert.ops.kernels.draws import draw_seed, dropped_draws, kept, keys_of_rows

FORWARD = {"num_warps": 4}
GRADIENT = {"num_warps": 2, "STAGES": 3}  # STAGES: rows on their way while one is worked on
# Programs of backward, each of which adds up its share of the gradients of weight and bias: 16 for
# each of the 132 multiprocessors of the GPU it was chosen on.
PARTS = 2112


@triton.jit
def _summed_row(residual, values, seed, row, columns, inside, dropped, scale_of_kept, H):
    """residual + dropout(values) in float32, and which of the values stay."""
    places = row * H + columns
    total = tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(values + places, mask=inside, other=0.0).to(tl.float32)
    stays = inside
    if seed is not None:
        first_key, second_key = keys_of_rows(seed, row)
        stays = inside & kept(first_key, second_key, columns, dropped)
        added = tl.where(stays, added * scale_of_kept, 0.0)
    return total + added, stays


@triton.jit(do_not_specialize=["seed", "dropped"])
def _add_and_norm_kernel(residual, values, weight, bias, seed, result, means, inverses,
                         dropped, scale_of_kept, eps, H: tl.constexpr,
                         TILE: tl.constexpr):  # fmt: skip
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)  # m H may pass 2^31
    columns = tl.arange(0, TILE)
    inside = columns < H
    total, _ = _summed_row(residual, values, seed, row, columns, inside, dropped, scale_of_kept, H)
    mean = tl.sum(total, axis=0) / H
    centred = tl.where(inside, total - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / H + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = centred * inverse * scale + shift
    tl.store(result + row * H + columns, scaled.to(result.dtype.element_ty), mask=inside)
    if means is not None:
        tl.store(means + row, mean)
        tl.store(inverses + row, inverse)


@triton.jit(do_not_specialize=["seed", "dropped", "m"])
def _add_and_norm_gradient_kernel(residual, values, weight, seed, means, inverses, upstream,
                                  d_residual, d_values, d_weight_parts, d_bias_parts,
                                  m, dropped, scale_of_kept, H: tl.constexpr,
                                  TILE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One program: some of the rows. With n the normalised row, of which LayerNorm made
    n weight + bias, and d_normed = upstream weight,

    d_total = inverse (d_normed - mean(d_normed) - n mean(d_normed n)),
    inverse = 1 / standard deviation
    """
    columns = tl.arange(0, TILE)
    inside = columns < H
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([TILE], tl.float32)
    d_bias = tl.zeros([TILE], tl.float32)
    for number in tl.range(tl.program_id(0), m, tl.num_programs(0), num_stages=STAGES):
        row = tl.full([], 0, tl.int64) + number  # m H may pass 2^31
        total, stays = _summed_row(
            residual, values, seed, row, columns, inside, dropped, scale_of_kept, H
        )
        inverse = tl.load(inverses + row)
        normed = tl.where(inside, (total - tl.load(means + row)) * inverse, 0.0)
        d_out = tl.load(upstream + row * H + columns, mask=inside, other=0.0).to(tl.float32)
        d_weight += d_out * normed
        d_bias += d_out
        d_normed = d_out * scale
        mean = tl.sum(d_normed, axis=0) / H
        d_total = inverse * (d_normed - mean - normed * (tl.sum(d_normed * normed, axis=0) / H))
        places = row * H + columns
        tl.store(d_residual + places, d_total.to(d_residual.dtype.element_ty), mask=inside)
        if seed is not None:
            d_added = tl.where(stays, d_total * scale_of_kept, 0.0)
            tl.store(d_values + places, d_added.to(d_values.dtype.element_ty), mask=inside)
    part = tl.program_id(0) * H + columns
    tl.store(d_weight_parts + part, d_weight, mask=inside)
    tl.store(d_bias_parts + part, d_bias, mask=inside)


@torch.compiler.disable
def add_and_norm(
    residual: Tensor, values: Tensor, probability: float, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`plain.add_and_norm`, of rows in float32 or a half precision."""
    return _AddAndNorm.apply(residual, values, probability, weight, bias, eps)


class _AddAndNorm(Function):
    @staticmethod
    def forward(ctx, residual, values, probability, weight, bias, eps):
        residual, values = residual.contiguous(), values.contiguous()
        H = residual.shape[-1]
        m = residual.numel() // H
        seed = draw_seed() if probability > 0 else None
        ctx.seed, ctx.numbers = seed, dropped_draws(probability)
        ctx.sizes = {"H": H, "TILE": triton.next_power_of_2(H)}
        result = torch.empty_like(residual)
        means = inverses = None
        if any(ctx.needs_input_grad):
            means, inverses = residual.new_empty(2, m, dtype=torch.float32)
        if m > 0:
            _add_and_norm_kernel[(m,)](
                residual, values, weight, bias, seed, result, means, inverses,
                *ctx.numbers, eps, **ctx.sizes, **FORWARD,
            )  # fmt: skip
        ctx.save_for_backward(residual, values, weight, means, inverses)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        residual, values, weight, means, inverses = ctx.saved_tensors
        seed = ctx.seed
        m, H = means.numel(), weight.numel()
        d_residual = torch.empty_like(residual)
        d_values = d_residual if seed is None else torch.empty_like(values)
        parts = weight.new_empty(2, min(m, PARTS), H, dtype=torch.float32)
        if m > 0:
            _add_and_norm_gradient_kernel[(parts.shape[1],)](
                residual, values, weight, seed, means, inverses, upstream.contiguous(),
                d_residual, d_values, *parts, m, *ctx.numbers, **ctx.sizes, **GRADIENT,
            )  # fmt: skip
        d_weight, d_bias = parts.sum(1).to(weight.dtype)
        return d_residual, d_values, None, d_weight, d_bias, None
