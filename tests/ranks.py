"""Ranks for tests: processes that find themselves where `torchrun` would have put them.

They are forked from a server that has imported torch already (a start costs 0.1 s instead of 3 s),
and see no GPU.
"""

import multiprocessing
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minibert.errors import run_command
from minibert.training.distributed import ranks_joined
from train import main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "torch._dynamo", "pytest"])
PATIENCE = 60  # seconds within which every rank has ended: what is promised where one fails


class Ranks:
    """Processes of one world, what each printed, and how each ended.

    Args:
        world_size: how many.
        function: of a module that can be imported; its exit status or SystemExit is the rank's.
        arguments: for `function`.
        folder: where what they print is put.
        where: working directories by rank.
        environment: variables by rank, beside those of every torchrun.
    """

    def __init__(
        self,
        world_size: int,
        function: Callable[..., Any],
        *arguments: Any,
        folder: Path,
        where: dict[int, Path] | None = None,
        environment: dict[int, dict[str, Any]] | None = None,
    ):
        self.folder, self.processes = folder, []
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        for rank in range(world_size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
            place |= {"LOCAL_WORLD_SIZE": world_size}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            place |= (environment or {}).get(rank, {})
            folders = (folder, (where or {}).get(rank, Path.cwd()))
            process = FORKS.Process(target=_begin, args=(place, *folders, function, arguments))
            process.start()
            self.processes.append(process)

    def wait(self) -> float:
        """Until all have ended; the seconds it took. None may outlast `PATIENCE`."""
        began = time.monotonic()
        try:
            for process in self.processes:
                process.join(max(0.0, began + PATIENCE - time.monotonic()))
            assert None not in self.statuses, f"still there: {self.statuses}, {self.complaints}"
        finally:
            for process in self.processes:
                process.kill()
        return time.monotonic() - began

    @property
    def statuses(self) -> list[int | None]:
        """Exit status of each rank; minus the number of the signal that killed it."""
        return [process.exitcode for process in self.processes]

    @property
    def told(self) -> list[str]:
        """What each has printed on standard output."""
        return self._printed("out")

    @property
    def complaints(self) -> list[str]:
        """What each has printed on standard error."""
        return self._printed("err")

    def _printed(self, stream: str) -> list[str]:
        return [
            path.read_text() if (path := self.folder / f"{rank}.{stream}").exists() else ""
            for rank in range(len(self.processes))
        ]


def on_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, folder: Path
) -> list[Any]:
    """What `function` gives on each of so many ranks that are joined."""
    ranks = Ranks(world_size, _keep_result, folder, function, arguments, folder=folder)
    ranks.wait()
    assert not any(ranks.statuses), "".join(ranks.complaints)
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def command_line(*flags: Any) -> int:
    """`python train.py FLAGS`."""
    sys.argv = ["train.py", *map(str, flags)]
    return run_command(main)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _keep_result(folder: Path, function: Callable[..., Any], arguments: tuple) -> None:
    with ranks_joined():
        result = function(*arguments)
    (folder / f"{os.environ['RANK']}.result").write_bytes(pickle.dumps(result))


def _begin(
    place: dict[str, Any],
    folder: Path,
    where: Path,
    function: Callable[..., Any],
    arguments: tuple,
) -> None:
    """Turn a forked process into a rank."""
    for number, stream in (1, "out"), (2, "err"):
        path = folder / f"{place['RANK']}.{stream}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(where)
    multiprocessing.set_start_method("fork", force=True)  # for its own worker, as usual
    torch.set_num_threads(1)
    sys.exit(function(*arguments))
