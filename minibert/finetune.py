"""Fine-tune a model on a task, and say what it is worth there.

    python -m minibert.finetune ner --model MODEL --data DIR --out RUN
    python -m minibert.finetune relation --model MODEL --data DIR --out RUN --seeds 5
    python -m minibert.finetune qa --model MODEL --data DIR --out RUN --resume

DIR holds train, devel and test: .tsv for ner, .jsonl or .tsv for relation, .json for qa. The model
of the epoch that is best on devel is kept, and test is looked at once, at the end, with it. A run
folder holds config.json, metrics.jsonl (a line an epoch), step_*/ (the newest epoch's checkpoint),
best_epoch_N/ (the best model so far; at the end model/), predictions of devel and test, and
scores.json. With --seeds N the folder holds N such runs, seed_0/ and so on.
"""

import dataclasses
import math
import os
import shutil
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from minibert.data.tokenizer import Tokenizer, load_tokenizer
from minibert.errors import ArgumentParser, InputError, run_command
from minibert.files import atomic_file, read_json, sha256_of_files, write_json
from minibert.flags import number
from minibert.folder import CONFIG
from minibert.heads import FineTunedModel, load_fine_tuned, save_fine_tuned, with_new_head
from minibert.hugging_face import check_tokenizer, weight_files
from minibert.ops import fused
from minibert.ops.plain import IGNORED_LABEL
from minibert.progress import counted
from minibert.tasks.epochs import EpochLog
from minibert.tasks.ner import Ner
from minibert.tasks.qa import QuestionAnswering
from minibert.tasks.relation import Relation
from minibert.tasks.scores import mean_and_deviation
from minibert.tasks.task import Task, collate, shuffled
from minibert.training.checkpoint import State, load_newest, run_folder, save_checkpoint
from minibert.training.device import out_of_memory_is_told, release_freed_memory, set_up_device
from minibert.training.optimizer import LARGEST_GRAD_NORM, build_optimizer, learning_rate_at
from minibert.training.seeds import dropout_seed

TASKS = {"ner": Ner, "relation": Relation, "qa": QuestionAnswering}
# The paper's rates, and the lengths that are customary in the field.
LEARNING_RATE = {"ner": 5e-5, "relation": 5e-5, "qa": 3e-5}
MAX_LENGTH = {"ner": 128, "relation": 128, "qa": 384}
WEIGHT_DECAY = 0.01  # google-research/bert, and the paper
WARMUP_SHARE = 0.1  # of all updates, then linearly down to 0: google-research/bert
SCORES, MODEL = "scores.json", "model"
EVALUATED_AT_ONCE = 32  # features


@dataclass(frozen=True)
class FineTuning:
    """What a run was started with. `run_folder` asks of it what it asks of a `RunConfig`.

    The flags take their defaults from here. None: the task decides.
    """

    task: str
    model: Path
    data: Path
    out: Path
    epochs: int = 5
    batch_size: int = 16
    learning_rate: float | None = None
    max_length: int | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    resume: bool = False
    steps: int = 0  # updates in all, known when the data has been read

    def __post_init__(self):
        for name, by_task in (("learning_rate", LEARNING_RATE), ("max_length", MAX_LENGTH)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, by_task[self.task])

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        settings = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def fine_tune(run: FineTuning) -> dict[str, Any]:
    """Train as `run` says, from its beginning or its last finished epoch; returns the scores."""
    device = set_up_device(run.device)
    task, model, tokenizer = load_task_and_model(run)
    model.to(device)
    optimizer = build_optimizer(model, WEIGHT_DECAY)
    updates = math.ceil(len(task.features["train"]) / run.batch_size)  # of an epoch
    run = dataclasses.replace(run, steps=updates * run.epochs)
    warmup_steps = round(WARMUP_SHARE * run.steps)
    half = torch.bfloat16 if run.dtype == "bfloat16" else None

    with run_folder(run, identity(run, task, tokenizer)):
        if (run.out / SCORES).exists():  # it had come to its end
            return read_json(run.out / SCORES)
        first_step = load_newest(run.out, model, optimizer).step
        log = EpochLog(run.out, task.chosen_by, first_step, run.steps)

        for epoch in range(first_step // updates, run.epochs):
            torch.manual_seed(dropout_seed(run.seed, epoch))
            model.train()
            batches = shuffled(task.features["train"], run.batch_size, run.seed, epoch)
            for step, features in enumerate(batches, start=epoch * updates):
                batch = collate(features, tokenizer.pad_id, device)
                inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
                logits = model(*inputs, dtype=half, ops=fused)  # (B, P, C)
                loss = F.cross_entropy(
                    logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED_LABEL
                )
                loss.backward()
                clip_grad_norm_(model.parameters(), LARGEST_GRAD_NORM)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, run.steps, warmup_steps, run.learning_rate)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                log.update(step, loss.item())

            predictions = task.predict("devel", logits_of(model, task, "devel", tokenizer))
            is_best = log.epoch(epoch, step + 1, task.scores("devel", predictions))
            if is_best:
                folder = best_model(run, epoch + 1)
                save_fine_tuned(folder, model, task.labels, tokenizer_from=run.model)
            save_checkpoint(run.out, State(step + 1), model, optimizer, keep=1)
            keep_best_model(run, log.best_epoch())
        return conclude(run, task, tokenizer, log.best_epoch(), device)


