"""What a run tells: one JSON object a log step for programs, one line of progress for people."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from minibert.errors import InputError
from minibert.files import atomic_file
from minibert.progress import ProgressLine, duration

METRICS = "metrics.jsonl"
HELD_OUT_LOSS = "held_out_mlm_loss"  # every line about an evaluation has it


class RunLog:
    """`metrics.jsonl` of a run folder, and the progress line.

    A resumed run cuts off what was logged after the checkpoint it goes on from, so that every step
    stands in the file once.
    """

    def __init__(self, folder: Path, first_step: int, steps: int):
        self.path = folder / METRICS
        self.first_step, self.steps = first_step, steps
        self.line = ProgressLine()
        self.tokens = 0  # learnt from since the last line about an update
        self.seconds_in_all = 0.0  # of updates, in this process
        kept = [line for line in read_metrics(self.path) if 0 < first_step >= line["step"]]
        with atomic_file(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.clock = time.perf_counter()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done in here (evaluating, saving) does not count as time of updates."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started

    def update(
        self,
        step: int,
        loss: Tensor,
        mlm_loss: Tensor,
        hidden_loss: Tensor,
        attention_loss: Tensor,
        output_loss: Tensor,
        learning_rate: float,
        grad_norm: Tensor,
    ) -> None:
        """Add a line about the update that was just done, and show progress.

        Loss terms are unweighted; `hidden_loss` and `attention_loss` (L,) are written as their sums
        and, under `..._per_layer`, as lists. Throughput is that since the last such line.
        """
        figures = {"loss": loss.item(), "mlm_loss": mlm_loss.item()}
        if len(hidden_loss):  # there is a teacher
            figures |= {
                "hidden_loss": hidden_loss.sum().item(),
                "attention_loss": attention_loss.sum().item(),
                "output_loss": output_loss.item(),
                "hidden_loss_per_layer": hidden_loss.tolist(),
                "attention_loss_per_layer": attention_loss.tolist(),
            }
        now = time.perf_counter()  # after .item(): a GPU has done all that was asked of it
        self.seconds_in_all += now - self.clock
        tokens_per_second = self.tokens / (now - self.clock)
        self.tokens, self.clock = 0, now
        self._write(
            step,
            **figures,
            learning_rate=learning_rate,
            grad_norm=grad_norm.item(),
            tokens_per_second=round(tokens_per_second, 1),
        )
        left = (self.steps - step) * self.seconds_in_all / (step - self.first_step)
        terms = "  ".join(
            f"{name.removesuffix('_loss')} {value:.3f}"
            for name, value in figures.items()
            if isinstance(value, float)
        )
        self.line.show(
            f"step {step}/{self.steps}  {terms}  {tokens_per_second:,.0f} tokens/s  "
            f"{duration(left)} left"
        )

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Add a line with the figures of `minibert.evaluate`, each under `held_out_...`."""
        self.line.clear()
        if figures:  # there are none where no document is held out
            self._write(step, **{f"held_out_{name}": value for name, value in figures.items()})

    def summary(self, result: Path) -> None:
        """Print what the run began with, what it ended with, and where the result lies."""
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
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")


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
        cells = (f"{row[key]:13.4f}" if key in row else f"{'-':>13}" for key in columns)
        print(f"{name:{width}}", *cells)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no file. A torn last line is left out."""
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
            lines[-1]["step"] += 0
        except (ValueError, TypeError, LookupError):
            raise InputError(f"{path}: line {number} is not of a run's log") from None
    return lines
