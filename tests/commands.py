"""Commands as users give them, in processes of their own that begin in a tenth of a second.

To import torch takes 2 to 5 s. A server has done so once, and computes nothing; a command is a
fork of it that does what `python ARGUMENTS` does: in its own folder, with its own variables, files
and signals. What a Python settles when it begins is the server's: the seed of hashes, the number of
threads, what is imported already. Where that matters, a test starts a new one.

    python tests/commands.py SOCKET       the server; it ends when its standard input does
"""

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
START = 120  # seconds in which a server has imported torch, on the slowest machine


class Command:
    """`python ARGUMENTS`, under way; with the methods of `subprocess.Popen`.

    What it writes goes to files, so that nobody need read it for it to go on.

    Args:
        arguments: a script, -m and a module or -c and a program; then those of the program.
        cwd: its folder.
        environment: variables beside those of this process.
        stdin: text to read.
        start_new_session: whether it leads a process group of its own, and has no terminal.
    """

    def __init__(
        self,
        *arguments: Any,
        cwd: Path = ROOT,
        environment: dict[str, str] | None = None,
        stdin: str = "",
        start_new_session: bool = False,
    ):
        self.returncode = None
        # To append: what is read meanwhile does not move the place of the next line.
        self._files = [tempfile.TemporaryFile("a+") for _ in range(3)]  # noqa: SIM115
        self._files[0].write(stdin)
        self._files[0].seek(0)
        asked = {
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd),
            "environment": os.environ | ONE_THREAD | (environment or {}),
            "new_session": start_new_session,
        }
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(str(server()))
        socket.send_fds(self._server, [b"!"], [file.fileno() for file in self._files])
        self._server.sendall(json.dumps(asked).encode() + b"\n")
        self._answers = self._server.makefile()
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        has_answer, _, _ = select.select([self._server], [], [], 0)
        if self.returncode is None and has_answer:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """The exit status; raises TimeoutExpired where it runs on."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired("python", timeout)
            select.select([self._server], [], [], left)
        return self.returncode

    def wait_for_group(self, timeout: float = 60) -> None:
        """Until those that it has begun have ended too, where it leads a group."""
        deadline = time.monotonic() + timeout
        while living(self.pid):
            assert time.monotonic() < deadline, f"still there: {living(self.pid)}"
            time.sleep(0.02)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it has written on standard output and standard error until its end."""
        self.wait(timeout)
        return self.told(), self.complaint()

    def told(self) -> str:
        """What it has written on standard output until now."""
        return self._written(1)

    def complaint(self) -> str:
        """What it has written on standard error until now."""
        return self._written(2)

    def send_signal(self, number: int) -> None:
        """Nothing happens where it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # in this very moment
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _written(self, number: int) -> str:
        self._files[number].seek(0)
        return self._files[number].read()


def run(*arguments: Any, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess:
    """A command from begin to end, as `subprocess.run` with text."""
    command = Command(*arguments, **options)
    try:
        told, complaint = command.communicate(timeout)
    finally:
        command.kill()
    return subprocess.CompletedProcess(arguments, command.returncode, told, complaint)


@cache
def server() -> Path:
    """The socket of this process's server, which is there when this returns."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "socket"
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, __file__, path], stdin=subprocess.PIPE, cwd=ROOT, env=environment
    )

    def end() -> None:
        process.terminate()  # what tests have forked may hold its standard input
        process.wait()
        folder.cleanup()

    atexit.register(end)
    deadline = time.monotonic() + START
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, "no server of commands"
        time.sleep(0.05)
    return path


def living(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has ended meanwhile
        if int(its_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


# In the server.


def serve(path: Path) -> None:
    """Answer whoever asks, until nobody is left to ask."""
    import torch._dynamo  # noqa: F401  (a run imports it: two seconds)

    import train  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends this
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path.with_name("early")))
        listener.listen(64)
        path.with_name("early").rename(path)  # from here on somebody answers
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                os._exit(answer(connection))
            connection.close()


def answer(connection: socket.socket) -> int:
    """Begin the command that is asked for; tell its number, and at last its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    asked = json.loads(connection.makefile().readline())
    begun, begins = os.pipe()
    pid = os.fork()
    if pid == 0:
        connection.close()
        if asked["new_session"]:
            os.setsid()
        os.close(begun)
        os.close(begins)
        become(asked, files)
    for number in (*files, begins):
        os.close(number)
    os.read(begun, 1)  # until it leads its session, if it does: who asked may signal it at once
    connection.sendall(b"%d\n" % pid)
    _, status = os.waitpid(pid, 0)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    return 0


def become(asked: dict[str, Any], files: list[int]) -> None:
    """Be the command, to its end; what it raises, Python deals with."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for name, number, mode in ("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w"):
        buffering = 1 if name == "stderr" else -1
        setattr(sys, name, os.fdopen(number, mode, buffering=buffering, closefd=False))
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    first, *sys.argv = asked["arguments"]
    if first == "-m":
        sys.path[0] = asked["cwd"]
        sys.modules.pop(sys.argv[0], None)  # it is imported anew, as __main__
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0] = ""
        program, sys.argv[0] = sys.argv[0], "-c"
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(main))
    else:
        sys.argv = [first, *sys.argv]
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")
    raise SystemExit  # and from here on as any program ends


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
