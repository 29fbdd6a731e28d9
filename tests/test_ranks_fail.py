"""When one rank fails all end, within a minute, and the first cause stands there in one line.

torchrun may then start them again, and the run goes on.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from conftest import ROOT
from ranks import Ranks, command_line, free_port

import train as train_script
from minibert.data.corpus import Corpus
from minibert.training.checkpoint import checkpoints, step_of
from minibert.training.runlog import read_metrics

ENDLESS = ("--steps", 1_000_000, "--save-every", 1_000_000, "--log-every", 1)
LOST = "rank {} ends, for it lost touch with another\n"


@pytest.fixture
def folders(toy_world, tmp_path) -> dict[int, Path]:
    """A working directory for each of two ranks, with a teacher and a corpus of its own."""
    folders = {number: tmp_path / f"rank {number}" for number in (0, 1)}
    for folder in folders.values():
        for name in ("teacher", "corpus"):
            shutil.copytree(toy_world / name, folder / name)
    return folders


def begin(folders: dict[int, Path], *flags: Any, function=command_line, **options) -> Ranks:
    """`train.py` on two ranks, each in its folder; the paths are the same for both."""
    flags = ("--max-length", 19, "--batch-size", 7, "--device", "cpu", *flags)
    flags = ("--teacher", "teacher", "--data", "corpus", "--out", "run", *flags)
    told = folders[0].with_name("told")
    return Ranks(2, function, *flags, folder=told, where=folders, **options)


def end(ranks: Ranks) -> tuple[list[int | None], str]:
    """Exit statuses and what all have printed on standard error, the ranks in their order."""
    ranks.wait()
    return ranks.statuses, "".join(ranks.complaints)


def updates(folders: dict[int, Path]) -> list[int]:
    log = folders[0] / "run" / "metrics.jsonl"
    lines = read_metrics(log) if log.exists() else []
    return [line["step"] for line in lines if "loss" in line]


def wait_for_updates(ranks: Ranks, folders: dict[int, Path]) -> None:
    """Until the first is logged."""
    while not updates(folders):
        assert ranks.statuses.count(None) == len(ranks.statuses), ranks.complaints
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--mlm-weight", "nan"), "argument --mlm-weight: 'nan' is not a number"),
        (("--steps", 3, "--warmup-steps", 4), "--warmup-steps 4 of --steps 3"),
        (("--resume", "--seed", 1, "--out", "nowhere", "--teacher", "none"), "none: no such"),
        (("--batch-size", 1), "--batch-size 1 for 2 processes"),
        (("--teacher-layers", "3,1"), "teacher layers 3,1"),
    ],
)
def test_a_wrong_flag_is_told_once(folders, flags, complaint):
    statuses, told = end(begin(folders, *flags))
    assert statuses == [2, 2]
    assert complaint in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert not (folders[0] / "run").exists()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("thing", ["teacher/model.safetensors", "corpus/meta.json"])
def test_a_rank_that_learns_from_something_else_is_refused(folders, thing, number):
    path = folders[number] / thing
    content = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(content.replace(b'"corpus_sha256": "', b'"corpus_sha256": "0'))
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    statuses, told = end(begin(folders))
    assert statuses == [2, 2]
    assert told == f"error: rank 0: rank 1 has another {thing.split('/')[0]}\n"
    assert not (folders[0] / "run").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_rank_lacks_is_told_once(folders, number):
    (folders[number] / "corpus" / "offsets.npy").unlink()
    statuses, told = end(begin(folders))
    assert statuses == [2, 2]
    assert told == f"error: rank {number}: corpus/offsets.npy: no such file\n"


def test_a_folder_that_holds_a_run_is_refused_once(folders):
    (folders[0] / "run").mkdir()
    (folders[0] / "run" / "config.json").write_text("{}")
    statuses, told = end(begin(folders))
    assert statuses == [2, 2]
    assert told.startswith("error: rank 0: run holds a run; --resume goes on with it")
    assert told.count("\n") == 1


@pytest.mark.parametrize("number", [0, 1])
def test_damage_that_shows_on_the_way_ends_all(folders, number):
    """A document that one rank cannot read: the others lose touch with it."""
    corpus = folders[number] / "corpus"
    offsets = np.load(corpus / "offsets.npy")
    tokens = np.memmap(corpus / "tokens.bin", dtype="<u2", mode="r+")
    last = Corpus.open(corpus).num_training - 1
    tokens[offsets[last]] = 65_535
    tokens.flush()
    statuses, told = end(begin(folders, *ENDLESS))
    assert statuses[number] == 2 and statuses[1 - number] == 1
    expected = {
        number: f"error: rank {number}: corpus/tokens.bin: damaged; document {last} holds 65535\n",
        1 - number: LOST.format(1 - number),
    }
    assert told == expected[0] + expected[1]


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_all(folders, number):
    """Its worker, an orphan, holds its connections for some seconds more."""
    ranks = begin(folders, *ENDLESS)
    wait_for_updates(ranks, folders)
    ranks.processes[number].kill()
    seconds = ranks.wait()
    assert seconds < 30
    assert ranks.statuses[number] == -signal.SIGKILL
    assert ranks.statuses[1 - number] == 1
    assert "".join(ranks.complaints) == LOST.format(1 - number)


@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_to_one_rank_ends_all_at_one_step(folders, number):
    ranks = begin(folders, *ENDLESS)
    wait_for_updates(ranks, folders)
    ranks.processes[number].terminate()
    statuses, told = end(ranks)
    assert statuses == [128 + signal.SIGTERM] * 2
    assert told == "\nSIGTERM: after this update the run is saved and ends\n"
    (saved,) = checkpoints(folders[0] / "run")
    assert step_of(saved) == updates(folders)[-1]
    assert ranks.told[0].startswith(f"saved after {step_of(saved)} of 1000000 updates")
    assert ranks.told[1] == ""


def failing(number: str, how: BaseException, *flags: Any) -> int:
    """`train.py`, whose third update fails on one rank."""
    update = train_script.update

    def fails(*arguments):
        if os.environ["RANK"] == number and arguments[4] == 2:
            raise how
        return update(*arguments)

    train_script.update = fails
    return command_line(*flags)


def failing_by_our_fault(*flags: Any) -> int:
    return failing("1", ZeroDivisionError("our own fault"), *flags)


def interrupted_twice(*flags: Any) -> int:
    return failing("1", KeyboardInterrupt(), *flags)


def test_our_own_fault_shows_its_traceback_once(folders):
    ranks = begin(folders, *ENDLESS, function=failing_by_our_fault)
    statuses, _ = end(ranks)
    assert statuses == [1, 1]
    assert ranks.complaints[0] == LOST.format(0)
    assert ranks.complaints[1].count("Traceback") == 1
    assert ranks.complaints[1].endswith("ZeroDivisionError: our own fault\n")


def test_an_interrupt_of_one_rank_ends_all(folders):
    ranks = begin(folders, *ENDLESS, function=interrupted_twice)
    statuses, _ = end(ranks)
    assert statuses == [1, 130]
    assert ranks.complaints == [LOST.format(0), "interrupted\n"]


def killed_at_first(*flags: Any) -> int:
    """`train.py`, whose rank 1 is killed in its fifth update, and then begins after rank 0."""
    update, again = train_script.update, int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    def fails(*arguments):
        if os.environ["RANK"] == "1" and not again and arguments[4] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*arguments)

    train_script.update = fails
    time.sleep(1.0 * int(os.environ["RANK"]) * again)
    return command_line(*flags)


def attempt(number: int, store: dist.TCPStore, on_a_machine: int) -> dict[int, dict[str, Any]]:
    """What torchrun says when it starts ranks for the first time (0) or again."""
    place = {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    place |= {"TORCHELASTIC_RESTART_COUNT": number, "LOCAL_WORLD_SIZE": on_a_machine}
    return {0: place, 1: place}


@pytest.mark.parametrize("on_a_machine", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_ranks_that_are_started_again_go_on(folders, on_a_machine):
    """torchrun keeps one store for all attempts; what the first has left there is no use."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    flags = ("--steps", 7, "--save-every", 3, "--log-every", 1)
    options = {"function": killed_at_first, "environment": attempt(0, store, on_a_machine)}
    assert end(begin(folders, *flags, **options)) == ([1, -signal.SIGKILL], LOST.format(0))
    assert [step_of(saved) for saved in checkpoints(folders[0] / "run")] == [3]
    options["environment"] = attempt(1, store, on_a_machine)
    assert end(begin(folders, *flags, **options)) == ([0, 0], "")
    assert updates(folders) == [1, 2, 3, 4, 5, 6, 7]


