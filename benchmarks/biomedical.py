"""A small biomedical teacher of our own, its students, and what they are worth on tasks.

    python benchmarks/biomedical.py --data data/pubmed --out runs/biomedical \\
        --task ner NCBI-disease --task relation ChemProt

No BioBERT is needed: everything begins at random and learns from the corpus. The stages:

1. a shallow model of 4 layers learns to fill in masked words;
2. its layers, three times on top of each other, begin a teacher of 12 layers, which learns on
   (progressive stacking: Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML
   2019; begun at random, 12 layers take several times as long to leave the word frequencies);
3. students of 6 layers: by `compactbiobert`, by `distilbiobert`, by masked words alone for as many
   updates; and two that learn nothing more: the copied layers, and 6 layers drawn at random;
4. each is fine-tuned on each task, with each seed.

What is done is passed over, what was stopped goes on: the same command again does what is left.
Several such commands share the work. `--json FILE` gathers what is there.
"""

import dataclasses
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from machine import circumstances
from study import MLM_ALONE
from work import Job, do_what_is_left

import train
from minibert.config import BertConfig
from minibert.data.corpus import Corpus
from minibert.errors import ArgumentParser, InputError, run_command
from minibert.files import read_json, sha256_of_files, write_json
from minibert.finetune import SCORES, FineTuning, fine_tune, values_of_flags
from minibert.flags import number
from minibert.folder import CONFIG, load_model, save_model
from minibert.hugging_face import weight_files
from minibert.model import BertForMaskedLM
from minibert.run_config import RunConfig
from minibert.student import student_from_teacher
from minibert.tasks.scores import mean_and_deviation
from minibert.training.device import set_up_device
from minibert.training.runlog import HELD_OUT_LOSS, METRICS, read_metrics

SCALES: dict[str, dict[str, Any]] = {
    "cpu": {
        "hidden_size": 256, "shallow_steps": 2000, "teacher_steps": 700, "student_steps": 300,
        "batch_size": 128, "max_length": 64,
    },
    "gpu": {
        "hidden_size": 384, "shallow_steps": 3000, "teacher_steps": 9000, "student_steps": 3000,
        "batch_size": 192, "max_length": 256, "micro_batch_tokens": 49152,
    },
}  # fmt: skip
SHALLOW_LAYERS, TIMES = 4, 3
BEGIN = "shallow.json"  # what the shallow model begins as
STUDENTS = {  # settings of `RunConfig`
    "compactbiobert": {"recipe": "compactbiobert"},
    "mlm": {"recipe": "compactbiobert"} | MLM_ALONE,
    "distilbiobert": {"recipe": "distilbiobert"},
}  # fmt: skip
PRETRAINED = ("teacher", *STUDENTS)
MODELS = ("teacher", "compactbiobert", "mlm", "random", "copied", "distilbiobert")
FINE_TUNING = {"epochs": 2, "batch_size": 16, "dtype": "bfloat16"}
# At 5e-4 the 12 layers gave every relation one class after two epochs.
LEARNING_RATE = {"ner": 5e-4, "relation": 2e-4}


