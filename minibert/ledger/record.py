"""Records each ATen operation of a training step, and the line of our source that asked for it.

A dispatch mode sees the operations that autograd, modules and Python break down to. Which line
asked is told by the Python stack; in backward there is none, but a node of the graph carries the
sequence number that was current when its forward operation ran, and so leads back to that line.
What backward runs in an autograd function of our own has a stack: its lines are named themselves.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.utils._python_dispatch import TorchDispatchMode

from minibert.ledger.counts import bytes_moved, flops, size_in_bytes, tensors_in

FORWARD, TEACHER, STUDENT, LOSSES, BACKWARD, UPDATE = PHASES = (
    "forward",  # of a model that is not trained
    "teacher forward",
    "student forward",
    "losses",
    "backward",
    "update",
)
UPDATES = ("clip_grad_norm_", "pass_over_unless_finite", "step")  # functions of the last phase
PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent

Line = tuple[str, int]  # file, relative to the checkout, and number of the line
TensorKind = tuple[tuple[int, ...], str]  # shape, dtype


@dataclass
class Operation:
    """One call of an ATen operation."""

    number: int  # in the order of the step, from 0
    phase: str  # one of PHASES
    module: str  # path of the module, "student.layers.0.query"; "" outside of any
    function: str  # the autograd function of ours that it is part of, or ""
    lines: tuple[Line, ...]  # our lines that asked for it, innermost first
    name: str  # "aten.addmm.default"
    inputs: tuple[TensorKind, ...]
    outputs: tuple[TensorKind, ...]
    flops: int
    bytes_read: int
    bytes_written: int
    seconds: float | None = None  # None where nothing was computed
    saved_bytes: int = 0  # of what it made, kept for backward

    @property
    def line(self) -> Line | None:
        """The innermost line of ours."""
        return self.lines[0] if self.lines else None


@dataclass(frozen=True)
class _Origin:
    """What an operation of the forward pass leaves behind for those of the backward pass."""

    module: str
    lines: tuple[Line, ...]


class Ledger(TorchDispatchMode):
    """Records every operation while it is entered, by way of `recorded`.

        with Ledger({"teacher": teacher, "student": student}).recorded() as ledger:
            update(...)
        ledger.operations

    models: name -> module, "teacher", "student" or any other name.
    timed: whether to note how long each operation took (on a CPU).
    """

    def __init__(self, models: dict[str, nn.Module], timed: bool = False):
        super().__init__()
        self.operations: list[Operation] = []
        self.timed = timed
        self._names = {
            module: f"{name}.{path}" if path else name
            for name, model in models.items()
            for path, module in model.named_modules()
        }
        self._inside: list[str] = []  # the modules whose forward is running
        self._origins: dict[int, _Origin] = {}  # sequence number of a node -> its forward
        self._made: dict[int, Operation] = {}  # memory of a tensor -> what made it
        self._saved: set[tuple[int, int]] = set()  # memory and operation, counted already

    @contextmanager
    def recorded(self) -> Iterator["Ledger"]:
        """The ledger, entered, with its eyes on modules and on what autograd keeps."""
        saving = torch.autograd.graph.saved_tensors_hooks(self._note_saved, lambda tensor: tensor)
        with self._watching_modules(), saving, self:
            yield self

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        if operation.namespace == "prim":  # a question that tensors without elements are asked
            return operation(*arguments, **named)
        with self:  # in inference mode `linear` and its like come whole
            result = operation.decompose(*arguments, **named)
        if result is not NotImplemented:
            return result
        began = time.perf_counter()
        result = self.run(operation, arguments, named)
        seconds = time.perf_counter() - began if self.timed else None
        entry = self._entry(operation, arguments, named, result, seconds)
        self.operations.append(entry)
        for tensor in tensors_in(result):
            if not operation.is_view:
                self._made[tensor.untyped_storage()._cdata] = entry
        return result

    def run(self, operation: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Compute an operation; the next entry of the ledger, `len(self.operations)`, is its."""
        return operation(*arguments, **named)

    def _entry(self, operation, arguments, named, result, seconds) -> Operation:
        """What there is to know about a call."""
        read, written = bytes_moved(operation, arguments, named, result)
        frames = list(_frames())
        lines = tuple(line for frame in frames if (line := _line(frame)) is not None)
        node = torch._C._current_autograd_node()
        module = self._inside[-1] if self._inside else ""
        if node is None:
            phase = self._phase(frames)
            self._origins.setdefault(torch.autograd._get_sequence_nr() - 1, _Origin(module, lines))
        else:
            phase = BACKWARD
            origin = self._origins.get(node._sequence_nr())
            if origin is not None:
                module = origin.module
                lines = lines if _function(frames) else origin.lines + lines
        return Operation(
            number=len(self.operations),
            phase=phase,
            module=module,
            function=_function(frames),
            lines=lines,
            name=str(operation),
            inputs=_kinds([*arguments, *named.values()]),
            outputs=_kinds(result),
            flops=flops(operation, arguments),
            bytes_read=read,
            bytes_written=written,
            seconds=seconds,
        )

    def _phase(self, frames: list[FrameType]) -> str:
        """The phase of an operation outside of backward."""
        if self._inside:
            model = self._inside[0].split(".")[0]
            return {"teacher": TEACHER, "student": STUDENT}.get(model, FORWARD)
        return UPDATE if any(frame.f_code.co_name in UPDATES for frame in frames) else LOSSES

    def _note_saved(self, tensor: Tensor) -> Tensor:
        """Autograd keeps this tensor for backward: said once of each tensor's memory."""
        made_by = self._made.get(key := tensor.untyped_storage()._cdata)
        if made_by is not None and (key, made_by.number) not in self._saved:
            self._saved.add((key, made_by.number))
            made_by.saved_bytes += size_in_bytes(tensor)
        return tensor

    @contextmanager
    def _watching_modules(self) -> Iterator[None]:
        """Keep `_inside` up to date."""

        def enter(module: nn.Module, inputs: Any) -> None:
            self._inside.append(self._names.get(module, ""))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._inside.pop()

        hooks = (
            all_modules.register_module_forward_pre_hook(enter),
            all_modules.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _frames() -> Iterator[FrameType]:
    """The Python stack, innermost first, without this file."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


_relative: dict[str, str | None] = {}  # a file's name -> relative to the checkout, if it is ours


def _line(frame: FrameType) -> Line | None:
    """Where in our source a frame is; None where it is in other code, or in the audit itself."""
    name = frame.f_code.co_filename
    if name not in _relative:
        path = Path(name).resolve()
        ours = path == ROOT / "train.py" or path.is_relative_to(PACKAGE)
        audit = path.is_relative_to(PACKAGE / "ledger") or path == PACKAGE / "audit.py"
        _relative[name] = path.relative_to(ROOT).as_posix() if ours and not audit else None
    relative = _relative[name]
    return None if relative is None else (relative, frame.f_lineno)


def _function(frames: list[FrameType]) -> str:
    """The autograd function of ours whose forward or backward is running, or ""."""
    for frame in frames:
        if frame.f_code.co_name in ("forward", "backward") and _line(frame) is not None:
            context = frame.f_locals.get("ctx")
            if context is not None:
                return type(context).__name__.removesuffix("Backward")
    return ""


def _kinds(values: Any) -> tuple[TensorKind, ...]:
    """Shapes and dtypes of the tensors among the values."""
    return tuple(
        (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for tensor in tensors_in(values)
    )
