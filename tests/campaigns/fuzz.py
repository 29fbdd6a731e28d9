"""The fuzz campaign: every reader of files meets thousands of spoilt ones.

    python tests/campaigns/fuzz.py --inputs 10000 [--seed N] [--target NAME]

An input is good where its reader refuses it cleanly (an InputError, or an OSError that names a
file) or gives what the spoilt file says. Anything else is a failure: another exception, a wrong
result, a crash, more than 10 seconds of computing, more than 1 GB at the peak. Inputs run in child
processes, each a function of (seed, target, number); those that fail are kept with what happened.
"""

import argparse
import faulthandler
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not outlive a fork
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from campaigns.targets import Target, make_targets, spoilt  # noqa: E402

from minibert.errors import InputError  # noqa: E402
from minibert.training.device import release_freed_memory  # noqa: E402

SECONDS, MEGABYTES = 10.0, 1_000  # what one input may take, of computing time and of memory
PATIENCE = 60.0  # seconds by the clock, for one that waits rather than computes
ADDRESSES = 3 << 30  # bytes beyond what the child has at its start; past this the system refuses


@dataclass
class Counts:
    """What became of a target's inputs."""

    refused: int = 0
    read: int = 0
    failures: dict[int, str] = field(default_factory=dict)  # number of the input -> what happened
    peak: int = 0  # MB, of the whole process (torch alone has some 250)
    slowest: float = 0.0  # seconds of computing
    seconds: float = 0.0  # by the clock, of all inputs

    @property
    def inputs(self) -> int:
        return self.refused + self.read + len(self.failures)


def campaign(
    name: str,
    target: Target,
    inputs: int,
    seed: int = 0,
    keep: Path | None = None,
    tell: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Run the inputs 0 to `inputs` of a target; those that fail are written below `keep`.

    The good files themselves come first: one that is not read is failure -1, -2, ...
    """
    counts, begun = Counts(), time.monotonic()
    first = -len(target.good)
    while first < inputs:
        first = _run_child(name, target, range(first, inputs), seed, counts, tell)
        counts.seconds = time.monotonic() - begun
    for number, what in counts.failures.items():
        if keep is not None:
            folder = keep / f"{name.replace(' ', '_')}-{seed}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            _write(input_of(name, target, seed, number), folder)
            (folder / "WHAT_HAPPENED").write_text(what, errors="backslashreplace")
    return counts


def input_of(name: str, target: Target, seed: int, number: int) -> dict[str, bytes]:
    """The files of an input: spoilt ones, or for -1, -2, ... the good ones."""
    if number < 0:
        return target.good[number]
    return spoilt(target, random.Random(f"{seed} {name} {number}"))


def _run_child(
    name: str, target: Target, numbers: range, seed: int, counts: Counts, tell: Callable
) -> int:
    """Judge inputs in a child process until all are done or it ends; returns where to go on."""
    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _judge_all(name, target, numbers, seed, scratch, writing)
        finally:
            os._exit(0)
    os.close(writing)
    number, rest = numbers.start, b""
    while True:
        ready, _, _ = select.select([reading], [], [], PATIENCE)
        block = os.read(reading, 1 << 16) if ready else b""
        if not block:
            break
        *lines, rest = (rest + block).split(b"\n")
        for line in map(json.loads, lines):
            _count(counts, line)
            number = line["number"] + 1
        tell(counts)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    shutil.rmtree(scratch, ignore_errors=True)
    if number in numbers:  # it did not come to the end of this one
        counts.failures[number] = _end(status & 127)
        number += 1
    return number


def _end(signal_number: int) -> str:
    """How a child ended before its time, by the signal."""
    if signal_number == signal.SIGPROF:
        return f"still running after {SECONDS} s"
    if signal_number == signal.SIGKILL:
        return f"waiting after {PATIENCE} s, or killed for want of memory"
    return f"ended by signal {signal_number}"


def _count(counts: Counts, line: dict) -> None:
    counts.peak = max(counts.peak, line["peak"])
    counts.slowest = max(counts.slowest, line["seconds"])
    what = line["what"]
    if what not in ("refused", "read"):
        counts.failures[line["number"]] = what
    elif line["peak"] > MEGABYTES:
        counts.failures[line["number"]] = f"{what}, with {line['peak']} MB at the peak"
    elif line["number"] >= 0 and what == "refused":
        counts.refused += 1
    elif line["number"] >= 0:
        counts.read += 1
    elif what == "refused":
        counts.failures[line["number"]] = "a good file was refused"


def _judge_all(
    name: str, target: Target, numbers: range, seed: int, scratch: Path, pipe: int
) -> None:
    """In the child: judge inputs one by one and write a line about each to the pipe."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)  # a panic in Rust talks, whoever catches it
    faulthandler.disable()  # it has the place where stderr was before
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, size + ADDRESSES))
    torch.set_num_threads(1)
    release_freed_memory()  # what the parent kept would hide what an input takes
    for number in numbers:
        folder = scratch / "source"
        _write(input_of(name, target, seed, number), folder)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = _peak()  # of the parent, which may be a whole test suite, and of inputs before
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process, whatever it is in
        begun = time.process_time()
        what = judge(target, folder)
        line = {"number": number, "what": what, "seconds": time.process_time() - begun}
        os.write(pipe, json.dumps(line | {"peak": _peak() - before}).encode() + b"\n")


