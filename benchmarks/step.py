"""What one update costs: ours beside the authors' way, in BioBERT's shape.

    python benchmarks/step.py                          random text, on any machine
    python benchmarks/step.py --data CORPUS            the documents of a prepared corpus
    python benchmarks/step.py --variants "authors float32" "ours bfloat16"

Every variant has a process of its own, so that its peak memory is its own. The processes take
turns and only one computes at a time, so that a machine that is busy for a while is so for all. A
turn is `--warmup` untimed updates, the timed ones, one after the other as in a run, and a rest, in
which the authors' side gives free memory back to the system (two updates later an allocator that
keeps memory has it again). Building a batch is not timed, moving it to the device is. All variants
begin with the same random weights and see the same documents and masks. A compiled variant takes
its turns, on the same batches, after all others: what compiling takes is none of theirs.

Peak memory on a CPU is all that a process has held: Python and its libraries, student, teacher (for
ours in bfloat16 twice, as in a run, which evaluates with the float32 one), optimiser, and the gaps
between tensors. Of these ours gives nothing back while it is measured; a run does so every hundred
updates. On a GPU it is that of tensors alone.

Needs `pip install -e ".[bench]"`; ours alone `pip install -e .`. Prints a table, then one line of
JSON.
"""

import itertools
import json
import multiprocessing
import resource
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from machine import (
    MATRIX_KINDS,
    allocator,
    circumstances,
    give_memory_back,
    matrix_rates,
    medium_error,
    peak_of_process,
    synchronize,
    tell,
)
from step_table import is_medium, table
from torch import Tensor
from variants import Variant, authors_side, choose, our_side
from workload import Work, work_of, write_random_corpus

from minibert.config import BIOBERT
from minibert.data.batches import GlobalBatch
from minibert.data.corpus import Corpus
from minibert.errors import ArgumentParser, InputError, run_command
from minibert.evaluate import check_fit
from minibert.flags import number
from minibert.training.device import MICRO_BATCH_TOKENS, set_up_device

REFERENCE = "authors float32"  # the first variant where it is not among them
TIMED_UPDATES = {"cpu": 1, "cuda": 3}  # of a turn
TIMES_OURS = {"cpu": 1, "cuda": 4}  # ours goes over them so many times, as one is soon over


# In the process of a variant.


def serve(pipe: Connection, work: Work, variant: Variant) -> None:
    """Make a side, say which float32 products it has, and then take turns.

    A question is (untimed, timed), the numbers of a turn's batches; the answer what was measured.
    """
    if variant.medium:
        torch.set_float32_matmul_precision("medium")
    batches, update = (our_side if variant.ours else authors_side)(work, variant)
    pipe.send(torch.get_float32_matmul_precision())
    while True:
        untimed, timed = pipe.recv()
        updates_of(update, [ready(batches.at(step), work.device) for step in untimed], work.device)
        there = [ready(batches.at(step), work.device) for step in timed]
        there *= TIMES_OURS[work.device.type] if variant.ours else 1
        measured = updates_of(update, there, work.device)
        on_gpu = work.device.type == "cuda"
        if on_gpu or not variant.ours:
            give_memory_back()
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_of_process()
        pipe.send(measured | {"peak_mb": peak / 1e6})


def ready(batch: GlobalBatch, device: torch.device) -> GlobalBatch:
    """As a DataLoader would have it: for a GPU in memory that is copied without waiting."""
    if device.type != "cuda":
        return batch
    pinned = [part.each(Tensor.pin_memory) for part in batch.micro_batches]
    return batch._replace(micro_batches=pinned)


def updates_of(
    update: Callable[[GlobalBatch], Tensor], batches: Sequence[GlobalBatch], device: torch.device
) -> dict[str, float]:
    """Seconds and page faults of an update on average, and the last loss.

    As in a run, nothing waits for a GPU between one update and the next.
    """
    torch.manual_seed(0)
    loss = torch.zeros(())
    synchronize(device)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    for batch in batches:
        loss = update(batch)
    synchronize(device)
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    count = max(1, len(batches))
    return {"seconds": seconds / count, "page_faults": faults / count, "loss": loss.item()}