RESTARTED = {"TORCHELASTIC_RESTART_COUNT": 1}


@pytest.mark.parametrize("number", [0, 1])
def test_one_rank_that_knows_of_a_restart_is_enough(folders, number):
    """Of two machines torchrun counts the attempts on that where a rank had ended."""
    flags = ("--steps", 2, "--log-every", 1, "--save-every", 1)
    assert end(begin(folders, *flags)) == ([0, 0], "")
    shutil.rmtree(folders[0] / "run" / "step_000002")
    alone = {"LOCAL_WORLD_SIZE": 1}
    environment = {number: alone | RESTARTED, 1 - number: alone}
    ranks = begin(folders, *flags, environment=environment)
    assert end(ranks) == ([0, 0], "")
    assert updates(folders) == [1, 2]


def test_a_restart_goes_on_with_no_other_run(folders):
    """The first attempt was refused: --out is another run's. So is the second."""
    assert end(begin(folders, "--steps", 2, "--seed", 3)) == ([0, 0], "")
    ranks = begin(folders, "--steps", 4, environment={0: RESTARTED, 1: RESTARTED})
    statuses, told = end(ranks)
    assert statuses == [2, 2]
    assert told.startswith("error: rank 0: run holds a run; --resume goes on with it")
    assert told.count("\n") == 1