def load_task_and_model(run: FineTuning) -> tuple[Task, FineTunedModel, Tokenizer]:
    """The data, and a model that can read it under a head that the seed drew."""
    tokenizer = load_tokenizer(run.model)
    task = TASKS[run.task](run.data, tokenizer, run.max_length)
    torch.manual_seed(run.seed)
    model = with_new_head(task.head, len(task.labels), run.model)
    check_tokenizer(run.model, model.config, ours=True)
    if run.max_length > model.config.max_position_embeddings:
        raise InputError(
            f"--max-length {run.max_length}: {run.model} has "
            f"{model.config.max_position_embeddings} positions"
        )
    return task, model, tokenizer


@torch.inference_mode()
def logits_of(model: FineTunedModel, task: Task, split: str, tokenizer: Tokenizer) -> list[Tensor]:
    """The logits (P, C) of each feature of a split: plain formulas, float32, dropout off."""
    model.eval()
    device = model.embeddings.word_embeddings.weight.device
    features = task.features[split]
    by_length = sorted(range(len(features)), key=lambda i: len(features[i].input_ids))
    logits: dict[int, Tensor] = {}
    starts = range(0, len(features), EVALUATED_AT_ONCE)
    for start in counted(starts, f"scoring {split}, batch"):
        numbers = by_length[start : start + EVALUATED_AT_ONCE]
        batch = collate([features[i] for i in numbers], tokenizer.pad_id, device)
        rows = model(batch.input_ids, batch.attention_mask, batch.token_type_ids).cpu()
        for i, row in zip(numbers, rows, strict=True):
            logits[i] = row[: len(features[i].labels)]  # without the padding of labels
    release_freed_memory()
    return [logits[i] for i in range(len(features))]


def best_model(run: FineTuning, epoch: int) -> Path:
    """The model of an epoch, from 1, that was the best when it ended.

    Each has a folder of its own: one whose checkpoint was never written takes no other's place.
    """
    return run.out / f"best_epoch_{epoch}"


def keep_best_model(run: FineTuning, best_epoch: int) -> None:
    """Remove those that another epoch has surpassed."""
    for folder in run.out.glob("best_epoch_*"):
        if folder != best_model(run, best_epoch):
            shutil.rmtree(folder)


def conclude(
    run: FineTuning, task: Task, tokenizer: Tokenizer, best_epoch: int, device: torch.device
) -> dict[str, Any]:
    """Let the best epoch's model predict devel and test, and write what it did and what it got."""
    keep_best_model(run, best_epoch)
    if best_model(run, best_epoch).exists():  # or a run that was stopped below renamed it
        shutil.rmtree(run.out / MODEL, ignore_errors=True)  # of an attempt before this one
        os.replace(best_model(run, best_epoch), run.out / MODEL)
    model = load_fine_tuned(run.out / MODEL).to(device)
    result = run.to_dict() | {"best_epoch": best_epoch}
    for split in ("devel", "test"):
        predictions = task.predict(split, logits_of(model, task, split, tokenizer))
        with atomic_file(run.out / task.predictions_file.format(split)) as partial:
            partial.write_text(task.written(split, predictions), encoding="utf-8")
        result[split] = task.scores(split, predictions)
    write_json(run.out / SCORES, result)  # last: it tells that all is done
    return result


