"""From logged lines to the curves of each panel. Nothing is drawn here, and nothing left out.

A curve has the points of a run's lines as they were logged; NaN is a gap. A panel holds one curve
of each run that has logged its figure.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minibert.errors import InputError
from minibert.pictures.runs import HELD_OUT, TEACHERS_OWN, Run

FEW = 60  # points that need no trend among them
UNITS = {  # of a loss, by its word in the recipe
    "cosine": "1 − cosine", "mse": "mean square", "kl": "nats", "cross_entropy": "nats",
}  # fmt: skip


class Curve(NamedTuple):
    """Points, from left to right; NaN is a gap."""

    x: list[float]
    y: list[float]


class Panel(NamedTuple):
    """What is drawn over one pair of axes."""

    title: str  # with the unit
    curves: dict[int, Curve]  # by the number of the run
    teacher: tuple[float, ...] = ()  # what teachers have themselves: level lines
    logarithmic: bool = False
    noisy: bool = False  # so that a trend helps


class LayerPanel(NamedTuple):
    """The parts of a loss, a curve a level, of one run."""

    title: str
    run: int  # its number
    curves: dict[str, Curve]  # by level: the student's, and the teacher's that it follows


def curve(lines: Sequence[dict[str, Any]], name: str, x: str = "step") -> Curve:
    """What the lines tell under `name`; those without it are no points."""
    told = [line for line in lines if name in line]
    return Curve([line[x] for line in told], [line[name] for line in told])


def panel(title: str, lines_of_runs: dict[int, list[dict]], name: str, x: str = "step") -> Panel:
    """One figure of several runs; a run without any number of it has no curve."""
    curves = {number: curve(lines, name, x) for number, lines in lines_of_runs.items()}
    return Panel(title, {n: c for n, c in curves.items() if not all(map(math.isnan, c.y))})


def loss_panels(runs: Sequence[Run]) -> list[Panel]:
    """The loss and its terms against updates; a term that no run has makes no panel."""
    titles = {
        "loss": "loss, weighted sum",
        "mlm_loss": "MLM loss, nats",
        "hidden_loss": f"hidden-state loss{_unit(runs, 'hidden_loss')}",
        "attention_loss": f"attention loss{_unit(runs, 'attention_loss')}",
        "output_loss": f"output loss{_unit(runs, 'output_loss')}",
    }
    lines = _updates(runs)
    panels = (panel(title, lines, name) for name, title in titles.items())
    return _with_data(panel._replace(noisy=True) for panel in panels)


def update_panels(runs: Sequence[Run]) -> list[Panel]:
    """Learning rate, gradient norm before clipping, throughput, against updates."""
    lines = _updates(runs)
    norm = panel("gradient norm, unclipped", lines, "grad_norm")
    norms = [value for curve in norm.curves.values() for value in curve.y]
    positive = all(value > 0 for value in norms if not math.isnan(value))
    return _with_data([
        panel("learning rate", lines, "learning_rate"),
        norm._replace(logarithmic=positive, noisy=True),
        panel("tokens a second", lines, "tokens_per_second")._replace(noisy=True),
    ])  # fmt: skip


def held_out_panels(runs: Sequence[Run], against: str = "step") -> list[Panel]:
    """The held-out figures against updates (`step`) or seconds of updates (`seconds`).

    Against seconds, runs whose log has none are left out.
    """
    lines = {number: run.evaluations for number, run in enumerate(runs)}
    if against == "seconds":
        lines = {number: evaluations_in_time(run) for number, run in enumerate(runs)}
        lines = {number: evaluations for number, evaluations in lines.items() if evaluations}
    panels = []
    for name, title in HELD_OUT.items():
        one = panel(title.removeprefix("held-out "), lines, name, against)
        own = (_last(lines[number], TEACHERS_OWN.get(name, "")) for number in one.curves)
        levels = tuple(sorted({value for value in own if value is not None}))
        panels.append(one._replace(teacher=levels))
    return _with_data(panels)


def evaluations_in_time(run: Run) -> list[dict[str, Any]]:
    """The evaluations with the `seconds` of the updates before each; evaluating is left out.

    They are those of the newest line about an update at or before that step, 0 for step 0; an
    evaluation that no such line precedes is left out. None at all where a line about an update has
    no seconds: then later ones do not count from the run's beginning.
    """
    if not run.updates or not all("seconds" in line for line in run.updates):
        return []
    placed = []
    for line in run.evaluations:
        earlier = [update for update in run.updates if update["step"] <= line["step"]]
        if line["step"] == 0 or earlier:
            seconds = max(earlier, key=lambda update: update["step"])["seconds"] if earlier else 0.0
            placed.append(line | {"seconds": seconds})
    return placed


def layer_panels(runs: Sequence[Run]) -> list[list[LayerPanel]]:
    """A row of panels for each run that is compared in layers: hidden states, attention maps.

    Raises InputError where a log has other levels than its settings compare.
    """
    rows = []
    for number, run in enumerate(runs):
        terms = {"hidden_loss": "hidden-state loss", "attention_loss": "attention loss"}
        row = [
            LayerPanel(f"{title}{_unit([run], name)}", number, curves)
            for name, title in terms.items()
            if (curves := layer_curves(run, name))
        ]
        rows += [row] if row else []
    return rows


def layer_curves(run: Run, name: str) -> dict[str, Curve]:
    """A curve for each level that `name` (hidden_loss, attention_loss) is the sum over."""
    lines = [line for line in run.updates if f"{name}_per_layer" in line]
    if not lines:
        return {}
    levels = level_names(run, name)
    parts = [line[f"{name}_per_layer"] for line in lines]
    if any(not isinstance(part, list) or len(part) != len(levels) for part in parts):
        raise InputError(
            f"{run.label}: {name}_per_layer in metrics.jsonl is not one number for each of the "
            f"{len(levels)} levels that config.json compares"
        )
    steps = [line["step"] for line in lines]
    return {level: Curve(steps, [part[i] for part in parts]) for i, level in enumerate(levels)}


def level_names(run: Run, name: str) -> list[str]:
    """`0 ← 1`: student's layer and teacher's, counted from 0; or `embeddings`, `last`."""
    if run.config.teacher_layers is None:
        return []
    if name == "attention_loss":
        return [f"{i} ← {j}" for i, j in run.config.attention_pairs]
    named = {(0, 0): "embeddings", (-1, -1): "last"}
    return [named.get((i, j), f"{i - 1} ← {j - 1}") for i, j in run.config.hidden_pairs]


def passed_over(run: Run) -> list[int]:
    """The steps of the lines that tell of updates passed over since the line before."""
    steps, before = [], 0
    for line in run.updates:
        if (count := line.get("skipped_updates", 0)) > before:
            steps.append(line["step"])
            before = count
    return steps


def trend(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, a thirtieth of all; gaps stay gaps."""
    y = np.array(values, dtype=float)
    window = np.ones(2 * (len(y) // 60) + 1)
    known = np.isfinite(y)
    sums = np.convolve(np.where(known, y, 0), window, "same")
    counts = np.convolve(known.astype(float), window, "same")
    return np.where(known, sums / np.maximum(counts, 1), np.nan).tolist()


def _updates(runs: Sequence[Run]) -> dict[int, list[dict[str, Any]]]:
    return {number: run.updates for number, run in enumerate(runs)}


def _with_data(panels) -> list[Panel]:
    return [panel for panel in panels if panel.curves]


def _last(lines: list[dict[str, Any]], name: str) -> float | None:
    """What the last of the lines that have it tells under `name`; None where it is no number."""
    values = [line[name] for line in lines if not math.isnan(line.get(name, math.nan))]
    return values[-1] if values else None


def _unit(runs: Sequence[Run], name: str) -> str:
    """`, nats`: in what the runs that have this loss measure it; nothing where they differ."""
    words = {getattr(r.config.recipe, name) for r in runs if any(name in u for u in r.updates)}
    units = {UNITS[word] for word in words}
    if len(units) != 1:
        return ""
    per_element = " an element" if name == "attention_loss" and units == {"nats"} else ""
    return f", {units.pop()}{per_element}"
