"""Records each ATen operation of a training step, and the line of our source that asked for it.

A dispatch mode sees the operations that autograd, modules and Python break down to. Which line
asked is told by the Python stack; in backward there is none, but a node of the graph carries the
sequence number that was current when its forward operation ran, and so leads back to that line.
What backward runs in an autograd function of our own has a stack: its lines are named themselves.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as all_modules
from torch.utils._python_dispatch import TorchDispatchMode

from minibert.ledger.counts import Cost, Traffic, bytes_moved, flops, tensors_in, traffic
from minibert.ledger.launches import launches_told
from minibert.recipes import ATTENTION_LOSSES

FORWARD, TEACHER, STUDENT, LOSSES, BACKWARD, UPDATE = PHASES = (
    "forward",  # of a model that is not trained
    "teacher forward",
    "student forward",
    "losses",
    "backward",
    "update",
)
UPDATES = ("clip_grad_norm_", "step")  # functions that the last phase begins with
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
    saved_bytes: int = 0  # of the memory that it filled, kept for backward

    @property
    def line(self) -> Line | None:
        """The innermost line of ours."""
        return self.lines[0] if self.lines else None


class Flow(NamedTuple):
    """Which memories an operation had to do with; a number for each, in the order of the step."""

    reads: tuple[int, ...]
    overwrites: tuple[int, ...]  # in part or whole
    makes: tuple[int, ...]


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
        self.flows: list[Flow] = []  # of each operation
        self.results: tuple[int, ...] = ()  # memories that what was recorded is for
        self.timed = timed
        self._names = {
            module: f"{name}.{path}" if path else name
            for name, model in models.items()
            for path, module in model.named_modules()
        }
        self._owners = {
            parameter: self._names[module]
            for module in self._names
            for parameter in module.parameters(recurse=False)
        }
        self._inside: list[str] = []  # the modules whose forward is running
        self._origins: dict[int, _Origin] = {}  # sequence number of a node -> its forward
        self._memories: dict[int, tuple[int, StorageWeakRef]] = {}  # by address, which it keeps
        self._filled: dict[int, Operation] = {}  # memory -> what wrote it last
        self._saved: set[int] = set()  # memories that were counted already

    @contextmanager
    def recorded(self) -> Iterator["Ledger"]:
        """The ledger, entered, with its eyes on modules and on what autograd keeps."""
        saving = torch.autograd.graph.saved_tensors_hooks(self._note_saved, lambda tensor: tensor)
        with self._watching_modules(), launches_told(self.note, self.timed), saving, self:
            yield self

    def memory(self, tensor: Tensor) -> int:
        """The number of a tensor's memory. Its address is not used again while the ledger lives."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memories:
            self._memories[storage._cdata] = (len(self._memories), StorageWeakRef(storage))
        return self._memories[storage._cdata][0]

    def note_results(self, tensors: Iterable[Tensor]) -> None:
        """What was recorded is for these: figures, weights, the optimiser's moments."""
        self.results = tuple(map(self.memory, tensors))

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        if operation.namespace in ("prim", "profiler"):  # a question about a tensor, a time stamp
            return operation(*arguments, **named)
        with self:  # in inference mode `linear` and its like come whole
            result = operation.decompose(*arguments, **named)
        if result is not NotImplemented:
            return result
        began = time.perf_counter()
        result = self.run(operation, arguments, named)
        seconds = time.perf_counter() - began
        moved = traffic(operation, arguments, named, result)
        cost = Cost(
            flops(operation, arguments),
            *bytes_moved(operation, arguments, named, result, moved),
            seconds if self.timed else None,
        )
        self.note(str(operation), [*arguments, *named.values()], result, moved, cost)
        return result

    def run(self, operation: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Compute an operation; the next entry of the ledger, `len(self.operations)`, is its."""
        return operation(*arguments, **named)

    def note(self, name: str, given: Any, result: Any, moved: Traffic, cost: Cost) -> None:
        """Write down a call that was made just now."""
        phase, module, function, lines = self._asked_by()
        entry = Operation(
            number=len(self.operations),
            phase=phase,
            module=module,
            function=function,
            lines=lines,
            name=name,
            inputs=_kinds(given),
            outputs=_kinds(result),
            **cost._asdict(),
        )
        flow = Flow(*(tuple(map(self.memory, tensors)) for tensors in moved))
        self.operations.append(entry)
        self.flows.append(flow)
        self._filled.update(dict.fromkeys((*flow.overwrites, *flow.makes), entry))

    def _asked_by(self) -> tuple[str, str, str, tuple[Line, ...]]:
        """Phase, module, autograd function of ours and lines that ask for the present call."""
        frames = list(_frames())
        lines = tuple(line for frame in frames if (line := _line(frame)) is not None)
        function = _function(frames)
        node = torch._C._current_autograd_node()
        if node is None:
            module = self._inside[-1] if self._inside else ""
            self._origins.setdefault(torch.autograd._get_sequence_nr() - 1, _Origin(module, lines))
            return self._phase(frames), module, function, lines
        origin = self._origins.get(node._sequence_nr())
        if origin is None:  # it adds up the gradient of a parameter
            return BACKWARD, self._owners.get(getattr(node, "variable", None), ""), "", lines
        return BACKWARD, origin.module, function, lines if function else origin.lines + lines

    def _phase(self, frames: list[FrameType]) -> str:
        """The phase of an operation outside of backward; a loss of maps is asked for in layers."""
        names = {frame.f_code.co_name for frame in frames}
        if self._inside and names.isdisjoint(ATTENTION_LOSSES.values()):
            model = self._inside[0].split(".")[0]
            return {"teacher": TEACHER, "student": STUDENT}.get(model, FORWARD)
        began = bool(self.operations) and self.operations[-1].phase == UPDATE
        is_update = began or not names.isdisjoint(UPDATES)
        return UPDATE if is_update else LOSSES

    def _note_saved(self, tensor: Tensor) -> Tensor:
        """Autograd keeps this tensor's memory for backward; the whole, also where it is a view."""
        memory = self.memory(tensor)
        if memory in self._filled and memory not in self._saved:
            self._saved.add(memory)
            self._filled[memory].saved_bytes += tensor.untyped_storage().nbytes()
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
    """The Python stack, innermost first, without this file and the audit that runs the step."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != AUDIT:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


AUDIT = str(Path(__file__).with_name("step.py"))
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
