"""The ways to do an update: ours, and the authors', with several settings of each."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import TUNED_ALLOCATOR, installed
from torch import Tensor
from workload import Work, random_models

import train
from minibert.data.batches import Batches, GlobalBatch
from minibert.errors import InputError
from minibert.run_config import RunConfig
from minibert.training.device import set_up_device
from minibert.training.optimizer import build_optimizer


@dataclass(frozen=True)
class Variant:
    """One way to do an update."""

    name: str
    dtype: str = "float32"
    tuned: bool = False  # the allocator keeps memory (ours: train.py itself sees to it)
    medium: bool = False  # theirs: set_float32_matmul_precision("medium"), on a CPU oneDNN
    best: bool = False  # the authors' way at its best, see authors.build
    ours: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # ours: other than train.py's defaults

    @property
    def environment(self) -> dict[str, str]:
        """What glibc reads when the variant's process starts."""
        return TUNED_ALLOCATOR if self.tuned and not self.ours else {}

    @property
    def compiled(self) -> bool:
        """Whether torch.compile runs first, which takes as long as many updates."""
        return self.settings.get("compile", False)


ours = partial(Variant, ours=True)
BF16, PLAIN, COMPILE = "bfloat16", {"ops": "plain"}, {"compile": True}
ON_CPU = [
    Variant("authors float32"),  # as a user gets it
    Variant("authors float32, tuned allocator", tuned=True),
    Variant("authors float32, oneDNN", tuned=True, medium=True),
    Variant("authors bfloat16", BF16, tuned=True),
    ours("ours float32", tuned=True),  # as a user gets it
    ours("ours float32, stock allocator"),
    ours("ours bfloat16", BF16, tuned=True),
    ours("ours bfloat16, stock allocator", BF16),
]
ON_CPU_IF_ASKED = [
    Variant("authors bfloat16, stock allocator", BF16),
    Variant("authors best", BF16, tuned=True, best=True),
    ours("ours float32, plain ops", tuned=True, settings=PLAIN),
    ours("ours float32, plain ops, stock allocator", settings=PLAIN),
    ours("ours bfloat16, plain ops", BF16, tuned=True, settings=PLAIN),
    ours("ours bfloat16, plain ops, stock allocator", BF16, settings=PLAIN),
    ours("ours bfloat16, compiled", BF16, tuned=True, settings=COMPILE),
]
ON_CUDA = [
    Variant("authors float32"),
    Variant("authors bfloat16", BF16),
    Variant("authors best", BF16, best=True),
    ours("ours float32", tuned=True),
    ours("ours bfloat16", BF16, tuned=True),
    ours("ours bfloat16, compiled", BF16, tuned=True, settings=COMPILE),
]
ON_CUDA_IF_ASKED = [ours("ours bfloat16, plain ops", BF16, tuned=True, settings=PLAIN)]


def choose(names: Sequence[str] | None, device: torch.device) -> list[Variant]:
    """The variants of these names, in the order of the tables above; None: the usual ones."""
    usual, if_asked = (
        (ON_CPU, ON_CPU_IF_ASKED) if device.type == "cpu" else (ON_CUDA, ON_CUDA_IF_ASKED)
    )
    known = [variant.name for variant in usual + if_asked]
    for name in names or ():
        if name not in known:
            raise InputError(f"--variants {name!r}; on this device: {'; '.join(known)}")
    chosen = usual if names is None else [v for v in usual + if_asked if v.name in names]
    if not all(v.ours for v in chosen) and not installed("transformers"):
        raise InputError('the authors\' side needs transformers: pip install -e ".[bench]"')
    return chosen


# The two sides. Each makes its models and returns its batches and the update.
Side = tuple[Batches, Callable[[GlobalBatch], Tensor]]


def our_side(work: Work, variant: Variant) -> Side:
    """Models, batches and update as in train.py."""
    if variant.tuned:
        set_up_device(work.device.type)  # which keeps freed memory, and chooses float32 products
    else:
        torch.set_float32_matmul_precision(work.precision)
    student, teacher, layers = random_models(work.config)
    settings = {"micro_batch_tokens": work.micro_batch_tokens} | variant.settings
    run = RunConfig(
        teacher=Path("random"),
        data=work.data,
        out=Path("none"),
        batch_size=work.batch_size,
        max_length=work.max_length,
        teacher_layers=layers,
        device=work.device.type,
        dtype=variant.dtype,
        **settings,
    ).resolved()
    student, teacher = student.to(work.device), teacher.to(work.device)
    optimizer = build_optimizer(student, run.weight_decay)
    learner, guide = train.forward_passes(student, teacher, run)

    steps = itertools.count(1)

    def update(batch: GlobalBatch) -> Tensor:
        assert not teacher.training  # it stays in memory, as in a run, for evaluations
        return train.update(learner, guide, optimizer, batch, next(steps), run)[0]  # the loss

    return work.batches(run.micro_batch_tokens, train.is_packed(run, work.device)), update


def authors_side(work: Work, variant: Variant) -> Side:
    """The authors' way: the whole batch at once, padded to its longest text."""
    import authors  # here: without it, and without transformers, our side still runs

    student, teacher, layers = random_models(work.config)
    way, optimizer = authors.build(student, teacher, layers, work.device, variant.best)

    def update(batch: GlobalBatch) -> Tensor:
        (padded,) = batch.micro_batches
        return authors.update(way, optimizer, padded.to(work.device), variant.dtype)

    return work.batches(micro_batch_tokens=work.batch_size * work.max_length), update
