"""A run that is killed (kill -9, no last words), at whatever moment, loses nothing and goes on.

The short version of tests/campaigns/kills.py, which says what is compared, and what a kill leaves.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_stopping import ENDLESS, logged, started, wait_for_updates

from minibert.errors import run_command
from minibert.files import atomic_folder
from train import main, train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def campaign(*flags: str) -> None:
    """tests/campaigns/kills.py, in a process of its own since it forks."""
    command = [sys.executable, ROOT / "tests" / "campaigns" / "kills.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost" in done.stdout


@pytest.mark.slow
def test_killed_before_each_change_to_its_folder():
    campaign("--everywhere")


@pytest.mark.slow
def test_killed_at_random_moments():
    campaign("--kills", "8")


@pytest.mark.slow
def test_two_ranks_killed_together_or_one_alone():
    campaign("--kills", "5", "--ranks", "2")


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank():
    campaign("--kills", "2", "--torchrun")


# What a kill leaves.


def run_killed_between_renames(path: Path) -> None:
    """Replace the folder `path`, and end where the old one has gone and the new not yet come."""
    code = """
import os, signal, sys
from pathlib import Path
from minibert.files import atomic_folder
rename = os.rename
def fatal(*paths):
    rename(*paths)
    if str(paths[1]).endswith(".replaced"):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = fatal
with atomic_folder(Path(sys.argv[1])) as partial:
    (partial / "content").write_text("new")
"""
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT).returncode == -9


def test_a_kill_between_two_renames_keeps_the_old(tmp_path):
    """Also where the next attempt comes to nothing, or is killed there again."""
    path = tmp_path / "student"
    path.mkdir()
    (path / "content").write_text("old")
    for _ in range(2):
        run_killed_between_renames(path)
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_folder(path) as partial:
        (partial / "content").write_text("newer")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    assert (path / "content").read_text() == "old"
    with atomic_folder(path) as partial:
        (partial / "content").write_text("newest")
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    assert (path / "content").read_text() == "newest"


def test_a_run_begins_where_a_kill_came_before_its_settings(toy_run):
    toy_run.out.mkdir()
    (toy_run.out / "lock").write_text("process 1 on elsewhere\n")
    (toy_run.out / "config.json.partial").write_text('{"run": {"rec')
    train(dataclasses.replace(toy_run, steps=1, warmup_steps=0))
    names = {"config.json", "lock", "metrics.jsonl", "step_000001", "student"}
    assert {path.name for path in toy_run.out.iterdir()} == names


def test_leftovers_do_not_confuse_the_next_start(toy_run, tmp_path):
    """Of steps, files and the result; the disk is not to fill up with them."""
    run = dataclasses.replace(toy_run, steps=4, save_every=2)
    train(dataclasses.replace(run, out=tmp_path / "whole"))
    train(run)
    for name in ("student", "step_000004"):
        (run.out / name).rename(run.out / f"{name}.partial")  # as if just about to be there
    for name in ("step_000003.partial", "step_000009.partial", "student.replaced"):
        (run.out / name).mkdir()
        (run.out / name / "model.safetensors").write_bytes(b"half of it")
    for name in ("config.json.partial", "metrics.jsonl.partial"):
        (run.out / name).write_text("half of it")
    train(dataclasses.replace(run, resume=True))
    for name in ("step_000004/model.safetensors", "student/model.safetensors"):
        assert (run.out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in run.out.iterdir()} == names


# Two at once.


def test_a_second_run_on_a_folder_is_refused(toy_world, tmp_path, monkeypatch, capsys):
    """And a killed one leaves it free at once, although its reader of batches outlives it."""
    out = tmp_path / "run"
    first = started(toy_world, out, *ENDLESS)
    wait_for_updates(first, out)
    settings = (out / "config.json").read_bytes()
    resume = ["train.py", "--out", str(out), "--resume"]

    monkeypatch.setattr(sys, "argv", [*resume, "--keep", "9"])
    assert run_command(main) == 2
    told, complaint = capsys.readouterr()
    assert complaint.startswith(f"error: {out}: in use by process {first.pid} on ")
    assert (told, complaint.count("\n")) == ("", 1)
    assert (out / "config.json").read_bytes() == settings
    seen = len(logged(out))
    while first.poll() is None and len(logged(out)) <= seen:
        time.sleep(0.02)

    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    os.killpg(first.pid, 0)  # its reader is still there
    monkeypatch.setattr(sys, "argv", [*resume, "--max-hours", str(0.1 / 3600)])
    assert run_command(main) == 0
    told, complaint = capsys.readouterr()
    assert told.startswith("saved after ")
    assert complaint == ""
