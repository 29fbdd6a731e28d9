"""What it costs that a run cannot be lost: saving, hashing, logging, looking for bad numbers.

    python benchmarks/survive.py [--saves 5] [--runs 5] [--updates 800] [--json FILE]

Two tables. The teacher of the demonstration is trained for real, at its intervals, and every call
that keeps or tells is timed where it is made, so that no two noisy runs need to be subtracted. A
checkpoint of CompactBioBERT's size is saved, in parts: its share of a run follows from how long an
update takes. On a CPU; evaluations, which measure rather than keep, are left out of both.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from machine import circumstances, tell
from workload import random_models

import minibert.files as files
import train
from minibert.config import BIOBERT
from minibert.data import demo
from minibert.demonstration import DEMO_TEACHER, DEMO_TEACHING
from minibert.errors import ArgumentParser, run_command
from minibert.files import write_json
from minibert.flags import number
from minibert.prepare import prepare
from minibert.run_config import RunConfig
from minibert.training import checkpoint
from minibert.training.checkpoint import State, save_checkpoint
from minibert.training.nonfinite import NonfiniteWatch
from minibert.training.optimizer import build_optimizer
from minibert.training.runlog import RunLog

WATCHED = {  # what is timed -> where it is called from
    "save": (train, "save_checkpoint"),
    "log": (RunLog, "update"),
    "look": (NonfiniteWatch, "look"),
    "note": (NonfiniteWatch, "add"),
    "agree": (train, "agreed"),
    "pass over": (train, "pass_over_unless_finite"),
    "update": (train, "update"),
}
PARTS = {
    "write": (checkpoint, "write_tensors"),
    "hash": (checkpoint, "_hashes"),
    "sync": (files, "_sync"),
}
UPDATE_SECONDS = {"a GPU": 0.2, "two CPU cores": 1.7}  # of BioBERT's student


@contextmanager
def timed(watched: dict[str, tuple[Any, str]]) -> Iterator[dict[str, list[float]]]:
    """The seconds of every call of these functions while in here."""
    seconds, originals = defaultdict(list), {}
    for name, (owner, function) in watched.items():
        originals[name] = getattr(owner, function)
        setattr(owner, function, _timed(originals[name], seconds[name]))
    try:
        yield seconds
    finally:
        for name, (owner, function) in watched.items():
            setattr(owner, function, originals[name])


def _timed(original: Callable, seconds: list[float]) -> Callable:
    def call(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    return call


# A run of the demonstration's length.


def demonstration_corpus(folder: Path) -> RunConfig:
    """Text of the demonstration and its teacher's run, to be trained on a CPU."""
    text, vocabulary, corpus = (folder / n for n in ("abstracts.jsonl", "vocab.txt", "corpus"))
    demo.write_abstracts(text, 20_000, seed=0)
    demo.train_vocabulary(text, vocabulary, DEMO_TEACHER.vocab_size)
    prepare([text], vocabulary, corpus, show_progress=False)
    write_json(folder / "teacher.json", DEMO_TEACHER.to_dict())
    return RunConfig(
        recipe="mlm",
        model=folder / "teacher.json",
        data=corpus,
        out=folder / "teacher",
        batch_size=16,
        max_length=96,
        eval_documents=300,
        device="cpu",
        **DEMO_TEACHING,
    ).resolved()


def measure_run(run: RunConfig) -> dict[str, Any]:
    """Seconds of a run's updates and of each kind of keeping; its evaluations are not counted."""
    evaluations = {"evaluation": (RunLog, "evaluation"), "train": (train, "train")}
    with timed(WATCHED | evaluations) as calls, contextlib.redirect_stdout(io.StringIO()):
        train.train(run)
    seconds = {name: sum(calls[name]) for name in calls}
    spent = seconds["train"] - seconds["evaluation"]
    kept = {name: seconds[name] for name in WATCHED if name != "update"}
    return {
        "updates": len(calls["update"]),
        "saves": len(calls["save"]),
        "seconds": spent,
        "kept": kept,
        "share": sum(kept.values()) / spent,
    }


