"""Triton twins of what `fused.py` computes, for tensors on a GPU.

Imported only where Triton is installed. The tensors lie on the current CUDA device.
"""

from minibert.ops.kernels.attention_maps import (
    attention,
    attention_and_map_loss,
    attention_map_loss,
)
from minibert.ops.kernels.loss_rows import column_sums, hidden_state_loss, vocabulary_rows
from minibert.ops.kernels.norm_rows import add_and_norm

__all__ = [
    "add_and_norm",
    "attention",
    "attention_and_map_loss",
    "attention_map_loss",
    "column_sums",
    "hidden_state_loss",
    "vocabulary_rows",
]
