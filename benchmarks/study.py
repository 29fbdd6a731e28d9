"""What each part of the recipe is worth: seeded runs that differ in one thing each.

    python benchmarks/study.py --teacher models/rxnfp --data data/reactions --out runs/study
    python benchmarks/study.py ... --only compactbiobert mlm --seeds 1
    python benchmarks/study.py ... --scale gpu --minutes 9

Every variant is a run of train.py with the settings in `VARIANTS`, once for each seed; seed by
seed, so that what is there at any time can be compared. A run that is done is passed over, one that
was stopped goes on where it stood: the same command again does what is left. Several such commands
may share the work: a run that another one is at is passed over too.

Each run's folder gets a result.json: its settings, what was measured on held-out documents while it
learnt, and at the end on all of them. `--json FILE` gathers those that are done, with the machine
and the versions. Checkpoints are removed when a run is done, students are kept.
"""

import dataclasses
import json
import shutil
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import circumstances, commit
from work import Job, do_what_is_left

import train
from minibert.data.batches import Batches
from minibert.data.corpus import Corpus
from minibert.errors import ArgumentParser, InputError, run_command
from minibert.evaluate import evaluate, load_for_corpus
from minibert.files import read_json, write_json
from minibert.flags import number
from minibert.folder import CONFIG
from minibert.model import BertForMaskedLM
from minibert.recipes import RECIPES
from minibert.run_config import RunConfig
from minibert.training.checkpoint import checkpoints, sources
from minibert.training.device import set_up_device
from minibert.training.runlog import HELD_OUT_LOSS, METRICS, read_metrics

RESULT, STUDENT = "result.json", "student"
FIGURES = ("mlm_loss", "mlm_accuracy", "teacher_kl", "teacher_agreement")
OF_TEACHER = ("teacher_mlm_loss", "teacher_mlm_accuracy")

# What a run is like, unless its variant says otherwise. Reactions have 94 tokens on average.
SCALES: dict[str, dict[str, Any]] = {
    "cpu": {
        "steps": 100, "batch_size": 24, "eval_every": 25, "eval_documents": 128,
        "log_every": 5, "dtype": "bfloat16",
    },
    "gpu": {
        "steps": 2000, "batch_size": 192, "eval_every": 200, "eval_documents": 512,
        "dtype": "bfloat16", "micro_batch_tokens": 49152, "device": "cuda",
    },
}  # fmt: skip

MLM_ALONE = {"hidden_weight": 0.0, "attention_weight": 0.0, "output_weight": 0.0}
RANDOM_START = dataclasses.replace(RECIPES["compactbiobert"], name="random start", start="random")


@dataclass(frozen=True)
class Variant:
    """One thing that is done otherwise than in `compactbiobert`."""

    title: str
    settings: dict[str, Any] = field(default_factory=dict)  # of `RunConfig`
    fresh_head: bool = False  # the student's MLM head drawn anew


VARIANTS = {
    "compactbiobert": Variant("`compactbiobert`"),
    "mlm": Variant("masked words alone, same layers", MLM_ALONE),
    "distilbiobert": Variant("`distilbiobert`", {"recipe": "distilbiobert"}),
    "random": Variant("random start, all signals", {"recipe": RANDOM_START}),
    "even-layers": Variant("even layers 0, 2, ... 10", {"teacher_layers": (0, 2, 4, 6, 8, 10)}),
    "first-layers": Variant("first six layers", {"teacher_layers": tuple(range(6))}),
    "last-layers": Variant("last six layers", {"teacher_layers": tuple(range(6, 12))}),
    "fresh-head": Variant("MLM head drawn anew", fresh_head=True),
    "no-mlm": Variant("without masked words", {"mlm_weight": 0.0}),
    "no-output": Variant("without output distribution", {"output_weight": 0.0}),
    "no-hidden": Variant("without hidden states", {"hidden_weight": 0.0}),
    "no-attention": Variant("without attention maps", {"attention_weight": 0.0}),
    "temperature-2": Variant("temperature 2", {"temperature": 2.0}),
    "plain": Variant("`--ops plain`", {"ops": "plain"}),
    "float32": Variant("`--dtype float32`", {"dtype": "float32"}),
    "random-mlm": Variant("random start, masked words alone", {"recipe": RANDOM_START} | MLM_ALONE),
}


def planned(flags: Any) -> Iterator[Job]:
    """The runs that were asked for, seed by seed."""
    learnt_from = sources(run_of("compactbiobert", 0, flags), Corpus.open(flags.data))
    for seed in range(flags.seeds):
        for name in flags.only or VARIANTS:
            run = run_of(name, seed, flags)
            if (run.out / RESULT).exists():
                refuse_another(run, learnt_from)
            title, lock = f"{run.out.name}: {VARIANTS[name].title}", run.out.with_suffix(".lock")
            make = partial(do_run, VARIANTS[name], run)
            yield Job(title, flags.teacher, run.out / RESULT, lock, make)


def run_of(name: str, seed: int, flags: Any) -> RunConfig:
    """The run of a variant."""
    common = {"teacher": flags.teacher, "data": flags.data, "seed": seed, "resume": True}
    common |= {"out": flags.out / f"{name}-seed{seed}"}
    return RunConfig.from_flags(SCALES[flags.scale] | common | VARIANTS[name].settings)


def do_run(variant: Variant, run: RunConfig, hours: float | None) -> None:
    """Train as the run says, from where it stood, and write what came of it."""
    with the_student_begins(variant):
        train.train(dataclasses.replace(run, max_hours=hours))
    write_json(run.out / RESULT, result_of(run))
    for checkpoint in checkpoints(run.out):
        shutil.rmtree(checkpoint)


