"""What an ATen operation costs: floating-point operations and bytes, from shapes alone.

FLOPs are those of matrix products, 2 for each multiplication and its addition, as everybody counts
them; element-wise work is told by its bytes. Bytes are those of the tensors that an operation reads
and writes, each once, as if nothing were cached; an operation that only looks at a tensor in
another way (a view) moves none, and one that looks up rows reads those rows.

Shapes: B batch, N heads, S sequence (of queries), T sequence (of keys), D head size; a product is
of (m, k) by (k, n).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _product(left: Tensor, right: Tensor) -> int:
    """(..., m, k) by (..., k, n)."""
    return 2 * left.numel() * right.shape[-1]


def _attention(query: Tensor, key: Tensor, products: int) -> int:
    """So many products of S rows with T rows, all of D numbers."""
    B, N, S, D = query.shape
    return products * 2 * B * N * S * key.shape[2] * D


# Attention's forward is Q K^T and P V; its backward recomputes Q K^T, and then dV, dP, dQ and dK.
FLOPS: dict[Any, Callable[..., int]] = {
    aten.mm: lambda left, right, *_: _product(left, right),
    aten.bmm: lambda left, right, *_: _product(left, right),
    aten.addmm: lambda _, left, right, *__: _product(left, right),
    aten.baddbmm: lambda _, left, right, *__: _product(left, right),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_: _attention(q, k, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda _, q, k, *__: _attention(q, k, 5)
    ),
}
# Operations that read as many elements of their first tensor as they write.
LOOK_UP = (aten.embedding, aten.index, aten.index_select, aten.gather)
# Operations that leave what they allocate as it is.
ALLOCATE = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty)


def flops(operation: Any, arguments: Sequence[Any]) -> int:
    """FLOPs of a call; 0 for all but matrix products."""
    count = FLOPS.get(operation.overloadpacket)
    return 0 if count is None else count(*arguments)


def bytes_moved(
    operation: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any
) -> tuple[int, int]:
    """Bytes that a call reads and writes."""
    if operation.is_view:
        return 0, 0
    read, written = [], []
    for argument, value in argument_values(operation, arguments, named):
        tensors = list(tensors_in(value))
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors
        if not argument.is_out:
            read += tensors
    before = {tensor.untyped_storage()._cdata for tensor in read + written}
    made = [t for t in tensors_in(result) if t.untyped_storage()._cdata not in before]
    if operation.overloadpacket in ALLOCATE:
        made = []
    bytes_written = sum(map(size_in_bytes, written + made))
    if operation.overloadpacket in LOOK_UP:
        return sum(map(size_in_bytes, [*read[1:], *tensors_in(result)])), bytes_written
    return sum(map(size_in_bytes, read)), bytes_written


def argument_values(
    operation: Any, arguments: Sequence[Any], named: Mapping[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """What was given, each with what the operation's schema says of it."""
    schema = operation._schema.arguments
    yield from zip(schema, arguments, strict=False)
    yield from ((argument, named[argument.name]) for argument in schema if argument.name in named)


def size_in_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that are there; one that is repeated by a stride of 0 is there once."""
    sizes = (size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step != 0)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument or a result, which may be a list of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
