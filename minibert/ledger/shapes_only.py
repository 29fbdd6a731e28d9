"""A training step without its numbers: every shape as it would be, no memory, no time.

Floating-point tensors are fake: they know shape, dtype, layout and that they are on a CPU, and have
no elements. Whole numbers and truth values are real, since the code asks them how long a sequence
is.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

aten = torch.ops.aten


class ShapesOnly(TorchDispatchMode):
    """Inside, floating-point tensors are made without elements, and meet real whole numbers so."""

    def __init__(self):
        super().__init__()
        self._fake = FakeTensorMode()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        if operation.namespace == "prim":  # a question about a fake tensor: its device, its layout
            with self._fake:
                return operation(*arguments, **named)
        if operation is aten._local_scalar_dense.default and _is_fake(arguments[0]):
            return 0  # whoever asks for a number that nobody computed gets 0, or False
        if operation is aten.index.Tensor:  # of truth values: how many are True is known
            arguments = (arguments[0], _as_positions(arguments[1]))
        if tree_any(_is_fake, (arguments, named)):
            arguments, named = tree_map(self._faked, (tuple(arguments), dict(named)))
            with self._fake:
                return operation(*arguments, **named)
        if _makes_floats(operation, arguments, named):
            with self._fake:
                return operation(*arguments, **named)
        return tree_map(self._faked_float, operation(*arguments, **named))

    def _faked(self, value: Any) -> Any:
        """As an operation with a fake tensor needs its other tensors."""
        if isinstance(value, Tensor) and not _is_fake(value):
            return self._fake.from_tensor(value)
        return value

    def _faked_float(self, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return self._faked(value) if is_float else value


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def _as_positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Truth values among the indices become positions, one tensor for each dimension of theirs."""
    positions: list[Tensor | None] = []
    for index in indices:
        is_truth = index is not None and index.dtype == torch.bool and not _is_fake(index)
        positions += index.nonzero(as_tuple=True) if is_truth else [index]
    return positions


def _makes_floats(operation: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether it is to make a floating-point tensor, from a size or after the pattern of one."""
    takes_device = any(argument.name == "device" for argument in operation._schema.arguments)
    patterns = [value.dtype for value in arguments if isinstance(value, Tensor)]
    dtype = named.get("dtype") or (patterns or [torch.get_default_dtype()])[0]
    return takes_device and dtype.is_floating_point
