"""docs/walkthrough.md prints what it says it prints.

python tests/test_walkthrough.py        writes the printed text into the page anew
"""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "walkthrough.md"
BLOCK = re.compile(r"```(python|text)\n(.*?)```", flags=re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def printed_by(page: str) -> list[str]:
    """What each block of Python prints that has a block of text behind it."""
    printed, namespace = [], {}
    output = ""
    for kind, content in BLOCK.findall(page):
        if kind == "text":
            printed.append(output)
            continue
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(compile(content, "walkthrough.md", "exec"), namespace)
        output = stream.getvalue()
    return printed


def quoted_in(page: str) -> list[str]:
    return [content for kind, content in BLOCK.findall(page) if kind == "text"]


def test_the_page_prints_what_it_says():
    """Words and whole numbers exactly; of others the last digit may differ between machines."""
    page = PAGE.read_text()
    quoted, printed = quoted_in(page), printed_by(page)
    assert len(quoted) == len(printed) >= 14
    for said, done in zip(quoted, printed, strict=True):
        assert NUMBER.sub("#", said) == NUMBER.sub("#", done)
        there, here = NUMBER.findall(said), NUMBER.findall(done)
        for one, other in zip(there, here, strict=True):
            last_digit = 10.0 ** -len(one.split("e")[0].split(".")[1])
            assert float(other) == pytest.approx(float(one), abs=2 * last_digit), (said, done)


def test_what_is_worked_out_by_hand_is_what_the_code_computes():
    """Where the page sets two numbers side by side, they are one number."""
    pairs = re.findall(r"by hand (\S+) +(?:autograd|logged|update) (\S+)", PAGE.read_text())
    pairs = [pair for pair in pairs if NUMBER.fullmatch(pair[0])]
    assert len(pairs) == 3
    assert all(one == other for one, other in pairs)
    losses = re.findall(r"^loss ([\d.]+)$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(losses) == 2 and losses[0] == losses[1]


if __name__ == "__main__":
    page = PAGE.read_text()
    printed = iter(printed_by(page))
    renew = lambda m: m[0] if m[1] == "python" else f"```text\n{next(printed)}```"  # noqa: E731
    PAGE.write_text(BLOCK.sub(renew, page))
