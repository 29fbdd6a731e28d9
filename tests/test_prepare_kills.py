"""A `prepare` that is stopped, in whatever way, loses no finished file; given again, it goes on.

What comes out in the end is, byte for byte, what comes out when nothing happens.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path

import pytest
from conftest import ROOT
from prepare_toys import command, content, run, write_inputs, write_vocabulary

from minibert.data.shards import META

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes by /proc")
resource = pytest.importorskip("resource")

TIMES = 120  # so long that each file takes a tenth of a second
PATIENCE = 60  # seconds


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[list[Path], dict[str, bytes]]:
    """Four files, and the corpus that they come to; a vocabulary beside it."""
    folder = tmp_path_factory.mktemp("inputs")
    write_vocabulary(folder)
    inputs, _ = write_inputs(folder, TIMES)
    done = run(inputs, folder / "whole", "--workers", "2")
    assert (done.returncode, done.stderr) == (0, b"")
    return inputs, content(folder / "whole")


@pytest.fixture
def out(tmp_path) -> Path:
    write_vocabulary(tmp_path)
    return tmp_path / "out"


def started(inputs: list[Path], out: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(inputs, out, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(happened: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait for something that happens while a process runs."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


def finished(out: Path) -> list[Path]:
    """Whole shards."""
    return [
        meta.parent for meta in out.parent.glob(f"out.shards/*/{META}") if not meta.parent.suffix
    ]


def begun(out: Path) -> list[Path]:
    """Shards that are being written."""
    return list(out.parent.glob("out.shards/*.partial/tokens.bin"))


def children(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in path.read_text().split()] if path.exists() else []


def is_running(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_gone(numbers: list[int]) -> None:
    """Processes end, soon."""
    end = time.monotonic() + PATIENCE
    while any(is_running(number) for number in numbers):
        assert time.monotonic() < end
        time.sleep(0.01)


def made_at(path: Path) -> int:
    """When, or 0 where there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def assert_goes_on(world, out: Path, *flags: str) -> None:
    """Given again the command comes to its end; nothing else is left behind."""
    inputs, whole = world
    kept = {folder / META: made_at(folder / META) for folder in finished(out)}
    process = started(inputs, out, *flags)
    while process.poll() is None:  # what is finished is not made again
        for path, when in kept.items():
            assert made_at(path) in (when, 0)  # at last it is removed
        time.sleep(0.01)
    assert (process.communicate()[1], process.returncode) == ("", 0)
    assert content(out) == whole
    assert {path.name for path in out.parent.iterdir()} == {"vocab.txt", "out"}


# kill -9


@pytest.mark.parametrize(
    "happened",
    [
        pytest.param(begun, marks=pytest.mark.slow),
        lambda out: len(finished(out)) >= 2,
        pytest.param(lambda out: (out.parent / "out.partial").exists(), marks=pytest.mark.slow),
    ],
)
def test_killed_outright(world, out, happened):
    """While shards are made, between them, in the merging; the workers end as well."""
    process = started(world[0], out, "--workers", "2")
    wait_until(lambda: happened(out), process)
    workers = children(process)
    process.kill()
    process.communicate()
    assert not out.exists()
    assert_gone(workers)
    assert_goes_on(world, out, "--workers", "2")


