"""What a fine-tuning run tells: a line of metrics.jsonl an epoch, and progress for people."""

import json
import math
import time
from pathlib import Path

from minibert.errors import InputError
from minibert.files import atomic_file
from minibert.progress import ProgressLine, duration
from minibert.training.runlog import METRICS, read_metrics


class EpochLog:
    """`metrics.jsonl`, a line an epoch, and what people see meanwhile.

    A resumed run cuts off what was logged after the checkpoint it goes on from.
    """

    def __init__(self, folder: Path, chosen_by: str, first_step: int, steps: int):
        self.path = folder / METRICS
        self.chosen_by, self.first_step, self.steps = chosen_by, first_step, steps
        self.lines = [line for line in read_metrics(self.path) if line["step"] <= first_step]
        if first_step and (not self.lines or self.lines[-1]["step"] != first_step):
            raise InputError(f"{self.path}: no line about update {first_step}, the newest kept")
        self.progress, self.began = ProgressLine(), time.monotonic()
        self.losses: list[float] = []  # of the updates of this epoch
        self.epoch_began = self.began

    def update(self, step: int, loss: float) -> None:
        """Note the loss of an update, and show progress."""
        if not math.isfinite(loss):
            raise InputError(
                f"update {step + 1}: the loss is {loss}; a smaller --learning-rate may help"
            )
        self.losses.append(loss)
        done = step + 1
        spent = time.monotonic() - self.began
        left = duration((self.steps - done) * spent / (done - self.first_step))
        best = f"  best devel {self.chosen_by} {self.best():.4f}" if self.lines else ""
        mean = sum(self.losses) / len(self.losses)
        self.progress.show(f"update {done}/{self.steps}  loss {mean:.4f}{best}  {left} left")

    def epoch(self, epoch: int, step: int, scores: dict[str, float]) -> bool:
        """Add the line of an epoch; returns whether it is the best so far."""
        best_before = self.best() if self.lines else -1.0
        loss = sum(self.losses) / len(self.losses)
        seconds = round(time.monotonic() - self.epoch_began, 1)
        devel = {f"devel_{name}": value for name, value in scores.items()}
        line = {"epoch": epoch + 1, "step": step, "loss": loss, **devel, "seconds": seconds}
        self.lines.append(line)
        with atomic_file(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.losses, self.epoch_began = [], time.monotonic()
        self.progress.clear()
        figures = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"epoch {epoch + 1}  loss {loss:.4f}  devel {figures}", flush=True)
        return scores[self.chosen_by] > best_before

    def best(self) -> float:
        """The best figure of devel so far."""
        return max(line[f"devel_{self.chosen_by}"] for line in self.lines)

    def best_epoch(self) -> int:
        """The first epoch that reached it, from 1."""
        reached = (line for line in self.lines if line[f"devel_{self.chosen_by}"] == self.best())
        return next(reached)["epoch"]
