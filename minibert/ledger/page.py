"""The annotated source: one HTML file in which each line of ours says what it ran.

The page is page.html with page.css, page.js and the data of one ledger put into it. Its policy
allows this script and this style alone and no request to anywhere, so that nothing in a file's
name or in a line of source can do more than be read.
"""

import base64
import hashlib
import html
import io
import json
import keyword
import math
import tokenize
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

from minibert.ledger.precision import LineError, PrecisionLedger, worst_lines
from minibert.ledger.record import PHASES, ROOT, Ledger, Operation, TensorKind
from minibert.ledger.table import kind_of, unit, whole

FIRST = (  # in README's order; the others follow by name
    "train.py",
    "minibert/model.py",
    "minibert/ops/plain.py",
    "minibert/ops/fused.py",
    "minibert/ops/attention.py",
    "minibert/ops/dropout.py",
    "minibert/ops/vocabulary.py",
    "minibert/ops/hidden_states.py",
    "minibert/ops/tiles.py",
    "minibert/ops/feed_forward.py",
    "minibert/ops/frozen.py",
    "minibert/ops/projections.py",
    "minibert/ops/kernels/attention_maps.py",
    "minibert/ops/kernels/attention_forward.py",
    "minibert/ops/kernels/attention_gradients.py",
    "minibert/ops/kernels/attention_tiles.py",
    "minibert/ops/kernels/norm_rows.py",
    "minibert/ops/kernels/loss_rows.py",
    "minibert/ops/kernels/draws.py",
    "minibert/student.py",
)
SHAPES_TOLD = 4  # of one kind of tensor after the other; AdamW is given hundreds
WORST_SHOWN = 10


def annotated_source(ledger: Ledger, title: str, versions: dict[str, str]) -> str:
    """The page, as text. title: what was recorded; versions: of what it was recorded with."""
    folder = Path(__file__).parent
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")
    lines = sorted({line for operation in ledger.operations for line in operation.lines})
    numbers: dict[str, set[int]] = {}
    for name, number in lines:
        numbers.setdefault(name, set()).add(number)
    files = sorted(numbers, key=lambda name: (FIRST.index(name) if name in FIRST else 99, name))
    data = json.dumps(_data(ledger), allow_nan=False, separators=(",", ":"))
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        versions=html.escape(", ".join(f"{name} {version}" for name, version in versions.items())),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=data.replace("<", "\\u003c"),  # so that nothing in it ends the element
        files="\n".join(_file(name, numbers[name]) for name in files),
    )


def _hash(text: str) -> str:
    """As a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _file(name: str, ran: set[int]) -> str:
    """A file of ours, a row a line; the script puts the figures in."""
    rows = []
    source = (ROOT / name).read_text(encoding="utf-8")
    for number, line in enumerate(highlighted(source), start=1):
        place = f"{name}:{number}"
        if number in ran:
            label = f'<button type="button" tabindex="-1" aria-expanded="false">{number}</button>'
            row = f'<tr role="row" class="ran" id="{html.escape(place)}">'
        else:
            label, row = str(number), '<tr role="row">'
        rows.append(
            f'{row}<th role="rowheader" scope="row">{label}</th>'
            f'<td role="cell" class="source"><code>{line}</code></td></tr>'
        )
    escaped = html.escape(name)
    return (
        f'<section class="file" data-file="{escaped}"><h3 id="file:{escaped}">{escaped}</h3>\n'
        f'<table role="table" class="lines" aria-label="{escaped}"><tbody role="rowgroup">\n'
        + "\n".join(rows)
        + "\n</tbody></table></section>"
    )


def highlighted(source: str) -> list[str]:
    """The lines as HTML: comments and texts, other strings, keywords marked; all else as it is."""
    lines = source.split("\n")
    marks: list[list[tuple[int, int, str]]] = [[] for _ in lines]  # from, to, class
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = _class_of(token)
        (first, start), (last, end) = token.start, token.end
        for number in range(first, last + 1) if kind else ():
            line = lines[number - 1]
            begins = start if number == first else len(line) - len(line.lstrip())
            marks[number - 1].append((begins, end if number == last else len(line), kind))
    told = [_marked(line, spans) for line, spans in zip(lines, marks, strict=True)]
    return told[:-1] if lines[-1] == "" else told


def _class_of(token: tokenize.TokenInfo) -> str:
    """The class of a token: c (comment or docstring), s (string), k (keyword), or ""."""
    if token.type == tokenize.COMMENT:
        return "c"
    if token.type == tokenize.STRING:
        return "c" if '"""' in token.string[:5] else "s"
    is_word = token.type == tokenize.NAME and keyword.iskeyword(token.string)
    return "k" if is_word else ""


