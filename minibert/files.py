"""Files that are either whole or absent: written to a temporary name, synced, renamed.

A reader (or a run that is resumed) therefore never sees half a file, whatever moment the process
was killed at. A leftover `*.partial` is overwritten by the next attempt.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minibert.errors import InputError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` on success and is gone on failure."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it takes the place of `path`, old or new."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            _sync(file)
        _sync(partial)
        replaced = path.with_name(path.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():  # a folder cannot be renamed over a full one: step aside first
            os.rename(path, replaced)
        os.rename(partial, path)
        _sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict:
    """The object in a JSON file; anything else is the user's error."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, endless digits
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write an object as indented JSON, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sha256_of_files(*paths: Path) -> str:
    """What `cat PATHS | sha256sum` prints."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