# In the process that asks.


class Child:
    """A variant in a process of its own."""

    def __init__(self, work: Work, variant: Variant):
        context = multiprocessing.get_context("spawn")
        self.variant = variant
        self.precision: str | None = None  # of float32 products, told when it is ready
        self.turns: list[dict[str, float]] = []
        self.failure: str | None = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, work, variant), daemon=True)
        with allocator(variant.environment):
            self.process.start()
        theirs.close()

    def get_ready(self, seconds: float | None) -> str:
        """Wait for it; returns what to tell."""
        self.precision = self._answer(seconds)
        return self.failure or "ready"

    def take_turn(self, untimed: Sequence[int], timed: Sequence[int], seconds: float | None) -> str:
        """Let it compute while all others wait; returns what to tell."""
        measured = self._answer(seconds, question=(untimed, timed))
        if measured is None:
            return self.failure
        self.turns.append(measured)
        return f"{measured['seconds']:.3f} s an update, {measured['peak_mb']:,.0f} MB"

    def _answer(self, seconds: float | None, question: Any = None) -> Any:
        """What the child says within so many seconds (None: any); None where it fails instead."""
        try:
            if question is not None:
                self.pipe.send(question)
            if self.pipe.poll(seconds):
                return self.pipe.recv()
            self.failure = "no time was left"
            self.end()  # the others compute alone
        except (EOFError, ConnectionError):
            self.process.join()
            killed = ", killed (often for want of memory)" if self.process.exitcode == -9 else ""
            self.failure = f"its process ended with status {self.process.exitcode}{killed}"
        return None

    def end(self) -> None:
        """Let the process go."""
        self.process.terminate()
        self.process.join()


def measure(
    work: Work,
    variants: Sequence[Variant],
    rounds: int,
    warmup: int,
    limit: float | None = None,
    compiled_limit: float | None = None,
) -> dict[str, Any]:
    """Let the variants take turns; returns what was measured, as JSON holds it.

    After `limit` seconds, where there is one, no turn goes on and no other begins. Compiled
    variants come when all others are done, and may compute until `compiled_limit` seconds have
    gone by, counted from the same beginning.
    """
    began = time.monotonic()
    end, compiled_end = (None if each is None else began + each for each in (limit, compiled_limit))
    H, I = work.config.hidden_size, work.config.intermediate_size
    batches = work.batches(micro_batch_tokens=1)
    children = [Child(work, variant) for variant in variants]
    for child in children:
        its_end = compiled_end if child.variant.compiled else end
        tell(f"{child.variant.name}: {child.get_ready(left(its_end))}")
    compiled = [child for child in children if child.variant.compiled]
    others = [child for child in children if not child.variant.compiled]
    steps = itertools.count()
    rates, tokens, flops, turns = [], [], [], []
    for _ in range(rounds):
        if left(end) == 0:
            break
        rates.append(matrix_rates(H, I, work.device))
        untimed = list(itertools.islice(steps, warmup))
        timed = list(itertools.islice(steps, TIMED_UPDATES[work.device.type]))
        counts = [work_of(work.config, batches.at(step)) for step in timed]
        tokens.append(mean(count for count, _ in counts))
        flops.append(mean(count for _, count in counts))
        turns.append((untimed, timed))
        take_turns(others, *turns[-1], end)
    for turn in turns:
        take_turns(compiled, *turn, compiled_end)
    for child in children:
        child.end()
    best_rates = {kind: max((rate[kind] for rate in rates), default=0) for kind in MATRIX_KINDS}
    names = [child.variant.name for child in children]
    reference = children[names.index(REFERENCE) if REFERENCE in names else 0]
    return {
        "reference": reference.variant.name,
        "tokens": tokens,
        "useful_gflop": [count / 1e9 for count in flops],
        "matrix_gflops": {kind: rate / 1e9 for kind, rate in best_rates.items()},
        "medium_error": medium_error(H, I, work.device),
        "updates_of_a_turn": {
            "theirs": TIMED_UPDATES[work.device.type],
            "ours": TIMED_UPDATES[work.device.type] * TIMES_OURS[work.device.type],
        },
        "variants": {
            child.variant.name: summary(child, reference, tokens, flops, best_rates)
            for child in children
        },
    }


