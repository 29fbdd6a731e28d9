"""The ledger in sums: by phase, by line of source, by kind of module; as text for a terminal.

What an operation costs is counted once, for the innermost line of ours that asked for it, so the
rows of a table add up to its last one.
"""

import linecache
import re
import shutil
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from minibert.ledger.precision import LineError
from minibert.ledger.record import PHASES, ROOT, Line, Operation

Key = TypeVar("Key", bound=Hashable)

WIDTH = 100  # columns of a table where no terminal tells another width
PREFIXES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


@dataclass
class Total:
    """The sum over some operations."""

    operations: int = 0
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    saved_bytes: int = 0  # kept for backward
    seconds: float | None = None  # None where no operation was timed

    def add(self, operation: Operation) -> None:
        self.operations += 1
        self.flops += operation.flops
        self.bytes_read += operation.bytes_read
        self.bytes_written += operation.bytes_written
        self.saved_bytes += operation.saved_bytes
        if operation.seconds is not None:
            self.seconds = (self.seconds or 0.0) + operation.seconds

    @property
    def bytes_moved(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written


def totals(
    operations: Iterable[Operation], key: Callable[[Operation], Key] = lambda operation: None
) -> dict[Key, Total]:
    """The sums over the operations of one key each, in the order in which the keys appear."""
    sums: dict[Key, Total] = {}
    for operation in operations:
        this = key(operation)
        if this not in sums:
            sums[this] = Total()
        sums[this].add(operation)
    return sums


def whole(operations: Iterable[Operation]) -> Total:
    """The sum over all."""
    return totals(operations).get(None, Total())


def line_name(line: Line | None) -> str:
    """`minibert/model.py:50`; what no line of ours asked for is told as such."""
    return f"{line[0]}:{line[1]}" if line is not None else "(no line of ours)"


def kind_of(operation: Operation) -> str:
    """Where in a model an operation belongs, whichever model and layer: `layers.*.query`.

    An autograd function of ours is named too (`layers.*: _Attention`), and where there is no
    module it is all the name there is; what has neither is told by its phase.
    """
    path = re.sub(r"\.\d+", ".*", operation.module.partition(".")[2])
    return ": ".join(filter(None, (path, operation.function))) or operation.phase


def unit(largest: float, name: str) -> tuple[float, str]:
    """What to divide by, and what to write: 2.4e9 "FLOP" -> 1e9, "GFLOP"."""
    prefix = [prefix for prefix, size in PREFIXES.items() if size <= max(1, largest)][-1]
    return PREFIXES[prefix], prefix + name


def figure(value: float, divisor: float, digits: int = 3) -> str:
    """A number of a column: nothing for 0, and "<0.001" for what would look like 0."""
    if value == 0:
        return ""
    smallest = 10**-digits
    rounded = f"{value / divisor:,.{digits}f}"
    return rounded if value / divisor >= smallest / 2 else f"<{smallest:.{digits}f}"


def by_phase(operations: list[Operation]) -> str:
    """A row a phase, in the order of the step."""
    sums = totals(operations, lambda operation: operation.phase)
    rows = [(phase, sums[phase], "") for phase in PHASES if phase in sums]
    return _table("phase", rows, whole(operations))


def by_line(operations: list[Operation], at_most: int | None = None) -> str:
    """A row a line, the heaviest first, with the beginning of what stands there."""
    step = whole(operations)
    sums = totals(operations, lambda operation: operation.line)
    rows = [(line_name(line), total, _source(line)) for line, total in heaviest(sums, step)]
    return _table("line", rows[:at_most], step, left_out=len(rows[at_most:]) if at_most else 0)


def by_module(operations: list[Operation], at_most: int | None = None) -> str:
    """A row a kind of module, the heaviest first; layers of a kind stand together."""
    step = whole(operations)
    rows = [(kind, total, "") for kind, total in heaviest(totals(operations, kind_of), step)]
    return _table("module", rows[:at_most], step, left_out=len(rows[at_most:]) if at_most else 0)


def heaviest(sums: dict[Key, Total], step: Total) -> list[tuple[Key, Total]]:
    """By the share of the step's FLOPs or of its bytes, whichever is larger."""

    def weight(entry: tuple[Key, Total]) -> float:
        _, total = entry
        flops = total.flops / max(1, step.flops)
        return max(flops, total.bytes_moved / max(1, step.bytes_moved))

    return sorted(sums.items(), key=weight, reverse=True)


def worst(lines: list[LineError]) -> str:
    """The lines that round most, each by its worst operation."""
    named = [(line_name(each.line), each) for each in lines]
    width = max([len("line"), *(len(name) for name, _ in named)])
    head = f"{'line':{width}}  {'relative':>9} {'largest':>9}  operation"
    rows = [
        f"{name:{width}}  {each.error.relative:9.2e} {each.error.largest:9.2e}  "
        f"{each.operation.name.removeprefix('aten.')}, {each.operation.phase}"
        for name, each in named
    ]
    return "\n".join([head, *rows])


def _table(title: str, rows: list[tuple[str, Total, str]], step: Total, left_out: int = 0) -> str:
    """Rows of figures in common units, what they are of the step, and the step itself."""
    flop, flop_name = unit(step.flops, "FLOP")
    byte, byte_name = unit(step.bytes_moved, "B")
    kept, kept_name = unit(step.saved_bytes, "B")
    timed = step.seconds is not None
    columns, _ = shutil.get_terminal_size((WIDTH, 0))
    width = max([len(title), len("the whole"), *(len(name) for name, _, _ in rows)])
    head = f"{title:{width}} {'calls':>7} {flop_name:>9} {'%':>5} {byte_name:>8} {'%':>5}"
    head += f" {'kept ' + kept_name:>8}" if step.saved_bytes else ""
    head += f" {'ms':>9}" if timed else ""
    lines = [head]
    for name, total, note in [*rows, ("the whole", step, "")]:
        cells = f"{name:{width}} {total.operations:7,} {figure(total.flops, flop):>9}"
        cells += f" {figure(100 * total.flops, step.flops or 1, 1):>5}"
        cells += f" {figure(total.bytes_moved, byte):>8}"
        cells += f" {figure(100 * total.bytes_moved, step.bytes_moved or 1, 1):>5}"
        cells += f" {figure(total.saved_bytes, kept):>8}" if step.saved_bytes else ""
        cells += f" {figure(1000 * (total.seconds or 0), 1):>9}" if timed else ""
        lines.append(f"{cells}  {note}"[:columns].rstrip())
    if left_out:
        lines.insert(-1, f"and {left_out} more")
    return "\n".join(lines)


def _source(line: Line | None) -> str:
    return linecache.getline(str(ROOT / line[0]), line[1]).strip() if line is not None else ""
