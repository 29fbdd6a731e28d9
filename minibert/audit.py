"""What a training step runs: every tensor operation, the line that asked for it, what it costs.

    python -m minibert.audit --meta --html audit.html       BioBERT's size, shapes alone
    python -m minibert.audit --model MODEL                  a model that fits: its times too
    python -m minibert.audit --model MODEL --precision      where rounding shows most
    python -m minibert.audit --model MODEL --forward        one forward pass in place of a step

FLOPs are those of matrix products, 2 for each multiplication and its addition. Bytes are those of
the tensors that each operation reads and writes, as if nothing were cached. Kept is what autograd
keeps for backward. The text is random tokens, every sequence of full length; the teacher's weights
are as in a file, while a run may have them packed for its CPU (`ops.frozen`).

--json FILE holds one object:
  settings    what the flags said; recipe: all of it, null with --forward
  versions    of python and torch
  totals      phases, lines ("train.py:145") and modules (a path, "" outside of any), each name with
              operations, flops, bytes_read, bytes_written, saved_bytes, seconds (null with
              --meta and --precision)
  stacks      lists of lines, innermost first
  operations  in their order, a line of the file each, with the fields of `ledger.record.Operation`:
              number, phase, module, function, stack (index into stacks), name, inputs and outputs
              as [shape, dtype], flops, bytes_read, bytes_written, seconds, saved_bytes; with
              --precision also error: {largest, relative}, or null where there is none; a number of
              it that is not finite is null
"""

import dataclasses
import json
import math
import platform
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minibert.errors import ArgumentParser, InputError, run_command
from minibert.files import atomic_file
from minibert.flags import number, recipe_at
from minibert.ledger import table
from minibert.ledger.page import annotated_source
from minibert.ledger.precision import PrecisionLedger, worst_lines
from minibert.ledger.record import Ledger, Operation
from minibert.ledger.step import record_forward, record_step
from minibert.progress import ProgressLine
from minibert.run_config import RunConfig
from minibert.training.device import MICRO_BATCH_TOKENS, out_of_memory_is_told

LARGEST_STEP = 1 << 24  # tokens; BERT was trained with 128,000 an update
LINES_SHOWN, MODULES_SHOWN, WORST_SHOWN = 15, 12, 10


class _CountedAloud(Ledger):
    """A ledger that tells how far it is."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._progress = ProgressLine()

    def run(self, operation: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self.operations:
            last = self.operations[-1]
            self._progress.show(f"recording: {last.number + 1:,} operations, {last.phase}")
        return super().run(operation, arguments, named)

    @contextmanager
    def recorded(self) -> Iterator[Ledger]:
        try:
            with super().recorded():
                yield self
        finally:
            self._progress.clear()


class _CountedPrecision(_CountedAloud, PrecisionLedger):
    """The same for one that replays each operation in float64."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.timed = False  # it would be the time of the replays


def record(flags: Namespace) -> Ledger:
    """The ledger of what the flags ask for."""
    kind = _CountedPrecision if flags.precision else _CountedAloud
    advice = "--meta needs none for the tensors, a smaller --batch or --length less"
    with out_of_memory_is_told(advice):
        if flags.forward:
            return record_forward(flags.model, run_of(flags), flags.meta, kind)
        return record_step(run_of(flags), flags.model, flags.meta, kind)


def run_of(flags: Namespace) -> RunConfig:
    """The run of which a step is recorded. It reads no corpus and writes no folder."""
    teacher, model = Path("teacher"), None  # the step has its own
    if not flags.recipe.needs_teacher:
        teacher, model = None, Path("model")
    return RunConfig(
        recipe=flags.recipe,
        teacher=teacher,
        model=model,
        data=Path("data"),
        out=Path("out"),
        batch_size=flags.batch,
        max_length=flags.length,
        micro_batch_tokens=flags.micro_batch_tokens,
        dtype=flags.dtype,
        ops=flags.ops,
        seed=flags.seed,
        device="cpu",
    ).resolved()


def settings_of(flags: Namespace) -> dict[str, Any]:
    """What was recorded, as JSON holds it."""
    settings = {name: value for name, value in vars(flags).items() if name not in ("json", "html")}
    settings["model"] = None if flags.model is None else str(flags.model)
    settings["recipe"] = None
    if not flags.forward:
        settings["recipe"] = {"name": flags.recipe.name} | flags.recipe.to_dict()
    del settings["by"]
    return settings


def title_of(flags: Namespace) -> str:
    """The same in a line."""
    model = "BioBERT's sizes" if flags.model is None else str(flags.model)
    what = "a forward pass" if flags.forward else f"a step of {flags.recipe}"
    how = f"{flags.batch} x {flags.length} tokens, {flags.dtype}, {flags.ops} operations"
    return f"{what}, {model}: {how}" + (", shapes only" if flags.meta else "")


def write_ledger(path: Path, ledger: Ledger, settings: dict, versions: dict) -> None:
    """Write the JSON that this file's docstring describes, an operation a line."""
    operations = ledger.operations
    by = {
        "phases": table.totals(operations, lambda operation: operation.phase),
        "lines": table.totals(operations, lambda operation: table.line_name(operation.line)),
        "modules": table.totals(operations, lambda operation: operation.module),
    }
    sums = {
        name: {key: dataclasses.asdict(total) for key, total in entries.items()}
        for name, entries in by.items()
    }
    stacks = {
        stack: index for index, stack in enumerate(dict.fromkeys(o.lines for o in operations))
    }
    names = [[table.line_name(line) for line in stack] for stack in stacks]
    head = {"settings": settings, "versions": versions, "totals": sums, "stacks": names}
    errors = getattr(ledger, "errors", None)
    with atomic_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(head, indent=1, allow_nan=False)[:-2])
        file.write(',\n "operations": [\n')
        for operation in operations:
            entry = _entry(operation, stacks[operation.lines])
            if errors is not None:
                error = errors.get(operation.number)
                entry["error"] = None if error is None else dict(_finite(error._asdict()))
            end = ",\n" if operation is not operations[-1] else "\n"
            file.write(json.dumps(entry, allow_nan=False) + end)
        file.write("]}\n")


