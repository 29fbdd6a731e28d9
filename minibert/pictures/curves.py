"""The pictures of what runs have logged: which panels, and what is said of each."""

from collections.abc import Sequence

from minibert.pictures.drawing import Picture, draw_layer_panels, draw_panels
from minibert.pictures.runs import Run
from minibert.pictures.series import (
    FEW,
    Panel,
    held_out_panels,
    layer_panels,
    loss_panels,
    passed_over,
    update_panels,
)

UNITS_OF_TIME = {"seconds": 1, "minutes": 60, "hours": 3600}


def pictures_of_runs(runs: Sequence[Run]) -> list[Picture]:
    """One PNG a picture; a picture that no run has data for is left out."""
    pictures = [losses(runs), losses_by_layer(runs), updates(runs)]
    pictures += [held_out_by_updates(runs), held_out_by_time(runs)]
    return [picture for picture in pictures if picture is not None]


def losses(runs: Sequence[Run]) -> Picture | None:
    """The loss and each of its terms."""
    note = (
        "Hidden-state and attention loss are sums over layers, "
        "of means over tokens and over the elements of the maps."
    )
    return _of_updates(runs, "losses", "Losses", loss_panels(runs), note)


def updates(runs: Sequence[Run]) -> Picture | None:
    """How fast, and in what steps."""
    return _of_updates(runs, "updates", "Updates", update_panels(runs))


def _of_updates(
    runs: Sequence[Run], name: str, title: str, panels: Sequence[Panel], note: str = ""
) -> Picture | None:
    """Panels against updates, three in a row."""
    if not panels:
        return None
    labels = [run.label for run in runs]
    marks = {number: passed_over(run) for number, run in enumerate(runs)}
    png = draw_panels(panels, labels, 3, "updates", marks=marks)
    alt = _alt(panels, "updates", labels)
    return Picture(f"{name}.png", title, alt, f"{note} {_pale(runs)}".strip(), png)


def losses_by_layer(runs: Sequence[Run]) -> Picture | None:
    """The parts of the losses that are sums over layers."""
    rows = layer_panels(runs)
    if not rows:
        return None
    labels = [run.label for run in runs]
    alt = "A curve for each layer against updates, of: " + "; ".join(
        f"{labels[panel.run]}: {panel.title}" for row in rows for panel in row
    )
    note = "Layers are counted from 0: the student's ← the teacher's that it follows. "
    png = draw_layer_panels(rows, labels)
    return Picture("losses_by_layer.png", "Losses by layer", alt, note + _pale(runs), png)


def held_out_by_updates(runs: Sequence[Run]) -> Picture | None:
    """What the evaluations found."""
    panels, labels = held_out_panels(runs), [run.label for run in runs]
    if not panels:
        return None
    png = draw_panels(panels, labels, 2, "updates")
    title = "Held-out documents, by updates"
    return Picture("held_out_by_updates.png", title, _alt(panels, "updates", labels), "", png)


def held_out_by_time(runs: Sequence[Run]) -> Picture | None:
    """The same against the time that updates took; evaluations and checkpoints take none."""
    panels, labels = held_out_panels(runs, "seconds"), [run.label for run in runs]
    if not panels:
        return None
    word = time_unit(max(x for panel in panels for curve in panel.curves.values() for x in curve.x))
    png = draw_panels(panels, labels, 2, f"{word} of updates", UNITS_OF_TIME[word])
    drawn = {number for panel in panels for number in panel.curves}
    note = "Time is that of updates alone: evaluations and checkpoints are left out."
    if missing := [label for number, label in enumerate(labels) if number not in drawn]:
        note += f" Not here, since its log tells no seconds: {', '.join(missing)}."
    alt = _alt(panels, f"{word} of updates", labels)
    return Picture("held_out_by_time.png", "Held-out documents, by time", alt, note, png)


def time_unit(seconds: float) -> str:
    """In what a time is told, so that its number is of few digits."""
    return "seconds" if seconds <= 300 else "minutes" if seconds <= 18_000 else "hours"


def _alt(panels: Sequence[Panel], against: str, labels: Sequence[str]) -> str:
    titles = "; ".join(panel.title for panel in panels)
    drawn = sorted({number for panel in panels for number in panel.curves})
    return f"Curves against {against} of: {titles}. Runs: {', '.join(labels[n] for n in drawn)}."


def _pale(runs: Sequence[Run]) -> str:
    """What is told of the two lines of a long curve."""
    if max(len(run.updates) for run in runs) <= FEW:
        return ""
    return "Pale: as logged; bold: the mean over a thirtieth of the curve around each point."
