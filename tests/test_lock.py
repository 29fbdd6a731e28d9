"""A run folder belongs to one process at a time, and is free the moment that process ends."""

import dataclasses
import os
import platform
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from test_stopping import ENDLESS, logged, started, wait_for_updates

from minibert.errors import InputError, run_command
from minibert.files import locked
from minibert.run_config import RunConfig
from minibert.training.checkpoint import checkpoints
from train import train

pytest.importorskip("fcntl")  # Windows has no such locks


@pytest.fixture
def two(toy_run) -> RunConfig:
    return dataclasses.replace(toy_run, steps=2)


def complaint_of(run: RunConfig, capsys) -> str:
    assert run_command(lambda: train(run)) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    return complaint


def test_a_second_process_is_refused_until_the_first_is_killed(toy_world, two, capsys):
    """Killed outright, with a batch on its way from the worker, which ends by itself."""
    first = started(toy_world, two.out, *ENDLESS, "--warmup-steps", "1")
    try:
        wait_for_updates(first, two.out)
        before = logged(two.out)
        resumed = RunConfig.from_flags({"out": two.out, "resume": True, "steps": 2})
        complaint = complaint_of(resumed, capsys)
        holder = f"process {first.pid} on {platform.node()}"
        assert complaint == f"error: {two.out}: in use by {holder}\n"
        assert first.poll() is None
        assert logged(two.out)[: len(before)] == before  # nothing is cut off
        assert (two.out / "lock").read_text() == holder + "\n"  # nor written over
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait(timeout=60)
    train(resumed)
    assert [path.name for path in checkpoints(two.out)] == ["step_000002"]
    first.wait_for_group()


@pytest.mark.slow
def test_of_two_that_begin_at_once_one_runs(toy_world, tmp_path):
    """Which one is open; `--resume` begins where there is none, as a queue's jobs do."""
    flags = ("--steps", "40", "--log-every", "1", "--resume")
    runs = [started(toy_world, tmp_path / "run", *flags) for _ in range(4)]
    complaints = [run.communicate(timeout=120)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2, 2, 2], complaints
    for run, complaint in zip(runs, complaints, strict=True):
        if run.returncode == 2:
            assert complaint.startswith(f"error: {tmp_path / 'run'}: in use by ")
            assert complaint.count("\n") == 1
    assert [line["step"] for line in logged(tmp_path / "run") if "loss" in line] == [*range(1, 41)]


def test_what_a_dead_process_left_does_not_lock(two):
    """Neither in a new folder nor in that of a run."""
    two.out.mkdir()
    (two.out / "lock").write_text("process 1 on another machine\n" * 99)
    train(two)
    assert (two.out / "lock").read_text() == f"process {os.getpid()} on {platform.node()}\n"
    (two.out / "lock").write_text("process 1 on another machine\n" * 99)
    train(dataclasses.replace(two, steps=3, resume=True))
    assert [path.name for path in checkpoints(two.out)] == ["step_000002", "step_000003"]


def test_a_process_begun_within_does_not_hold_on(tmp_path):
    """A reader of the corpus that outlives its run by a moment must not keep the folder."""
    with locked(tmp_path / "lock"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    asks = f"""
from pathlib import Path
from minibert.files import locked
with locked(Path({str(tmp_path / "lock")!r})):
    pass
"""
    try:
        other = subprocess.run(
            [sys.executable, "-c", asks],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=60,
        )
    finally:
        child.communicate(b"\n")
    assert other.returncode == 0


HOLDS = """
import sys
from pathlib import Path
from minibert.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"", "another process"), (b"a\nb\n", "a b"), (b"\xff", "\N{REPLACEMENT CHARACTER}")],
)
def test_whatever_stands_in_the_lock_is_told_in_one_line(tmp_path, content, named):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        (tmp_path / "lock").write_bytes(content)
        with pytest.raises(InputError) as found, locked(tmp_path / "lock"):
            pass
        assert " ".join(str(found.value).split()) == f"{tmp_path}: in use by {named}"
    finally:
        holder.communicate(b"\n")


def test_a_folder_named_lock_is_named(two, capsys):
    train(two)
    (two.out / "lock").unlink()
    (two.out / "lock").mkdir()
    complaint = complaint_of(dataclasses.replace(two, steps=3, resume=True), capsys)
    assert complaint == f"error: {two.out / 'lock'}: Is a directory\n"


def test_a_full_disk_is_named(two, capsys):
    train(two)
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        complaint = complaint_of(dataclasses.replace(two, steps=3, resume=True), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert complaint == f"error: {two.out / 'lock'}: File too large\n"
    assert [path.name for path in checkpoints(two.out)] == ["step_000002"]
