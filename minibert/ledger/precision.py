"""How much each operation of a step rounds: its output beside a replay of it in float64.

An operation is computed twice from the same inputs, as it is and in float64, so what is seen is
its own rounding, not what it was handed. What it hands on is the step's own output: the step takes
the same course as without a replay.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from minibert.ledger.counts import ALLOCATE, argument_values, tensors_in
from minibert.ledger.record import Ledger, Line, Operation

aten = torch.ops.aten
RANDOM = (aten.random_, aten.normal_, aten.native_dropout, aten.bernoulli_)  # not the same twice


class Error(NamedTuple):
    """How far an operation's output is from that of its replay."""

    largest: float  # the largest absolute difference of two elements
    relative: float  # norm of the difference over the norm of the replay's output


class LineError(NamedTuple):
    """The operation of a line whose relative error is largest."""

    line: Line
    operation: Operation
    error: Error


class PrecisionLedger(Ledger):
    """A ledger that also knows the error of each operation on floating-point numbers.

    errors: number of an operation -> its error. Not there: views, random draws, what has no
    floating-point output, and what torch cannot do in float64.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.errors: dict[int, Error] = {}

    def run(self, operation: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        kind = operation.overloadpacket
        if operation.is_view or kind in ALLOCATE or kind in RANDOM:
            return operation(*arguments, **named)
        exact_inputs = tree_map(_exact, (tuple(arguments), dict(named)))  # before any is changed
        if kind is aten._fused_adamw_:  # its counts of steps and `found_inf` are float32 always
            exact_inputs[0][5][:] = [steps.clone() for steps in arguments[5]]
            exact_inputs[1]["found_inf"] = named.get("found_inf")
        result = operation(*arguments, **named)
        found = list(_outputs(operation, arguments, named, result))
        if found:
            try:
                exact_result = operation(*exact_inputs[0], **exact_inputs[1])
            except RuntimeError:  # there is none for float64
                return result
            exact = list(_outputs(operation, *exact_inputs, exact_result))
            self.errors[len(self.operations)] = _error(found, exact)
        return result


def worst_lines(ledger: PrecisionLedger, count: int) -> list[LineError]:
    """The lines with the largest relative errors, each by its worst operation, worst first."""
    worst: dict[Line, LineError] = {}
    for operation in ledger.operations:
        error, line = ledger.errors.get(operation.number), operation.line
        if error is None or line is None:
            continue
        if line not in worst or error.relative > worst[line].error.relative:
            worst[line] = LineError(line, operation, error)
    return sorted(worst.values(), key=lambda each: -each.error.relative)[:count]


def _exact(value: Any) -> Any:
    """A copy of a tensor in float64, which may be written to; float64 for a dtype asked for."""
    if isinstance(value, Tensor):
        return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def _outputs(operation, arguments, named, result) -> Iterator[Tensor]:
    """The floating-point tensors that a call has made or changed."""
    changed = [
        tensor
        for argument, value in argument_values(operation, arguments, named)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_in(value)
    ]
    for tensor in changed or tensors_in(result):
        if tensor.is_floating_point():
            yield tensor


def _error(found: list[Tensor], exact: list[Tensor]) -> Error:
    """The error of all outputs of a call together; elements that are equal (both may be -inf) have
    none, and where the replay's output is 0 any error is infinite."""
    largest, squares, size = 0.0, 0.0, 0.0
    for one, other in zip(found, exact, strict=True):
        one = one.to(torch.float64)
        difference = torch.where(one == other, 0.0, one - other)
        if difference.numel() > 0:
            largest = max(largest, difference.abs().max().item())
        squares += difference.square().sum().item()
        size += torch.where(other.isfinite(), other, 0.0).square().sum().item()
    if squares == 0:
        return Error(0.0, 0.0)
    return Error(largest, (squares / size) ** 0.5 if size > 0 else float("inf"))
