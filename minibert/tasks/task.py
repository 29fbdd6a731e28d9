"""What the tasks share: what a task is, features, batches, the files of a data folder.

Shapes: B batch, S sequence, P places where something is chosen (see `minibert/heads.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from minibert.errors import InputError
from minibert.files import file_size
from minibert.heads import FineTunedModel
from minibert.ops.plain import IGNORED_LABEL

SPLITS = ("train", "devel", "test")
OTHER_NAMES = {"devel": ("devel", "dev")}


class Feature(NamedTuple):
    """One sequence that goes through the model."""

    input_ids: list[int]
    token_type_ids: list[int]
    labels: list[int]  # what is right at each of P places; IGNORED_LABEL where nobody asks


class Batch(NamedTuple):
    """Features side by side."""

    input_ids: Tensor  # (B, S)
    attention_mask: Tensor  # (B, S), 1 = real
    token_type_ids: Tensor  # (B, S)
    labels: Tensor  # (B, P)


class Task(Protocol):
    """What the loop asks of a task. Its constructor takes (data folder, tokenizer, max_length).

    The constructor reads all three splits, and raises InputError for what is wrong in them.
    """

    files: dict[str, Path]  # split -> its file
    features: dict[str, list[Feature]]  # split -> sequences
    labels: list[str]
    head: type[FineTunedModel]
    chosen_by: str  # the figure of devel by which the best epoch is chosen
    predictions_file: str  # what predictions are called in a run folder, with {} for the split

    def predict(self, split: str, logits: Sequence[Tensor]) -> list[Any]:
        """What the model says about a split, from the logits (P, C) of each feature."""

    def scores(self, split: str, predictions: list[Any]) -> dict[str, float]:
        """The figures, all between 0 and 1, best 1."""

    def written(self, split: str, predictions: list[Any]) -> str:
        """The text of the predictions file."""


def collate(features: Sequence[Feature], pad_id: int, device: torch.device) -> Batch:
    """Pad to the longest. Labels of one feature a token are padded with it."""
    lengths = torch.tensor([len(feature.input_ids) for feature in features])  # (B,)
    attention_mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()  # (B, S)
    parts = (
        _padded([feature.input_ids for feature in features], pad_id),
        attention_mask,
        _padded([feature.token_type_ids for feature in features], 0),
        _padded([feature.labels for feature in features], IGNORED_LABEL),
    )
    return Batch(*(part.to(device) for part in parts))


def _padded(rows: list[list[int]], filler: int) -> Tensor:
    """Rows of several lengths as one tensor."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def shuffled(
    features: Sequence[Feature], batch_size: int, seed: int, epoch: int
) -> list[list[Feature]]:
    """All features once, in an order that is a function of (seed, epoch); the last batch may be
    smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(len(features))
    starts = range(0, len(features), batch_size)
    return [[features[i] for i in order[start : start + batch_size]] for start in starts]


def find_files(data: Path, endings: Sequence[str]) -> dict[str, Path]:
    """The file of each split in a data folder: `train.tsv` and so on; `dev` is a name of devel."""
    if not data.is_dir():
        raise InputError(f"{data}: no such folder")
    files = {}
    for split in SPLITS:
        names = [n + end for n in OTHER_NAMES.get(split, (split,)) for end in endings]
        there = [name for name in names if (data / name).exists()]
        if not there:
            raise InputError(f"{data / names[0]}: no such file; expected {' or '.join(names)}")
        if len(there) > 1:
            raise InputError(f"{data}: {' and '.join(there)}; expected one of them")
        files[split] = data / there[0]
    return files


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, UTF-8; an empty one is an InputError."""
    if file_size(path) == 0:
        raise InputError(f"{path}: empty")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some editors begin with a mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    # Not splitlines(): U+2028 and its like may stand in a text.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
