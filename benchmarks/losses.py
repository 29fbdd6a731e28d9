"""What each fused operation costs beside its plain formula: time, peak memory, error.

    python benchmarks/losses.py --quick            under a minute on two cores
    python benchmarks/losses.py --plot FILE.png    all sizes, drawn

One call is forward and backward. Times are medians of repeats that take turns. Peak memory is what
a call adds to its inputs, gradients included; on a CPU each call that is measured has a process of
its own, with glibc's stock allocator. Errors are norms relative to those of the plain formula in
float64 on the same inputs: of the value, and of all gradients together; where random numbers are
drawn there is none to tell. Inputs all have the dtype of the row, and no position is padding.
Where plain would need more than `LARGEST_PLAIN`, fused stands alone, without an error.

On CUDA, where a fused operation has Triton kernels, it stands there with them ("kernels") and
without, beside plain as it is and compiled. A call that fails is named, and the others go on.

Needs `pip install -e .`, for --plot `pip install -e ".[report]"`. Prints a table, then one line of
JSON.
"""

import dataclasses
import json
import multiprocessing
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from cases import Call, Case, all_cases, quick_cases
from machine import (
    allocator,
    circumstances,
    give_memory_back,
    installed,
    peak_of_process,
    synchronize,
)
from torch import Tensor

from minibert.errors import ArgumentParser, InputError, run_command
from minibert.ops import tiles
from minibert.training.device import set_up_device

LARGEST_PLAIN = {"cpu": 6e9, "cuda": 60e9}  # bytes
FEWEST_REPEATS, MOST_REPEATS = 3, 20  # of every variant; between them,
ENOUGH = 1.0  # none once those of a case have taken so many seconds


class Variant(NamedTuple):
    """One way to compute an operation."""

    name: str
    function: Callable[..., Any]
    kernels: bool = True  # False: fused without those of Triton


def variants_of(case: Case, device: torch.device) -> list[Variant]:
    """Those to compare in this case."""
    operation = case.operation
    on_gpu = device.type == "cuda" and operation.has_kernels
    variants = []
    if case.plain_bytes() <= LARGEST_PLAIN[device.type]:
        variants.append(Variant("plain", operation.plain))
        if on_gpu:
            torch.compiler.reset()  # else it compiles for the first few sizes alone
            compiled = torch.compile(operation.plain, dynamic=False)
            variants.append(Variant("plain compiled", compiled))
    variants.append(Variant("fused", operation.fused, kernels=not on_gpu))
    by_torch = operation.torchs_in_float32 and case.dtype == torch.float32
    if on_gpu and installed("triton") and not by_torch:
        variants.append(Variant("kernels", operation.fused, kernels=True))
    return variants


def call_once(variant: Variant, call: Call) -> Tensor:
    """Forward and backward; returns the value. The gradients are those of this call alone."""
    for argument in learning(call):
        argument.grad = None
    before, tiles.KERNELS = tiles.KERNELS, variant.kernels
    try:
        value = variant.function(*call.arguments)
        values = value if isinstance(value, tuple) else (value,)
        learnt_from = [part for part in values if part.requires_grad]  # not sums for the log
        upstreams = [call.upstream if part.ndim > 0 else None for part in learnt_from]
        torch.autograd.backward(learnt_from, upstreams)
    finally:
        tiles.KERNELS = before
    return values[0].detach()


def learning(call: Call) -> list[Tensor]:
    """The arguments that get gradients."""
    return [part for part in call.arguments if isinstance(part, Tensor) and part.requires_grad]


# Error.


def outcome(variant: Variant, call: Call) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients."""
    return call_once(variant, call), [argument.grad for argument in learning(call)]


def truth_of(case: Case, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients by the plain formula in float64."""
    call = case.call(device)
    exact = [
        part.detach().double().requires_grad_(part.requires_grad)
        if isinstance(part, Tensor) and part.is_floating_point()
        else part
        for part in call.arguments
    ]
    upstream = None if call.upstream is None else call.upstream.double()
    return outcome(Variant("truth", case.operation.plain), Call(exact, upstream))


def relative_error(found: list[Tensor], truth: list[Tensor]) -> float:
    """Norm of the error of all together, relative to the truth's (absolute where that is 0)."""
    errors = [(f.double() - t).norm() for f, t in zip(found, truth, strict=True)]
    size = torch.stack([t.norm() for t in truth]).norm()
    return (torch.stack(errors).norm() / (size if size > 0 else 1)).item()


# Memory.