def assert_survives_ten_kills(inputs: list[Path], out: Path, whole: dict[str, bytes], *flags: str):
    """At random moments of one run after the other; one that comes to its end begins anew."""
    draw = random.Random(len(flags))
    begin, seconds, kills = time.monotonic(), 60.0, 0

    def begin_anew_if_it_stands():
        if out.exists() and not out.with_name("out.shards").exists():  # killed behind its end
            assert content(out) == whole
            shutil.rmtree(out)

    while kills < 10:
        begin_anew_if_it_stands()
        process = started(inputs, out, *flags)
        try:
            process.communicate(timeout=draw.uniform(0.2, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        else:
            assert (process.returncode, content(out)) == (0, whole)
            seconds = min(seconds, time.monotonic() - begin)  # of the first: undisturbed
            shutil.rmtree(out)
    begin_anew_if_it_stands()
    assert run(inputs, out, *flags).returncode == 0
    assert content(out) == whole
    assert {path.name for path in out.parent.iterdir()} == {"vocab.txt", "out"}


def test_killed_between_its_result_and_the_end(world, out):
    """Nothing but tidying up was left to do; another corpus is not taken for this one."""
    inputs, _ = world
    assert run(inputs, out).returncode == 0

    def left():
        (out.parent / "out.shards" / "0123456789abcdef").mkdir(parents=True)
        (out.parent / "out.shards" / "lock").touch()
        return content(out)

    for changed in (inputs[:3], [*inputs[1:], inputs[0]], [*inputs, "--held-out", "0.1"]):
        before = left()
        again = run(changed, out)
        assert (again.returncode, content(out)) == (2, before)
        assert again.stderr.startswith(f"error: {out} exists already; ".encode())
        assert not (out.parent / "out.shards").exists()
    left()
    assert_goes_on(world, out)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "3"])
def test_killed_ten_times_at_random(world, out, workers):
    inputs, whole = world
    assert_survives_ten_kills(inputs, out, whole, "--workers", workers)


@pytest.mark.slow
def test_killed_ten_times_on_real_data(shared_data, tmp_path):
    names = ("pubmed-text/cohen2006_abstracts.tsv.gz", "pubmed-xml/pubmed21n1298.xml.gz")
    inputs = [shared_data / name for name in names]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copyfile(shared_data / "vocab" / "vocab.txt", tmp_path / folder / "vocab.txt")
    assert subprocess.run(command(inputs, tmp_path / "one" / "out")).returncode == 0
    whole = content(tmp_path / "one" / "out")
    assert_survives_ten_kills(inputs, tmp_path / "two" / "out", whole, "--workers", "2")


# Ctrl-C


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_ctrl_c(world, out, workers):
    """The whole group of processes gets it from a terminal."""
    line = command(world[0], out, "--workers", workers)
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: finished(out) and begun(out), process)
    workers = children(process)
    assert all(os.getpgid(worker) != process.pid for worker in workers)
    os.killpg(process.pid, signal.SIGINT)
    complaint = process.communicate(timeout=PATIENCE)[1]
    done = len(finished(out))
    assert process.returncode == 130
    assert complaint == (
        f"interrupted; {done} of 4 files are done, the same command goes on from there\n"
    )
    assert not begun(out)
    assert_gone(workers)
    assert_goes_on(world, out)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_before_anything_is_done_leaves_nothing(world, out, workers):
    process = started(world[0], out.parent / "new" / "out", "--workers", workers)
    wait_until(lambda: list(out.parent.glob("new/out.shards/*.partial")), process)
    process.send_signal(signal.SIGINT)
    complaint = process.communicate(timeout=PATIENCE)[1]
    if "0 of 4" in complaint:  # else it was too quick
        assert {path.name for path in out.parent.iterdir()} == {"vocab.txt"}
    assert process.returncode == 130


# Workers that die


def test_a_killed_worker_ends_the_run_in_one_line(world, out):
    """As the system kills one when memory runs out."""
    process = started(world[0], out, "--workers", "2")
    wait_until(lambda: finished(out) and begun(out), process)
    workers = children(process)
    os.kill(workers[0], signal.SIGKILL)
    complaint = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2
    assert complaint.count("\n") == 1
    assert complaint.startswith(f"error: {world[0][0].parent}")
    assert "the process that read it was killed (SIGKILL); too little memory?; " in complaint
    assert f"; {len(finished(out))} of 4 files are done, the same command" in complaint
    assert_gone(workers)
    assert_goes_on(world, out, "--workers", "2")


def test_a_worker_ends_with_its_parent():
    """Also one that is given nothing to do, or is at a long file."""
    ours, theirs = Pipe()
    code = f"from minibert.data.workers import work; work({theirs.fileno()})"
    pipes = {"stdin": subprocess.PIPE, "pass_fds": [theirs.fileno()]}
    worker = subprocess.Popen([sys.executable, "-c", code], **pipes)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(timeout=0.5)
    worker.stdin.close()
    assert worker.wait(timeout=PATIENCE) == 1
    ours.close()


