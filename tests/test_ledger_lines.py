"""Every operation of a step was asked for by a line of `minibert/` or `train.py`, in backward too;
and the ledger names that line, its module and its phase.
"""

import dataclasses

import pytest
from ledger_toys import EVERY_RECIPE, asked_in, ledger_of, run_of, source, toy_ledger
from ledger_toys import WatchfulLedger as Watchful

import train
from minibert.ledger.record import (
    BACKWARD,
    LOSSES,
    PHASES,
    STUDENT,
    TEACHER,
    UPDATE,
    Ledger,
    Operation,
)

BACKWARD_CALL = "(loss * world_size()).backward()"


@pytest.mark.parametrize("ops", ["fused", "plain"])
@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_all_is_asked_for_by_lines_of_ours(recipe, ops):
    ledger = toy_ledger(recipe, ops)
    for operation, strangers in zip(ledger.operations, ledger.strangers, strict=True):
        assert strangers == set(), operation
        assert operation.lines
        for file, _ in operation.lines:
            assert file == "train.py" or file.startswith("minibert/")
            assert not file.startswith("minibert/ledger/")


def test_a_line_that_is_not_ours_is_found(monkeypatch):
    loss_terms = train.loss_terms

    def from_elsewhere(*arguments):
        terms = loss_terms(*arguments)
        return terms._replace(hidden_loss=terms.hidden_loss * 1.0)

    monkeypatch.setattr(train, "loss_terms", from_elsewhere)
    ledger = ledger_of(run_of("compactbiobert"), kind=Watchful)
    told = zip(ledger.operations, ledger.strangers, strict=True)
    found = [(operation.name, operation.phase) for operation, strangers in told if strangers]
    assert found == 3 * [("aten.mul.Tensor", LOSSES)]


@pytest.mark.parametrize("ops", ["fused", "plain"])
@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_backward_leads_back_to_the_forward_line(recipe, ops):
    """But for the root of the graph and its leaves: adding up a parameter's gradient."""
    for operation in toy_ledger(recipe, ops).operations:
        if operation.phase != BACKWARD:
            continue
        assert asked_in(operation, BACKWARD_CALL)
        if all(BACKWARD_CALL in source(line) for line in operation.lines):
            of_root = operation.name == "aten.mul.Tensor" and operation.outputs[0][0] == ()
            of_leaf = operation.name in ("aten.add_.Tensor", "aten.detach.default")
            assert of_root or (of_leaf and operation.module.startswith("student."))


def matrices(ledger: Ledger) -> dict[str, tuple[int, int]]:
    """Module of the student -> shape of its matrix, (out, in)."""
    found = {
        name: tuple(module.weight.shape)
        for module, name in ledger._names.items()
        if name.startswith("student.") and type(module).__name__ == "Linear"
    }
    assert len(found) >= 2 * 6 + 1
    return found


def check_products(operations: list[Operation], shape: tuple[int, int], times: int) -> None:
    """Forward multiplies by the transpose of a matrix of this shape, and backward makes a gradient
    of its shape and one of its input, by the line that multiplied; and no more.
    """
    forward = [o for o in operations if o.phase == STUDENT]
    made = [o.outputs[0][0] for o in operations if o.phase == BACKWARD]
    assert [o.inputs[-1][0] for o in forward] == times * [shape[::-1]]
    assert sum(gradient == shape for gradient in made) == times
    assert sum(gradient != shape for gradient in made) == times
    assert len(operations) == 3 * times
    for operation in operations:
        assert source(operation.line).startswith("return F.linear(values, weight.to(")


@pytest.mark.parametrize("ops", ["fused", "plain"])
@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_each_weight_has_its_products_in_its_module(recipe, ops):
    """But for those of operations that have several, by their layer."""
    run, ledger = run_of(recipe, ops=ops), toy_ledger(recipe, ops)
    levels = len(run.recipe.student and run.recipe.hidden_pairs((1, 3)))  # uses of the projection
    for name, shape in matrices(ledger).items():
        here = [o for o in ledger.operations if o.module == name and o.flops]
        if name.endswith((".query", ".key", ".value", ".intermediate", ".output")):
            assert here == []
        else:
            times = 3 * (levels if name.endswith("projection") else 1)  # micro-batches
            check_products(here, shape, times)


