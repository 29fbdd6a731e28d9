"""The benchmark compares equal work, counts it rightly, and tells it as JSON."""

import dataclasses
import json
import math
import os
import sys

import pytest
import torch
from conftest import ROOT, TOY_CONFIG
from torch.utils.flop_counter import FlopCounterMode

import train
from minibert.run_config import RunConfig

pytest.importorskip("transformers", reason="the authors' side is made of transformers models")
sys.path.insert(0, str(ROOT / "benchmarks"))
import authors
import step
import step_correctness
from machine import TUNED_ALLOCATOR
from variants import COMPILE, Variant
from workload import random_models, useful_flops, write_random_corpus

STILL = dataclasses.replace(TOY_CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture
def work(toy_world) -> step.Work:
    """Five documents of at most 19 tokens an update, our side in several micro-batches."""
    return step.Work(STILL, toy_world / "corpus", 5, 19, 40, torch.device("cpu"), "highest")


def both_sides(work: step.Work, best: bool = False):
    """Our terms and the authors' on one padded batch."""
    student, teacher, layers = random_models(work.config)
    torch.manual_seed(8)
    with torch.no_grad():  # biases and LayerNorm begin as constants, the student as the teacher
        for parameter in (*student.parameters(), *teacher.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    whole = work.batches(work.batch_size * work.max_length).at(0)
    (padded,) = whole.micro_batches
    run = RunConfig(
        teacher=work.data,
        data=work.data,
        out=work.data,
        teacher_layers=layers,
        max_length=padded.input_ids.shape[1],  # what their map loss is divided by
    ).resolved()
    way, _ = authors.build(student, teacher, layers, work.device, best)
    way.train()
    labels = authors.labels_of(padded)
    ours = train.loss_terms(student, teacher, padded, whole, run)
    return ours, way(padded.input_ids, padded.attention_mask, labels), way


@pytest.mark.parametrize("best", [False, True])
def test_without_dropout_both_sides_compute_the_same_terms(work, best):
    ours, theirs, _ = both_sides(work, best)
    for name in authors.Terms._fields:
        assert getattr(ours, name).abs().min() > 1e-4
        torch.testing.assert_close(
            getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=0, msg=name
        )


def test_at_its_best_the_teacher_hands_out_the_compared_maps_alone(work):
    _, _, way = both_sides(work, best=True)
    ids = torch.tensor([[5, 6, 7]])
    assert len(way.teacher(ids, output_attentions=True).attentions) == 2
    assert len(way.student(ids, output_attentions=True).attentions) == 2
    assert way.teacher.training  # as in the authors' scripts


def test_the_map_loss_by_hand():
    """The second query is padding; the mean is over one row of two columns."""
    student_map = torch.tensor([[[[0.5, 0.5], [0.9, 0.1]]]])
    teacher_map = torch.tensor([[[[0.25, 0.75], [0.3, 0.7]]]])
    found = authors.map_loss(student_map, teacher_map, torch.tensor([[True, False]]))
    by_hand = (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)) / 2
    assert found.item() == pytest.approx(by_hand, rel=1e-6)


def test_useful_flops_are_those_of_models_without_padding():
    student, teacher, layers = random_models(STILL)
    lengths, masked_at = [13, 7, 5], [[1, 4, 5], [2], [1, 3]]
    with FlopCounterMode(display=False) as counter:
        for length, masked in zip(lengths, masked_at, strict=True):
            input_ids = torch.full((1, length), 7)
            where = (input_ids, torch.ones_like(input_ids), None, torch.tensor(masked))
            with torch.no_grad():
                taught = teacher(*where)
            learnt = student(*where)
            student_logits = student.logits(learnt.head_output)
            assert student_logits.shape == teacher.logits(taught.head_output).shape
            student_logits.sum().backward()
    assert useful_flops(STILL, len(layers), lengths, 6) == counter.get_total_flops()


@pytest.mark.slow
def test_all_variants_take_their_turns(monkeypatch, capfd):
    monkeypatch.setattr(step, "BIOBERT", STILL)
    names = ["authors bfloat16", "ours bfloat16"]
    sizes = ["--batch", "5", "--length", "19", "--rounds", "2", "--warmup", "1"]
    flags = [*sizes, "--device", "cpu", "--variants", *names]
    monkeypatch.setattr(sys, "argv", ["step.py", *flags])
    before = dict(os.environ)
    assert step.run_command(step.main) == 0
    assert dict(os.environ) == before
    told = capfd.readouterr().out
    report = json.loads(told.splitlines()[-1])
    assert all(name in told for name in names)
    assert list(report["variants"]) == names
    assert report["reference"] == "authors bfloat16"  # the first, where float32 is not asked for
    theirs, ours = report["variants"].values()
    for row in (theirs, ours):
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["peak_mb"] > 50 and 0 < row["last_loss"] < 1000
        assert row["useful_gflops"] > 0 and row["tokens_per_second"] > 0
    assert theirs["times_as_fast_as_reference"] == 1
    assert theirs["environment"] == TUNED_ALLOCATOR and ours["environment"] == {}


@pytest.mark.slow
def test_a_variant_that_dies_does_not_take_the_others_along(work):
    broken = Variant("broken", ours=True, settings={"no such setting": 1})
    alive = Variant("ours float32", ours=True)
    report = step.measure(work, [broken, alive], rounds=1, warmup=1)
    assert "status 1" in report["variants"]["broken"]["failure"]
    assert report["variants"]["ours float32"]["times_as_fast_as_reference"] is None
    assert "status 1" in step.table(report)


def test_when_the_time_is_over_no_turn_begins(work):
    report = step.measure(work, [Variant("ours float32", ours=True)], rounds=1, warmup=0, limit=0)
    assert report["variants"]["ours float32"]["failure"] == "no time was left"
    assert "no time was left" in step.table(report)


def test_a_compiled_variant_comes_when_all_others_are_done(work, monkeypatch):
    order = []

    class Done(step.Child):
        def __init__(self, work, variant):
            self.variant, self.turns, self.failure, self.precision = variant, [], None, "highest"

        def get_ready(self, seconds):
            return "ready"

        def take_turn(self, untimed, timed, seconds):
            order.append((self.variant.name, *untimed, *timed, seconds > 50))
            self.turns.append({"seconds": 1.0, "peak_mb": 1.0, "page_faults": 0, "loss": 1.0})
            return "done"

        def end(self):
            pass

    monkeypatch.setattr(step, "Child", Done)
    variants = [Variant("compiled", ours=True, settings=COMPILE), Variant("a"), Variant("b")]
    report = step.measure(work, variants, rounds=2, warmup=1, limit=50, compiled_limit=90)
    first = [(name, *turn, False) for turn in ((0, 1), (2, 3)) for name in "ab"]
    assert order == [*first, ("compiled", 0, 1, True), ("compiled", 2, 3, True)]
    assert report["reference"] == "compiled" and len(report["variants"]) == 3


@pytest.mark.parametrize(("error", "marked"), [(2e-3, True), (3e-7, False)])
def test_what_is_rounded_is_marked(error, marked):
    row = {"dtype": "float32", "float32_matmul_precision": "medium", "failure": "none"}
    highest = row | {"float32_matmul_precision": "highest"}
    rows = {"medium": row, "highest": highest, "half": row | {"dtype": "bfloat16"}}
    told = step.table({"matrix_gflops": {}, "medium_error": error, "variants": rows})
    assert ("medium *" in told) == ("\n* " in told) == marked
    assert "highest *" not in told and "half *" not in told


def test_the_step_on_this_device_is_right():
    rows = list(step_correctness.check_step(torch.device("cpu")))
    assert len(rows) == (5 + 1) + (5 + 2) and all(row["right"] for row in rows)
    assert max(row["error"] for row in rows) > 1e-8  # two ways are compared


def test_a_wrong_step_is_seen(monkeypatch):
    right = train.fused.attention_map_loss

    def too_large(*arguments):
        return 1.1 * right(*arguments)

    monkeypatch.setattr(train.fused, "attention_map_loss", too_large)
    rows = step_correctness.check_step(torch.device("cpu"))
    said = {row["what"] for row in rows if not row["right"]}
    assert {f"step {dtype}: attention_loss" for dtype in ("float32", "bfloat16")} <= said
    assert "step float32: gradient" in said


def negated(gradients):
    return [-part for part in gradients]


def two_swapped(gradients):
    """Of the second layer's query and key, which are of one shape."""
    alike = [i for i, part in enumerate(gradients) if part.shape == (78, 78)][4:6]
    first, second = alike
    gradients[first], gradients[second] = gradients[second], gradients[first]
    return gradients


@pytest.mark.parametrize("spoil", [negated, two_swapped])
def test_a_gradient_that_points_elsewhere_is_seen(monkeypatch, spoil):
    right = step_correctness.terms_and_gradients

    def spoilt(ops, dtype, device):
        terms, gradients = right(ops, dtype, device)
        return terms, spoil(gradients) if ops == "fused" else gradients

    monkeypatch.setattr(step_correctness, "terms_and_gradients", spoilt)
    rows = step_correctness.check_step(torch.device("cpu"))
    said = {row["what"] for row in rows if not row["right"]}
    assert {"step float32: gradient", "step bfloat16: gradient directions"} <= said


def test_a_turn_is_told_as_the_mean_of_its_updates(monkeypatch):
    times = iter([10.0, 16.0])
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(times))
    seen = []

    def update(batch):
        seen.append(batch)
        return torch.tensor(float(batch))

    measured = step.updates_of(update, [4, 5, 6], torch.device("cpu"))
    assert seen == [4, 5, 6]
    assert (measured["seconds"], measured["loss"]) == (2.0, 6.0)


def test_a_resumed_run_goes_on_as_it_was():
    rows = list(step_correctness.check_resume(torch.device("cpu")))
    assert [row["error"] for row in rows] == [0, 0]


def test_forgotten_moments_are_seen(monkeypatch):
    load = step_correctness.load_newest

    def forgets(folder, model, optimizer):
        done = load(folder, model, optimizer)
        optimizer.state.clear()
        return done

    monkeypatch.setattr(step_correctness, "load_newest", forgets)
    loss, weights = step_correctness.check_resume(torch.device("cpu"))
    assert loss["right"] and not weights["right"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--variants", "mine"], "'mine'"),
        (["--device", "cuda"], "CUDA"),
        (["--data", "nowhere"], "nowhere"),
        (["--length", "513"], "513"),
    ],
)
def test_bad_input_is_one_line(flags, named, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["step.py", *flags])
    assert step.run_command(step.main) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error


def test_random_text_is_as_long_as_it_says(tmp_path):
    corpus = step.Corpus.open(write_random_corpus(tmp_path, vocab_size=99))
    lengths = [min(256, len(corpus.tokens(number)) + 2) for number in range(corpus.num_training)]
    assert len(lengths) == 4096
    assert 208 < sum(lengths) / len(lengths) < 214
