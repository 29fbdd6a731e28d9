"""Pictures of a study: how the student nears its teacher, and what each part is worth."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from study import FIGURES

from minibert.files import atomic_file
from minibert.pictures.drawing import COLOURS, WIDTH, finish, styled, to_png

CURVES = ("compactbiobert", "last-layers", "distilbiobert", "mlm")
KL, AGREEMENT = FIGURES.index("teacher_kl"), FIGURES.index("teacher_agreement")
SHOWN = {KL: (0, 1), AGREEMENT: (0.7, 1)}  # the last six layers begin outside
KL_TICKS = (0.1, 0.2, 0.5, 1, 2, 5)


def draw(study: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Draw all of them; yields the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (("study.png", curves), ("variants.png", variants)):
        with styled():
            png = to_png(picture(study))
        with atomic_file(folder / name) as partial:
            partial.write_bytes(png)
        yield folder / name


def curves(study: dict[str, Any]) -> Figure:
    """Held-out KL and agreement against updates, KL against seconds; mean and range of seeds."""
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    by_step, agreement, by_time = figure.subplots(1, 3)
    panels = (
        (by_step, 0, KL, "KL to teacher, nats", "updates"),
        (agreement, 0, AGREEMENT, "agreement with teacher", "updates"),
        (by_time, 1, KL, "KL to teacher, nats", "seconds of updates"),
    )
    for axes, across, number, title, label in panels:
        for name, colour in zip(CURVES, COLOURS, strict=False):
            runs = [run["curve"] for run in study["runs"][name]["seeds"].values()]
            draw_seeds(axes, runs, across, 2 + number, colour, title_of(study, name))
        axes.set_ylim(*SHOWN[number])
        finish(axes, title, label)
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def draw_seeds(
    axes: Axes, runs: Sequence[list], across: int, up: int, colour: str, label: str
) -> None:
    """One line for the seeds' mean, a shade from their least to their greatest.

    Of seconds the least of the seeds: other work on the machine only ever adds to them.
    """
    points = list(zip(*runs, strict=True))  # one for each evaluation: its seeds
    x = [min(point[across] for point in seeds) for seeds in points]
    y = [[point[up] for point in seeds] for seeds in points]
    axes.plot(x, [mean(values) for values in y], color=colour, label=label, marker="o", ms=3)
    axes.fill_between(x, [*map(min, y)], [*map(max, y)], color=colour, alpha=0.3, lw=0)


def variants(study: dict[str, Any]) -> Figure:
    """Each seed's last held-out KL as a dot, a row a variant, the nearest at the top."""
    last = {
        name: [run["final"][KL] for run in entry["seeds"].values()]
        for name, entry in study["runs"].items()
    }
    names = sorted(last, key=lambda name: -mean(last[name]))
    figure = Figure(figsize=(WIDTH, 0.27 * len(names) + 0.8), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        colour = COLOURS[name != CURVES[0]]
        axes.plot(last[name], [row] * len(last[name]), "o", color=colour, ms=5, alpha=0.7)
    axes.axvline(mean(last[CURVES[0]]), color=COLOURS[0], lw=0.8, ls=":")
    axes.set_xscale("log")
    finish(axes, "held-out KL to teacher after the last update, nats; a dot a seed", "")
    axes.xaxis.set_major_locator(FixedLocator(KL_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(names)), [title_of(study, name) for name in names])
    return figure


def title_of(study: dict[str, Any], name: str) -> str:
    """A variant's title without Markdown."""
    return study["runs"][name]["title"].replace("`", "")