@pytest.mark.parametrize("ops", ["fused", "plain"])
@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_query_key_and_value_have_their_products_in_their_layer(recipe, ops):
    """Beside those of attention and of the loss of its maps, which are asked for as such."""
    ledger = toy_ledger(recipe, ops)
    weights = matrices(ledger)
    layers = [name.removesuffix(".query") for name in weights if name.endswith(".query")]
    assert len(layers) == (4 if recipe == "mlm" else 2)
    for layer in layers:
        (shape,) = {weights[f"{layer}.{name}"] for name in ("query", "key", "value")}
        here = [o for o in ledger.operations if o.module == layer and o.flops]
        projections = [o for o in here if asked_in(o, "in ops.projections(hidden_state, *linears)")]
        check_products(projections, shape, times=3 * 3)  # matrices, micro-batches
        for operation in here:
            if operation not in projections:
                within = operation.function == "_Attention"
                assert within or asked_in(operation, "ops.attention") or of_feed_forward(operation)


def of_feed_forward(operation: Operation) -> bool:
    """In backward within its function, where it is one."""
    within = operation.function == "GeluThenLinear"
    return within or asked_in(operation, "ops.feed_forward(hidden_state, inner, outer)")


@pytest.mark.parametrize("ops", ["fused", "plain"])
@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_the_feed_forward_network_has_its_products_in_its_layer(recipe, ops):
    ledger = toy_ledger(recipe, ops)
    weights = matrices(ledger)
    for name in weights:
        if not name.endswith(".intermediate"):
            continue
        layer = name.removesuffix(".intermediate")
        shapes = [weights[f"{layer}.{which}"] for which in ("intermediate", "output")]
        here = [o for o in ledger.operations if o.module == layer and o.flops]
        here = [o for o in here if of_feed_forward(o)]
        forward = [o for o in here if o.phase == STUDENT]
        assert [o.inputs[-1][0] for o in forward] == 3 * [shape[::-1] for shape in shapes]
        made = [o.outputs[0][0] for o in here if o.phase == BACKWARD]
        assert all(made.count(shape) == 3 for shape in shapes)  # micro-batches
        assert len(made) == 12 and len(here) == 18


def test_phases_come_in_their_order():
    """Student after teacher, losses after both; three micro-batches one after another, one update
    at the end. Losses of maps stand by themselves within plain's layers; fused makes attention and
    loss in one.
    """
    for ops, layers in (("fused", []), ("plain", 2 * [STUDENT, LOSSES])):
        phases = [operation.phase for operation in toy_ledger("compactbiobert", ops).operations]
        order = [p for i, p in enumerate(phases) if i == 0 or phases[i - 1] != p]
        once = [TEACHER, *layers, STUDENT, LOSSES, BACKWARD, LOSSES]  # the figures for the log
        assert order == [*once, *once, *once, UPDATE]
        assert set(order) < set(PHASES)


def test_autograd_functions_of_ours_are_named():
    """In forward and in backward; with the lines of their own."""
    places = {
        "_Attention": "minibert/ops/attention.py",
        "_Dropout": "minibert/ops/dropout.py",
        "_HiddenStateLoss": "minibert/ops/hidden_states.py",
        "_VocabularyLoss": "minibert/ops/vocabulary.py",
    }
    operations = toy_ledger("compactbiobert").operations
    for name, file in places.items():
        within = [o for o in operations if o.function == name]
        helpers = {"minibert/ops/dropout.py", "minibert/ops/tiles.py"}
        assert {o.line[0] for o in within} <= {file, *helpers}
        assert all(any(line[0] == file for line in o.lines) for o in within)
        assert {o.phase for o in within} >= {BACKWARD}, name
        modules = {o.module for o in within if o.phase == BACKWARD}
        assert modules == {o.module for o in within if o.phase != BACKWARD}
    assert not any(o.function for o in toy_ledger("compactbiobert", "plain").operations)


def test_a_saved_memory_is_of_its_step():
    """What one micro-batch left behind is not taken for what stands at its address later."""
    ledger = toy_ledger("compactbiobert")
    made = [memory for flow in ledger.flows for memory in flow.makes]
    assert len(made) == len(set(made))
    numbers = [o.number for o in ledger.operations]
    assert numbers == list(range(len(numbers)))
    assert all(dataclasses.astuple(o)[0] == o.number for o in ledger.operations)
