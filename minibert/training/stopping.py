"""Reasons to end a run before its last update: a signal, or its time is up."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

SIGNALS = tuple(  # Ctrl-C, a queue's or a system's request, a closed terminal
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class StopRequest:
    """Within this, signals are noted, so that the update at hand can be finished and saved.

    A second Ctrl-C ends at once, by KeyboardInterrupt. A signal that was ignored stays so (`nohup`
    ignores SIGHUP).
    """

    def __init__(self, max_hours: float | None):
        self.began, self.max_hours = time.monotonic(), max_hours
        self.signal: int | None = None
        self.handlers = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        name = signal.Signals(number).name
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{name}: after this update the run is saved and ends{again}\n".encode())

    def is_made(self) -> bool:
        """Whether it is time to save and end."""
        return self.signal is not None or self.is_time_up()

    def is_time_up(self) -> bool:
        """Whether the run has had its hours."""
        spent = time.monotonic() - self.began
        return self.max_hours is not None and spent >= self.max_hours * 3600

    def status(self) -> int:
        """The exit status: 128 + the signal's number, as shells have it; 0 when time is up."""
        return 0 if self.signal is None else 128 + self.signal
