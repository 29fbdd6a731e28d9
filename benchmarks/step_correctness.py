"""Whether a whole step, on this very device, is right: on a CPU too, and without Triton.

1. Loss terms and gradient by the fused operations are those by the plain ones.
2. A run that goes on from its checkpoint does what the run that was not interrupted does.

Models are toys at awkward sizes.

Shapes: B batch, S sequence, M masked positions.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from losses import relative_error
from torch import Tensor
from workload import random_models

import train
from minibert.config import BertConfig
from minibert.data.batches import GlobalBatch, MicroBatch
from minibert.model import BertForMaskedLM
from minibert.run_config import RunConfig
from minibert.training.checkpoint import State, load_newest, save_checkpoint
from minibert.training.optimizer import build_optimizer

TOY = BertConfig(
    vocab_size=591,
    hidden_size=78,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=131,
    max_position_embeddings=53,
    initializer_range=0.2,  # so that attention is not uniform and layers differ
)
STILL = dataclasses.replace(TOY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LENGTHS = (47, 31, 7)  # real tokens of the sequences: B = 3, S = 47
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
RESUME_TOLERANCE = 1e-6


def check_step(device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for each loss term and for the gradient, as JSON holds it.

    Float32 gradients are compared number by number; in bfloat16 the norms of the parameters', and
    the directions of those that are more than rounding.
    """
    for dtype, tolerance in TOLERANCE.items():
        (found, gradients), (truth, true_gradients) = (
            terms_and_gradients(ops, dtype, device) for ops in ("fused", "plain")
        )
        for name, ours, theirs in zip(truth._fields, found, truth, strict=True):
            yield row(f"step {dtype}: {name}", [ours], [theirs], tolerance)
        if dtype == "float32":
            yield row(f"step {dtype}: gradient", gradients, true_gradients, tolerance)
        else:
            both = ([part.norm() for part in side] for side in (gradients, true_gradients))
            yield row(f"step {dtype}: gradient norms", *both, tolerance)
            largest = max(part.norm() for part in true_gradients)
            pairs = [
                (ours / ours.norm(), theirs / theirs.norm())
                for ours, theirs in zip(gradients, true_gradients, strict=True)
                if theirs.norm() > largest / 1000
            ]
            yield row(f"step {dtype}: gradient directions", *zip(*pairs, strict=True), tolerance)


def check_resume(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for the loss of the third update, and one for the weights after it.

    By plain operations: a GPU's attention adds in an order that varies, and AdamW makes a whole
    step of a gradient that is nothing but rounding.
    """
    run, whole = toy_run("plain", "float32", device), random_batch(TOY.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        student, teacher, _ = toy_models(TOY, device)
        optimizer = build_optimizer(student, run.weight_decay)
        for step in range(2):
            update(student, teacher, optimizer, run, whole, step)
        save_checkpoint(Path(folder), State(2), student, optimizer, keep=1)
        loss = update(student, teacher, optimizer, run, whole, step=2)

        resumed, _, _ = toy_models(TOY, device)
        its_optimizer = build_optimizer(resumed, run.weight_decay)
        done, _ = load_newest(Path(folder), resumed, its_optimizer)
        assert done == 2
        its_loss = update(resumed, teacher, its_optimizer, run, whole, step=done)
    yield row("resumed: loss of the third update", [its_loss], [loss], RESUME_TOLERANCE)
    weights, its_weights = (
        [part.detach() for part in model.parameters()] for model in (student, resumed)
    )
    yield row("resumed: weights after the third update", its_weights, weights, RESUME_TOLERANCE)


def row(
    what: str, found: Sequence[Tensor], truth: Sequence[Tensor], allowed: float
) -> dict[str, Any]:
    """The error of several tensors together; one that is not a number is not right."""
    error = relative_error(found, truth)
    return {"what": what, "error": error, "allowed": allowed, "right": error <= allowed}


def terms_and_gradients(
    ops: str, dtype: str, device: torch.device
) -> tuple[train.LossTerms, list[Tensor]]:
    """Of one micro-batch, by models without dropout."""
    run, whole = toy_run(ops, dtype, device), random_batch(STILL.vocab_size)
    student, teacher, _ = toy_models(STILL, device)
    learner, guide = train.forward_passes(student, teacher, run)
    terms = train.loss_terms(learner, guide, whole.micro_batches[0].to(device), whole, run)
    loss = (
        terms.vocabulary_loss
        + run.hidden_weight * terms.hidden_loss.sum()
        + run.attention_weight * terms.attention_loss.sum()
    )
    loss.backward()
    detached = train.LossTerms(*(term.detach() for term in terms))
    return detached, [part.grad for part in student.parameters()]


def update(
    student: BertForMaskedLM,
    teacher: BertForMaskedLM,
    optimizer: torch.optim.Optimizer,
    run: RunConfig,
    whole: GlobalBatch,
    step: int,
) -> Tensor:
    """One update of train.py; returns the loss, a scalar."""
    learner, guide = train.forward_passes(student, teacher, run)
    return train.update(learner, guide, optimizer, whole, step, run)[0]


def toy_models(
    config: BertConfig, device: torch.device
) -> tuple[BertForMaskedLM, BertForMaskedLM, tuple[int, ...]]:
    """A student that is some way from its teacher, and the layers that it follows."""
    student, teacher, layers = random_models(config)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return student.to(device), teacher.to(device), layers


def toy_run(ops: str, dtype: str, device: torch.device) -> RunConfig:
    """The recipe's weights; temperature 2, so that both softmaxes are asked for."""
    nowhere = Path("none")
    return RunConfig(
        teacher=nowhere,
        data=nowhere,
        out=nowhere,
        teacher_layers=random_models(TOY)[2],
        max_length=LENGTHS[0],
        temperature=2.0,
        learning_rate=1e-3,
        device=device.type,
        dtype=dtype,
        ops=ops,
    ).resolved()


def random_batch(vocab_size: int) -> GlobalBatch:
    """One micro-batch, every fifth real token of which is masked."""
    generator = torch.Generator().manual_seed(0)
    B, S = len(LENGTHS), LENGTHS[0]
    original_ids = torch.randint(5, vocab_size, (B, S), generator=generator)
    attention_mask = (torch.arange(S) < torch.tensor(LENGTHS)[:, None]).long()  # (B, S)
    masked_positions = attention_mask.flatten().nonzero().squeeze(1)[2::5]  # (M,)
    labels = original_ids.flatten()[masked_positions]  # (M,)
    input_ids = original_ids * attention_mask
    input_ids.view(-1)[masked_positions] = 4
    batch = MicroBatch(input_ids, attention_mask, masked_positions, labels)
    return GlobalBatch([batch], list(range(B)), sum(LENGTHS), len(labels))