def _marked(line: str, spans: list[tuple[int, int, str]]) -> str:
    """A line with its spans as elements."""
    parts, here = [], 0
    for begins, ends, kind in spans:
        marked = html.escape(line[begins:ends], quote=False)
        parts += [html.escape(line[here:begins], quote=False), f'<i class="{kind}">{marked}</i>']
        here = ends
    return "".join(parts) + html.escape(line[here:], quote=False)


class _Numbered:
    """Things by number, each once, so that a row of data names them shortly."""

    def __init__(self):
        self.numbers: dict[Any, int] = {}

    def __getitem__(self, thing: Any) -> int:
        return self.numbers.setdefault(thing, len(self.numbers))

    def __iter__(self):
        return iter(self.numbers)


def _data(ledger: Ledger) -> dict[str, Any]:
    """What the script reads: rows of identical operations, and the names that they refer to."""
    step = whole(ledger.operations)
    texts, stacks = _Numbered(), _Numbered()
    errors = ledger.errors if isinstance(ledger, PrecisionLedger) else {}
    phases = [p for p in PHASES if any(o.phase == p for o in ledger.operations)]
    groups: dict[tuple, list[Operation]] = {}
    for operation in ledger.operations:
        groups.setdefault(_identity(operation), []).append(operation)
    rows = []
    for same in groups.values():
        one, found = same[0], [errors[o.number] for o in same if o.number in errors]
        names = (one.module, kind_of(one), one.function, one.name.removeprefix("aten."))
        ends = (shapes(one.inputs), dtypes(one.inputs), shapes(one.outputs), dtypes(one.outputs))
        rows.append([
            one.number, len(same), phases.index(one.phase), stacks[one.lines],
            *(texts[text] for text in names + ends),
            one.flops, one.bytes_read + one.bytes_written, one.saved_bytes,
            sum(o.seconds for o in same) if step.seconds is not None else None,
            _finite(max((error.relative for error in found), default=None)),
            _finite(max((error.largest for error in found), default=None)),
        ])  # fmt: skip
    return {
        "phases": phases,
        "texts": list(texts),
        "stacks": [[f"{name}:{number}" for name, number in stack] for stack in stacks],
        "rows": rows,
        "units": {
            "flops": unit(step.flops, "FLOP"),
            "bytes": unit(step.bytes_moved, "B"),
            "kept": unit(step.saved_bytes, "B"),
        },
        "timed": step.seconds is not None,
        "precision": isinstance(ledger, PrecisionLedger),
        "worst": [_worst(each) for each in worst_lines(ledger, WORST_SHOWN)] if errors else [],
    }


def _identity(operation: Operation) -> tuple:
    """Operations that differ in number, time and error alone are one row."""
    o = operation
    asked = (o.phase, o.module, o.function, o.lines)
    done = (o.name, o.inputs, o.outputs)
    return (*asked, *done, o.flops, o.bytes_read, o.bytes_written, o.saved_bytes)


def _worst(each: LineError) -> dict[str, Any]:
    return {
        "line": f"{each.line[0]}:{each.line[1]}",
        "name": each.operation.name.removeprefix("aten."),
        "phase": each.operation.phase,
        "module": each.operation.module,
        "shapes": f"{shapes(each.operation.inputs)} → {shapes(each.operation.outputs)}",
        "relative": _finite(each.error.relative),
        "largest": _finite(each.error.largest),
    }


def _finite(value: float | None) -> float | str | None:
    """JSON has no infinity: a text in its place."""
    return value if value is None or math.isfinite(value) else "infinite"


def shapes(kinds: Iterable[TensorKind]) -> str:
    """`(768,) (32, 768)`; of many tensors the first shapes, and how many tensors there are."""
    told = [str(shape) for shape, _ in kinds]
    if len(told) <= SHAPES_TOLD:
        return " ".join(told)
    return f"{' '.join(told[: SHAPES_TOLD - 1])} … {len(told)} tensors"


def dtypes(kinds: Iterable[TensorKind]) -> str:
    """Each dtype once."""
    return ", ".join(dict.fromkeys(dtype for _, dtype in kinds))
