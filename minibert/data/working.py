"""The working folder beside a corpus in the making: finished shards, which outlive a stopped run.

CORPUS.shards/
  lock              held by the process that works here
  3f2a9c0154d2e7b8/ the shard of an input file, named by the file's path
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minibert.data.shards import META
from minibert.errors import InputError
from minibert.files import locked

LOCK = "lock"


@contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """The working folder for `out`, locked; afterwards it is gone, unless it holds finished shards
    of a corpus that does not stand yet.

    Raises InputError where another process works there, where it is somebody else's, or where `out`
    has something in it before there are any shards.
    """
    working = out.with_name(out.name + ".shards")
    if working.exists() and any(working.iterdir()) and not (working / LOCK).is_file():
        raise InputError(f"{working}: not made here; move it away, or choose another --out")
    new = [folder for folder in (working, *working.parents) if not folder.exists()]
    try:
        working.mkdir(parents=True, exist_ok=True)
        with locked(working / LOCK):
            try:
                if working in new:
                    refuse_full(out)
                shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
                _remove_unfinished(working)
                yield working
                forget_shards(working)  # the corpus stands
            finally:
                _remove_unfinished(working)
                if not finished(working):
                    (working / LOCK).unlink()
                    with suppress(OSError):  # what is not ours stays
                        working.rmdir()
    except OSError:  # not even a lock could be written
        if working in new:
            (working / LOCK).unlink(missing_ok=True)
        raise
    finally:
        for folder in new:  # from the deepest up, as far as nothing is in them
            with suppress(OSError):
                folder.rmdir()


def is_full(out: Path) -> bool:
    """Whether `out` is something else than absent or an empty folder."""
    return out.is_file() or (out.is_dir() and any(out.iterdir()))


def refuse_full(out: Path) -> None:
    """Raise InputError if there is something that must not be lost."""
    if is_full(out):
        raise InputError(f"{out} exists already; choose another folder, or delete it first")


def shard_folder(working: Path, path: Path) -> Path:
    """The shard of a file; wherever it stands among the others."""
    return working / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]


def finished(working: Path) -> list[Path]:
    """The folders of all finished shards."""
    return [path.parent for path in working.glob(f"*/{META}") if not path.parent.suffix]


def forget_shards(working: Path) -> None:
    """Remove what a later run would go on from."""
    for folder in finished(working):
        shutil.rmtree(folder)


def _remove_unfinished(working: Path) -> None:
    """What a killed worker was at, and shards that were half removed."""
    for name in ("[0-9a-f]" * 16, "*.partial", "*.replaced"):
        for folder in working.glob(name):
            if folder.suffix or not (folder / META).is_file():
                shutil.rmtree(folder, ignore_errors=True)
