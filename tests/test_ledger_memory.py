"""The fused path never makes a tensor of S x S for every head of every sequence, nor one of M x V
beyond its tile, which plain does; and the ledger says of what is kept for backward just what is.

On a CPU fused attention works on the maps of one sequence at a time, N x S x S, and so does the
loss that follows them. Each keeps one for backward, a tensor of its own: together as much as two of
plain's whole ones.
"""

import dataclasses
import math

import pytest
import torch
from ledger_toys import EVERY_RECIPE, asked_in, ledger_of, run_of, toy_ledger

import train
from minibert.config import BIOBERT
from minibert.ledger import step
from minibert.ledger.record import STUDENT, Ledger, Operation
from minibert.ops.vocabulary import LOGITS_AT_ONCE

# One micro-batch of long sequences, BioBERT's sizes but for the layers. So many masked positions
# that M V is beyond a tile of logits.
B, S, N, V = 4, 503, BIOBERT.num_attention_heads, BIOBERT.vocab_size
MASKED_SHARE = 0.6
M = round(MASKED_SHARE * B * S)
ROUNDED_S = 512  # on so many tokens fused attention is computed on a CPU
LONG = {"batch_size": B, "max_length": S, "micro_batch_tokens": B * S}


def made(operations: list[Operation]) -> list[tuple[int, ...]]:
    """The shapes of all that was made."""
    return [shape for operation in operations for shape, _ in operation.outputs]


def map_sizes(operations: list[Operation], S: int) -> set[int]:
    """Elements of the tensors whose rows are as long as a row of an attention map."""
    maps = [shape for shape in made(operations) if len(shape) > 2 and shape[-1] == S]
    return {math.prod(shape) for shape in maps}


def logit_sizes(operations: list[Operation], V: int) -> set[int]:
    """Elements of the tensors whose rows are as long as a row of logits."""
    return {math.prod(shape) for shape in made(operations) if len(shape) > 1 and shape[-1] == V}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["compactbiobert", "tinybiobert"])
def test_no_whole_maps_and_logits_at_biobert_s_size(recipe, monkeypatch):
    monkeypatch.setattr(step, "MASKED_SHARE", MASKED_SHARE)
    config = dataclasses.replace(BIOBERT, num_hidden_layers=2)
    student = {"num_hidden_layers": 1, "hidden_size": 312, "intermediate_size": 1_200}
    assert M * V > LOGITS_AT_ONCE
    fused = ledger_of(run_of(recipe, student, **LONG), config, shapes_only=True).operations
    assert max(map_sizes(fused, ROUNDED_S)) == N * ROUNDED_S**2
    assert 0 < max(logit_sizes(fused, V)) <= LOGITS_AT_ONCE
    plain = ledger_of(run_of(recipe, student, ops="plain", **LONG), config, shapes_only=True)
    assert max(map_sizes(plain.operations, S)) == B * N * S * S
    assert max(logit_sizes(plain.operations, V)) == M * V


@pytest.mark.slow
def test_no_whole_maps_in_all_of_biobert_s_layers():
    run = run_of("compactbiobert", batch_size=5, max_length=96, micro_batch_tokens=480)
    fused = ledger_of(run, BIOBERT, shapes_only=True).operations
    assert max(map_sizes(fused, 96)) == N * 96 * 96
    plain = ledger_of(dataclasses.replace(run, ops="plain"), BIOBERT, shapes_only=True).operations
    assert max(map_sizes(plain, 96)) == 5 * N * 96 * 96


@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_no_whole_maps_in_a_toy_step(recipe):
    S, rounded, heads, sequences = 13, 16, 3, 2
    assert max(map_sizes(toy_ledger(recipe).operations, rounded)) == heads * rounded * rounded
    whole = max(map_sizes(toy_ledger(recipe, "plain").operations, S))
    assert whole == sequences * heads * S * S


def test_what_attention_keeps():
    """Of each sequence two maps: the probabilities with what dropout did as their sign, and the
    gradient of the loss by the scores. Beside them the context, which the next linear map keeps
    too; queries, keys and values are kept by the linear maps' outputs.
    """
    kept = [
        o
        for o in toy_ledger("compactbiobert").operations
        if o.phase == STUDENT and o.function == "_Attention" and o.saved_bytes
    ]
    maps = [o.saved_bytes for o in kept if o.outputs[0][0][-2:] == (16, 16)]  # 13, rounded up
    assert maps == 2 * 5 * 2 * [3 * 16 * 16 * 4]  # sequences, layers
    contexts = [o for o in kept if asked_in(o, "context[b][:, real] = ")]
    assert len(maps) + len(contexts) == len(kept)


def kept_by_autograd(recipe: str, ops: str, dtype: str, monkeypatch) -> int:
    """Bytes that autograd keeps in a toy step, counted without a ledger: those of the storages of
    all saved tensors, without the weights and what the batch brought.
    """
    update, totals = train.update, []

    def counted(student, teacher, optimizer, batch, *rest):
        given = [*student.parameters(), *(() if teacher is None else teacher.parameters())]
        given += [t for part in batch.micro_batches for t in part if t is not None]
        saved = []

        def keep(tensor):
            saved.append(tensor.detach())  # holds on to it, so that no address is used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            figures = update(student, teacher, optimizer, batch, *rest)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        for tensor in given:
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        totals.append(sum(storages.values()))
        return figures

    monkeypatch.setattr(train, "update", counted)
    ledger_of(run_of(recipe, ops=ops, dtype=dtype))
    return totals[1]


@pytest.mark.parametrize(
    ("recipe", "ops", "dtype"),
    [
        ("compactbiobert", "fused", "float32"),
        ("compactbiobert", "plain", "bfloat16"),
        ("tinybiobert", "fused", "bfloat16"),
        ("mlm", "plain", "float32"),
    ],
)
def test_saved_bytes_are_what_autograd_keeps(recipe, ops, dtype, monkeypatch):
    kept = sum(o.saved_bytes for o in toy_ledger(recipe, ops, dtype).operations)
    assert kept == kept_by_autograd(recipe, ops, dtype, monkeypatch) > 100_000


def test_the_whole_of_what_a_view_keeps():
    """A row that is saved keeps the memory of the matrix."""
    with Ledger({}).recorded() as ledger:
        matrix = torch.zeros(5, 7, requires_grad=True) + 1
        (matrix[2] * matrix[3]).sum().backward()
    assert sum(o.saved_bytes for o in ledger.operations) == 5 * 7 * 4
