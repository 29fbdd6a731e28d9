"""What a run stands on may vanish: corpus, teacher, folder, memory, worker, terminal.

Each ends in one line and status 2, or does not matter; the last checkpoint is left as it was.
"""

import dataclasses
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import commands
import numpy as np
import pytest
import torch
from commands import Command
from conftest import ROOT
from test_stopping import ENDLESS, logged, started, wait_for_updates

import train as train_script
from minibert.data.batches import Batches
from minibert.errors import run_command
from minibert.folder import load_model
from minibert.run_config import RunConfig
from minibert.training.checkpoint import State, checkpoints, save_checkpoint
from minibert.training.device import MICRO_BATCH_TOKENS
from minibert.training.runlog import read_metrics
from train import train

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for processes and limits")

# A batch of so many sequences does not fit into a pipe: the worker dies in the midst of sending it.
LARGE = ("--batch-size", "600")


@pytest.fixture
def two(toy_run) -> RunConfig:
    return dataclasses.replace(toy_run, steps=2)


def resumed(run: RunConfig, **flags) -> RunConfig:
    return RunConfig.from_flags({"out": run.out, "resume": True, **flags})


def complaint_of(begin, capsys) -> str:
    """The one line with which it ends; `begin` makes a RunConfig, which may fail as well."""
    assert run_command(lambda: train(begin())) == 2
    return one_line(capsys.readouterr().err)


def one_line(complaint: str) -> str:
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    return complaint.removeprefix("error: ").rstrip("\n")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Corpus and teacher.


@pytest.fixture
def corpus(toy_world, tmp_path) -> Path:
    """The toy corpus, where it may be harmed; its world is the folder above."""
    for name in ("corpus", "teacher"):
        shutil.copytree(toy_world / name, tmp_path / "world" / name)
    return tmp_path / "world" / "corpus"


def ended(run: Command, seconds: float) -> str:
    """What a run complains about; whatever is left of it is killed."""
    try:
        complaint = run.communicate(timeout=seconds)[1]
        assert run.returncode == 2
        run.wait_for_group(seconds)
        return complaint
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


