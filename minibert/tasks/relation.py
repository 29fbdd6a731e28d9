"""Relations: what a text says of the two things that are marked in it, one class a text.

`.jsonl`: an object a line with `text` and `label`. `.tsv`: text TAB label, or id TAB text TAB
label; a first line whose last column is `label` is a heading (GAD comes in both forms).

Micro F1 counts every class but those that say that there is no relation (`NEGATIVE`). Of ChemProt
the field counts the groups CPR:3, 4, 5, 6 and 9 of its relations and takes the rest for negative.
The 13 classes of scibert's copy are the members of just these groups, and it has no negative
examples: there all classes count, and micro F1 is accuracy (what SciBERT reports). Beside it
stands `group_f1`, the same after each class has become its group.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Encoding
from torch import Tensor

from minibert.data.tokenizer import Tokenizer
from minibert.errors import InputError
from minibert.files import parse_json
from minibert.heads import BertForSequenceClassification
from minibert.tasks.scores import class_scores
from minibert.tasks.task import SPLITS, Feature, find_files, read_lines

# What corpora call the class of texts that state no relation.
NEGATIVE = {"0", "false", "not", "no", "none", "negative", "ddi-false"}  # in any case of letters
NEGATIVE |= {f"cpr:{number}" for number in (0, 1, 2, 7, 8, 10)}
# A marked thing: << protein >> and [[ drug ]] in ChemProt, @GENE$ and @DISEASE$ in GAD.
MARK = re.compile(r"<<.*?>>|\[\[.*?\]\]|@\w+\$")
CHEMPROT_GROUPS = {
    "CPR:3": ("UPREGULATOR", "ACTIVATOR", "INDIRECT-UPREGULATOR"),
    "CPR:4": ("DOWNREGULATOR", "INHIBITOR", "INDIRECT-DOWNREGULATOR"),
    "CPR:5": ("AGONIST", "AGONIST-ACTIVATOR", "AGONIST-INHIBITOR"),
    "CPR:6": ("ANTAGONIST",),
    "CPR:9": ("SUBSTRATE", "PRODUCT-OF", "SUBSTRATE_PRODUCT-OF"),
}
GROUP_OF = {member: group for group, members in CHEMPROT_GROUPS.items() for member in members}


class Example(NamedTuple):
    text: str
    label: str


class Relation:
    """The task; see `minibert.tasks.task.Task`."""

    head = BertForSequenceClassification
    chosen_by = "f1"
    predictions_file = "predictions_{}.jsonl"

    def __init__(self, data: Path, tokenizer: Tokenizer, max_length: int):
        self.files = find_files(data, [".jsonl", ".tsv"])
        self.examples: dict[str, dict[int, Example]] = {}  # split -> line -> example
        for split in SPLITS:
            path = self.files[split]
            read = read_objects if path.suffix == ".jsonl" else read_columns
            self.examples[split] = read(path)
        self.labels = self._labels()
        self.has_groups = set(self.labels) <= GROUP_OF.keys()
        self.features = {
            split: [
                self._feature(example, encoding, tokenizer, max_length)
                for example, encoding in zip(
                    examples.values(),
                    tokenizer.encode_with_offsets([e.text for e in examples.values()]),
                    strict=True,
                )
            ]
            for split, examples in self.examples.items()
        }

    def _labels(self) -> list[str]:
        """The classes of train; what devel and test have beyond is refused."""
        labels = sorted({example.label for example in self.examples["train"].values()})
        if len(labels) < 2:
            raise InputError(f"{self.files['train']}: one class, {labels[0]!r}; expected several")
        for split in ("devel", "test"):
            for line, example in self.examples[split].items():
                if example.label not in labels:
                    raise InputError(
                        f"{self.files[split]}: line {line}: label {example.label[:50]!r}; "
                        f"{self.files['train'].name} has {', '.join(labels)}"
                    )
        return labels

    def _feature(
        self, example: Example, encoding: Encoding, tokenizer: Tokenizer, max_length: int
    ) -> Feature:
        """[CLS] text [SEP], of a long text the part around what is marked."""
        part = around_marks(example.text, encoding.offsets, room=max_length - 2)
        input_ids = [tokenizer.cls_id, *encoding.ids[part], tokenizer.sep_id]
        return Feature(input_ids, [0] * len(input_ids), [self.labels.index(example.label)])

    def predict(self, split: str, logits: Sequence[Tensor]) -> list[tuple[str, float]]:
        """The class of each text, and its probability."""
        best = [rows[0].softmax(dim=-1).max(dim=-1) for rows in logits]
        return [(self.labels[int(each.indices)], float(each.values)) for each in best]

    def scores(self, split: str, predictions: list[tuple[str, float]]) -> dict[str, float]:
        """Micro figures over the classes that are relations; `group_f1`: over ChemProt's groups."""
        gold = [example.label for example in self.examples[split].values()]
        told = [label for label, _ in predictions]
        negative = [label for label in self.labels if label.lower() in NEGATIVE]
        figures = class_scores(gold, told, negative)
        if self.has_groups:
            groups = ([GROUP_OF[label] for label in labels] for labels in (gold, told))
            figures["group_f1"] = class_scores(*groups, negative)["f1"]
        return figures

    def written(self, split: str, predictions: list[tuple[str, float]]) -> str:
        """An object a line: text, label, predicted, probability."""
        return "".join(
            json.dumps(example._asdict() | {"predicted": told, "probability": round(p, 6)}) + "\n"
            for example, (told, p) in zip(self.examples[split].values(), predictions, strict=True)
        )