def take_turns(
    children: Sequence[Child], untimed: Sequence[int], timed: Sequence[int], end: float | None
) -> None:
    """A round of those that have not failed, one after the other."""
    for child in children:
        if child.failure is None:
            told = child.take_turn(untimed, timed, left(end))
            tell(f"round {len(child.turns)}, {child.variant.name}: {told}")


def left(end: float | None) -> float | None:
    """Seconds until then, 0 at least; None where there is no end."""
    return None if end is None else max(0.0, end - time.monotonic())


def summary(
    child: Child,
    reference: Child,
    tokens: Sequence[float],
    flops: Sequence[float],
    rates: dict[str, float],
) -> dict[str, Any]:
    """What is told of one variant; medians are over the rounds it did (which are the first)."""
    variant = child.variant
    told = {
        "dtype": variant.dtype,
        "allocator": "keeps memory" if variant.tuned else "stock",
        "environment": variant.environment,
        "float32_matmul_precision": child.precision,
        "settings": variant.settings,
        "failure": child.failure,
    }
    if not child.turns:
        return told | {"failure": child.failure or "no time was left"}
    seconds = [turn["seconds"] for turn in child.turns]
    references = [turn["seconds"] for turn in reference.turns]
    rate = median(count / each for count, each in zip(flops, seconds, strict=False))
    ratios = [their / our for their, our in zip(references, seconds, strict=False)]
    kind = "float32 medium" if is_medium(told) else variant.dtype
    return told | {
        "seconds": seconds,
        "median_seconds": median(seconds),
        "times_as_fast_as_reference": median(ratios) if ratios else None,
        "tokens_per_second": median(
            count / each for count, each in zip(tokens, seconds, strict=False)
        ),
        "peak_mb": child.turns[-1]["peak_mb"],
        "useful_gflops": rate / 1e9,
        "share_of_matrix_rate": rate / rates[kind],
        "page_faults": median(turn["page_faults"] for turn in child.turns),
        "last_loss": child.turns[-1]["loss"],
    }


def main() -> None:
    parser = ArgumentParser(
        prog="python benchmarks/step.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    count = number(int, 1)
    parser.add_argument("--data", metavar="CORPUS", type=Path, help="corpus folder (else random)")
    parser.add_argument("--variants", metavar="NAME", nargs="+", help="these alone, by name")
    parser.add_argument("--batch", type=count, default=8, help="sequences of an update (8)")
    parser.add_argument("--length", type=number(int, 3), default=256, help="tokens of one (256)")
    parser.add_argument(
        "--micro-batch-tokens", type=count, help="ours, as in train.py, and with its default"
    )
    parser.add_argument("--rounds", type=count, default=5, help="turns of every variant (5)")
    parser.add_argument("--warmup", type=count, default=2, help="untimed updates of a turn (2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags = parser.parse_args()
    device = set_up_device(flags.device)
    variants = choose(flags.variants, device)
    if flags.length > BIOBERT.max_position_embeddings:
        raise InputError(f"--length {flags.length}: BERT has {BIOBERT.max_position_embeddings}")
    with tempfile.TemporaryDirectory() as folder:
        data = flags.data or write_random_corpus(Path(folder), BIOBERT.vocab_size)
        check_fit(Path("BioBERT"), BIOBERT, Corpus.open(data), flags.length)
        tokens = flags.micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]
        sizes = (flags.batch, flags.length, tokens)
        work = Work(BIOBERT, data, *sizes, device, torch.get_float32_matmul_precision())
        report = measure(work, variants, flags.rounds, flags.warmup)
    print(table(report))
    print(json.dumps(circumstances("step", device) | report))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
