"""The report as one HTML page that needs nothing beside it.

Its policy allows this style alone, pictures that it holds itself, no script and no request to
anywhere: nothing in a folder's name or in a text can do more than be read.
"""

import base64
import hashlib
import html
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from minibert.pictures.drawing import Picture
from minibert.pictures.runs import printable


def report_page(
    title: str,
    labels: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    pictures: Sequence[Picture],
    versions: Mapping[str, str],
) -> str:
    """The page, as text. labels, rows: the table of runs, a column each; none: no table."""
    folder = Path(__file__).parent
    style = (folder / "page.css").read_text(encoding="utf-8")
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=_escaped(title),
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        table=_table(labels, rows) if labels else "",
        pictures="\n".join(map(_figure, pictures)),
        versions=_escaped(", ".join(f"{name} {version}" for name, version in versions.items())),
    )


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _table(labels: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A column a run."""
    head = "".join(f'<th scope="col">{_escaped(label)}</th>' for label in labels)
    body = "\n".join(
        f'<tr><th scope="row">{_escaped(title)}</th>'
        + "".join(f"<td>{_escaped(cell)}</td>" for cell in cells)
        + "</tr>"
        for title, cells in rows.items()
    )
    return (
        '<div class="wide" role="region" aria-label="Runs" tabindex="0"><table>\n'
        f'<thead><tr><th scope="col">run</th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )


def _figure(picture: Picture) -> str:
    """A picture with its title above and its note below."""
    width, height = png_size(picture.png)
    title = _escaped(picture.title)
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure>\n<h2>{title}</h2>\n<div class="wide" role="region" aria-label="{title}" '
        f'tabindex="0"><img alt="{_escaped(picture.alt)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption><p>{_escaped(picture.note)}</p></figcaption>\n</figure>"
    )


def png_size(png: bytes) -> tuple[int, int]:
    """Pixels of width and height, from the header (PNG specification, 11.2.2 IHDR)."""
    return struct.unpack(">II", png[16:24])
