"""The ledger tells of the step, not of a run of it: it is the same for the same seed and for
another step, and by shapes alone.
"""

import dataclasses

import pytest
from ledger_toys import EVERY_RECIPE, asked_in, ledger_of, run_of, toy_ledger

import train

SMALL = {"batch_size": 3, "max_length": 7, "micro_batch_tokens": 14}  # two sequences, then one
CLIPPING = "clip_grad_norm_("


def content(ledger, but=None):
    """All fields of the operations but their number and time."""
    known = ("number", "seconds")
    fields = [f.name for f in dataclasses.fields(ledger.operations[0]) if f.name not in known]
    chosen = [o for o in ledger.operations if but is None or not asked_in(o, but)]
    return [{name: getattr(o, name) for name in fields} for o in chosen]


@pytest.mark.parametrize(
    ("recipe", "ops"),
    [("compactbiobert", "fused"), ("compactbiobert", "plain"), ("tinybiobert", "fused")],
)
def test_the_same_for_the_same_seed(recipe, ops):
    again = ledger_of(run_of(recipe, ops=ops))
    first = toy_ledger(recipe, ops)
    assert content(again) == content(first)
    assert again.flows == first.flows and again.results == first.results
    assert [o.number for o in again.operations] == list(range(len(again.operations)))


def test_the_same_at_another_step(monkeypatch):
    """Where the dropout is another and the learning rate falls."""
    update, first = train.update, toy_ledger("compactbiobert")  # of step 1
    monkeypatch.setattr(train, "update", lambda *given: update(*given[:4], given[4] + 7, given[5]))
    later = ledger_of(run_of("compactbiobert"))
    assert content(later) == content(first)
    assert later.flows == first.flows


def test_another_length_is_another_ledger():
    other = ledger_of(run_of("compactbiobert", max_length=12))
    assert content(other) != content(toy_ledger("compactbiobert"))


QUICK = [
    ("compactbiobert", "fused", "bfloat16"),
    ("tinybiobert", "plain", "float32"),
]
EVERY = [
    (recipe, ops, dtype)
    for recipe in EVERY_RECIPE
    for ops in ("fused", "plain")
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(
    ("recipe", "ops", "dtype"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY],
)
def test_shapes_alone_make_the_same_ledger(recipe, ops, dtype):
    """But for the line that clips: torch takes the norms of tensors without elements one by one."""
    run = run_of(recipe, ops=ops, dtype=dtype, **SMALL)
    real, shapes = ledger_of(run), ledger_of(run, shapes_only=True)
    assert content(shapes, but=CLIPPING) == content(real, but=CLIPPING)
    assert all(o.seconds is None for o in shapes.operations)
    assert all(o.seconds is not None for o in real.operations)
    assert sum(asked_in(o, CLIPPING) for o in real.operations) < 20