# A checkpoint of CompactBioBERT.


def measure_saves(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of saving a student of BioBERT's, in all and in its parts."""
    folder.mkdir()
    student, _, _ = random_models(BIOBERT)
    optimizer = build_optimizer(student, 0.01)
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    found: dict[str, list[float]] = defaultdict(list)
    for turn in range(1 + rounds):  # the first is a warm-up
        with timed(PARTS) as calls:
            started, worked = time.perf_counter(), time.process_time()
            save_checkpoint(folder, State(turn + 1), student, optimizer, keep=2)
            spent, worked = time.perf_counter() - started, time.process_time() - worked
        if turn > 0:
            parts = {name: sum(calls[name]) for name in PARTS}
            parts["remove and rest"] = spent - sum(parts.values())
            whole = {"in all": spent, "of it computing": worked}
            for name, value in (parts | whole).items():
                found[name].append(value)
        tell(f"save {turn}/{rounds}: {spent:.2f} s")
    newest = folder / f"step_{rounds + 1:06d}"
    size = sum(file.stat().st_size for file in newest.iterdir())
    return {"seconds": found, "megabytes": size / 1e6}


def share_of_saves(save_seconds: float, update_seconds: float) -> float:
    """Of a run at default intervals: saved after so many updates, or so many minutes."""
    run = RunConfig()
    between = min(run.save_every * update_seconds, run.save_minutes * 60)
    return save_seconds / (between + save_seconds)


# For people.


def table(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"load {machine['load']:.1f}; torch {report['versions']['torch']}; {report['commit']}",
        "",
    ]
    if runs := report["runs"]:
        shares = ", ".join(f"{run['share']:.2%}" for run in runs)
        middle = sorted(runs, key=lambda run: run["share"])[len(runs) // 2]
        lines += [
            f"demonstration's teacher, {middle['updates']} updates, {middle['saves']} saves, "
            f"median of {len(runs)} runs: {middle['seconds']:.1f} s",
            *(
                f"  {name:16}{seconds:9.3f} s{seconds / middle['seconds']:9.3%}"
                for name, seconds in middle["kept"].items()
            ),
            f"  {'in all':16}{sum(middle['kept'].values()):9.3f} s{middle['share']:9.3%}",
            f"  shares of all runs: {shares}",
            "",
        ]
    if saves := report["saves"]:
        rounds = len(saves["seconds"]["in all"])
        lines.append(f"a checkpoint of {saves['megabytes']:,.0f} MB, medians of {rounds}")
        for name, seconds in saves["seconds"].items():
            spread = f"{min(seconds):.2f} - {max(seconds):.2f}"
            lines.append(f"  {name:16}{median(seconds):9.2f} s   {spread}")
        for where, update_seconds in UPDATE_SECONDS.items():
            share = share_of_saves(median(saves["seconds"]["in all"]), update_seconds)
            lines.append(f"  updates of {update_seconds} s ({where}): {share:.2%} of a run")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser(
        prog="python benchmarks/survive.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--saves", type=number(int, 0), default=5, help="of the checkpoint; 0: none"
    )
    parser.add_argument("--runs", type=number(int, 0), default=5, help="of the demonstration")
    parser.add_argument("--updates", type=number(int, 1), default=800, help="of each run")
    parser.add_argument("--folder", type=Path, help="disk to write to (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write all figures")
    flags = parser.parse_args()

    report = circumstances("survive", torch.device("cpu")) | {"runs": [], "saves": None}
    with TemporaryDirectory(dir=flags.folder) as name:
        if flags.runs:
            run = demonstration_corpus(Path(name))
            for turn in range(flags.runs):
                again = dataclasses.replace(run, out=Path(name) / f"run {turn}")
                report["runs"].append(measure_run(dataclasses.replace(again, steps=flags.updates)))
                tell(f"run {turn + 1}/{flags.runs}: {report['runs'][-1]['share']:.2%}")
        if flags.saves:
            report["saves"] = measure_saves(Path(name) / "saves", flags.saves)
    report["machine"]["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    print(table(report))
    if flags.json:
        write_json(flags.json, report)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
