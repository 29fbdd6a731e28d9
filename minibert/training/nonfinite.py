"""Numbers that are none: which update they came from, and how to build its batch again.

An update whose loss or gradient is not finite changes nothing: the optimiser is told on the device,
and nobody waits for it. That it happened is seen at the next look, a log step at the latest.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from minibert.data.batches import Batches
from minibert.errors import BAD_INPUT_STATUS, InputError, Stopped, in_one_line
from minibert.files import write_json
from minibert.run_config import RunConfig
from minibert.training.distributed import rank
from minibert.training.runlog import named_figures

REBUILD = (
    "from pathlib import Path; from minibert.data.batches import Batches; "
    "from minibert.data.corpus import Corpus; "
    "batch = Batches(Corpus.open(Path({data!r})), max_length={max_length}, "
    "batch_size={batch_size}, seed={seed}, packed={packed}).at({step})"
)


def pass_over_unless_finite(optimizer: torch.optim.Optimizer, figures: Tensor) -> None:
    """Have the optimiser's next step change nothing unless loss and gradient are finite.

    `found_inf`, 1 for such a step, is how a GradScaler tells a fused optimiser.
    """
    optimizer.found_inf = 1.0 - torch.isfinite(figures[0] + figures[-1]).float()


class NonfiniteWatch:
    """Looks at the figures of updates, and ends a run that has too many that are not finite.

    Args:
        run: its `skip_nonfinite` updates may be passed over.
        batches: to tell which documents were in them.
        skipped: how many were before this process went on with the run.
    """

    def __init__(self, run: RunConfig, batches: Batches, skipped: int):
        self.run, self.batches, self.skipped = run, batches, skipped
        self.unseen: list[tuple[int, Tensor]] = []  # updates done, figures on the device

    def add(self, done: int, figures: Tensor) -> None:
        """Note the figures (loss first, gradient norm last) of the update that made `done`."""
        self.unseen.append((done, figures))

    def look(self) -> dict[str, float | list[float]]:
        """Wait for the device and look at all updates since the last look.

        Returns the newest one's figures by name; one too many that is not finite is an InputError.
        """
        rows = torch.stack([figures for _, figures in self.unseen]).tolist()
        for (done, _), row in zip(self.unseen, rows, strict=True):
            if not math.isfinite(row[0] + row[-1]):
                self.skipped += 1
                self._report(done, row)
        self.unseen.clear()
        return named_figures(rows[-1], self.run)

    def _report(self, done: int, row: list[float]) -> None:
        """Write down what was in the batch, and end the run where it may not be passed over."""
        path = self.run.out / f"nonfinite_step_{done:06d}.json"
        figures = named_figures(row, self.run)
        where = f"its documents are named in {path}"
        if rank() == 0:
            try:
                self._write(path, done, figures)
            except (InputError, OSError) as error:
                where = f"what was in it could not be written ({in_one_line(error)})"
        if self.skipped > self.run.skip_nonfinite:
            if rank() != 0:
                raise Stopped(BAD_INPUT_STATUS)
            terms = ", ".join(
                f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float)
            )
            raise InputError(
                f"step {done} is not finite: {terms}; the newest checkpoint stays; {where} "
                f"(--skip-nonfinite N passes over such steps)"
            )

    def _write(self, path: Path, done: int, figures: dict[str, float | list[float]]) -> None:
        """The figures, the batch's documents, and the line of Python that builds it again."""
        run = self.run
        settings = {"data": str(run.data.resolve()), "max_length": run.max_length}
        settings |= {"batch_size": run.batch_size, "seed": run.seed, "step": done - 1}
        settings["packed"] = self.batches.packed
        content = {
            "step": done,
            "figures": {name: str(value) for name, value in figures.items()},
            "documents": self.batches.corpus.document_ids(self.batches.documents(done - 1)),
            "rebuild": REBUILD.format(**settings),
        }
        write_json(path, content)
