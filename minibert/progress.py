"""One line of progress on standard error, for people who wait."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 20  # where a line cannot be rewritten in place


class ProgressLine:
    """A line that is rewritten in place on a terminal, and repeated now and then elsewhere."""

    def __init__(self):
        self.in_place = sys.stderr.isatty()
        self.width = 0  # of what stands in the line now
        self.shown_at = time.monotonic()  # a short wait needs no line

    def show(self, text: str) -> None:
        """Show `text`, unless the line was shown just before."""
        pause = 0.2 if self.in_place else SECONDS_BETWEEN_LINES
        if time.monotonic() - self.shown_at < pause:
            return
        self.shown_at = time.monotonic()
        if self.in_place:
            _print(f"\r{text:<{self.width}}", end="")
            self.width = len(text)
        else:
            _print(text)

    def clear(self) -> None:
        """Leave the terminal's line empty for what is printed next."""
        if self.width:
            _print(f"\r{'':<{self.width}}\r", end="")
            self.width = 0


def _print(text: str, end: str = "\n") -> None:
    """Nobody may be there to read it: no reason to end what is being done."""
    with suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


def counted(items: Sequence[Item], what: str, quiet: bool = False) -> Iterator[Item]:
    """The items themselves, counted on a progress line while they are used."""
    line = ProgressLine()
    for number, item in enumerate(items, start=1):
        if not quiet:
            line.show(f"{what} {number}/{len(items)}")
        yield item
    line.clear()


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
