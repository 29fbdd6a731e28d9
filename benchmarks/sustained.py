"""A run as a user starts it, for minutes: is it as fast at its end as at its beginning?

    python benchmarks/sustained.py --minutes 5 --json sustained.json
    python benchmarks/sustained.py --data data/pubmed --device cpu --batch-size 8

CompactBioBERT from a teacher of BioBERT's size with seeded random weights (its speed is that of the
real one), by train.py as it is: batches built beside it, metrics written, checkpoints as they fall
due, with --data an evaluation at the beginning. It ends when its time is up. Told are the tokens a
second of each tenth of the updates, how long all of it took, peak memory (on a GPU of tensors, else
of the process) and the hours that the recipe's 100,000 updates would take at their mean pace,
saving and evaluating left out.
"""

import json
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from machine import circumstances, peak_of_process
from workload import random_models, write_random_corpus

import train
from minibert.config import BIOBERT
from minibert.data.corpus import Corpus
from minibert.errors import ArgumentParser, InputError, Stopped, run_command
from minibert.evaluate import check_fit
from minibert.files import write_json
from minibert.flags import number
from minibert.folder import save_model
from minibert.recipes import RECIPES
from minibert.run_config import RunConfig
from minibert.training.checkpoint import checkpoints, step_of
from minibert.training.device import set_up_device
from minibert.training.runlog import METRICS, read_metrics

PARTS = 10
STEPS = RECIPES["compactbiobert"].steps  # of the paper; nobody waits for its end here


def run_for(run: RunConfig) -> float:
    """Train until its time is up; returns the seconds that took, start and end included."""
    began = time.monotonic()
    try:
        train.train(run)
    except Stopped as stopped:
        if stopped.status != 0:
            raise
    return time.monotonic() - began


def summary(run: RunConfig, seconds: float, device: torch.device) -> dict[str, Any]:
    """What the run's folder tells of its pace."""
    lines = [line for line in read_metrics(run.out / METRICS) if "tokens_per_second" in line]
    updates = step_of(checkpoints(run.out)[-1])
    if len(lines) < PARTS:
        raise InputError(f"{updates} updates are too few to tell a pace; give it more --minutes")
    parts = [lines[len(lines) * i // PARTS : len(lines) * (i + 1) // PARTS] for i in range(PARTS)]
    rates = [mean(line["tokens_per_second"] for line in part) for part in parts]
    first, last = lines[0], lines[-1]
    pace = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_of_process()
    return {
        "settings": run.to_dict(),
        "updates": updates,
        "seconds": seconds,
        "seconds_of_updates": last["seconds"],
        "seconds_an_update": pace,
        "tokens_per_second": rates,
        "last_tenth_to_first": rates[-1] / rates[0],
        "peak_mb": peak / 1e6,
        "projected_hours": pace * STEPS / 3600,
        "last_loss": last["loss"],
    }


def told(found: dict[str, Any]) -> str:
    """For people."""
    rates = " ".join(f"{rate:,.0f}" for rate in found["tokens_per_second"])
    return (
        f"{found['updates']} updates in {found['seconds']:.0f} s, of which updates "
        f"{found['seconds_of_updates']:.0f} s\ntokens/s, tenth by tenth: {rates}\n"
        f"peak {found['peak_mb'] / 1e3:.1f} GB, {found['seconds_an_update']:.3f} s an update, "
        f"100,000 of them {found['projected_hours']:.1f} h"
    )


def main() -> None:
    parser = ArgumentParser(
        prog="python benchmarks/sustained.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add, count = parser.add_argument, number(int, 1)
    minutes = {"type": number(float, 0, exclusive=True), "default": 5.0, "metavar": "N"}
    add("--minutes", **minutes, help="of updates (default: 5)")
    add("--data", metavar="CORPUS", type=Path, help="corpus folder (else random)")
    add("--batch-size", type=count, default=192, help="sequences of an update (default: 192)")
    add("--max-length", type=number(int, 3), default=256, help="tokens of one (default: 256)")
    add("--micro-batch-tokens", type=count, help="as in train.py, and with its default")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--compile", action="store_true", help="as in train.py")
    add("--log-every", type=count, default=10, help="updates between measurements (default: 10)")
    add("--json", metavar="FILE", type=Path, help="write what was found to this file")
    flags = vars(parser.parse_args())
    minutes, data, file = (flags.pop(name) for name in ("minutes", "data", "json"))
    device = set_up_device(flags["device"])
    with tempfile.TemporaryDirectory() as folder:
        data = data or write_random_corpus(Path(folder), BIOBERT.vocab_size)
        check_fit(Path("BioBERT"), BIOBERT, Corpus.open(data), flags["max_length"])
        save_model(Path(folder) / "teacher", random_models(BIOBERT)[1], tokenizer_from=data)
        run = {"teacher": Path(folder) / "teacher", "data": data, "out": Path(folder) / "run"}
        run |= {"max_hours": minutes / 60, "steps": STEPS, "eval_documents": 20}
        run = RunConfig.from_flags(flags | run | {"eval_every": STEPS})
        seconds = run_for(run)
        found = summary(run, seconds, device)
    found = circumstances("sustained", device) | found
    print(told(found))
    print(json.dumps(found))
    if file:
        write_json(file, found)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
