"""Run folders as they are read for a report: settings, logged lines, a name that tells them apart.

Every figure of a line is a float here, or a list of floats; null, which stands for what is not
finite, is NaN.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minibert.errors import InputError
from minibert.files import file_size
from minibert.run_config import RunConfig
from minibert.training.runlog import HELD_OUT_LOSS, METRICS, read_metrics

HELD_OUT = {
    "held_out_mlm_loss": "held-out MLM loss, nats",
    "held_out_mlm_accuracy": "held-out accuracy",
    "held_out_teacher_kl": "KL to teacher, nats",
    "held_out_teacher_agreement": "agreement with teacher",
}
TEACHERS_OWN = {  # figures of the teacher itself, by those of the model that they are like
    "held_out_mlm_loss": "held_out_teacher_mlm_loss",
    "held_out_mlm_accuracy": "held_out_teacher_mlm_accuracy",
}
TOLD_APART = ("recipe", "steps", "dtype", "seed")  # have a row of the table always
OF_NO_MATTER = (  # to what is learnt
    "out", "resume", "save_every", "save_minutes", "max_hours", "log_every", "keep",
)  # fmt: skip


class Run(NamedTuple):
    """A run of `train.py`."""

    label: str
    config: RunConfig
    updates: list[dict[str, Any]]  # the lines about updates, oldest first
    evaluations: list[dict[str, Any]]  # the lines about held-out documents

    @property
    def steps_done(self) -> int:
        """Updates that are told of."""
        return max(line["step"] for line in self.updates + self.evaluations)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each with a label of its own.

    Raises InputError for a folder that holds no run, one that is damaged or empty, or one given
    twice.
    """
    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{folder}: given twice")
    return [read_run(f, label) for f, label in zip(folders, labels(paths), strict=True)]


def labels(paths: Sequence[Path]) -> list[str]:
    """Of each path its last part, with as many before it as tell it from all others."""

    def shortest(path: Path) -> str:
        for count in range(1, len(path.parts) + 1):
            tail = path.parts[-count:]
            if sum(other.parts[-count:] == tail for other in paths) == 1:
                break
        return printable("/".join(tail))

    return [shortest(path) for path in paths]


def printable(text: str) -> str:
    """Text of one line that any file can hold: of a folder's name, which may be any bytes."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def read_run(folder: Path, label: str) -> Run:
    """The run in a folder; InputError where there is none, or nothing is told of it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a run of train.py")
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: no run of train.py (no config.json in it)")
    config, path = _settings_in(folder / "config.json"), folder / METRICS
    if path.exists():
        file_size(path)  # a pipe would be waited for
    lines = [_in_floats(line, path) for line in read_metrics(path)]
    if not lines:
        raise InputError(f"{path}: nothing logged yet; expected a line at least")
    updates = [line for line in lines if HELD_OUT_LOSS not in line]
    return Run(label, config, updates, [line for line in lines if HELD_OUT_LOSS in line])


def _settings_in(path: Path) -> RunConfig:
    """The settings in a run's config.json, which go together; errors name it."""
    run = RunConfig.read(path)
    try:
        return run.resolved()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _in_floats(line: dict[str, Any], path: Path) -> dict[str, Any]:
    """A line with its figures as floats, NaN for null; `step` stays the whole number it is."""
    step = line["step"]
    if type(step) is not int or not 0 <= step < 2**53:
        raise InputError(f"{path}: a line of step {str(step)[:100]}; expected a whole number")
    figures = {}
    for name, value in line.items():
        several = name.endswith("_per_layer")
        items = value if several and isinstance(value, list) else [value]
        numbers = all(item is None or type(item) in (int, float) for item in items)
        if not numbers or several != isinstance(value, list):
            wanted = "list of numbers" if several else "number"
            raise InputError(f"{path}: step {step}: {name[:100]!r} is no {wanted}")
        floats = [_as_float(item) for item in items]
        figures[name] = floats if several else floats[0]
    return figures | {"step": step}


def _as_float(value: float | None) -> float:
    """NaN where a number is none, or more than a float holds."""
    return math.nan if value is None or not abs(value) < 1e300 else float(value)


def table(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The rows of the table of runs: a cell for each run, under what it tells."""
    rows = {
        "recipe": [run.config.recipe.name for run in runs],
        "updates": [f"{run.steps_done:,} of {run.config.steps:,}" for run in runs],
        "dtype": [run.config.dtype for run in runs],
        "seed": [str(run.config.seed) for run in runs],
    }
    for name, title in HELD_OUT.items():
        rows[title] = [_last(run, name) for run in runs]
        if name in TEACHERS_OWN:
            rows[f"{title}: teacher's own"] = [_last(run, TEACHERS_OWN[name]) for run in runs]
    at = [run.evaluations[-1]["step"] if run.evaluations else None for run in runs]
    rows["held out after updates"] = ["" if step is None else f"{step:,}" for step in at]
    speeds = [median(line.get("tokens_per_second", math.nan) for line in r.updates) for r in runs]
    rows["tokens a second, median"] = [_cell(speed, ",.0f") for speed in speeds]
    return {title: cells for title, cells in rows.items() if any(cells)} | differing_settings(runs)


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings of which the runs have several values, those of their recipes too."""
    each = [_settings(run.config) for run in runs]
    return {
        name.replace("_", " "): [_setting(one[name]) for one in each]
        for name in each[0]
        if name not in TOLD_APART + OF_NO_MATTER and any(one[name] != each[0][name] for one in each)
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    """All settings by name: of the recipe those that the run itself has none of."""
    run = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    recipe = {f"recipe's {key}": value for key, value in config.recipe.to_dict().items()}
    return {key: v for key, v in recipe.items() if key.removeprefix("recipe's ") not in run} | run


def _setting(value: Any) -> str:
    """A setting as a cell: `1,3,5` as the flag has it, nothing for one without a value."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else printable(str(value))


def _last(run: Run, name: str) -> str:
    """The last of a run's held-out figures, as a cell."""
    return _cell(run.evaluations[-1].get(name, math.nan), ".4f") if run.evaluations else ""


def _cell(value: float, form: str) -> str:
    """A number as a cell; nothing for NaN."""
    return "" if math.isnan(value) else format(value, form)


def median(values) -> float:
    """The median of those that are numbers; NaN where there is none."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.median(numbers) if numbers else math.nan
