"""Work that is done once, by whoever comes first, and gone on with after a stop."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from minibert.errors import Stopped
from minibert.files import InUse, locked


class Job(NamedTuple):
    """Something to be made from `source`; it is done when `result` is there."""

    title: str
    source: Path
    result: Path
    lock: Path
    make: Callable[[float | None], None]  # is given the hours that are left, None: any


def do_what_is_left(jobs: Iterable[Job], minutes: float | None) -> None:
    """Make what is not there, in order, until the minutes are over.

    Passed over is what is done, what another process is at, and what has no source yet. `make` may
    end early by `Stopped` with status 0, as train.py's runs do when their time is up.
    """
    began = time.monotonic()
    for job in jobs:
        if job.result.exists() or not job.source.exists():
            continue
        left = None if minutes is None else minutes / 60 - (time.monotonic() - began) / 3600
        if left is not None and left <= 0:
            return
        job.result.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(job.lock):
                if not job.result.exists():
                    print(job.title, flush=True)
                    job.make(left)
        except InUse:
            continue
        except Stopped as stopped:
            if stopped.status != 0:
                raise
            return
