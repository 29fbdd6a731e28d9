"""A step computes in float32 or less, on one device, and does not wait for a number: nothing is
float64, nothing is copied between devices, and Python asks for no tensor's value, but where it is
on a CPU for certain.
"""

import pytest
from ledger_toys import EVERY_RECIPE, asked_in, ledger_of, run_of, toy_ledger
from ledger_toys import WatchfulLedger as Watchful

import train
from minibert.ledger.record import Operation

# Operations that on a GPU wait for it, since their value or shape is for Python; words of a line
# that asked, and why that line is not run on a GPU with Triton.
WAITS = {
    ("aten._local_scalar_dense.default", "for count in numbers.bincount()"): "attention on a CPU",
    ("aten._local_scalar_dense.default", "int(real[0]), int(real[-1])"): "the same",
    ("aten._local_scalar_dense.default", "float(loss_upstream)"): "the same",
    ("aten._local_scalar_dense.default", "upstream.is_cuda or upstream != 1"): "asks a CPU alone",
}
# Plain formulas pick rows by truth values: how many there are is their results' shape. They are
# for reading and for tests.
PICKS = ("student_hidden[real]", "teacher_hidden[real]", "distances[labels != IGNORED_LABEL]")
FUSED_AND_PLAIN = [(recipe, ops) for recipe in EVERY_RECIPE for ops in ("fused", "plain")]


def waits(operations: list[Operation]) -> list[Operation]:
    """Those that read a tensor's value into Python, or make a shape of it."""
    asks = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")
    return [o for o in operations if o.name.split(".")[1] in asks]


def picks(operations: list[Operation]) -> list[Operation]:
    """Those that index by truth values."""
    indexes = [
        o for o in operations if o.name.split(".")[1] in ("index", "index_put", "index_put_")
    ]
    return [o for o in indexes if any(dtype == "bool" for _, dtype in o.inputs[1:])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("recipe", "ops"), FUSED_AND_PLAIN)
def test_nothing_is_float64(recipe, ops, dtype):
    seen = {
        kind
        for operation in toy_ledger(recipe, ops, dtype).operations
        for _, kind in (*operation.inputs, *operation.outputs)
    }
    assert seen <= {"float32", dtype, "int64", "int16", "bool"}


@pytest.mark.parametrize(("recipe", "ops"), FUSED_AND_PLAIN)
def test_nothing_is_copied_between_devices(recipe, ops):
    for devices in toy_ledger(recipe, ops).devices:
        assert devices <= {"cpu"}


@pytest.mark.parametrize(("recipe", "ops"), FUSED_AND_PLAIN)
def test_python_asks_for_no_value(recipe, ops):
    operations = toy_ledger(recipe, ops).operations
    found = waits(operations)
    if ops == "plain":
        assert found == []
    for operation in found:
        assert any(operation.name == n and asked_in(operation, call) for n, call in WAITS)
    for operation in picks(operations):
        assert ops == "plain" and any(asked_in(operation, call) for call in PICKS)


@pytest.mark.parametrize(
    ("change", "is_found"),
    [
        (lambda loss: loss.double(), lambda ledger: _has_float64(ledger)),
        (lambda loss: loss * loss.sum().item(), lambda ledger: _asks(ledger)),
        (lambda loss: loss[loss > -1], lambda ledger: bool(picks(ledger.operations))),
        (lambda loss: loss + 0 * len(loss.to("meta")), lambda ledger: _has_two_devices(ledger)),
    ],
)
def test_a_step_that_does_is_found(change, is_found, monkeypatch):
    run, loss_terms = run_of("compactbiobert"), train.loss_terms
    assert not is_found(toy_ledger("compactbiobert"))

    def changed(*arguments):
        terms = loss_terms(*arguments)
        return terms._replace(hidden_loss=change(terms.hidden_loss))

    monkeypatch.setattr(train, "loss_terms", changed)
    assert is_found(ledger_of(run, kind=Watchful))


def _has_float64(ledger):
    return any(kind == "float64" for o in ledger.operations for _, kind in (*o.inputs, *o.outputs))


def _asks(ledger):
    known = [call for _, call in WAITS]
    return any(not any(asked_in(o, call) for call in known) for o in waits(ledger.operations))


def _has_two_devices(ledger):
    return any(len(devices) > 1 for devices in ledger.devices)
