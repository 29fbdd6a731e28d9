"""Files that are either whole or absent: written to a temporary name, synced, renamed.

A reader (or a run that is resumed) therefore never sees half a file, whatever moment the process
was killed at. A leftover `*.partial` is overwritten by the next attempt.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minibert.errors import InputError

LARGEST_TEXT = 1 << 24  # bytes of a JSON file or a vocabulary: 16 million, several times BERT's

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class InUse(InputError):
    """Another process holds a lock."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in here names `path` where the system names nothing (a full disk)."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that is the file `path`; an `InUse` tells who else holds it.

    The system takes it back when the process ends, however that comes; children do not inherit it.
    Where there are no such locks (Windows, some network disks) nothing is locked.
    """
    with open(path, "a+b", buffering=0) as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read(200).decode(errors="replace").strip() or "another process"
                raise InUse(f"{path.parent}: in use by {holder}") from None
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` on success and is gone on failure."""
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path):
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
    replaced = path.with_name(path.name + ".replaced")
    if replaced.exists() and not path.exists():  # a kill between the two renames below
        os.rename(replaced, path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with naming(path):
            yield partial
            for file in partial.rglob("*"):
                _sync(file)
            _sync(partial)
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
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network disks cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def file_size(path: Path) -> int:
    """Bytes of a file; anything else of that name (a pipe would wait for ever) is refused."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a file")
    return path.stat().st_size


def read_bytes(path: Path) -> bytes:
    """What is in a file that is read as a whole, and so must be of bounded size."""
    if (size := file_size(path)) > LARGEST_TEXT:
        raise InputError(f"{path}: {size:,} bytes; expected at most {LARGEST_TEXT:,}")
    return path.read_bytes()


def read_text(path: Path) -> str:
    """The text of such a file, UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says; one that cannot be read, or says a thing twice, is a ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values for one key readers take either: the file says nothing certain."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice[:100]!r} stands twice")
    return content


def read_json(path: Path) -> dict:
    """The object in a JSON file; anything else is the user's error."""
    text = read_text(path)
    try:
        content = parse_json(text)
    except ValueError as error:
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
        file_size(path)  # a pipe would be waited for
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