def around_marks(text: str, offsets: list[tuple[int, int]], room: int) -> slice:
    """Which tokens of a text to keep where there is room for so many alone.

    As much before what is marked as behind it. The beginning where nothing is marked; from the
    first mark on where the marks are too far apart.
    """
    if len(offsets) <= room:
        return slice(None)
    marks = list(MARK.finditer(text))
    if not marks:
        return slice(room)
    marked = [
        number
        for number, (begin, end) in enumerate(offsets)
        if end > marks[0].start() and begin < marks[-1].end()
    ]
    spare = max(0, room - len(marked))
    start = min(max(0, marked[0] - spare // 2), len(offsets) - room)
    return slice(start, start + room)


def read_objects(path: Path) -> dict[int, Example]:
    """The examples of a .jsonl file by line number."""
    examples = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            content = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number}: not readable as JSON ({error})") from None
        found = content if isinstance(content, dict) else {}
        text, label = found.get("text"), found.get("label")
        if type(label) is int:
            label = str(label)
        if not isinstance(text, str) or not isinstance(label, str):
            raise InputError(f"{path}: line {number}: expected an object with text and label")
        examples[number] = _checked(text, label, f"{path}: line {number}")
    if not examples:
        raise InputError(f"{path}: empty lines alone; expected examples")
    return examples


def read_columns(path: Path) -> dict[int, Example]:
    """The examples of a .tsv file by line number."""
    examples = {}
    for number, line in enumerate(read_lines(path), start=1):
        columns = line.split("\t")
        if not line.strip():
            continue
        if number == 1 and columns[-1].strip().lower() == "label":
            continue
        if len(columns) not in (2, 3):
            raise InputError(
                f"{path}: line {number}: {len(columns)} columns; "
                f"expected text TAB label, or id TAB text TAB label"
            )
        examples[number] = _checked(columns[-2], columns[-1], f"{path}: line {number}")
    if not examples:
        raise InputError(f"{path}: a heading alone; expected examples")
    return examples


def _checked(text: str, label: str, place: str) -> Example:
    if not text.strip() or not label.strip():
        raise InputError(f"{place}: an empty text or label")
    return Example(text.strip(), label.strip())
