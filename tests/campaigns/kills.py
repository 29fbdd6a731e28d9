"""The kill campaign: a run that is killed, at whatever moment, loses nothing.

    python tests/campaigns/kills.py --kills 100             kill -9 at random moments
    python tests/campaigns/kills.py --kills 20 --ranks 2    the same for a run of two ranks
    python tests/campaigns/kills.py --kills 6 --torchrun    a rank at a time; torchrun restarts them
    python tests/campaigns/kills.py --everywhere            before each change to its folder

Toy runs of train.py (dropout on) are killed and started again with --resume until that many kills
are made, then left alone to their end. Final weights, moments, student and log must be those of a
run that was never disturbed, to the last bit; nothing may be left behind, nothing may hang, and no
kill may cost a checkpoint. Where each kill hit is read from what it left in the folder.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaigns.toy_runs import (
    EVAL_EVERY,
    KEEP,
    PATIENCE,
    ROOT,
    Process,
    arguments,
    differences,
    forked,
    free_port,
    logged,
    make_world,
    newest_whole,
    nobody_left,
    rank_of,
    started,
)
from commands import living

from minibert.training.checkpoint import checkpoints

STEPS = 60
RESTARTS = 3  # that torchrun is allowed
PLACES = ("start-up", "update", "saving", "evaluating", "final")
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")
Places = dict[str, tuple[int, int]]


def standing(out: Path) -> Places:
    """What stands in a run folder: name -> (inode, time of its last change)."""
    found = {}
    for path in out.glob("*"):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue  # a .partial on its way
        found[path.name] = (stat.st_ino, stat.st_ctime_ns)
    return found


def touched(out: Path, before: Places) -> set[str]:
    return {name for name, what in standing(out).items() if before.get(name) != what}


def where(out: Path, before: Places) -> str:
    """In which part of an attempt a kill hit; `before` is what stood there when it began."""
    names = touched(out, before)
    saved = {name for name in names if name.startswith("step_")}
    if "metrics.jsonl" not in names:
        return "start-up"
    if any(name.endswith(".partial") for name in saved) or len(checkpoints(out)) > KEEP:
        return "saving"
    if newest_whole(out) == STEPS:
        return "final"  # the last evaluation, and student/
    return "evaluating" if evaluation_is_due(out) else "update"


def evaluation_is_due(out: Path) -> bool:
    lines = logged(out)
    done = lines[-1]["step"] if lines else 0
    return done % EVAL_EVERY == 0 and not (lines and "held_out_mlm_loss" in lines[-1])


def wait_for(there: Callable[[], bool], processes: list[Process]) -> None:
    """Until something is there, or one of the processes has ended."""
    deadline = time.monotonic() + PATIENCE
    while not there() and not any(process.has_ended() for process in processes):
        assert time.monotonic() < deadline, f"nothing happened for {PATIENCE} s"
        time.sleep(0.0005)


def wait_for_a_moment(out: Path, processes: list[Process], draw: Random, joined: bool) -> None:
    """Until a moment to kill at, every other one in or near saving, or the attempt's end.

    joined: not before the ranks know each other, which the lock tells.
    """
    begun, log = standing(out), out / "metrics.jsonl"
    aims = ("start-up", "update", "evaluating", "saving", "saving", "saving")
    aim = "final" if newest_whole(out) > STEPS - 9 and draw.random() < 0.8 else draw.choice(aims)
    if joined:
        wait_for(lambda: "lock" in touched(out, begun), processes)
    if aim != "start-up":
        wait_for(lambda: log.name in touched(out, begun), processes)
        size = log.stat().st_size + draw.randint(0, 2_500)  # some 450 a line
        if aim == "final":
            wait_for((out / f"step_{STEPS:06d}").exists, processes)
        else:
            wait_for(lambda: log.stat().st_size >= size, processes)
    if aim == "evaluating":
        wait_for(lambda: evaluation_is_due(out), processes)
    if aim == "saving":
        wait_for(lambda: any(out.glob("step_*.partial")), processes)
    longest = {"start-up": 0.4, "saving": draw.choice((0.005, 0.03)), "evaluating": 0.005}
    time.sleep(draw.uniform(0, longest.get(aim, 0.02)))


def kill(processes: list[Process], one_rank: bool, draw: Random) -> str | None:
    """Kill a run: all of it, its main process alone, its reader of batches, or one of its ranks.

    Returns what is wrong with how the rest of it ended.
    """
    victim = draw.choice(processes)
    readers = [pid for pid in living(victim.pid) if pid != victim.pid]
    if len(processes) == 1 and readers and draw.random() < 0.1:
        os.kill(readers[0], signal.SIGKILL)
        return ending(victim, 2, "error: ")
    for process in [victim] if one_rank else processes:
        process.kill(alone=draw.random() < 0.5)
    told = "rank {} ends, for it lost touch with another"
    endings = [
        ending(process, 1, told.format(rank))
        for rank, process in enumerate(processes)
        if one_rank and process is not victim
    ]
    return "; ".join(filter(None, endings)) or None


def ending(process: Process, status: int, told: str) -> str | None:
    """What is wrong with how a process ends that has lost another: it has a minute, and a line."""
    if process.wait(seconds=60) == 0:
        return None  # it needed nothing more of the other
    lines = process.complaint().strip().splitlines()
    if process.status == status and len(lines) == 1 and lines[0].startswith(told):
        return None
    return f"status {process.status}, {lines}"


def disturbed(
    world: Path, out: Path, kills: int, ranks: int, draw: Random
) -> tuple[Counter, list[str]]:
    """A run that is killed up to `kills` times on its way: where, and what went wrong."""
    places, problems, groups = Counter(), [], []
    statuses = [-9]
    while any(statuses):
        before, whole, problem, killed = standing(out), newest_whole(out), None, False
        processes = started(arguments(world, out, STEPS, draw.randint(1, 3)), out, ranks)
        groups += [process.pid for process in processes]
        with nobody_left(processes):
            if places.total() < kills:
                one_rank = ranks > 1 and draw.random() < 0.5
                wait_for_a_moment(out, processes, draw, joined=one_rank)
                if not any(process.has_ended() for process in processes):
                    problem, killed = kill(processes, one_rank, draw), True
            statuses = [process.wait() for process in processes]
        if any(statuses) and not killed:
            told = [process.complaint() for process in processes]
            return places, [*problems, f"not killed, it ended with {statuses}: {told}"]
        if any(statuses):
            places[where(out, before)] += 1
        if newest_whole(out) < whole:
            problem = f"after {whole} updates were saved, {newest_whole(out)} are"
        problems += [problem] * (problem is not None)
    return places, problems + left(groups)


def left(groups: list[int]) -> list[str]:
    """Readers of batches whose run was killed are to end by themselves; those that do not."""
    deadline = time.monotonic() + 60
    while True:
        pids = [pid for group in groups for pid in living(group)]
        if not pids or time.monotonic() > deadline:
            return [f"still there after a minute: {pids}"] if pids else []
        time.sleep(0.1)


def restarted(
    world: Path, out: Path, kills: int, ranks: int, draw: Random
) -> tuple[Counter, list[str]]:
    """A run under torchrun, up to RESTARTS of whose ranks are killed, one after another."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", ranks]
    command += ["--max-restarts", RESTARTS, "--master-port", free_port(), ROOT / "train.py"]
    command = [*map(str, command), *arguments(world, out, STEPS, draw.randint(1, 3))]
    command.remove("--resume")  # restarted ranks do so by themselves
    told = out.with_name(f"{out.name}.told")
    launcher = forked(lambda: os.execv(sys.executable, [sys.executable, *command]), told)
    places, problems = Counter(), []
    with nobody_left([launcher]):
        while places.total() < min(kills, RESTARTS):
            before, whole = standing(out), newest_whole(out)
            wait_for_a_moment(out, [launcher], draw, joined=True)
            victims = rank_of(launcher.pid)
            if launcher.has_ended() or len(victims) < ranks:
                break
            os.kill(victims[places.total() % ranks], signal.SIGKILL)
            places[where(out, before)] += 1
            if newest_whole(out) < whole:
                problems.append(f"after {whole} updates were saved, {newest_whole(out)} are")
        if launcher.wait() != 0:
            problems.append(launcher.complaint())
    return places, problems


