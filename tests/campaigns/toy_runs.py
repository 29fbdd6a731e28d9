"""Toy runs in processes of their own, begun in a moment: for campaigns that kill them.

This process has imported torch and `train` once; a run is a fork of it that does what the command
line does. Nothing here computes with torch, whose threads would not outlive a fork.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (a run imports it: a second)

import train  # noqa: E402
from minibert.config import BertConfig  # noqa: E402
from minibert.data.merge import write_corpus  # noqa: E402
from minibert.data.tokenizer import load_tokenizer  # noqa: E402
from minibert.errors import run_command  # noqa: E402
from minibert.folder import save_model  # noqa: E402
from minibert.model import BertForMaskedLM  # noqa: E402
from minibert.training.checkpoint import checkpoints, step_of  # noqa: E402
from minibert.training.runlog import TIMES, read_metrics  # noqa: E402

EVAL_EVERY, KEEP = 7, 2
PATIENCE = 300  # seconds, for what takes two on an idle machine


@dataclass
class Process:
    """A forked process, leader of a group of its own (in which its reader of batches is, too)."""

    pid: int
    told: Path  # what it writes on standard error
    status: int | None = None  # its exit status, or minus the signal that ended it

    def has_ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit status; one that is not there in time is an error."""
        deadline = time.monotonic() + seconds
        while not self.has_ended():
            assert time.monotonic() < deadline, f"process {self.pid} still runs after {seconds} s"
            time.sleep(0.002)
        return self.status

    def kill(self, alone: bool = False) -> None:
        """kill -9, with its children or alone."""
        (os.kill if alone else os.killpg)(self.pid, signal.SIGKILL)
        self.wait()

    def complaint(self) -> str:
        return self.told.read_text(errors="replace")


def forked(task: Callable[[], int], told: Path) -> Process:
    """Do `task` in a forked process; it returns the exit status."""
    pid = os.fork()
    if pid:
        with suppress(OSError):  # the child was first, and has gone on to another program
            os.setpgid(pid, pid)
        return Process(pid, told)
    status = 1
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        status = task()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def make_world(world: Path) -> None:
    """Fill a folder with vocab.txt, corpus/ (43 documents) and teacher/ (4 layers, dropout)."""

    def fill() -> int:
        words = [f"w{number:02}" for number in range(94)]
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (world / "vocab.txt").write_text("\n".join(special + words) + "\n")
        draw = np.random.default_rng(0)
        tokenizer = load_tokenizer(world / "vocab.txt")
        documents = [
            (f"document {document}", draw.integers(5, 99, draw.integers(1, 41)).tolist())
            for document in range(43)
        ]
        write_corpus(world / "corpus", tokenizer, documents, held_out=0.2)
        torch.manual_seed(0)
        config = BertConfig(99, 24, 4, 3, 37, max_position_embeddings=29, initializer_range=0.2)
        save_model(world / "teacher", BertForMaskedLM(config), tokenizer_from=world)
        return 0

    world.mkdir(parents=True)
    maker = forked(fill, world / "told")
    assert maker.wait() == 0, maker.complaint()


def arguments(world: Path, out: Path, steps: int, save_every: int) -> list[str]:
    """The flags of a toy run that begins or goes on."""
    flags = ["--teacher", world / "teacher", "--data", world / "corpus", "--out", out, "--resume"]
    flags += ["--max-length", 19, "--batch-size", 7, "--micro-batch-tokens", 60, "--device", "cpu"]
    flags += ["--learning-rate", 0.01, "--log-every", 1, "--eval-every", EVAL_EVERY, "--keep", KEEP]
    return [*map(str, flags), "--steps", str(steps), "--save-every", str(save_every)]


def started(
    flags: list[str], out: Path, ranks: int = 1, prepare: Callable[[], None] = lambda: None
) -> list[Process]:
    """The processes of `train.py` with these flags, one a rank; `prepare` is done in each first."""
    port = free_port()

    def run(rank: int) -> int:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = ["train.py", *flags]
        prepare()
        return run_command(train.main)

    told = [out.with_name(f"{out.name}.rank{rank}.told") for rank in range(ranks)]
    return [forked(lambda rank=rank: run(rank), told[rank]) for rank in range(ranks)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def nobody_left(processes: list[Process]) -> Iterator[None]:
    """However this is left, so are the processes that were begun in it."""
    try:
        yield
    finally:
        for process in processes:
            if not process.has_ended():
                process.kill()


def rank_of(launcher: int) -> dict[int, int]:
    """The ranks that a torchrun has under way: rank -> process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher:
                settings = (path / "environ").read_bytes().split(b"\0")
                (rank,) = [int(s[5:]) for s in settings if s.startswith(b"RANK=")]
                found[rank] = int(path.name)
        except (OSError, ValueError):
            continue  # it has ended meanwhile, or is no rank
    return found


def logged(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the throughput, which no two runs share."""
    lines = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def newest_whole(out: Path) -> int:
    """The step of the newest checkpoint that is as it was written; 0 where there is none."""
    return max((step_of(folder) for folder in checkpoints(out) if is_whole(folder)), default=0)


def is_whole(checkpoint: Path) -> bool:
    try:
        hashes = json.loads((checkpoint / "state.json").read_text())["sha256"]
        found = {n: hashlib.sha256((checkpoint / n).read_bytes()).hexdigest() for n in hashes}
    except (OSError, ValueError):
        return False
    return found == hashes


def differences(out: Path, undisturbed: Path) -> list[str]:
    """In what a finished run is not as the undisturbed one: files to the bit, log, leftovers."""
    last = f"step_{max(map(step_of, checkpoints(undisturbed))):06d}"
    found = []
    for folder in (last, "student"):
        names = sorted(path.name for path in (undisturbed / folder).iterdir())
        if not (out / folder).is_dir():
            found.append(f"no {folder}")
        elif sorted(path.name for path in (out / folder).iterdir()) != names:
            found.append(f"other files in {folder}")
        else:
            pairs = ((out / folder / name, undisturbed / folder / name) for name in names)
            found += [f"{a} differs" for a, b in pairs if a.read_bytes() != b.read_bytes()]
    if logged(out) != logged(undisturbed):
        found.append("metrics.jsonl differs")
    names = {path.name for path in out.iterdir() if path not in checkpoints(out)}
    if names != {"config.json", "lock", "metrics.jsonl", "student"}:
        found.append(f"in the folder: {' '.join(sorted(names))}")
    found += [f"half of {folder.name}" for folder in checkpoints(out) if not is_whole(folder)]
    if (kept := len(checkpoints(out))) > KEEP + 1:  # one more where removing the last was cut off
        found.append(f"{kept} checkpoints, not {KEEP}")
    return found