def judge(target: Target, folder: Path) -> str:
    """`refused`, `read`, or what went wrong."""
    try:
        target.read(folder)
        return "read"
    except InputError as error:
        causes = _causes(error)
        if any(_is_shortage(cause) for cause in causes):
            return f"memory ran out: {error}"
        named = any(part in str(error) for part in (str(folder), *os.listdir(folder.parent)))
        return "refused" if named else f"no file is named: {error}"
    except OSError as error:
        return "refused" if error.filename else traceback.format_exc()
    except BaseException:
        return traceback.format_exc()


def _causes(error: BaseException | None) -> list[BaseException]:
    """An exception and those that it came from."""
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__context__
    return causes


def _is_shortage(error: BaseException) -> bool:
    """Whether memory that might have been filled was not there.

    What torch's unpickler asks for, as long as the file claims, comes in one piece and untouched.
    """
    frames = traceback.extract_tb(error.__traceback__)
    by_torch = any(frame.filename.endswith("_weights_only_unpickler.py") for frame in frames)
    short = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    return short and not by_torch


def _peak() -> int:
    """MB that this process has had at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    raise AssertionError("no VmHWM in /proc/self/status")


def _write(files: dict[str, bytes], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=10_000, help="spoilt inputs a target")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs")
    parser.add_argument("--target", help="this one alone")
    elsewhere = Path(tempfile.gettempdir()) / "fuzz-failures"
    parser.add_argument("--keep", type=Path, default=elsewhere, help="where inputs that fail go")
    parser.add_argument("--replay", type=int, metavar="NUMBER", help="one input, in this process")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        targets = make_targets(Path(scratch) / "good")
    if flags.target is not None and flags.target not in targets:
        parser.error(f"--target is one of: {', '.join(targets)}")
    if flags.replay is not None:
        return _replay(flags.target, targets[flags.target], flags.seed, flags.replay)
    chosen = targets if flags.target is None else {flags.target: targets[flags.target]}
    print(f"{'target':18}{'inputs':>8}{'refused':>9}{'read':>7}{'failures':>9}", end="")
    print(f"{'peak MB':>9}{'slowest s':>11}{'seconds':>9}")
    failed = False
    for name, target in chosen.items():
        begun = time.monotonic()

        def tell(counts: Counts, name: str = name, begun: float = begun) -> None:
            left = (time.monotonic() - begun) / max(1, counts.inputs) * flags.inputs
            left -= time.monotonic() - begun
            if sys.stderr.isatty():
                print(f"\r{name}: {counts.inputs:,} of {flags.inputs:,}, {left:.0f} s left ",
                      end="", file=sys.stderr)  # fmt: skip

        counts = campaign(name, target, flags.inputs, flags.seed, flags.keep, tell)
        print(f"{name:18}{counts.inputs:8}{counts.refused:9}{counts.read:7}", end="")
        print(f"{len(counts.failures):9}{counts.peak:9}{counts.slowest:11.2f}", end="")
        print(f"{counts.seconds:9.0f}", flush=True)
        for number, what in list(counts.failures.items())[:10]:
            failed = True
            print(f"  {number}: {what.strip().splitlines()[-1][:150]}")
            print(f'    again: --target "{name}" --seed {flags.seed} --replay {number}')
    return int(failed)


def _replay(name: str, target: Target, seed: int, number: int) -> int:
    """Run one input here and print what becomes of it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "source"
        _write(input_of(name, target, seed, number), folder)
        what = judge(target, folder)
    print(what)
    return int(what not in ("refused", "read"))


if __name__ == "__main__":
    raise SystemExit(main())