def stages(flags: Any) -> Iterator[Job]:
    """All there is to make, in an order in which it can be."""
    out, scale = flags.out, SCALES[flags.scale]
    begin, shallow, stacked = out / BEGIN, out / "shallow" / "model", out / "stacked"
    teacher = folder_of("teacher", out)
    common = {name: scale[name] for name in scale if name in RunConfig.__dataclass_fields__}
    common |= {"data": flags.data, "dtype": "bfloat16", "eval_documents": 200, "resume": True}

    def trained(name: str, **settings: Any) -> Callable[[float | None], None]:
        settings = common | {"out": out / name, "eval_every": settings["steps"] // 4} | settings
        return lambda hours: train.train(RunConfig.from_flags(settings | {"max_hours": hours}))

    def stage(name: str, source: Path, result: Path, make: Callable[[float | None], Any]) -> Job:
        return Job(name, source, result, out / f"{name.replace(': ', ' ')}.lock", make)

    yield stage("begin", flags.data, begin, lambda _: write_json(begin, shape(flags).to_dict()))
    steps = scale["shallow_steps"]
    rate = {"learning_rate": 1e-3, "warmup_steps": steps * 15 // 100}
    learn = trained("shallow", recipe="mlm", model=begin, steps=steps, **rate)
    yield stage("shallow", begin, shallow, learn)
    yield stage("stacked", shallow, stacked, lambda _: save_stacked(shallow, stacked))
    steps = scale["teacher_steps"]
    rate = {"learning_rate": 7e-4, "warmup_steps": steps * 15 // 100}
    learn = trained("teacher", recipe="mlm", model=stacked, steps=steps, **rate)
    yield stage("teacher", stacked, teacher, learn)
    for name in ("random", "copied"):
        folder = folder_of(name, out)
        yield stage(name, teacher, folder, partial(save_untaught, name, teacher, folder))
    for name in [name for name in STUDENTS if name in flags.models]:
        learn = trained(name, steps=scale["student_steps"], teacher=teacher, **STUDENTS[name])
        yield stage(name, teacher, folder_of(name, out), learn)
    for seed in range(flags.seeds):
        for kind, data in flags.task:
            for name in flags.models:
                run = fine_tuning(kind, Path(data), name, seed, out)
                title = f"{Path(data).name}: {name}, seed {seed}"
                refuse_another(run)
                yield stage(title, run.model, run.out / SCORES, partial(tuned, run))


def folder_of(name: str, out: Path) -> Path:
    """Where the model of that name lies."""
    if name in STUDENTS:
        return out / name / "student"
    return out / name / "model" if name == "teacher" else out / name


def shape(flags: Any) -> BertConfig:
    """The shallow model: heads of 64, dropout off, for it sees each text about once."""
    H = SCALES[flags.scale]["hidden_size"]
    return BertConfig(
        vocab_size=Corpus.open(flags.data).tokenizer.vocab_size,
        hidden_size=H,
        num_hidden_layers=SHALLOW_LAYERS,
        num_attention_heads=H // 64,
        intermediate_size=4 * H,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def save_stacked(shallow: Path, folder: Path) -> None:
    """A model whose layer i begins as the shallow one's layer i modulo its depth."""
    below = load_model(shallow)
    depth = below.config.num_hidden_layers
    above = BertForMaskedLM(dataclasses.replace(below.config, num_hidden_layers=depth * TIMES))
    above.embeddings.load_state_dict(below.embeddings.state_dict())
    above.head.load_state_dict(below.head.state_dict())
    for i, layer in enumerate(above.layers):
        layer.load_state_dict(below.layers[i % depth].state_dict())
    save_model(folder, above, tokenizer_from=shallow)


def save_untaught(name: str, teacher: Path, folder: Path, _hours: float | None) -> None:
    """A student that learns nothing more: copied layers, or layers drawn at random."""
    student = student_from_teacher(load_model(teacher), (1, 3, 5, 7, 9, 11))
    if name == "random":
        torch.manual_seed(0)
        student = BertForMaskedLM(student.config)
    save_model(folder, student, tokenizer_from=teacher)


def fine_tuning(kind: str, data: Path, name: str, seed: int, out: Path) -> FineTuning:
    """The settings for one model on one task with one seed."""
    folder = out / "tasks" / data.name / name / f"seed_{seed}"
    settings = FINE_TUNING | {"learning_rate": LEARNING_RATE[kind], "seed": seed, "resume": True}
    return FineTuning(kind, model=folder_of(name, out), data=data, out=folder, **settings)


def refuse_another(run: FineTuning) -> None:
    """A run that is done must be the one that is asked for."""
    if (run.out / SCORES).exists():
        wanted = values_of_flags(run) | {"model": sha256_of(run.model)}
        recorded = read_json(run.out / CONFIG)["identity"]
        for name in wanted:
            if wanted[name] != recorded.get(name):
                raise InputError(f"{run.out}: done with another {name}; another --out")


@cache
def sha256_of(model: Path) -> str:
    """Of a model's files, as `finetune` records it."""
    return sha256_of_files(*weight_files(model))


def tuned(run: FineTuning, _hours: float | None) -> None:
    """Minutes; what is stopped goes on after its last epoch."""
    fine_tune(run)


def checked(flags: Any) -> Any:
    """Refuse at once what would be found after hours, or not at all."""
    begin, shallow = flags.out / BEGIN, shape(flags)
    if begin.exists() and BertConfig.read(begin) != shallow:
        raise InputError(f"{begin}: of another --scale or vocabulary; another --out")
    names = [Path(data).name for _, data in flags.task]
    for kind, data in flags.task:
        if kind not in LEARNING_RATE:
            raise InputError(f"--task {kind}: unknown; known: {', '.join(LEARNING_RATE)}")
        if not Path(data).is_dir():
            raise InputError(f"--task {kind} {data}: no such folder")
        if names.count(Path(data).name) > 1:
            raise InputError(f"--task {kind} {data}: two folders of that name")
    return flags


def gathered(flags: Any) -> dict[str, Any]:
    """Held-out figures of what was pre-trained, and scores of what was fine-tuned."""
    figures, tasks = {}, {}
    for name in ("shallow", *PRETRAINED):
        lines = read_metrics(flags.out / name / METRICS)
        evaluations = [line for line in lines if HELD_OUT_LOSS in line]
        seconds = max((line["seconds"] for line in lines if "seconds" in line), default=None)
        if evaluations:
            figures[name] = {"seconds": seconds, "curve": evaluations}
    for _, data in flags.task:
        for name in MODELS:
            paths = sorted(flags.out.glob(f"tasks/{Path(data).name}/{name}/seed_*/{SCORES}"))
            if scores := [read_json(path) for path in paths]:
                tasks.setdefault(Path(data).name, {})[name] = summary(scores)
    settings = FINE_TUNING | {"learning_rate": LEARNING_RATE}
    return {"pretraining": figures, "fine_tuning": settings, "tasks": tasks}


def summary(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and single values of each figure on test, over the seeds."""
    result: dict[str, Any] = {"seeds": [score["seed"] for score in scores]}
    for figure in scores[0]["test"]:
        values = [score["test"][figure] for score in scores]
        mean, deviation = mean_and_deviation(values)
        result[figure] = {"mean": mean, "standard_deviation": deviation, "values": values}
    return result


def main() -> None:
    parser = ArgumentParser(
        prog="python benchmarks/biomedical.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="corpus folder with BioBERT's vocabulary")
    add("--out", type=Path, required=True, help="folder for models and runs")
    task = {"nargs": 2, "action": "append", "default": [], "metavar": ("KIND", "DIR")}
    add("--task", **task, help="ner or relation, and the folder of its files; may be repeated")
    chosen = {"nargs": "+", "choices": MODELS, "default": MODELS, "metavar": "NAME"}
    add("--models", **chosen, help=f"these students and controls alone, of {', '.join(MODELS)}")
    add("--seeds", type=number(int, 1), default=5, help="of fine-tuning (default: 5)")
    time_left = {"type": number(float, 0, exclusive=True), "metavar": "N"}
    add("--minutes", **time_left, help="end after so many, to go on later")
    add("--scale", choices=SCALES, default="cpu", help="sizes and steps (default: cpu)")
    add("--json", type=Path, help="write all results that are there to this file")
    flags = checked(parser.parse_args())
    flags.out.mkdir(parents=True, exist_ok=True)
    do_what_is_left(stages(flags), flags.minutes)
    if flags.json:
        told = circumstances("biomedical", set_up_device("auto")) | {"scale": flags.scale}
        write_json(flags.json, told | gathered(flags))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