# Two at once


@pytest.mark.slow
def test_a_second_one_is_refused(world, out):
    first = started(world[0], out, "--workers", "2")
    wait_until(lambda: begun(out), first)
    os.kill(first.pid, signal.SIGSTOP)  # so that it is not done before the second has asked
    try:
        second = run(world[0], out)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    if first.poll() is None:
        holder = f"in use by process {first.pid} on "
        assert second.stderr.startswith(f"error: {out}.shards: {holder}".encode())
        assert (second.returncode, second.stderr.count(b"\n")) == (2, 1)
    assert (first.communicate(timeout=PATIENCE)[1], first.returncode) == ("", 0)
    assert content(out) == world[1]


# A bad file


def test_a_bad_file_keeps_what_was_done(world, out):
    """Once it is mended, or left out, the same command goes on."""
    inputs, _ = world
    bad = out.parent / "z.txt"
    bad.write_bytes(b"x" * 3_000_000 + b"\n\xff")
    done = run([*inputs, bad], out, "--workers", "1")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {bad}: line 2: not UTF-8".encode())
    assert b"; 4 of 5 files are done, the same command goes on" in done.stderr
    assert done.stderr.count(b"\n") == 1
    bad.unlink()
    assert_goes_on(world, out)


# A full disk


@pytest.mark.parametrize(
    ("workers", "share"),
    [
        ("1", 0),
        ("2", 0.3),
        *(
            pytest.param(workers, share, marks=pytest.mark.slow)
            for workers in ("1", "2")
            for share in (0.001, 0.2, 0.7, 0.99)
        ),
    ],
)
def test_a_full_disk_is_one_line(world, out, workers, share):
    """By a limit on the size of files; once there is room, it goes on."""
    inputs, whole = world
    limit = int(share * len(whole["tokens.bin"]))

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run(inputs, out.parent / "new" / "out", "--workers", workers, preexec_fn=limited)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {out.parent / 'new' / 'out'}".encode())
    assert b"File too large" in done.stderr
    assert done.stderr.count(b"\n") == 1
    kept = list((out.parent / "new").rglob(META)) if share else []
    assert (out.parent / "new").exists() == bool(kept)
    assert (b" of 4 files are done" in done.stderr) == bool(kept)
    assert not list(out.parent.rglob("*.partial"))
    again = run(inputs, out.parent / "new" / "out", "--workers", workers)
    assert (again.returncode, again.stderr) == (0, b"")
    assert content(out.parent / "new" / "out") == whole
    assert [path.name for path in (out.parent / "new").iterdir()] == ["out"]


# In a mount namespace of its own: an empty folder, how large it is to be, then the command.
ON_A_REAL_DISK = """
import subprocess, sys
disk, size, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
done = subprocess.run(command, capture_output=True, text=True)
assert done.returncode == 2 and done.stderr.count("\\n") == 1, done
print(done.stderr)
subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
subprocess.run(command, check=True)
subprocess.run(["cp", "-r", f"{disk}/out", f"{disk}/../copy"], check=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 1.0, 1.5, 2.0])
def test_a_disk_that_is_full(world, out, share):
    """The estimate, the exact count or the system says so: all in one line."""
    inputs, whole = world
    disk = out.parent / "disk"
    disk.mkdir()
    size = sum(map(len, whole.values()))
    namespace = ["unshare", "--mount", "--map-root-user"]
    line = command(inputs, disk / "out", "--workers", "2")
    try:
        done = subprocess.run(
            [*namespace, sys.executable, "-c", ON_A_REAL_DISK, disk, str(int(share * size)), *line],
            capture_output=True,
            text=True,
            timeout=100,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    except FileNotFoundError:
        pytest.skip("this system has no `unshare`")
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(disk) in done.stdout
    assert content(out.parent / "copy") == whole
