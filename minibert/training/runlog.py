"""What a run tells: one JSON object a log step for programs, one line of progress for people."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minibert.errors import InputError
from minibert.files import atomic_file, naming, parse_json
from minibert.progress import ProgressLine, duration
from minibert.run_config import RunConfig
from minibert.training.distributed import from_rank_0, rank

METRICS = "metrics.jsonl"
HELD_OUT_LOSS = "held_out_mlm_loss"  # every line about an evaluation has it
TIMES = ("tokens_per_second", "seconds")  # what of a line differs from run to run


class RunLog:
    """`metrics.jsonl` of a run folder, and the progress line.

    A resumed run cuts off what was logged after the checkpoint it goes on from, so that every step
    stands in the file once.
    """

    def __init__(self, folder: Path, first_step: int, steps: int):
        self.path = folder / METRICS
        self.first_step, self.steps = first_step, steps
        self.tells = rank() == 0  # the other ranks keep count alone
        self.line = ProgressLine()
        self.tokens = 0  # learnt from since the last line about an update
        self.seconds_in_all = 0.0  # of updates, in this process
        self.evaluated, self.seconds_before = from_rank_0(self._cut)
        self.clock = time.perf_counter()

    def _cut(self) -> tuple[set[int], float]:
        """Drop the lines after the first step.

        Returns the steps that have been evaluated, and the seconds that the updates before took.
        """
        lines = read_metrics(self.path)
        kept = [line for line in lines if 0 < self.first_step >= line["step"]]
        with atomic_file(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        evaluated = {line["step"] for line in kept if HELD_OUT_LOSS in line}
        return evaluated, max((line.get("seconds", 0.0) for line in kept), default=0.0)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done in here (evaluating, saving) does not count as time of updates."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started

    def update(
        self,
        step: int,
        figures: dict[str, float | list[float]],
        learning_rate: float,
        skipped: int,
    ) -> None:
        """Add a line about the update that was just done, and show progress.

        Throughput is that since the last such line; `seconds` are those of all updates so far,
        those of earlier starts too (to the last line each wrote); `skipped` counts the updates so
        far that were passed over, and is written once there is one. What is not finite is null.
        """
        now = time.perf_counter()
        self.seconds_in_all += now - self.clock
        tokens_per_second = self.tokens / (now - self.clock)
        self.tokens, self.clock = 0, now
        counts = {"skipped_updates": skipped} if skipped else {}
        self._write(
            step,
            **figures,
            learning_rate=learning_rate,
            tokens_per_second=round(tokens_per_second, 1),
            seconds=round(self.seconds_before + self.seconds_in_all, 3),
            **counts,
        )
        if not self.tells:
            return
        left = (self.steps - step) * self.seconds_in_all / (step - self.first_step)
        terms = "  ".join(
            f"{name.removesuffix('_loss')} {value:.3f}"
            for name, value in figures.items()
            if name.endswith("loss")
        )
        self.line.show(
            f"step {step}/{self.steps}  {terms}  {tokens_per_second:,.0f} tokens/s  "
            f"{duration(left)} left"
        )

    def evaluation(self, step: int, evaluate: Callable[[], dict[str, float]]) -> None:
        """Add a line with the figures of `minibert.evaluate`, each under `held_out_...`.

        Nothing is done where the run had evaluated this step before it was stopped.
        """
        if step in self.evaluated:
            return
        with self.apart():
            figures = evaluate()
        self.line.clear()
        if figures:  # there are none where no document is held out
            self._write(step, **{f"held_out_{name}": value for name, value in figures.items()})

    def stopped(self, step: int) -> None:
        """Say that the run ends before its end, and how to go on."""
        self.line.clear()
        if self.tells:
            print(f"saved after {step} of {self.steps} updates: {how_to_go_on(self.path.parent)}")

    def summary(self, result: Path) -> None:
        """Print what the run began with, what it ended with, and where the result lies."""
        if not self.tells:
            return
        self.line.clear()
        if evaluations := [line for line in read_metrics(self.path) if HELD_OUT_LOSS in line]:
            first, last = evaluations[0], evaluations[-1]
            rows = {"before": first, f"after {last['step']} steps": last}
            if "held_out_teacher_kl" in last:
                own = {k.replace("teacher_", ""): v for k, v in last.items() if "teacher_mlm" in k}
                rows = {"teacher": own} | {f"student {name}": row for name, row in rows.items()}
            print_table(rows)
        print(f"written: {result}")

    def _write(self, step: int, **figures: Any) -> None:
        """Add a line to metrics.jsonl."""
        if self.tells:
            figures = {name: _finite(value) for name, value in figures.items()}
            with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")


def how_to_go_on(run_folder: Path) -> str:
    return f"--out {run_folder} --resume goes on"


def named_figures(row: list[float], run: RunConfig) -> dict[str, float | list[float]]:
    """The figures of an update by name; what `run` does not compare has none.

    row: loss, mlm_loss, hidden_loss of each of the run's `hidden_pairs`, attention_loss of each of
    its `attention_pairs`, output_loss, grad_norm.
    """
    loss, mlm_loss, *terms, output_loss, grad_norm = row
    split = len(run.hidden_pairs)
    per_layer = {"hidden_loss": terms[:split], "attention_loss": terms[split:]}
    per_layer = {name: losses for name, losses in per_layer.items() if losses}
    figures = {"loss": loss, "mlm_loss": mlm_loss}
    figures |= {name: sum(losses) for name, losses in per_layer.items()}
    if run.follows_teacher:
        figures["output_loss"] = output_loss
    figures |= {f"{name}_per_layer": losses for name, losses in per_layer.items()}
    return figures | {"grad_norm": grad_norm}


def _finite(value: float | list[float]) -> float | list | None:
    """JSON has no numbers that are none."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Print held-out figures, a row a model; a model is not compared with itself."""
    columns = {
        HELD_OUT_LOSS: "MLM loss",
        "held_out_mlm_accuracy": "accuracy",
        "held_out_teacher_kl": "KL to teacher",
        "held_out_teacher_agreement": "agreement",
    }
    columns = {key: title for key, title in columns.items() if any(key in r for r in rows.values())}
    width = max(map(len, rows))
    print(f"{'held out':{width}}", *(f"{title:>13}" for title in columns.values()))
    for name, row in rows.items():
        cells = (f"{'-':>13}" if row.get(key) is None else f"{row[key]:13.4f}" for key in columns)
        print(f"{name:{width}}", *cells)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no file. A torn last line is left out."""
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1
    ):
        try:
            lines.append(parse_json(line))
            lines[-1]["step"] += 0
            lines[-1].get("seconds", 0) + 0.0  # numbers, both
        except (ValueError, TypeError, LookupError):
            raise InputError(
                f"{path}: line {number} is not of a run's log (the file may be moved away)"
            ) from None
    return lines
