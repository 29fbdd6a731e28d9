"""Everything there is to measure on a GPU, in one call of less than eight minutes.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --out gpu.json --data CORPUS --minutes 4 --eager

1. Every Triton kernel is held to the plain formula in float64 (correctness.py), a toy's step to
   that with plain operations, and a resumed run to one not interrupted (step_correctness.py). If
   anything is wrong, that is said, and nothing is timed.
2. The operations one by one, first at the sizes of a step (losses.py).
3. Whole updates, ours beside the authors' way (step.py); at the end, in time of its own, ours
   compiled.

What there is no time for is skipped and named. After every part the file holds what is known. Needs
CUDA, Triton (it comes with torch for CUDA), and `pip install -e ".[bench]"`.
"""

import tempfile
import time
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import losses
import step
import torch
from cases import all_cases, cases_of_a_step
from machine import circumstances, give_memory_back, installed, tell
from outcomes import Row
from step_correctness import check_resume, check_step
from variants import BF16, Variant, choose, ours
from workload import Work, write_random_corpus

from minibert.config import BIOBERT
from minibert.data.corpus import Corpus
from minibert.errors import ArgumentParser, InputError, in_one_line, run_command
from minibert.evaluate import check_fit
from minibert.files import write_json
from minibert.flags import number
from minibert.recipes import RECIPES
from minibert.training.device import MICRO_BATCH_TOKENS, set_up_device

LOSSES_END, STEP_END, COMPILED_END = 0.55, 0.8, 0.97  # shares of the time there is
ROUNDS, WARMUP = 4, 1
LENGTH = 256
STEPS_OF_THE_PAPER = RECIPES["compactbiobert"].steps


class Report:
    """What is known so far, in a file."""

    def __init__(self, path: Path, known: dict[str, Any], seconds: float):
        self.path, self.seconds = path, seconds  # that there are
        self.known = known | {"skipped": []}
        self.began = time.monotonic()

    def add(self, **known: Any) -> None:
        self.known |= known | {"seconds": self.age()}
        write_json(self.path, self.known)

    def skip(self, what: str) -> None:
        tell(f"skipped: {what}")
        self.known["skipped"].append(what)

    def age(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def left(self, share: float) -> float:
        """Seconds until such a share of the time is over."""
        return max(0.0, share * self.seconds - self.age())


def check_correctness(report: Report, device: torch.device) -> None:
    """Part 1."""
    from correctness import check_all  # here: it imports Triton

    tell("1. correctness")
    rows = []
    for check in (check_all, check_step, check_resume):
        rows += rows_of(check, device)
        report.add(correctness=rows)
    wrong = [row for row in rows if not row["right"]]
    for row in wrong:
        errors = "" if row["error"] is None else ": error {error:.1e}, allowed {allowed:.1e}"
        tell(f"wrong: {row['what']}{errors.format(**row)}")
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(rows)} results are wrong")
    print(f"all {len(rows)} results of kernels, step and resumed run are right")


def rows_of(check: Callable[[torch.device], Iterable[Row]], device: torch.device) -> Iterator[Row]:
    """What a check finds; one that cannot go on, by any error, is wrong and says why."""
    try:
        yield from check(device)
    except Exception as error:
        traceback.print_exc()
        what = f"{check.__name__} ended with {type(error).__name__} ({in_one_line(error)})"
        yield {"what": what, "error": None, "allowed": None, "right": False}


def measure_losses(report: Report, batch: int, device: torch.device) -> None:
    """Part 2."""
    tell("2. operations")
    print(losses.HEADING)
    rows = []
    for case in cases_of_a_step(batch, LENGTH) + all_cases():
        if not report.left(LOSSES_END):
            report.skip(f"{case.operation.name} {case.sizes} {case.dtype}")
            continue
        for row in losses.measure(case, device):
            rows.append(row)
            print(losses.told(row), flush=True)
        report.add(losses=rows)
    give_memory_back()


def measure_step(
    report: Report, variants: list[Variant], batch: int, data: Path, device: torch.device
) -> None:
    """Part 3."""
    tell("3. updates")
    precision = torch.get_float32_matmul_precision()
    at_once = MICRO_BATCH_TOKENS["cuda"]  # as train.py has it
    work = Work(BIOBERT, data, batch, LENGTH, at_once, device, precision)
    compiled = any(variant.compiled for variant in variants)
    limits = (report.left(STEP_END if compiled else COMPILED_END), report.left(COMPILED_END))
    measured = step.measure(work, variants, ROUNDS, WARMUP, *limits)
    print(step.table(measured))
    rate = measured["matrix_gflops"]["bfloat16"]
    print(f"\n{'':44}{'TFLOP/s':>9}{'of bfloat16 rate':>18}{'hours of 100,000 steps':>24}")
    for name, row in measured["variants"].items():
        done = len(row.get("seconds", ()))
        if done < ROUNDS:
            why = row["failure"] or "no time was left"
            report.skip(f"{name}: {ROUNDS - done} of {ROUNDS} rounds ({why})")
        if done == 0:
            continue
        row["share_of_bfloat16_rate"] = share = row["useful_gflops"] / rate
        row["projected_hours"] = hours = row["median_seconds"] * STEPS_OF_THE_PAPER / 3600
        print(f"{name:44}{row['useful_gflops'] / 1e3:9,.1f}{share:18.0%}{hours:24.2f}")
    report.add(step=measured)


def main() -> None:
    parser = ArgumentParser(
        prog="python benchmarks/gpu.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("gpu.json"), help="(gpu.json)"
    )
    parser.add_argument("--data", metavar="CORPUS", type=Path, help="corpus folder (else random)")
    parser.add_argument("--eager", action="store_true", help="without ours compiled")
    parser.add_argument("--minutes", type=number(float, 1), default=8.0, help="at most (8)")
    parser.add_argument(
        "--batch", type=number(int, 4), default=192, help=f"sequences of {LENGTH} tokens (192)"
    )
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("gpu.py needs a CUDA device; step.py and losses.py run without")
    if not installed("triton"):
        raise InputError("gpu.py needs Triton, which the kernels are written in")
    if flags.data:
        check_fit(Path("BioBERT"), BIOBERT, Corpus.open(flags.data), LENGTH)
    device = set_up_device("cuda")
    half = {"micro_batch_tokens": flags.batch * LENGTH // 2}
    in_two = ours("ours bfloat16, two micro-batches", BF16, tuned=True, settings=half)
    variants = [*choose(None, device), in_two]
    if flags.eager:
        variants = [variant for variant in variants if not variant.compiled]
    report = Report(flags.out, circumstances("gpu", device), 60 * flags.minutes)
    check_correctness(report, device)
    measure_losses(report, flags.batch, device)
    with tempfile.TemporaryDirectory() as folder:
        data = flags.data or write_random_corpus(Path(folder), BIOBERT.vocab_size)
        measure_step(report, variants, flags.batch, data, device)
    print(f"{report.age():.0f} s; everything is in {flags.out}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