def identity(run: FineTuning, task: Task, tokenizer: Tokenizer) -> dict[str, str]:
    """What a run learns from, and how: a resumed run must find the same."""
    hashes = {path.name: sha256_of_files(path) for path in task.files.values()}
    hashes |= {"model": sha256_of_files(*weight_files(run.model))}
    hashes |= {"sizes": sha256_of_files(run.model / CONFIG)}
    hashes |= {"vocabulary": tokenizer.vocabulary_sha256, "task": run.task}
    return hashes | values_of_flags(run)


def values_of_flags(run: FineTuning) -> dict[str, str]:
    """What a run learns with, of that which may not change on the way."""
    flags = ("epochs", "batch_size", "learning_rate", "max_length", "seed", "dtype")
    return {f"--{flag.replace('_', '-')}": str(getattr(run, flag)) for flag in flags}


def over_seeds(run: FineTuning, seeds: int) -> dict[str, Any]:
    """Runs that differ in their seed alone; mean and standard deviation of each figure."""
    if (run.out / CONFIG).exists():
        raise InputError(f"{run.out} holds a run of one seed; choose another --out")
    if (run.out / SCORES).exists() and not run.resume:
        raise InputError(f"{run.out} holds {SCORES}; --resume goes on with its runs")
    results = []
    for seed in range(run.seed, run.seed + seeds):
        print(f"seed {seed}", flush=True)
        results.append(fine_tune(dataclasses.replace(run, seed=seed, out=run.out / f"seed_{seed}")))
    summary: dict[str, Any] = run.to_dict() | {"seeds": [result["seed"] for result in results]}
    for split in ("devel", "test"):
        summary[split] = {}
        for figure in results[0][split]:
            mean, deviation = mean_and_deviation([result[split][figure] for result in results])
            summary[split][figure] = {"mean": mean, "standard_deviation": deviation}
    write_json(run.out / SCORES, summary)
    return summary


def table(scores: dict[str, Any]) -> str:
    """The figures of devel and test, a row each."""
    lines = ["     " + "".join(f"{name:>20}" for name in scores["test"])]
    for split in ("devel", "test"):
        cells = [
            f"{value['mean']:.4f} ± {value['standard_deviation']:.4f}"
            if isinstance(value, dict)
            else f"{value:.4f}"
            for value in scores[split].values()
        ]
        lines.append(f"{split:5}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser(
        prog="python -m minibert.finetune",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    count = {"type": number(int, 1), "metavar": "N"}
    rate = {"type": number(float, 0, exclusive=True), "metavar": "N"}
    add("task", choices=TASKS, help="entities, relations, or answers to questions")
    add("--model", type=Path, required=True, help="model to begin from: ours or Hugging Face's")
    add("--data", type=Path, required=True, help="folder with train, devel and test")
    add("--out", type=Path, required=True, help="run folder to write")
    add("--resume", action="store_true", help="go on after the last finished epoch, or begin")
    add("--epochs", **count, help=f"times through train (default: {FineTuning.epochs})")
    sequences = f"sequences of an update (default: {FineTuning.batch_size})"
    add("--batch-size", **count, help=sequences)
    add("--learning-rate", **rate, help=f"the highest (default: {by_task(LEARNING_RATE)})")
    length = {"type": number(int, 8), "metavar": "N"}
    add("--max-length", **length, help=f"tokens of a sequence (default: {by_task(MAX_LENGTH)})")
    seed = {"type": number(int, 0), "metavar": "N"}
    add("--seed", **seed, help=f"seed of every random draw (default: {FineTuning.seed})")
    add("--seeds", **count, help="so many runs, with the seeds from --seed on")
    dtypes = f"in which the layers compute, in training (default: {FineTuning.dtype})"
    add("--dtype", choices=("float32", "bfloat16"), help=dtypes)
    place = f"where to compute (default: {FineTuning.device})"
    add("--device", choices=("auto", "cpu", "cuda"), help=place)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    seeds = given.pop("seeds", None)
    run = FineTuning(**given)
    try:
        with out_of_memory_is_told(f"less than --batch-size {run.batch_size} needs less"):
            scores = fine_tune(run) if seeds is None else over_seeds(run, seeds)
    except KeyboardInterrupt:
        print("\nfinished epochs are not lost: the same command with --resume goes on")
        raise
    print(table(scores))
    print(f"written: {run.out}")


def by_task(values: dict[str, Any]) -> str:
    return ", ".join(f"{task} {value}" for task, value in values.items())


if __name__ == "__main__":
    raise SystemExit(run_command(main))