def campaign(scratch: Path, kills: int, ranks: int, by_torchrun: bool, draw: Random) -> bool:
    """Make so many kills, in as many runs as that takes; whether all went well."""
    world, undisturbed = scratch / "world", scratch / "undisturbed"
    make_world(world)
    whole = started(arguments(world, undisturbed, STEPS, 2), undisturbed, ranks)
    assert not any(process.wait() for process in whole), whole[0].complaint()
    places, well, number = Counter(), True, 0
    while places.total() < kills:
        number += 1
        out, begun = scratch / f"run_{number}", time.monotonic()
        disturb = restarted if by_torchrun else disturbed
        found, problems = disturb(world, out, kills - places.total(), ranks, draw)
        problems = problems or differences(out, undisturbed)
        places, well = places + found, well and not problems
        print(f"run {number}: {table(found)}, {time.monotonic() - begun:.0f} s", flush=True)
        for problem in problems:
            print(f"  {problem}", flush=True)
    print(f"{number} runs: {table(places)}")
    return well


def table(places: Counter) -> str:
    parts = ", ".join(f"{place} {places[place]}" for place in PLACES if places[place])
    return f"{places.total()} kills ({parts})"


def everywhere(scratch: Path, events: tuple[str, ...]) -> bool:
    """Kill a run before each change to its folder, one after another; whether all went well.

    First a run of three updates with a checkpoint each, then the end of a finished run once more.
    """
    world, undisturbed = scratch / "world", scratch / "undisturbed"
    make_world(world)
    (whole,) = started(arguments(world, undisturbed, 3, 1), undisturbed)
    assert whole.wait() == 0, whole.complaint()
    well = True
    for finished in False, True:
        number, status, out = 0, -9, scratch / "out"
        while status == -9:
            number += 1
            shutil.rmtree(out, ignore_errors=True)
            if finished:
                shutil.copytree(undisturbed, out)
            flags = arguments(world, out, 3, 1)
            (run,) = started(flags, out, prepare=lambda n=number, o=out: end_before(n, events, o))
            status = run.wait()
            place = run.complaint().strip()
            if status == -9:
                (run,) = started(flags, out)
            problems = [run.complaint()] if run.wait() != 0 else differences(out, undisturbed)
            for problem in problems:
                well = False
                print(f"  killed before {place}: {problem.strip()}", flush=True)
        what = "its end once more" if finished else "a run"
        print(f"{what}: {number - 1} kills", flush=True)
    return well


