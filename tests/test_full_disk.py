"""A full disk ends a run in one line; what was saved stays, and once there is room it goes on.

At every operation of a save in turn, by a limit on file sizes, and on a file system that really is
full.
"""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors import SafetensorError

import minibert.folder
import train
from minibert.errors import run_command
from minibert.folder import load_model
from minibert.run_config import RunConfig
from minibert.training import runlog
from minibert.training.checkpoint import checkpoints
from minibert.training.runlog import read_metrics

resource = pytest.importorskip("resource")

NO_ROOM = "No space left on device"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class FullDisk:
    """From the first path with `name` in it on, there is room for so many operations and no more.

    What does not fit is left half written, and says what the system says: opening and making name
    the file, writing and syncing do not, and safetensors has an error of its own.
    """

    def __init__(self, monkeypatch, name: str, room: float):
        self.name, self.room, self.done, self.begun = name, room, 0, False
        for owner, function in (
            (os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "copyfile"),
            (Path, "mkdir"), (Path, "touch"), (Path, "write_text"), (Path, "write_bytes"),
            (minibert.folder, "save_file"),
        ):  # fmt: skip
            original = getattr(owner, function)
            monkeypatch.setattr(owner, function, self.limited(function, original))

    def limited(self, function, original):
        def call(*arguments, **options):
            if not self.fits(arguments):
                self.fail(function, arguments)
            return original(*arguments, **options)

        return call

    def fits(self, arguments: tuple) -> bool:
        self.begun = self.begun or any(
            self.name in str(a) for a in arguments[:2] if isinstance(a, Path)
        )
        self.done += self.begun
        return self.done <= self.room

    def fail(self, function: str, arguments: tuple) -> None:
        if function == "save_file":
            with open(arguments[1], "wb") as file:
                file.write(b"\x08\0\0\0")
            raise SafetensorError(f"Error while serializing: I/O error: {NO_ROOM} (os error 28)")
        if function.startswith("write"):
            path, content = arguments
            with open(path, "w" if isinstance(content, str) else "wb") as file:
                file.write(content[: len(content) // 2])
        named = [] if function.startswith(("fsync", "write")) else [str(arguments[0])]
        raise OSError(errno.ENOSPC, NO_ROOM, *named)


@pytest.fixture
def four(toy_run) -> RunConfig:
    """Four updates, saved after two and after four, one checkpoint kept."""
    return dataclasses.replace(toy_run, steps=4, save_every=2, keep=1, log_every=1)


@pytest.fixture(scope="module")
def whole(toy_world, tmp_path_factory) -> Path:
    """The folder of those four updates where nothing happened to them."""
    out = tmp_path_factory.mktemp("whole") / "run"
    sizes = {"batch_size": 7, "micro_batch_tokens": 60, "max_length": 19}
    rates = {"learning_rate": 1e-2, "warmup_steps": 2}
    folders = {"teacher": toy_world / "teacher", "data": toy_world / "corpus", "out": out}
    run = RunConfig(**folders, **sizes, **rates, steps=4, keep=1, log_every=1, device="cpu")
    train.train(run.resolved())
    return out


def complaint_of(run: RunConfig, capsys) -> str:
    """Train, and return the one line that it ends with."""
    assert run_command(lambda: train.train(run)) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert complaint.startswith(f"error: {run.out}")
    assert not list(run.out.rglob("*.partial"))
    return complaint


def assert_ends_like(whole: Path, run: RunConfig) -> None:
    """After a resumption: weights, moments, state, log and result, to the last bit."""
    train.train(dataclasses.replace(run, resume=True))
    for name in FILES:
        saved = [folder / "step_000004" / name for folder in (whole, run.out)]
        assert saved[0].read_bytes() == saved[1].read_bytes(), name
    assert sorted(path.name for path in run.out.iterdir()) == [
        "config.json", "lock", "metrics.jsonl", "step_000004", "student",
    ]  # fmt: skip
    for file in (whole / "student").iterdir():
        assert file.read_bytes() == (run.out / "student" / file.name).read_bytes()
    steps = [line["step"] for line in read_metrics(run.out / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4, 4]


POINTS = 16  # operations of a save that a full disk can refuse
POINTS_OF_RESULT = 14


def cases(all_of_them, quick) -> list:
    """Test cases, slow but for a few."""
    marks = {case: [] if case in quick else [pytest.mark.slow] for case in all_of_them}
    return [pytest.param(case, marks=found) for case, found in marks.items()]


def test_every_point_is_tried(four, monkeypatch):
    """Nothing of a save is left out of the tests below."""
    disk = FullDisk(monkeypatch, "step_000004", float("inf"))
    save_model, before = train.save_model, []

    def saving(*arguments, **options):
        before.append(disk.done)
        save_model(*arguments, **options)

    monkeypatch.setattr(train, "save_model", saving)
    train.train(four)
    assert [*before, disk.done] == [POINTS, POINTS + POINTS_OF_RESULT]


@pytest.mark.parametrize("room", cases(range(POINTS), quick=(0, 2, 6, 11, 15)))
def test_a_save_that_does_not_fit(four, whole, monkeypatch, capsys, room):
    with monkeypatch.context() as patch:
        FullDisk(patch, "step_000004", room)
        complaint = complaint_of(four, capsys)
    assert NO_ROOM in complaint
    assert ("step_000002" if room == POINTS - 1 else "step_000004") in complaint
    whole_already = room >= POINTS - 2  # what failed: the sync of its name, the old one's removal
    kept = ["step_000002", "step_000004"] if whole_already else ["step_000002"]
    assert [path.name for path in checkpoints(four.out)] == kept
    if whole_already:
        shutil.rmtree(four.out / "step_000002")
    assert_ends_like(whole, four)


@pytest.mark.parametrize("room", cases(range(POINTS_OF_RESULT), quick=(3, 13)))
def test_a_result_that_does_not_fit(four, whole, monkeypatch, capsys, room):
    with monkeypatch.context() as patch:
        FullDisk(patch, "student", room)
        complaint = complaint_of(four, capsys)
    assert NO_ROOM in complaint
    assert "student" in complaint
    assert [path.name for path in checkpoints(four.out)] == ["step_000004"]
    assert (four.out / "student").exists() == (room == POINTS_OF_RESULT - 1)
    assert_ends_like(whole, four)


@pytest.mark.parametrize(
    "room",
    cases(range(POINTS_OF_RESULT + 1), quick=(13,)),
)
def test_a_result_that_stood_there_is_not_lost(four, whole, monkeypatch, capsys, room):
    """Written anew by a resumed run: one operation more, the old one steps aside."""
    train.train(four)
    with monkeypatch.context() as patch:
        FullDisk(patch, "student", room)
        assert NO_ROOM in complaint_of(dataclasses.replace(four, resume=True), capsys)
    aside = four.out / "student.replaced"  # for the moment between two renames
    load_model(four.out / "student" if (four.out / "student").exists() else aside)
    shutil.rmtree(four.out / "student.replaced", ignore_errors=True)
    assert_ends_like(whole, four)


def test_a_log_that_does_not_fit(four, whole, monkeypatch, capsys):
    """/dev/full takes nothing; the third update is told to it."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")

    def opened(path, mode="r", **options):
        steps = [line["step"] for line in read_metrics(path)] if path.exists() else []
        return open("/dev/full" if mode == "a" and steps[-1:] == [2] else path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runlog, "open", opened, raising=False)
        complaint = complaint_of(four, capsys)
    assert complaint == f"error: {four.out / 'metrics.jsonl'}: {NO_ROOM}\n"
    assert [path.name for path in checkpoints(four.out)] == ["step_000002"]
    assert_ends_like(whole, four)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write further into any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Bytes, and tenths of optimizer.safetensors; model.safetensors is half as large. The first ones
# are too few for lock, config.json and metrics.jsonl.
LIMITS = [0, 100, 1500, *(f"{tenth}/10" for tenth in range(1, 10))]


@pytest.mark.parametrize("limit", cases(LIMITS, quick=(0, 1500, "3/10", "8/10")))
def test_a_file_that_may_not_grow(four, whole, capsys, limit):
    train.train(dataclasses.replace(four, keep=2))
    for name in ("step_000004", "student"):  # as if it had been killed after step 3
        shutil.rmtree(four.out / name)
    if isinstance(limit, str):
        size = (four.out / "step_000002" / "optimizer.safetensors").stat().st_size
        limit = size * int(limit[0]) // 10
    with files_of_at_most(limit):
        complaint = complaint_of(dataclasses.replace(four, resume=True), capsys)
    assert "File too large" in complaint
    assert [path.name for path in checkpoints(four.out)] == ["step_000002"]
    assert_ends_like(whole, four)


@pytest.mark.parametrize("limit", cases([0, 10, 100, 800], quick=(100,)))
def test_a_run_that_cannot_begin_begins_when_there_is_room(four, whole, capsys, limit):
    with files_of_at_most(limit):
        complaint = complaint_of(four, capsys)
    assert "File too large" in complaint
    assert [path.name for path in four.out.iterdir()] == ["lock"]
    train.train(four)  # without --resume: nothing is there
    assert_ends_like(whole, four)


# In a mount namespace of its own: arguments are world, an empty folder, files of the whole run.
ON_A_REAL_DISK = """
import contextlib, dataclasses, io, json, os, shutil, subprocess, sys
from pathlib import Path
import train
from minibert.run_config import RunConfig
from minibert.errors import run_command
from minibert.training.checkpoint import checkpoints

world, disk = map(Path, sys.argv[1:3])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
run = RunConfig(
    teacher=world / "teacher", data=world / "corpus", out=disk / "run", batch_size=7,
    micro_batch_tokens=60, max_length=19, learning_rate=1e-2, warmup_steps=2, steps=2,
    keep=1, log_every=1, device="cpu",
).resolved()
train.train(run)
run = dataclasses.replace(run, steps=4, resume=True)
shutil.copytree(run.out, world / "begun")
needed = sum(file.stat().st_size for file in (run.out / "step_000002").iterdir())
found = []
for tenth in range(10):
    room = needed * tenth // 10
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "filler").write_bytes(bytes(free - room))
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        status = run_command(lambda: train.train(run))
    names = [path.name for path in checkpoints(run.out)]
    partial = list(map(str, run.out.rglob("*.partial")))
    (disk / "filler").unlink()
    again = run_command(lambda: train.train(run))
    same = [
        (run.out / "step_000004" / name).read_bytes() == (Path(sys.argv[3]) / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    ]
    found.append([status, told.getvalue(), names, partial, again, all(same)])
    shutil.rmtree(run.out)
    shutil.copytree(world / "begun", run.out)
print("FOUND" + json.dumps(found))
"""


@pytest.mark.slow
def test_a_disk_that_is_full(toy_world, whole, tmp_path):
    """A small file system with room for 0 to 9 tenths of a checkpoint."""
    namespace = ["unshare", "--mount", "--map-root-user"]
    shutil.copytree(toy_world, tmp_path / "world")
    (tmp_path / "disk").mkdir()
    try:
        mount = [*namespace, "mount", "-t", "tmpfs", "tmpfs", tmp_path / "disk"]
        tried = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("this system has no `unshare`")
    if tried.returncode != 0:
        pytest.skip(f"this user may not mount a file system: {tried.stderr.strip()}")
    arguments = [tmp_path / "world", tmp_path / "disk", whole / "step_000004"]
    done = subprocess.run(
        [*namespace, sys.executable, "-c", ON_A_REAL_DISK, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("FOUND")[1])
    assert len(found) == 10
    out = tmp_path / "disk" / "run"
    for status, told, names, partial, again, same in found:
        assert (status, names, partial, again, same) == (2, ["step_000002"], [], 0, True)
        assert told.startswith(f"error: {out}")
        assert NO_ROOM in told
        assert told.count("\n") == 1
