"""Ledgers of toy steps, of every recipe; sizes are awkward and pairwise different."""

import dataclasses
import json
import linecache
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minibert.config import BertConfig
from minibert.ledger.counts import tensors_in
from minibert.ledger.record import PACKAGE, ROOT, Ledger, Line, Operation
from minibert.ledger.step import record_step
from minibert.recipes import RECIPES
from minibert.run_config import RunConfig
from minibert.student import layers_to_follow

TOY = BertConfig(
    vocab_size=101,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=37,
    max_position_embeddings=29,
    initializer_range=0.2,
)
TOY_STUDENT = {"num_hidden_layers": 2, "hidden_size": 18, "intermediate_size": 31}
SIZES = {"batch_size": 5, "max_length": 13, "micro_batch_tokens": 30, "steps": 10}  # 2 + 2 + 1
EVERY_RECIPE = tuple(RECIPES)


class WatchfulLedger(Ledger):
    """A ledger that also notes on which devices an operation's tensors are, and by whose code it
    was asked for: the files on the stack up to the first that is ours, torch's left out.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.devices: list[set[str]] = []
        self.strangers: list[set[str]] = []

    def run(self, operation: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        result = super().run(operation, arguments, named)
        tensors = tensors_in([*arguments, *named.values(), result])
        self.devices.append({str(tensor.device) for tensor in tensors})
        self.strangers.append(set(_strangers()))
        return result


def _strangers() -> Iterator[str]:
    ours = (str(PACKAGE), str(ROOT / "train.py"))
    passed = (str(PACKAGE / "ledger"), str(Path(torch.__file__).parent), __file__)
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(passed):
            if name.startswith(ours):
                return
            yield name
        frame = frame.f_back


def run_of(name: str, student: dict[str, int] = TOY_STUDENT, **settings: Any) -> RunConfig:
    """A run of the recipe; tinybiobert's student has the sizes given."""
    chosen = RECIPES[name]
    if chosen.student:
        chosen = dataclasses.replace(chosen, student=student)
    source = {"teacher" if chosen.needs_teacher else "model": Path("model")}
    given = {"recipe": chosen, "data": Path("data"), "out": Path("out"), **source, **SIZES}
    return RunConfig(**given | settings).resolved()


def ledger_of(
    run: RunConfig, config: BertConfig = TOY, shapes_only: bool = False, kind: type[Ledger] = Ledger
) -> Ledger:
    """The ledger of a step of `run`, by a teacher (recipe mlm: a model) of `config`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(config.to_dict()))
        return record_step(run, path, shapes_only, kind)


def toy_ledger(recipe: str, ops: str = "fused", dtype: str = "float32") -> WatchfulLedger:
    """The ledger of a toy step, made once."""
    return _toy_ledger(recipe, ops, dtype)


@cache
def _toy_ledger(recipe: str, ops: str, dtype: str) -> WatchfulLedger:
    return ledger_of(run_of(recipe, ops=ops, dtype=dtype), kind=WatchfulLedger)


def followed(run: RunConfig, config: BertConfig) -> tuple[BertConfig, BertConfig | None, RunConfig]:
    """The student's and the teacher's sizes, and the run with its layers named."""
    if not run.recipe.needs_teacher:
        return config, None, run
    layers = layers_to_follow(run.recipe, config.num_hidden_layers, run.teacher_layers)
    sizes = run.recipe.student | {"num_hidden_layers": len(layers)}
    return (
        dataclasses.replace(config, **sizes),
        config,
        dataclasses.replace(run, teacher_layers=layers),
    )


def source(line: Line) -> str:
    """What stands in a line of our source."""
    file, number = line
    return linecache.getline(str(ROOT / file), number).strip()


def asked_in(operation: Operation, call: str) -> bool:
    """Whether one of the lines that asked for an operation holds these words."""
    return any(call in source(line) for line in operation.lines)
