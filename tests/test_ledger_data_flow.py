"""Nothing in a step is computed in vain: whatever an operation makes goes into the loss's gradient,
the update or the logged figures; and every parameter gets a gradient.

What is followed are memories, whole: that part of one is overwritten unread is not seen.
"""

from collections import Counter

import pytest
import torch
from ledger_toys import EVERY_RECIPE, TOY, asked_in, ledger_of, run_of, toy_ledger

import train
from minibert.ledger.record import Ledger, Operation

# What is computed and not used: the operation, words of a line that asked for it, and why.
IN_VAIN = {
    ("aten.nonzero.default", "mask.nonzero()"): "its shape is used, the number of real tokens",
    ("aten.mul.Tensor", "(loss * world_size()).backward()"): "only its gradient is used",
    ("aten.zeros.default", "_VocabularyLoss.apply("): "autograd's, for outputs without gradient",
}
READ_BY_PYTHON = "aten._local_scalar_dense.default"


def in_vain(ledger: Ledger) -> list[Operation]:
    """The operations whose outputs lead to none of the ledger's results, from the last on."""
    needed = set(ledger.results)
    found = []
    for operation, flow in zip(reversed(ledger.operations), reversed(ledger.flows), strict=True):
        filled = {*flow.overwrites, *flow.makes}
        if filled & needed or operation.name == READ_BY_PYTHON:
            needed.difference_update(flow.makes)
            needed.update(flow.reads)
        elif filled:
            found.append(operation)
    return found


def unexplained(operations: list[Operation]) -> list[Operation]:
    return [
        operation
        for operation in operations
        if not any(operation.name == name and asked_in(operation, call) for name, call in IN_VAIN)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ops", ["fused", "plain"])
@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_no_operation_is_in_vain(recipe, ops, dtype):
    ledger = toy_ledger(recipe, ops, dtype)
    assert len(ledger.flows) == len(ledger.operations) > 1000
    assert unexplained(in_vain(ledger)) == []


def test_what_is_in_vain_takes_no_products_and_little_else():
    for recipe in EVERY_RECIPE:
        ledger = toy_ledger(recipe, "fused")
        found = in_vain(ledger)
        assert sum(operation.flops for operation in found) == 0
        written = sum(operation.bytes_written for operation in ledger.operations)
        assert sum(operation.bytes_written for operation in found) < 2e-3 * written


def test_a_dead_branch_is_found(monkeypatch):
    """Numbers that nobody looks at; what leads to them alone is found with them."""
    loss_terms = train.loss_terms

    def with_more(*arguments):
        terms = loss_terms(*arguments)
        (terms.hidden_loss.exp() @ terms.attention_loss).neg()
        return terms

    monkeypatch.setattr(train, "loss_terms", with_more)
    ledger = ledger_of(run_of("compactbiobert"))
    names = Counter(operation.name for operation in unexplained(in_vain(ledger)))
    assert names == {"aten.exp.default": 3, "aten.dot.default": 3, "aten.neg.default": 3}


def test_what_leads_to_no_result_is_found():
    """If the weights were no results of a step, the update of them would be in vain."""
    ledger = ledger_of(run_of("compactbiobert"))
    ledger.results = ledger.results[:1]  # the figures
    names = {operation.name for operation in in_vain(ledger)}
    assert "aten._fused_adamw_.default" in names


def gradients_of(recipe: str, ops: str, monkeypatch) -> dict[str, torch.Tensor]:
    """Each parameter's gradient in a toy step of the recipe, as the optimiser saw it."""
    update, gradients = train.update, {}

    def noted(student, teacher, optimizer, *rest):
        def note(*_):
            found = {name: p.grad for name, p in student.named_parameters()}
            gradients.update({n: None if g is None else g.clone() for n, g in found.items()})

        handle = optimizer.register_step_pre_hook(note)
        figures = update(student, teacher, optimizer, *rest)
        handle.remove()
        return figures

    monkeypatch.setattr(train, "update", noted)
    ledger_of(run_of(recipe, ops=ops))
    return gradients


@pytest.mark.parametrize("ops", ["fused", "plain"])
@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_every_parameter_gets_a_gradient(recipe, ops, monkeypatch):
    gradients = gradients_of(recipe, ops, monkeypatch)
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    S = 13
    for name, gradient in gradients.items():
        rows = gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]
        zero = (rows == 0).all(1).nonzero().flatten().tolist()  # rows without any gradient
        if name.endswith("position_embeddings.weight"):
            assert zero == list(range(S, TOY.max_position_embeddings))  # no sequence is so long
        elif name.endswith("token_type_embeddings.weight"):
            assert zero == [1]  # there is one segment
        elif name.endswith("key.bias"):
            # It adds the same to all scores of a query: in exact arithmetic its gradient is 0.
            query_bias = gradients[name.replace("key", "query")]
            assert gradient.norm() < 1e-4 * query_bias.norm()
        else:
            assert zero == [], name


def test_a_parameter_that_is_cut_off_is_found(monkeypatch):
    projection = torch.nn.functional.linear

    def cut_off(values, weight, bias):
        return projection(values, weight, bias.detach())

    monkeypatch.setattr("minibert.model.F.linear", cut_off)
    gradients = gradients_of("compactbiobert", "fused", monkeypatch)
    assert any(gradient is None for gradient in gradients.values())
