"""Curves on paper: one style, one colour a run, one way from a figure to a PNG.

Only this file and `maps.py` need matplotlib (the extra `report`). Figures are made without pyplot:
nothing is left open, and no display is needed.
"""

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from minibert.pictures.series import FEW, Curve, LayerPanel, Panel, trend

# Okabe & Ito, "Color Universal Design" (2008): told apart by all eyes. Their yellow is too pale for
# lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))  # of the runs beyond seven
GREY = "#777777"
WIDTH = 9.0  # inches: a README shows some 830 pixels, so that 10 points are 13 of them
DPI = 160
LONGEST_LABEL = 48  # letters in a picture; the page has them all
STYLE = {
    "font.family": "DejaVu Sans",  # which matplotlib brings along
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelcolor": "#444444",
    "axes.labelsize": 9,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar in a folder's name is a dollar
}


class Picture(NamedTuple):
    """A PNG and what is said of it."""

    name: str  # of the file
    title: str
    alt: str  # what it shows, for who cannot see it
    note: str  # below it
    png: bytes


@contextmanager
def styled() -> Iterator[None]:
    """Figures in here look the same whatever the user's matplotlib is set to.

    A letter that the font lacks is a box, and no reason to warn.
    """
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def to_png(figure: Figure) -> bytes:
    """The picture as the bytes of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def draw_panels(
    panels: Sequence[Panel],
    labels: Sequence[str],
    columns: int,
    x_label: str,
    x_unit: float = 1.0,
    marks: dict[int, list[int]] | None = None,
) -> bytes:
    """Panels side by side, the runs of all of them named once, at the top.

    x_unit: what a 1 on the axis stands for; marks: by number of the run, where a cross stands at
    the foot of each panel (updates passed over).
    """
    with styled():
        rows = -(-len(panels) // columns)
        lines = -(-(len(labels) + 2) // _names_in_a_line(list(map(shortened, labels))))
        figure = Figure(figsize=(WIDTH, 2.35 * rows + 0.25 * lines))
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
        for place, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, place)
            for number, curve in panel.curves.items():
                draw_curve(axes, curve, panel.noisy, x_unit, **colour_of(number))
                if steps := (marks or {}).get(number):
                    _draw_marks(axes, steps, colour_of(number)["color"])
            for level in panel.teacher:
                axes.axhline(level, color=GREY, linestyle="--", linewidth=1)
            finish(axes, panel.title, x_label if place > len(panels) - columns else "")
            if panel.logarithmic:
                _make_logarithmic(axes)
        _name_runs(figure, panels, labels, marks)
        return to_png(figure)


def draw_layer_panels(rows: Sequence[Sequence[LayerPanel]], labels: Sequence[str]) -> bytes:
    """A row of panels a run, hidden states and attention maps; layers from light to dark."""
    with styled():
        figure = Figure(figsize=(WIDTH, 2.7 * len(rows)))
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
        strips = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for strip, row in zip(strips, rows, strict=True):
            strip.suptitle(shortened(labels[row[0].run]), x=0.01, ha="left", fontsize=11)
            shades = shades_of(dict.fromkeys(level for panel in row for level in panel.curves))
            for panel, axes in zip(row, strip.subplots(1, len(row), squeeze=False)[0], strict=True):
                for level, curve in panel.curves.items():
                    draw_curve(axes, curve, noisy=True, color=shades[level])
                finish(axes, panel.title, "updates")
            handles = [Line2D([], [], color=shade) for shade in shades.values()]
            title = "student's layer\n← teacher's"
            strip.legend(
                handles, shades, loc="outside right upper", title=title, fontsize=9,
                title_fontsize=9, alignment="left",
            )  # fmt: skip
        return to_png(figure)


def shades_of(levels: Iterable[str]) -> dict[str, Any]:
    """A colour for each level, from the first, light, to the last, dark."""
    levels = list(levels)
    places = [0.1 + 0.9 * place / max(1, len(levels) - 1) for place in range(len(levels))]
    return dict(zip(levels, matplotlib.colormaps["viridis_r"](places), strict=True))


def draw_curve(axes: Axes, curve: Curve, noisy: bool, x_unit: float = 1.0, **look: Any) -> None:
    """The points as they were logged; many noisy ones pale, with their trend in bold."""
    x = [value / x_unit for value in curve.x]
    if not noisy or len(x) <= FEW:
        size = 2.6 if len(x) <= FEW else 0.8  # a point between two gaps has no line
        axes.plot(x, curve.y, marker="o", markersize=size, linewidth=1.3, **look)
        return
    pale = look | {"alpha": 0.3, "zorder": 2}
    axes.plot(x, curve.y, marker=".", markersize=0.8, linewidth=0.6, **pale)
    axes.plot(x, trend(curve.y), linewidth=1.6, zorder=3, **look)  # above all pale ones


def colour_of(number: int) -> dict[str, Any]:
    """Of a run, the same in every panel."""
    dashes = DASHES[number // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes}


def finish(axes: Axes, title: str, x_label: str) -> None:
    """Title, ticks that can be read, room between them."""
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_number))
    if axes.get_xlim()[1] < 1:  # a run at its very beginning
        axes.set_xlim(-0.05, 1)


def shortened(label: str) -> str:
    """A long label with its middle left out."""
    half = LONGEST_LABEL // 2 - 1
    return label if len(label) <= LONGEST_LABEL else f"{label[:half]} … {label[-half:]}"


def _number(value: float, _place: int = 0) -> str:
    """As short as it is, with commas: never a factor that stands elsewhere."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _make_logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_marks(axes: Axes, steps: Sequence[int], colour: str) -> None:
    foot = axes.get_xaxis_transform()  # steps from left to right, the panel's height upwards
    axes.plot(
        steps, [0.03] * len(steps), "x", color=colour, transform=foot, markersize=5, clip_on=False
    )


def _name_runs(
    figure: Figure,
    panels: Sequence[Panel],
    labels: Sequence[str],
    marks: dict[int, list[int]] | None,
) -> None:
    """The legend: the runs that are drawn, the teacher, the crosses."""
    drawn = sorted({number for panel in panels for number in panel.curves})
    entries = [(Line2D([], [], **colour_of(n)), shortened(labels[n])) for n in drawn]
    if any(panel.teacher for panel in panels):
        entries.append((Line2D([], [], color=GREY, linestyle="--"), "teacher"))
    if any((marks or {}).values()):
        cross = Line2D([], [], color="#444444", marker="x", linestyle="none")
        entries.append((cross, "updates passed over"))
    # Names are put in afterwards: one that begins with _ would be no entry.
    legend = figure.legend(
        [handle for handle, _ in entries], ["run"] * len(entries), loc="outside upper left",
        ncols=min(len(entries), _names_in_a_line([label for _, label in entries])),
    )  # fmt: skip
    for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(label)


def _names_in_a_line(names: Sequence[str]) -> int:
    """How many find room side by side: 0.09 inches a letter, the longest counts for all."""
    return max(1, int(WIDTH / (0.09 * max(map(len, names)) + 0.9)))