def end_before(number: int, events: tuple[str, ...], out: Path) -> None:
    """Have this process kill itself before the `number`-th event in a folder, and tell which."""
    process, seen = os.getpid(), 0

    def look(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in events or os.getpid() != process:
            return
        path, *_, last = arguments
        removed_by_tree = event in ("os.remove", "os.rmdir") and last != -1  # names its parent so
        read_only = event == "open" and last & (os.O_WRONLY | os.O_RDWR) == 0
        if read_only or not (str(path).startswith(str(out)) or removed_by_tree):
            return
        seen += 1
        if seen == number:
            os.write(2, f"{event} {path}".replace(str(out), "").encode())
            os.kill(process, signal.SIGKILL)

    sys.addaudithook(look)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--ranks", type=int, default=1, help="processes that train together")
    parser.add_argument("--torchrun", action="store_true", help="which restarts a rank; two ranks")
    parser.add_argument(
        "--everywhere", nargs="*", choices=CHANGES, help="before each change, or each of these"
    )
    parser.add_argument("--seed", type=int, default=0, help="of where to kill")
    flags = parser.parse_args()
    begun, ranks = time.monotonic(), max(flags.ranks, 2) if flags.torchrun else flags.ranks
    with tempfile.TemporaryDirectory() as scratch:
        if flags.everywhere is not None:
            well = everywhere(Path(scratch), tuple(flags.everywhere or CHANGES))
        else:
            draw = Random(flags.seed)
            well = campaign(Path(scratch), flags.kills, ranks, flags.torchrun, draw)
    print(f"{'nothing lost' if well else 'FAILED'}, {time.monotonic() - begun:.0f} s")
    return int(not well)


if __name__ == "__main__":
    raise SystemExit(main())