def peak_of_call(case: Case, variant: Variant, device: torch.device) -> int:
    """Bytes that a call adds to its inputs at its peak."""
    if device.type == "cpu":
        precision = torch.get_float32_matmul_precision()
        return in_own_process(peak_of_call_here, case, variant, precision)
    call = case.call(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call_once(variant, call)
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def in_own_process(function: Callable[..., int], *arguments: Any) -> int:
    """function(*arguments), called in a new process; RuntimeError where the system kills that.

    It is forked from one that has imported torch and never computed: its peak begins at what it
    holds, whereas that of a process started anew may begin at the peak of the one that starts it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minibert.ops.fused"])
    with allocator({}), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_of_call_here(case: Case, variant: Variant, precision: str) -> int:
    """As `peak_of_call`, on the CPU, in a process that has done nothing yet."""
    torch.set_float32_matmul_precision(precision)
    small = dataclasses.replace(case, sizes=dict.fromkeys(case.sizes, 2))
    cpu = torch.device("cpu")
    call_once(variant, small.call(cpu))  # libraries prepare themselves
    call = case.call(cpu)
    return added_to_peak(lambda: call_once(variant, call))


def added_to_peak(function: Callable[[], Any]) -> int:
    """Bytes by which a call of the function raises the peak of this process."""
    give_memory_back()
    before = peak_of_process()
    function()
    return peak_of_process() - before


# Time, and all together.


def measure(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """One row, as JSON holds it, for each variant of a case."""
    variants = variants_of(case, device)
    truth = None
    if variants[0].name == "plain" and not case.operation.is_random:
        truth = truth_of(case, device)
    rows = [error_and_memory(case, variant, truth, device) for variant in variants]
    truth = None
    give_memory_back()
    add_times(rows, variants, case, device)
    return rows


@contextmanager
def told_in(row: dict[str, Any], device: torch.device) -> Iterator[None]:
    """What fails is named in its row, and the others go on.

    On CUDA that is any exception, for Triton has its own; on a CPU too little memory, mostly, and
    what is no RuntimeError is an error of ours.
    """
    try:
        yield
    except Exception as error:
        if device.type == "cpu" and not isinstance(error, RuntimeError):
            raise
        first_line = str(error).split("\n")[0]
        row["failure"] = f"{type(error).__name__}: {first_line}"


def error_and_memory(
    case: Case,
    variant: Variant,
    truth: tuple[Tensor, list[Tensor]] | None,
    device: torch.device,
) -> dict[str, Any]:
    """The row of a variant, all but its time."""
    row = {
        "operation": case.operation.name,
        **case.sizes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "variant": variant.name,
    }
    with told_in(row, device):
        value, gradients = outcome(variant, case.call(device))
        if truth is not None:
            row["value_error"] = relative_error([value], [truth[0]])
            row["gradient_error"] = relative_error(gradients, truth[1])
        row["peak_mb"] = peak_of_call(case, variant, device) / 1e6
    return row


def add_times(
    rows: list[dict[str, Any]], variants: list[Variant], case: Case, device: torch.device
) -> None:
    """Median seconds of a call to the row of each variant that has not failed; they take turns."""
    call = case.call(device)
    seconds = [[] for _ in variants]
    began = time.monotonic()
    for turn in range(MOST_REPEATS):
        if turn >= FEWEST_REPEATS and time.monotonic() - began > ENOUGH:
            break
        for variant, row, there in zip(variants, rows, seconds, strict=True):
            if "failure" in row:
                continue
            with told_in(row, device):
                synchronize(device)
                start = time.perf_counter()
                call_once(variant, call)
                synchronize(device)
                there.append(time.perf_counter() - start)
    for row, there in zip(rows, seconds, strict=True):
        if "failure" not in row:
            row["seconds"] = median(there)


HEADING = (
    f"{'operation':23}{'sizes':20}{'dtype':10}{'variant':15}{'ms':>10}{'peak MB':>10}"
    f"{'value error':>13}{'gradient error':>16}"
)


def told(row: dict[str, Any]) -> str:
    """A row for people."""
    sizes = " ".join(f"{letter} {row[letter]}" for letter in "BSMV" if letter in row)
    start = f"{row['operation']:23}{sizes:20}{row['dtype']:10}{row['variant']:15}"
    if "failure" in row:
        return start + row["failure"]
    errors = ("", "")
    if "value_error" in row:
        errors = (f"{row['value_error']:.1e}", f"{row['gradient_error']:.1e}")
    figures = f"{row['seconds'] * 1e3:10,.2f}{row['peak_mb']:10,.1f}"
    return start + figures + f"{errors[0]:>13}{errors[1]:>16}"


# Drawing.


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory and time of the maps' loss against S and of the vocabulary's loss against V."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    columns = (("attention_map_loss", "S", "B", 1), ("vocabulary_loss", "V", "M", 256))
    for axes, (name, letter, fixed, size) in zip(panels.T, columns, strict=True):
        of_panel = [
            row
            for row in rows
            if row["operation"] == name and row[fixed] == size and "seconds" in row
        ]
        names = list(dict.fromkeys(row["variant"] for row in of_panel))
        for kind, points in lines_of(of_panel, letter):
            xs, peaks, seconds = zip(*sorted(points), strict=True)
            variant, dtype = kind.rsplit(" ", 1)
            color = f"C{names.index(variant)}"  # of the variant; dashed is half precision
            style = {"marker": "o", "color": color, "ls": "-" if dtype == "float32" else "--"}
            axes[0].loglog(xs, peaks, label=kind, **style)
            axes[1].loglog(xs, seconds, label=kind, **style)
        axes[0].set(title=f"{name}, {fixed} = {size}", ylabel="peak memory, MB")
        axes[1].set(xlabel=letter, ylabel="seconds")
        axes[0].legend()
        sizes = sorted({row[letter] for row in of_panel})
        for panel in axes:
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
            panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def lines_of(
    rows: list[dict[str, Any]], letter: str
) -> Iterator[tuple[str, list[tuple[int, float, float]]]]:
    """For each variant and dtype: (size, MB, seconds) of its rows."""
    for kind in dict.fromkeys((row["variant"], row["dtype"]) for row in rows):
        yield (
            " ".join(kind),
            [
                (row[letter], row["peak_mb"], row["seconds"])
                for row in rows
                if (row["variant"], row["dtype"]) == kind
            ],
        )


def main() -> None:
    parser = ArgumentParser(
        prog="python benchmarks/losses.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few and small sizes")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw memory and time")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags = parser.parse_args()
    device = set_up_device(flags.device)
    if flags.plot and not installed("matplotlib"):
        raise InputError('--plot needs matplotlib: pip install -e ".[report]"')
    print(HEADING)
    rows = []
    for case in quick_cases() if flags.quick else all_cases():
        for row in measure(case, device):
            rows.append(row)
            print(told(row), flush=True)
    if flags.plot:
        draw(rows, flags.plot)
    print(json.dumps(circumstances("losses", device) | {"rows": rows}))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
