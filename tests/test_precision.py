"""The numerical audit: each operation's own rounding, against a replay of it in float64."""

import dataclasses
import inspect
import json
from statistics import median

import pytest
import torch
from conftest import TOY_CONFIG

from minibert.ledger.precision import Error, PrecisionLedger, worst_lines
from minibert.ledger.record import Ledger
from minibert.ledger.step import record_step
from minibert.ops import plain


@pytest.fixture
def toy_model(tmp_path):
    """The config.json of a toy teacher."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(TOY_CONFIG)))
    return path


def errors_of(compute, *inputs) -> dict[str, Error]:
    """The errors of the operations in `compute`, by name; the last call of each."""
    with PrecisionLedger({}).recorded() as ledger:
        compute(*inputs)
    return {o.name: ledger.errors[o.number] for o in ledger.operations if o.number in ledger.errors}


def test_an_error_is_that_of_the_operation_alone():
    """A third in bfloat16 is off by the rounding of its quotient, doubled by nothing more."""
    ones, three = torch.ones(5, dtype=torch.bfloat16), torch.tensor(3.0)
    errors = errors_of(lambda: (ones / three) * 2)
    third = torch.tensor(1 / 3, dtype=torch.float64)
    off = abs(third.bfloat16().double() - third).item()
    assert errors["aten.div.Tensor"].largest == pytest.approx(off)
    assert errors["aten.div.Tensor"].relative == pytest.approx(3 * off)
    assert errors["aten.mul.Tensor"] == Error(0.0, 0.0)  # of what it was given, exact


def test_changes_in_place_are_replayed_from_what_was_there_before():
    values = torch.full((7,), 1.0, dtype=torch.bfloat16)
    errors = errors_of(lambda: values.add_(2.0**-9))  # lost: bfloat16 has 8 bits
    assert errors["aten.add_.Tensor"].largest == 2.0**-9
    assert values.eq(1).all()


def test_an_output_that_was_given_is_compared():
    left, right = torch.rand(3, 4).double(), torch.rand(4, 2).double()
    out = torch.empty(3, 2, dtype=torch.float64)
    assert errors_of(lambda: torch.mm(left, right, out=out))["aten.mm.out"] == Error(0.0, 0.0)


def test_float64_has_no_error():
    values = torch.rand(4, 6, dtype=torch.float64)
    errors = errors_of(lambda: (values.softmax(-1) @ values.T).log().sum())
    assert len(errors) >= 3 and set(errors.values()) == {Error(0.0, 0.0)}


def test_infinities_that_agree_are_no_error():
    values = torch.tensor([0.0, 2.0, 3.0])
    assert errors_of(lambda: values.log())["aten.log.default"].relative < 1e-6


def test_what_vanishes_is_all_lost():
    """A number too small for float32: the error is the number, the relative error 1."""
    tiny = torch.tensor([1e-60], dtype=torch.float64)
    with PrecisionLedger({}).recorded() as ledger:
        tiny.to(torch.float32)
    (error,) = ledger.errors.values()
    assert error == Error(1e-60, 1.0)


def test_random_draws_and_views_are_left_out():
    values = torch.rand(4, 6)
    assert errors_of(lambda: (values.t(), values.view(24), torch.empty(3).normal_())) == {}


def test_the_step_takes_the_same_course(toy_run, toy_model):
    """The replay changes nothing: both ledgers hold the same operations."""
    ledgers = [record_step(toy_run, toy_model, ledger=kind) for kind in (Ledger, PrecisionLedger)]
    names = [[operation.name for operation in ledger.operations] for ledger in ledgers]
    assert names[0] == names[1]
    assert len(ledgers[1].errors) > 300


def test_bfloat16_rounds_as_bfloat16_does(toy_run, toy_model):
    """8 bits of precision instead of 24, in the median of the operations of the models."""
    medians = {}
    for dtype in ("float32", "bfloat16"):
        ledger = record_step(dataclasses.replace(toy_run, dtype=dtype), toy_model,
                             ledger=PrecisionLedger)  # fmt: skip
        relative = [
            ledger.errors[operation.number].relative
            for operation in ledger.operations
            if operation.number in ledger.errors and operation.name == "aten.addmm.default"
        ]
        medians[dtype] = median(relative)
    assert 2**-26 < medians["float32"] < 2**-22
    assert 2**-11 < medians["bfloat16"] < 2**-7


def test_the_line_that_rounds_is_named(toy_run, toy_model, monkeypatch):
    """Scores that someone rounds to bfloat16 in a float32 step are the worst of its lines."""
    scores = plain.attention_scores

    def rounding(query, key, attention_mask):
        return scores(query, key, attention_mask).bfloat16().float()

    run = dataclasses.replace(toy_run, ops="plain")
    good = worst_lines(record_step(run, toy_model, ledger=PrecisionLedger), 10)
    monkeypatch.setattr(plain, "attention_scores", rounding)
    bad = worst_lines(record_step(run, toy_model, ledger=PrecisionLedger), 10)
    callers = (plain.attention, plain.attention_map_loss)
    where = {line for caller in callers for line in _lines_of(caller)}
    rounded = [each for each in bad if each.operation.name == "aten._to_copy.default"]
    assert rounded and all(each.line in where for each in rounded)
    assert rounded[0].error.relative > 1e-3
    assert not any(each.operation.name == "aten._to_copy.default" for each in good)
    assert len(good) == len(bad) == 10
    relative = [each.error.relative for each in good]
    assert relative == sorted(relative, reverse=True)


def _lines_of(function) -> list[tuple[str, int]]:
    source, first = inspect.getsourcelines(function)
    return [("minibert/ops/plain.py", number) for number in range(first, first + len(source))]