def refuse_another(run: RunConfig, learnt_from: dict[str, str]) -> None:
    """A run that is done must be the one that is asked for; folders may have moved."""
    if read_json(run.out / CONFIG)["identity"] != learnt_from:
        raise InputError(f"{run.out}: done with another teacher or corpus; another --out")
    settings = json.loads(json.dumps(run.to_dict()))  # tuples as JSON has them
    done = read_json(run.out / RESULT)["settings"]
    for name in settings.keys() - set(RunConfig.CHANGEABLE) | {"steps"}:
        if settings[name] not in (None, done[name]):
            raise InputError(
                f"{run.out}: done with {name} {done[name]}, not {settings[name]}; another --out"
            )


@contextmanager
def the_student_begins(variant: Variant) -> Iterator[None]:
    """In here train.py begins a student as the variant says; a head drawn anew is no flag there."""
    original = train.new_student

    def with_fresh_head(teacher: BertForMaskedLM, run: RunConfig) -> train.Student:
        student = original(teacher, run)
        torch.manual_seed(run.seed)
        student.head = BertForMaskedLM(student.config).head
        return student

    train.new_student = with_fresh_head if variant.fresh_head else original
    try:
        yield
    finally:
        train.new_student = original


def result_of(run: RunConfig) -> dict[str, Any]:
    """The settings of a finished run, its held-out curve, and its figures on all held-out texts.

    `seconds` of the curve are those of updates alone; of an evaluation, of all before it.
    """
    curve, seconds = [], 0.0
    for line in read_metrics(run.out / METRICS):
        if HELD_OUT_LOSS in line:
            figures = {k.removeprefix("held_out_"): v for k, v in line.items() if k != "step"}
            curve.append({"step": line["step"], "seconds": seconds, **figures})
        seconds = line.get("seconds", seconds)
    corpus = Corpus.open(run.data)
    student, teacher = (
        load_for_corpus(folder, corpus, run.max_length)
        for folder in (run.out / STUDENT, run.teacher)
    )
    held_out = Batches(corpus, max_length=run.max_length).held_out(corpus.num_held_out)
    return {
        "settings": read_json(run.out / CONFIG)["run"],
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "curve": curve,
        "held_out_documents": corpus.num_held_out,
        "final": evaluate(student, held_out, teacher),
    }


def gathered(folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    """All that is done in a study's folder, what is common said once.

    `settings` of a variant are those that differ from `compactbiobert`'s; `figures` gives the order
    of the numbers in `final` and, behind step and seconds, of a point of `curve`.
    """
    results = {
        name: {path.parent.name.rpartition("-seed")[2]: read_json(path) for path in paths}
        for name in VARIANTS
        if (paths := sorted(folder.glob(f"{name}-seed*/{RESULT}")))
    }
    if "compactbiobert" not in results:
        raise InputError(f"{folder}: no run of compactbiobert is done, nothing to compare with")
    any_run = next(iter(results["compactbiobert"].values()))
    common = any_run["settings"]
    own = ("out", "seed", "resume", "max_hours")
    runs = {
        name: {
            "title": VARIANTS[name].title,
            "settings": {
                key: value
                for key, value in next(iter(seeds.values()))["settings"].items()
                if value != common[key] and key not in own
            }
            | ({"fresh_head": True} if VARIANTS[name].fresh_head else {}),
            "seeds": {seed: _numbers(result) for seed, result in seeds.items()},
        }
        for name, seeds in results.items()
    }
    return told | {
        "settings": {key: value for key, value in common.items() if key not in own},
        "teacher": {key: round(any_run["final"][key], 6) for key in OF_TEACHER},
        "held_out_documents": any_run["held_out_documents"],
        "figures": FIGURES,
        "runs": runs,
    }


def _numbers(result: dict[str, Any]) -> dict[str, Any]:
    """A run's figures as lists of numbers, to six digits."""
    curve = [
        [point["step"], round(point["seconds"], 1), *(round(point[name], 6) for name in FIGURES)]
        for point in result["curve"]
    ]
    final = [round(result["final"][name], 6) for name in FIGURES]
    return {key: result[key] for key in ("commit", "threads")} | {"final": final, "curve": curve}


def main() -> None:
    parser = ArgumentParser(
        prog="python benchmarks/study.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="model folder of a teacher of 12 layers")
    add("--data", type=Path, required=True, help="corpus folder")
    add("--out", type=Path, required=True, help="folder for the runs")
    add("--only", nargs="+", choices=VARIANTS, help="these variants alone")
    add("--seeds", type=number(int, 1), default=3, help="runs of each variant (default: 3)")
    add("--scale", choices=SCALES, default="cpu", help="how long runs are (default: cpu)")
    time_left = {"type": number(float, 0, exclusive=True), "metavar": "N"}
    add("--minutes", **time_left, help="end after so many, to go on later")
    add("--json", type=Path, help="write all results that are there to this file")
    flags = parser.parse_args()
    load_for_corpus(flags.teacher, Corpus.open(flags.data), max_length=3)  # what is wrong, at once
    do_what_is_left(planned(flags), flags.minutes)
    if flags.json:
        device = set_up_device(SCALES[flags.scale].get("device", "cpu"))
        told = circumstances("study", device) | {"scale": flags.scale}
        write_json(flags.json, gathered(flags.out, told))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
