"""What an ATen operation costs: floating-point operations and bytes, from shapes alone.

FLOPs are those of matrix products, 2 for each multiplication and its addition, as everybody counts
them; element-wise work is told by its bytes. Bytes are those of the tensors that an operation reads
and writes, each once, as if nothing were cached; an operation that only looks at a tensor in
another way (a view) moves none, and one that looks up or adds to some rows moves those rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


def _product(left: Tensor, right: Tensor) -> int:
    """(..., m, k) by (..., k, n)."""
    return 2 * left.numel() * right.shape[-1]


FLOPS: dict[Any, Callable[..., int]] = {
    aten.mm: lambda left, right, *_: _product(left, right),
    aten.bmm: lambda left, right, *_: _product(left, right),
    aten.addmm: lambda _, left, right, *__: _product(left, right),
    aten.addmm_: lambda _, left, right, *__: _product(left, right),
    aten.baddbmm: lambda _, left, right, *__: _product(left, right),
}
# Operations that leave what they allocate as it is.
ALLOCATE = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty)
# Operations that overwrite their first tensor without a look at it.
OVERWRITE = (aten.copy_, aten.fill_, aten.zero_, aten.random_, aten.bernoulli_, aten.normal_)
# Operations that touch only some elements of their first tensor: as many as that argument has, or
# the result (None).
SOME_ELEMENTS = {
    aten.embedding: None,
    aten.index: None,
    aten.index_select: None,
    aten.gather: None,
    aten.nll_loss_forward: "target",
    aten.index_put_: "values",
    aten.scatter_add_: "src",
}


class Traffic(NamedTuple):
    """The tensors that a call reads, that it overwrites (in part or whole), and that it makes."""

    read: list[Tensor]
    overwritten: list[Tensor]
    made: list[Tensor]


class Cost(NamedTuple):
    """What a call took."""

    flops: int
    bytes_read: int
    bytes_written: int
    seconds: float | None  # None where nothing was computed


def flops(operation: Any, arguments: Sequence[Any]) -> int:
    """FLOPs of a call; 0 for all but matrix products."""
    count = FLOPS.get(operation.overloadpacket)
    return 0 if count is None else count(*arguments)


def traffic(
    operation: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any
) -> Traffic:
    """The tensors whose elements a call has to do with: none where it is a view of one."""
    given: list[Tensor] = []
    read: list[Tensor] = []
    overwritten: list[Tensor] = []
    for argument, value in argument_values(operation, arguments, named):
        tensors = list(tensors_in(value))
        given += tensors
        if _is_written(operation, argument, named):
            overwritten += tensors
        if not (argument.is_out or argument.name == _pattern(operation, arguments)):
            read += tensors
    results = list(tensors_in(result))
    memories = {tensor.untyped_storage()._cdata for tensor in given}
    made = [tensor for tensor in results if tensor.untyped_storage()._cdata not in memories]
    if results and not made and not overwritten:
        return Traffic([], [], [])
    return Traffic(_each_once(read), _each_once(overwritten), made)


def bytes_moved(
    operation: Any,
    arguments: Sequence[Any],
    named: Mapping[str, Any],
    result: Any,
    moved: Traffic,
) -> tuple[int, int]:
    """Bytes that a call reads and writes."""
    packet = operation.overloadpacket
    made = [] if packet in ALLOCATE else moved.made
    if packet not in SOME_ELEMENTS:
        size = size_in_bytes
    else:
        by_name = {a.name: value for a, value in argument_values(operation, arguments, named)}
        touched = by_name.get(SOME_ELEMENTS[packet], result).numel()

        def size(tensor: Tensor) -> int:
            is_first = tensor is arguments[0]
            return touched * tensor.element_size() if is_first else size_in_bytes(tensor)

    return sum(map(size, moved.read)), sum(map(size, moved.overwritten + made))


def _is_written(operation: Any, argument: Any, named: Mapping[str, Any]) -> bool:
    """Whether a call overwrites an argument: its schema says so."""
    if operation.overloadpacket is aten._fused_adamw_ and argument.name == "grads":
        return named.get("grad_scale") is not None  # what is not scaled stays as it is
    return argument.alias_info is not None and argument.alias_info.is_write


def _pattern(operation: Any, arguments: Sequence[Any]) -> str:
    """The name of the argument that an operation takes for its shape and dtype alone, or ""."""
    packet = operation.overloadpacket
    is_pattern = packet.__name__.endswith("_like") or packet.__name__.startswith("new_")
    overlooked = packet in (*OVERWRITE, aten.nll_loss_backward)
    if packet is aten.index_put_:
        overlooked = not any(arguments[3:])  # they are not added up
    return "self" if is_pattern or overlooked else ""


def _each_once(tensors: list[Tensor]) -> list[Tensor]:
    """Without repetitions."""
    places = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t for t in tensors
    }
    return list(places.values())


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