def torchrun(world: Path, *arguments: Any) -> subprocess.Popen:
    """`torchrun ARGUMENTS`: torchrun's own, the script, its flags; on the toy world."""
    flags = ("--teacher", world / "teacher", "--data", world / "corpus", "--device", "cpu")
    flags += ("--max-length", 19, "--batch-size", 7)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, (*arguments, *flags))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


FALLING = f"""
import os, sys
import train
from minibert.errors import run_command
update = train.update
def falls(*arguments):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if arguments[4] == 5:
            os.kill(os.getpid(), {signal.SIGKILL:d})
    return update(*arguments)
train.update = falls
if __name__ == "__main__":
    raise SystemExit(run_command(train.main))
"""


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_has_fallen(toy_world, tmp_path):
    """Killed at update 6, saved at 4; the log ends as that of a run that was never stopped."""
    script, out = tmp_path / "falling.py", tmp_path / "run"
    script.write_text(FALLING)
    flags = ("--out", out, "--steps", 8, "--save-every", 4, "--log-every", 1)
    run = torchrun(toy_world, "--nproc-per-node", 2, "--max-restarts", 3, script, *flags)
    told, complaints = run.communicate(timeout=120)
    assert run.returncode == 0, complaints
    assert f"written: {out}/student" in told
    assert LOST.format(0) in complaints
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.slow
def test_torchrun_shows_our_line(toy_world, tmp_path):
    """Among its own report."""
    flags = ("--nproc-per-node", 2, ROOT / "train.py", "--out", tmp_path / "run")
    run = torchrun(toy_world, *flags, "--teacher-layers", "3,1")
    told, complaints = run.communicate(timeout=120)
    assert run.returncode == 1
    assert told == ""
    assert complaints.count("error: rank 0: teacher layers 3,1; expected ascending numbers") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_machines(toy_world, tmp_path):
    """Two torchruns of one rank each that meet at a port."""
    meeting = ("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "toy")
    meeting += ("--rdzv-endpoint", f"localhost:{free_port()}")
    flags = (*meeting, ROOT / "train.py", "--out", tmp_path / "run", "--steps", 3)
    runs = [torchrun(toy_world, *flags) for _ in range(2)]
    told = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    printed = "".join(out for out, _ in told)
    assert printed.count("written") == 1
