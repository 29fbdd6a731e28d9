"""A run that is asked to end finishes its update, saves, and goes on later as if nothing had been.

Through the command line, as users do it; the toy world has 10 updates a second or more.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Command
from conftest import ROOT

from minibert.training.checkpoint import checkpoints, step_of
from minibert.training.runlog import TIMES, read_metrics
from minibert.training.stopping import StopRequest


def arguments(world: Path, out: Path, *flags: str) -> list[str | Path]:
    """What `train.py` is given on the toy world."""
    told = ["--teacher", world / "teacher", "--data", world / "corpus", "--out", out]
    return [*told, "--max-length", "19", "--batch-size", "7", "--device", "cpu", *flags]


def started(world: Path, out: Path, *flags: str) -> Command:
    """`python train.py` on the toy world, in a process group of its own."""
    return Command(ROOT / "train.py", *arguments(world, out, *flags), start_new_session=True)


def wait_for_updates(run: Command, out: Path) -> None:
    """Until the first update is logged."""
    while run.poll() is None and not any("loss" in line for line in logged(out)):
        time.sleep(0.05)


def logged(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def nobody_is_left(run: Command) -> bool:
    try:
        os.killpg(run.pid, 0)
    except ProcessLookupError:
        return True
    return False


ENDLESS = ("--steps", "1000000", "--save-every", "1000000", "--log-every", "1")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_tells_how_to_go_on(toy_world, tmp_path, name):
    """It reaches the whole group, as Ctrl-C does: the run, and its worker, which must not mind."""
    out, number = tmp_path / "run", getattr(signal, name)
    run = started(toy_world, out, *ENDLESS)
    wait_for_updates(run, out)
    os.killpg(run.pid, number)
    told, complaint = run.communicate(timeout=60)
    assert run.returncode == 128 + number, complaint
    assert complaint.startswith(f"\n{name}: after this update the run is saved and ends")
    assert complaint.count("\n") == 2
    (saved,) = checkpoints(out)
    assert (
        told == f"saved after {step_of(saved)} of 1000000 updates: --out {out} --resume goes on\n"
    )
    assert logged(out)[-1]["step"] == step_of(saved)
    assert nobody_is_left(run)


def test_a_second_interrupt_ends_at_once(toy_world, tmp_path):
    """The first comes in an update that would last for minutes."""
    out = tmp_path / "run"
    flags = ("--steps", "9", "--save-every", "1", "--log-every", "1")
    first = started(toy_world, out, *flags)
    assert first.wait(timeout=60) == 0
    code = f"""
import sys, time, train
from minibert.errors import run_command
update = train.update
def slow(*arguments):
    print("updating", flush=True)
    time.sleep(300)
train.update = slow
sys.argv = ["train.py", "--out", {str(out)!r}, "--resume", "--steps", "11"]
raise SystemExit(run_command(train.main))
"""
    run = Command("-c", code, start_new_session=True)
    while run.poll() is None and not run.told():
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    time.sleep(0.5)
    assert run.poll() is None
    os.killpg(run.pid, signal.SIGINT)
    ended = time.monotonic()
    told, complaint = run.communicate(timeout=60)
    assert time.monotonic() - ended < 10
    assert run.returncode == 130, complaint
    assert complaint.endswith("interrupted\n")
    assert told == f"updating\n\nwhat was saved stays: --out {out} --resume goes on\n"
    assert step_of(checkpoints(out)[-1]) == 9
    assert nobody_is_left(run)


def test_a_run_ends_when_its_time_is_up(toy_world, tmp_path):
    out = tmp_path / "run"
    run = started(toy_world, out, *ENDLESS, "--max-hours", str(1 / 3600))
    told, complaint = run.communicate(timeout=60)
    assert (run.returncode, complaint) == (0, "")
    assert nobody_is_left(run)
    assert "--resume goes on" in told
    assert step_of(checkpoints(out)[-1]) == logged(out)[-1]["step"] > 1


def test_minutes_make_a_checkpoint_due(toy_world, tmp_path):
    out = tmp_path / "run"
    run = started(toy_world, out, *ENDLESS, "--save-minutes", str(0.2 / 60), "--keep", "9")
    while run.poll() is None and len(checkpoints(out)) < 3:
        time.sleep(0.05)
    run.kill()
    run.wait_for_group()
    assert len(checkpoints(out)) >= 3


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_not(toy_world, tmp_path):
    """Weights, moments and log, to the last bit; stopped three times at other moments.

    The whole one is of a Python of its own, in which sets have another order.
    """
    flags = ("--steps", "60", "--log-every", "1", "--eval-every", "7")
    command = [sys.executable, ROOT / "train.py", *arguments(toy_world, tmp_path / "whole", *flags)]
    alone = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    subprocess.run(command, env=os.environ | alone, check=True, timeout=120)
    out, endings = tmp_path / "stopped", []
    for pause in (0.0, 0.2, 0.4):
        run = started(toy_world, out, *flags, "--resume")  # begins, then goes on
        seen = len(logged(out))
        while run.poll() is None and len(logged(out)) <= seen:
            time.sleep(0.02)
        time.sleep(pause)
        run.terminate()
        run.communicate(timeout=60)
        endings.append(run.returncode)
    assert 143 in endings
    last = started(toy_world, out, *flags, "--resume")
    assert last.wait(timeout=60) == 0
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        ours, theirs = (
            (folder / "step_000060" / name).read_bytes() for folder in (out, tmp_path / "whole")
        )
        assert ours == theirs, name
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in logged(folder)]
        for folder in (out, tmp_path / "whole")
    )
    assert ours == theirs


def test_what_was_ignored_stays_ignored():
    """`nohup` has SIGHUP ignored, so that a run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_made()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(None):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
