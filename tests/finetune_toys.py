"""Toy data for the tests of minibert.finetune: words of the toy world, rules that can be learnt."""

import json
import random
from pathlib import Path

import torch
from torch import Tensor

from minibert.finetune import FineTuning

SPLITS = {"train": 61, "devel": 11, "test": 13}  # examples of each


def words(generator: random.Random, low: int, high: int) -> list[str]:
    return [f"w{generator.randrange(94):02}" for _ in range(generator.randint(low, high))]


def ner_data(folder: Path) -> Path:
    """Words whose number ends in 3 or 7 begin an entity; one that ends in 5 behind it goes on."""
    folder.mkdir()
    generator = random.Random(0)
    for split, count in SPLITS.items():
        blocks = []
        for _ in range(count):
            lines, before = [], "O"
            for word in words(generator, 2, 40):
                kind = {"3": "Gene", "7": "Drug"}.get(word[-1])
                tag = f"B-{kind}" if kind else "O"
                if word[-1] == "5" and before != "O":
                    tag = f"I-{before[2:]}"
                lines.append(f"{word}\t{tag}\n")
                before = tag
            blocks.append("".join(lines))
        (folder / f"{split}.tsv").write_text("\n".join(blocks))
    return folder


def relation_data(folder: Path) -> Path:
    """The class is told by one word; `false` is the negative one."""
    folder.mkdir()
    generator = random.Random(1)
    for split, count in SPLITS.items():
        lines = []
        for number in range(count):
            label, sign = [("false", "w10"), ("UP", "w20"), ("DOWN", "w30")][number % 3]
            before, behind = words(generator, 1, 9), words(generator, 1, 20)
            text = " ".join([*before, "<<", "w01", ">>", sign, "[[", "w02", "]]", *behind])
            lines.append(json.dumps({"text": text, "label": label, "metadata": []}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def qa_data(folder: Path) -> Path:
    """The answer to `w11` is the two words w40 w41, to `w12` the word w50, wherever they stand."""
    folder.mkdir()
    generator = random.Random(2)
    for split, count in SPLITS.items():
        paragraphs = []
        for number in range(count):
            asked, answer = [("w11 w77", "w40 w41"), ("w12", "w50")][number % 2]
            others = [w for w in words(generator, 3, 45) if w not in ("w40", "w41", "w50")]
            others.insert(generator.randint(0, len(others)), answer)
            context = " ".join(others)
            answers = [{"text": answer, "answer_start": context.index(answer)}]
            qas = [{"id": f"q{number // 2}-{number % 2}", "question": asked, "answers": answers}]
            paragraphs.append({"context": context, "qas": qas})
        content = {"data": [{"title": "toy", "paragraphs": paragraphs}]}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


DATA = {"ner": ner_data, "relation": relation_data, "qa": qa_data}


def toy_settings(task: str, toy_world: Path, folder: Path, **changes) -> FineTuning:
    """A run of a few epochs on the toy data of a task, in `folder`."""
    data = folder / "data"
    if not data.exists():
        folder.mkdir(exist_ok=True)
        DATA[task](data)
    settings = {
        "task": task, "model": toy_world / "teacher", "data": data, "out": folder / "run",
        "epochs": 3, "batch_size": 5, "learning_rate": 3e-3, "max_length": 19, "device": "cpu",
    }  # fmt: skip
    return FineTuning(**(settings | changes))


def logits_that_say(task, split: str) -> list[Tensor]:
    """For each feature logits (P, C) that point at its own labels, whatever those are."""
    logits = []
    for feature in task.features[split]:
        choices = len(feature.input_ids) if task.labels == ("first", "last") else len(task.labels)
        rows = torch.zeros(len(feature.labels), choices)
        for place, label in enumerate(feature.labels):
            if label >= 0:
                rows[place, label] = 9.0
        logits.append(rows)
    return logits