def _entry(operation: Operation, stack: int) -> dict[str, Any]:
    """An operation with its stack by number."""
    fields = vars(operation).items()
    return dict(("stack", stack) if name == "lines" else (name, value) for name, value in fields)


def _finite(numbers: dict[str, float]) -> Iterator[tuple[str, float | None]]:
    """JSON has no infinity."""
    for name, value in numbers.items():
        yield name, value if math.isfinite(value) else None


def print_tables(ledger: Ledger, title: str, by: str | None) -> None:
    """One table in full, or the beginning of each."""
    operations = ledger.operations
    parts = [title]
    if by == "line":
        parts += [table.by_line(operations)]
    elif by == "module":
        parts += [table.by_module(operations)]
    elif by == "phase":
        parts += [table.by_phase(operations)]
    else:
        parts += [table.by_phase(operations), table.by_line(operations, LINES_SHOWN)]
        parts += [table.by_module(operations, MODULES_SHOWN)]
    if isinstance(ledger, PrecisionLedger):
        parts += ["where rounding shows most, each operation against a replay of it in float64"]
        parts[-1] += "\n" + table.worst(worst_lines(ledger, WORST_SHOWN))
    print("\n\n".join(parts))


def parse_flags() -> Namespace:
    """The flags; what does not go together is an InputError."""
    parser = ArgumentParser(
        prog="python -m minibert.audit",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    count = {"type": number(int, 1), "metavar": "N"}
    add(
        "--recipe", type=recipe_at, metavar="NAME",
        help="of the step: a name, or a JSON file (default: compactbiobert)",
    )  # fmt: skip
    model = "the teacher, or what recipe mlm trains: a folder or a config.json; without: as BioBERT"
    add("--model", type=Path, metavar="PATH", help=model)
    add("--forward", action="store_true", help="record one forward pass of the model, not a step")
    add("--batch", default=2, **count, help="sequences of the step (default: 2)")
    length = {"type": number(int, 3), "metavar": "N"}
    add("--length", default=16, **length, help="tokens of a sequence (default: 16)")
    at_once = f"tokens that go through at once (default: {MICRO_BATCH_TOKENS['cpu']})"
    add("--micro-batch-tokens", **count, help=at_once)
    dtype = "in which the layers compute (default: float32)"
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help=dtype)
    ops = "attention and losses, lean or as plain formulas (default: fused)"
    add("--ops", default="fused", choices=("fused", "plain"), help=ops)
    seed = {"type": number(int, 0), "metavar": "N"}
    add("--seed", default=0, **seed, help="of weights, tokens and dropout (default: 0)")
    meta = "shapes only: no numbers, no times, hardly any memory"
    add("--meta", action="store_true", help=meta)
    precision = "replay each operation in float64, and tell where rounding shows most"
    add("--precision", action="store_true", help=precision)
    by = "print this one table in full (without it the beginning of each)"
    add("--by", choices=("phase", "line", "module"), help=by)
    add("--json", type=Path, metavar="FILE", help="write every operation as JSON")
    add("--html", type=Path, metavar="FILE", help="write our source, each line with what it ran")
    return checked(parser.parse_args())


def checked(flags: Namespace) -> Namespace:
    """With defaults filled in; refuses at once what would fail after minutes."""
    if flags.batch * flags.length > LARGEST_STEP:
        raise InputError(
            f"--batch {flags.batch} --length {flags.length}: more than {LARGEST_STEP:,} tokens"
        )
    if flags.meta and flags.precision:
        raise InputError("--precision compares numbers, and --meta has none: choose one of the two")
    if flags.forward and (flags.recipe or flags.micro_batch_tokens):
        raise InputError("--forward has no --recipe and no --micro-batch-tokens: it is no step")
    if flags.json and flags.html and flags.json.resolve() == flags.html.resolve():
        raise InputError(f"--json and --html are both {flags.html}")
    for path in filter(None, (flags.json, flags.html)):
        if not path.parent.is_dir():
            raise InputError(f"{path.parent}: no such folder, to write {path.name} in")
        if path.is_dir():
            raise InputError(f"{path}: a folder; expected a file to write")
    flags.recipe = flags.recipe or recipe_at("compactbiobert")
    if flags.forward:
        flags.micro_batch_tokens = flags.batch * flags.length
    flags.micro_batch_tokens = flags.micro_batch_tokens or MICRO_BATCH_TOKENS["cpu"]
    return flags


def main() -> None:
    flags = parse_flags()
    ledger = record(flags)
    settings, title = settings_of(flags), title_of(flags)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    print_tables(ledger, title, flags.by)
    if flags.json:
        write_ledger(flags.json, ledger, settings, versions)
        print(f"written: {flags.json}")
    if flags.html:
        with atomic_file(flags.html) as partial:
            page = annotated_source(ledger, title, versions)
            partial.write_text(page, encoding="utf-8")
        print(f"written: {flags.html}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
