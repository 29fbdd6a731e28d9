"""Attention maps of teacher and student side by side, and how near their layers are."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minibert.errors import InputError
from minibert.pictures.compared import Nearness, Pair, Tokens, attention_maps, nearness, sentence
from minibert.pictures.drawing import COLOURS, WIDTH, Picture, shortened, styled, to_png

SIDE = (1.2, 4.0)  # inches of a map, at least and at most
SIDE_OF_FOUR = 2.1  # up to that, the maps of two layers stand side by side
INCHES_A_TOKEN = 0.09  # that a name can be read in
MOST_NAMES = 64  # along a side; of more tokens every second, third, ... is named


def draw_maps(
    teacher: Tensor, student: Tensor, layers: Sequence[int], words: Sequence[str]
) -> bytes:
    """For each student layer the map of the teacher's layer that it follows, and its own.

    teacher, student: (L, S, S), rows are queries; words: the S tokens. One scale of colour for all.
    """
    side = min(max(SIDE[0], INCHES_A_TOKEN * len(words)), SIDE[1])
    scale = PowerNorm(0.5, vmin=0, vmax=max(teacher.max().item(), student.max().item()))
    across = min(2 if side <= SIDE_OF_FOUR else 1, len(layers))
    down = -(-len(layers) // across)
    with styled():
        height = (side + 0.25) * down + 1.6
        width = min(WIDTH, across * (2 * side + 0.7) + 0.8)
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(down, 2 * across, squeeze=False)
        pairs = grid.reshape(-1, 2)  # in the order in which one reads
        for number, (pair, layer) in enumerate(zip(pairs, layers, strict=False)):
            titles = (f"teacher, layer {layer}", f"student, layer {number}")
            for axes, values, title in zip(pair, (teacher, student), titles, strict=True):
                image = axes.imshow(values[number].numpy(), norm=scale, cmap="magma_r")
                axes.set_title(title)
                _name_tokens(axes, words, side, last=number + across >= len(layers))
            pair[1].set_yticklabels([])
        for axes in pairs[len(layers) :].flat:
            axes.set_axis_off()
        gap = min(0.02, 0.3 / height)
        look = {"location": "top", "shrink": 0.6, "aspect": 45, "pad": gap}
        bar = figure.colorbar(image, ax=grid, ticks=MaxNLocator(4), **look)
        bar.set_label("attention from the token of a row to that of a column")
        bar.outline.set_visible(False)
        return to_png(figure)


def _name_tokens(axes: Axes, words: Sequence[str], side: float, last: bool) -> None:
    """Tokens along the left of each map, and below the lowest."""
    every = -(-len(words) // MOST_NAMES)
    places = range(0, len(words), every)
    names = [shortened(words[place]) for place in places]
    size = min(8.0, 0.85 * 72 * side * every / len(words))
    axes.set_yticks(places, names, fontsize=size)
    axes.set_xticks(places, names if last else [""] * len(names), fontsize=size, rotation=90)
    axes.tick_params(length=0, pad=2)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def draw_nearness(before: Nearness | None, after: Nearness, layers: Sequence[int]) -> bytes:
    """Cosine of hidden states and KL of attention maps, layer by layer, before and after."""
    panels = {
        "cosine of hidden states": [each and each.cosine for each in (before, after)],
        "KL of attention maps, nats a row": [
            each and each.attention_kl for each in (before, after)
        ],
    }
    panels = {title: curves for title, curves in panels.items() if curves[1]}
    looks = ({"color": COLOURS[4], "marker": "s"}, {"color": COLOURS[0], "marker": "o"})
    with styled():
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        grid = figure.subplots(1, 2)
        for axes, (title, curves) in zip(grid, panels.items(), strict=False):
            for curve, look in zip(curves, looks, strict=True):
                if curve:
                    axes.plot(range(len(layers)), curve, markersize=5, linewidth=1.6, **look)
            axes.set_title(title)
            axes.set_xlabel("layer of the student ← of the teacher")
            names = [f"{i} ← {j}" for i, j in enumerate(layers)]
            axes.set_xticks(range(len(layers)), names)
            axes.margins(x=0.08)
            if "KL" in title:
                axes.set_ylim(bottom=0)
        for axes in grid[len(panels) :]:
            axes.remove()
        handles = [Line2D([], [], **look) for look in looks]
        told = zip(handles, ("student before the first update", "trained student"), strict=True)
        told = list(told)[0 if before else 1 :]
        figure.legend(*zip(*told, strict=True), loc="outside upper left", ncols=2)
        return to_png(figure)


def pictures_of_pair(
    pair: Pair, text: str, head: int | None = None, documents: Sequence[Tokens] | None = None
) -> list[Picture]:
    """The maps of a text, and how near the layers are over `documents`, or over the text.

    head: that one alone; None: the mean over all.
    """
    tokens, words = sentence(pair, text)
    models = {"teacher": (pair.teacher, pair.layers), "student": (pair.after, None)}
    maps = [
        of_heads(attention_maps(model, tokens, layers or range(len(pair.layers))), head, who)
        for who, (model, layers) in models.items()
    ]
    shown = "mean over heads" if head is None else f"head {head}"
    alt = f"Maps of {len(pair.layers)} layers, the teacher's and the student's side by side."
    pictures = [
        Picture(
            "attention_maps.png", f"Attention maps, {shown}", alt, f"Text: {text}",
            draw_maps(*maps, pair.layers, words),
        ),
        _nearness_picture(pair, documents or [tokens], of_text=not documents),
    ]  # fmt: skip
    return [picture for picture in pictures if picture is not None]


def of_heads(maps: Tensor, head: int | None, who: str) -> Tensor:
    """maps (L, N, S, S) to those of one head, or their mean, (L, S, S)."""
    if head is None:
        return maps.mean(dim=1)
    if head >= maps.shape[1]:
        raise InputError(f"--head {head}: the {who} has {maps.shape[1]} heads, counted from 0")
    return maps[:, head]


def _nearness_picture(pair: Pair, batches: Sequence[Tokens], of_text: bool) -> Picture | None:
    """Before and after, and their figures in the alternative text."""
    after = nearness(pair.after, pair.teacher, pair.layers, batches)
    before = None
    if pair.before is not None:
        before = nearness(pair.before, pair.teacher, pair.layers, batches)
    if after.cosine is None and after.attention_kl is None:
        return None
    over = "the text" if of_text else f"{sum(len(ids) for ids, _ in batches):,} held-out documents"
    note = f"Means over the {after.num_tokens:,} tokens of {over}; layers are counted from 0."
    figures = {"before": before, "after": after}
    alt = "; ".join(
        f"{name} {when}: {', '.join(f'{value:.3f}' for value in values)}"
        for when, each in figures.items()
        if each is not None
        for name, values in (("cosine", each.cosine), ("KL in nats", each.attention_kl))
        if values
    )
    png = draw_nearness(before, after, pair.layers)
    title = "How near each layer is to its teacher's"
    return Picture("nearness.png", title, f"{title}: {alt}.", note, png)