def worker_of(run: Command) -> int:
    (worker,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return int(worker)


@linux
@pytest.mark.parametrize(
    ("way", "size"),
    [
        ("cut short", ()),
        ("killed", ()),
        pytest.param("cut short", LARGE, marks=pytest.mark.slow),
        pytest.param("killed", LARGE, marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_dies_ends_the_run(corpus, tmp_path, way, size):
    """SIGBUS for a file cut short, SIGKILL as the kernel sends it when memory runs out."""
    out = tmp_path / "run"
    run = started(corpus.parent, out, *ENDLESS, "--save-every", "2", *size)
    wait_for_updates(run, out)
    while run.poll() is None and not checkpoints(out):
        time.sleep(0.05)
    if way == "killed":
        os.kill(worker_of(run), signal.SIGKILL)
    else:
        os.truncate(corpus / "tokens.bin", 0)
    complaint = one_line(ended(run, 30))
    assert complaint.startswith(f"{corpus}: its reader ended")
    assert checkpoints(out)
    assert not list(out.rglob("*.partial"))


@linux
@pytest.mark.slow
def test_a_killed_run_leaves_no_process(toy_world, tmp_path):
    """With a batch under way."""
    run = started(toy_world, tmp_path / "run", *ENDLESS, *LARGE)
    try:
        wait_for_updates(run, tmp_path / "run")
        run.kill()
        run.wait_for_group(15)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


class Vanishing:
    """Calls `happens` before the update of `step`, counted from 1."""

    def __init__(self, monkeypatch, step: int, happens):
        update = train_script.update

        def watched(student, teacher, optimizer, batch, number, run):
            if number + 1 == step:
                happens()
            return update(student, teacher, optimizer, batch, number, run)

        monkeypatch.setattr(train_script, "update", watched)


def test_a_corpus_folder_that_is_removed_does_not_matter_until_the_end(
    toy_run, corpus, monkeypatch, capsys
):
    """Its tokens stay mapped. The result needs the vocabulary: one line, and a resumption."""
    run = dataclasses.replace(toy_run, data=corpus)
    Vanishing(monkeypatch, 3, lambda: corpus.rename(corpus.with_name("elsewhere")))
    complaint = complaint_of(lambda: run, capsys)
    assert str(corpus) in complaint
    assert [line["step"] for line in read_metrics(run.out / "metrics.jsonl")][-1] == 10
    assert not (run.out / "student").exists()
    train(resumed(run, data=corpus.with_name("elsewhere")))
    assert (run.out / "student" / "vocab.txt").exists()


@pytest.mark.parametrize("name", ["teacher", "corpus"])
@pytest.mark.parametrize("way", ["gone", "empty", "a file"])
def test_what_is_gone_on_resume_is_named(two, corpus, capsys, name, way):
    world = corpus.parent
    train(dataclasses.replace(two, data=corpus, teacher=world / "teacher"))
    before = content(two.out / "step_000002")
    log = (two.out / "metrics.jsonl").read_bytes()
    (world / name).rename(world / "elsewhere")
    if way == "empty":
        (world / name).mkdir()
    elif way == "a file":
        (world / name).write_text("")
    assert complaint_of(lambda: resumed(two, steps=3), capsys).startswith(str(world / name))
    assert content(two.out / "step_000002") == before
    assert (two.out / "metrics.jsonl").read_bytes() == log
    flag = {"corpus": "data"}.get(name, name)
    train(resumed(two, steps=3, **{flag: world / "elsewhere"}))
    assert (two.out / "step_000003").is_dir()


# The run folder.


def test_a_run_folder_removed_in_the_middle_ends_the_run(toy_run, monkeypatch, capsys):
    Vanishing(monkeypatch, 3, lambda: shutil.rmtree(toy_run.out))
    complaint = complaint_of(lambda: toy_run, capsys)
    assert complaint == f"{toy_run.out / 'metrics.jsonl'}: No such file or directory"
    assert not toy_run.out.exists()


def test_a_run_folder_removed_is_not_made_anew_by_a_checkpoint(toy_run, monkeypatch, capsys):
    """It would be no run's: without config.json it could neither be resumed nor begun."""
    run = dataclasses.replace(toy_run, save_every=2, log_every=100)
    Vanishing(monkeypatch, 3, lambda: shutil.rmtree(run.out))
    assert complaint_of(lambda: run, capsys).startswith(str(run.out))
    assert not run.out.exists()


def test_a_run_folder_below_a_file(two, tmp_path, capsys):
    (tmp_path / "file").write_text("years of work")
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "file" / "a" / "run"):
        run = dataclasses.replace(two, out=out)
        assert complaint_of(lambda run=run: run, capsys).startswith(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "years of work"


def test_a_run_folder_that_is_a_dangling_link(two, tmp_path, capsys):
    two.out.symlink_to(tmp_path / "nowhere")
    assert complaint_of(lambda: two, capsys).startswith(str(two.out))
    assert two.out.is_symlink()
    assert not (tmp_path / "nowhere").exists()


@linux
@pytest.mark.parametrize("out", ["/proc/run", "/sys/run", "/dev/null/run"])
def test_a_run_folder_where_nobody_may_write(two, out, capsys):
    run = dataclasses.replace(two, out=Path(out))
    assert complaint_of(lambda: run, capsys).startswith(str(Path(out).parent))


AS_ANOTHER = """
import os
import train
from minibert.errors import run_command
run_folder = train.run_folder
def as_nobody(*arguments):  # as late as can be: Python itself may not be for all to read
    os.setuid(65534)
    return run_folder(*arguments)
train.run_folder = as_nobody
raise SystemExit(run_command(train.main))
"""


@linux
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root to be less")
def test_a_run_folder_of_another_user(two):
    """It may be read, and is left as it is."""
    with TemporaryDirectory() as name:  # pytest's own are for their owner alone
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(two.teacher, folder / "teacher")
        shutil.copytree(two.data, folder / "corpus")
        inputs = {"teacher": folder / "teacher", "data": folder / "corpus"}
        refused_to_another(dataclasses.replace(two, **inputs, out=folder / "run"))


def refused_to_another(two: RunConfig) -> None:
    train(two)
    before = content(two.out / "step_000002")
    done = commands.run("-c", AS_ANOTHER, "--out", two.out, "--resume", "--steps", 3)
    assert done.returncode == 2, done.stderr
    assert one_line(done.stderr) == f"{two.out / 'lock'}: Permission denied"
    assert content(two.out / "step_000002") == before


def test_what_a_killed_save_left_is_removed(two):
    """Each would take as much room as a checkpoint, and its step may never come again."""
    two = dataclasses.replace(two, keep=1)
    train(two)
    shutil.copytree(two.out / "step_000002", two.out / "step_000001.partial")
    train(dataclasses.replace(two, steps=3, resume=True))
    assert sorted(path.name for path in two.out.glob("step_*")) == ["step_000003"]


def test_a_start_that_was_killed_can_be_made_again(two):
    """The first file of a run was being written."""
    two.out.mkdir()
    for name in ("lock", "config.json.partial"):
        (two.out / name).write_text("")
    train(two)
    assert (two.out / "step_000002").is_dir()


# Memory.


LITTLE_MEMORY = """
import re, resource, sys
from pathlib import Path
import train
from minibert.errors import run_command
begin = train.StopRequest.__enter__
def limited(stop):
    held = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (held + int(more), -1))
    return begin(stop)
train.StopRequest.__enter__ = limited
more = sys.argv.pop(1)
raise SystemExit(run_command(train.main))
"""
ADVICE = "out of memory; try --micro-batch-tokens below {}"


def with_memory(more: int, run: RunConfig) -> subprocess.CompletedProcess:
    """Resume a run with so many bytes beyond what it begins with, a whole batch at once."""
    flags = ["--out", run.out, "--resume", "--micro-batch-tokens", "12000"]
    return subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(more), *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@linux
@pytest.mark.parametrize(
    "megabytes",
    [
        pytest.param(3, marks=pytest.mark.slow),
        20,
        pytest.param(50, marks=pytest.mark.slow),
    ],
)
def test_too_little_memory_is_told_with_what_helps(toy_run, megabytes):
    run = dataclasses.replace(
        toy_run, batch_size=600, micro_batch_tokens=4000, steps=2, save_every=1
    )
    train(run)
    shutil.rmtree(run.out / "step_000002")
    before = content(run.out / "step_000001")
    done = with_memory(megabytes << 20, run)
    assert done.returncode == 2, done.stderr
    assert one_line(done.stderr) == ADVICE.format(12000)
    assert content(run.out / "step_000001") == before
    train(dataclasses.replace(run, resume=True))
    assert (run.out / "step_000002").is_dir()


def main_of(run: RunConfig, monkeypatch) -> int:
    """`train.py --resume` in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(run.out), "--resume"])
    return run_command(train_script.main)


@pytest.mark.parametrize("where", ["update", "evaluate", "save_checkpoint"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_memory_of_a_gpu_is_told_alike(toy_run, monkeypatch, capsys, where, error):
    at_once = None if where == "evaluate" else 60
    run = dataclasses.replace(toy_run, steps=4, save_every=2, micro_batch_tokens=at_once)
    train(run)
    shutil.rmtree(run.out / "step_000004")
    before = content(run.out / "step_000002")

    def too_much(*arguments, **options):
        raise error("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB in all.")

    with monkeypatch.context() as patch:
        patch.setattr(train_script, where, too_much)
        assert main_of(run, patch) == 2
    assert one_line(capsys.readouterr().err) == ADVICE.format(at_once or MICRO_BATCH_TOKENS["cpu"])
    assert content(run.out / "step_000002") == before
    assert main_of(run, monkeypatch) == 0


def test_other_faults_are_no_lack_of_memory(toy_run, monkeypatch):
    run = dataclasses.replace(toy_run, steps=4, save_every=2)
    train(run)
    shutil.rmtree(run.out / "step_000004")

    def wrong(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train_script, "update", wrong)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        main_of(run, monkeypatch)


@pytest.mark.parametrize(
    "of_numpy",
    [
        False,
        True,
    ],
)
def test_memory_of_the_reader_is_told_alike(toy_run, monkeypatch, capsys, of_numpy):
    """NumPy has an error of its own, a MemoryError that is not made from a line of text."""
    run = dataclasses.replace(toy_run, steps=4, save_every=2)
    train(run)
    shutil.rmtree(run.out / "step_000004")
    batch_at = Batches.at

    def too_much(batches, step):
        if step == 3 and of_numpy:
            np.empty(2**59)
        if step == 3:
            raise MemoryError
        return batch_at(batches, step)

    monkeypatch.setattr(Batches, "at", too_much)
    assert main_of(run, monkeypatch) == 2
    assert one_line(capsys.readouterr().err) == ADVICE.format(run.micro_batch_tokens)
    assert [path.name for path in checkpoints(run.out)] == ["step_000002"]


# The terminal.


def in_a_terminal(world: Path, out: Path) -> tuple[int, int]:
    """A run in the foreground of a terminal of its own: its process and the terminal."""
    process, terminal = pty.fork()
    if process == 0:
        flags = ["--teacher", world / "teacher", "--data", world / "corpus", "--out", out]
        flags += ["--max-length", "19", "--batch-size", "7", "--device", "cpu", *ENDLESS]
        os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        signal.signal(
            signal.SIGHUP, signal.SIG_DFL
        )  # `nohup python -m pytest` would pass on its own
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *map(str, flags)])
    return process, terminal


@linux
def test_a_closed_terminal_saves(toy_world, tmp_path):
    """A connection that breaks takes the terminal away and sends SIGHUP: nothing can be told."""
    out = tmp_path / "run"
    process, terminal = in_a_terminal(toy_world, out)
    while not any("loss" in line for line in logged(out)):
        time.sleep(0.05)
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert [int(path.name[5:]) for path in checkpoints(out)] == [logged(out)[-1]["step"]]
    assert status != 0


def test_a_progress_line_that_nobody_reads_does_not_end_a_run(toy_run, monkeypatch):
    """The terminal of a run put in the background is gone, or the `tee` behind a pipe."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr("minibert.progress.SECONDS_BETWEEN_LINES", 0)
    with os.fdopen(write, "w", buffering=1) as nobody, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", nobody)
        try:
            train(toy_run)
        finally:
            nobody_to_flush = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nobody_to_flush, nobody.fileno())
            os.close(nobody_to_flush)
    assert (toy_run.out / "student").is_dir()


# Time.


@linux
def test_no_file_stays_open(toy_run, monkeypatch):
    """A hundred thousand updates leave as few as three."""
    found = []
    update = train_script.update

    def watched(*arguments):
        found.append(len(os.listdir("/proc/self/fd")))
        return update(*arguments)

    monkeypatch.setattr(train_script, "update", watched)
    train(dataclasses.replace(toy_run, steps=9, save_every=1, eval_every=1))
    assert len(set(found[2:])) == 1


def test_a_checkpoint_that_stands_there_is_replaced(toy_run, tmp_path):
    """A run that goes on from an older checkpoint meets its newer ones again."""
    train(toy_run)
    corpus, device = train_script.Corpus.open(toy_run.data), torch.device("cpu")
    student, _, _ = train_script.build_models(toy_run, corpus, device)
    optimizer = train_script.build_optimizer(student, 0.0)
    train_script.load_newest(toy_run.out, student, optimizer)
    torch.nn.init.ones_(student.decoder_bias)
    save_checkpoint(toy_run.out, State(10), student, optimizer, keep=1)
    assert [path.name for path in toy_run.out.glob("step_*")] == ["step_000010"]
    torch.nn.init.zeros_(student.decoder_bias)
    assert train_script.load_newest(toy_run.out, student, optimizer) == State(10)
    assert (student.decoder_bias == 1).all()
    assert re.fullmatch(r"step_\d{6}", checkpoints(toy_run.out)[0].name)
    load_model(toy_run.out / "student")
