"""AdamW's parameter groups and the learning rate of each update."""

import torch
from torch import nn

BETAS, EPSILON = (0.9, 0.999), 1e-8
LARGEST_GRAD_NORM = 1.0  # the gradient is scaled down to this norm where it is larger


def build_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with decay on matrices alone.

    Biases and LayerNorm, the parameters of one dimension, do not decay. `fused`: one pass over
    each parameter and its moments.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=True)


def learning_rate_at(step: int, steps: int, warmup_steps: int, highest: float) -> float:
    """The rate of update `step`, counted from 0, of `steps` in all.

    It climbs from highest / warmup_steps to `highest` in `warmup_steps` updates, then falls in a
    straight line that would meet 0 one update after the last: no update is spent at rate 0.
    """
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    return highest * (steps - step) / (steps - warmup_steps)
