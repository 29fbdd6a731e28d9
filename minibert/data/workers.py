"""Processes that make shards, one file at a time each.

A worker is a Python of its own that is told what to do through a pipe. It ends with the process
that began it, however that ends: its standard input is a pipe that nobody writes to, and which is
closed then. It is out of reach of the terminal's Ctrl-C, which is for that process to answer.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from minibert.data.reading import STANDARD_INPUT
from minibert.data.shards import Settings, find_shard, make_shard
from minibert.data.tokenizer import Tokenizer, load_tokenizer
from minibert.errors import InputError, in_one_line
from minibert.progress import duration

# Bytes of a corpus, at 2 a token, for each byte of input, as measured on PubMed with BERT's pieces
# (of its citations a third are titles alone). Shards are 3 % larger.
CORPUS_BYTES = {".xml.gz": 0.37, ".xml": 0.064, ".gz": 1.4, "": 0.48}


class Task(NamedTuple):
    """A file, and the folder that is to be its shard."""

    path: Path
    folder: Path


class Event(NamedTuple):
    """What has happened to a file."""

    path: Path
    kind: str  # "read": so far; "done"; "bad": the file is; "failed": nothing can be done at all
    bytes_read: int = 0
    documents: int = 0
    reason: str = ""


def estimated_bytes(tasks: Sequence[Task], way: dict[str, Any]) -> int:
    """How much is still to be written: shards that are not there, and the corpus; 2 bytes a token.

    Of standard input nobody knows.
    """
    estimate = 0.0
    for path, folder in tasks:
        if path.is_file():
            suffix = next(end for end in CORPUS_BYTES if path.name.lower().endswith(end))
            size = path.stat().st_size * CORPUS_BYTES[suffix]
            estimate += size if find_shard(folder, way) else 2 * size
    return int(estimate)


def shards_made(
    tasks: Sequence[Task], tokenizer: Tokenizer, settings: Settings, num_workers: int
) -> Iterator[Event]:
    """Make the shards of all files and tell what happens; of each file at last "done" or "bad".

    More workers than files are not needed; a single one is this process, in which the tokenizer may
    use all cores. Raises InputError or OSError where it cannot go on.
    """
    alone = min(num_workers, len(tasks)) == 1
    own = [task for task in tasks if alone or task.path == STANDARD_INPUT]
    for task in own:
        yield from _events(task, tokenizer, settings)
    if others := [task for task in tasks if task not in own]:
        yield from _by_workers(others, tokenizer, settings, min(num_workers, len(others)))


def _events(task: Task, tokenizer: Tokenizer, settings: Settings) -> Iterator[Event]:
    """Make one shard."""
    try:
        for reading in make_shard(task.path, task.folder, tokenizer, settings):
            yield Event(task.path, "read", reading.bytes_read, reading.documents)
    except InputError as error:
        yield Event(task.path, "bad", reason=in_one_line(error))
    except OSError as error:
        if error.filename != str(task.path):  # the disk is full, perhaps
            raise
        yield Event(task.path, "bad", reason=in_one_line(error))
    else:
        yield Event(task.path, "done")


# ---- The process that has workers ----------------------------------------------------------------


class Worker:
    """A process that makes shards."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings, threads: int):
        self.connection, theirs = Pipe()
        environment = {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": "1"} | os.environ
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # the same packages as here
        code = f"from minibert.data.workers import work; work({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self._send((tokenizer.source, settings))

    def give(self, task: Task) -> None:
        self.task = task
        self._send(task)

    def _send(self, message: Any) -> None:
        with suppress(BrokenPipeError):  # it has ended: what is received next will say so
            self.connection.send(message)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.connection.close()

    def obituary(self) -> str:
        """How it ended, and over which file, when it was not to end."""
        status = self.process.wait()
        how = f"was killed ({signal.Signals(-status).name})" if status < 0 else f"ended ({status})"
        doubt = "; too little memory?" if status == -signal.SIGKILL else ""
        return f"{self.task.path}: the process that read it {how}{doubt}"


def _by_workers(
    tasks: Sequence[Task], tokenizer: Tokenizer, settings: Settings, num_workers: int
) -> Iterator[Event]:
    waiting = sorted(tasks, key=_size)  # the largest goes first, that none has to wait for it alone
    with ExitStack() as stack:
        busy: dict[Connection, Worker] = {}
        for _ in range(num_workers):
            worker = Worker(tokenizer, settings, max(1, num_cores() // num_workers))
            stack.callback(worker.end)
            busy[worker.connection] = worker
            worker.give(waiting.pop())
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]
                try:
                    event = connection.recv()
                except (EOFError, OSError):
                    raise InputError(worker.obituary()) from None
                if event.kind == "failed":
                    raise InputError(event.reason)
                if event.kind in ("done", "bad"):
                    if waiting:
                        worker.give(waiting.pop())
                    else:
                        del busy[connection]
                yield event


def _size(task: Task) -> int:
    return task.path.stat().st_size if task.path.is_file() else 0


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- A worker ------------------------------------------------------------------------------------


def work(descriptor: int) -> None:
    """Do what comes through the pipe of that number, until nothing more comes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):
        _work(Connection(descriptor))


def _work(connection: Connection) -> None:
    source, settings = connection.recv()
    tokenizer = load_tokenizer(source)
    while True:
        task = connection.recv()
        try:
            for event in _events(task, tokenizer, settings):
                connection.send(event)
        except (OSError, MemoryError) as error:
            reason = in_one_line(error) or "too little memory"
            connection.send(Event(task.path, "failed", reason=reason))


def _end_with_parent() -> None:
    os.read(0, 1)  # waits until the other end is closed
    os._exit(1)


# ---- How far they are ----------------------------------------------------------------------------


class Progress:
    """How far all files are, in bytes as they lie on the disk."""

    def __init__(self, inputs: Sequence[Path]):
        self.sizes = {path: path.stat().st_size if path.is_file() else 0 for path in inputs}
        self.left = dict(self.sizes)  # bytes still to be read
        self.read = dict.fromkeys(inputs, 0)  # bytes that were read in this run
        self.documents = dict.fromkeys(inputs, 0)
        self.done = 0
        self.start = time.monotonic()

    def note(self, event: Event) -> None:
        if event.kind == "read":
            self.read[event.path], self.documents[event.path] = event.bytes_read, event.documents
            self.left[event.path] = max(0, self.sizes[event.path] - event.bytes_read)
        else:
            self.left[event.path] = 0
            self.done += 1

    def text(self, seconds: float) -> str:
        """How far, how fast, and how long still; MB are those of the files on the disk."""
        read, documents = sum(self.read.values()), sum(self.documents.values())
        parts = [
            f"{self.done}/{len(self.sizes)} files",
            f"{documents:,} documents",
            f"{documents / seconds:,.0f} documents/s",
            f"{read / seconds / 1e6:.2f} MB/s",
        ]
        if STANDARD_INPUT not in self.sizes and read:
            total, left = max(1, sum(self.sizes.values())), sum(self.left.values())
            parts = [f"{1 - left / total:4.0%}", *parts, f"{duration(seconds * left / read)} left"]
        return "  ".join(parts)
