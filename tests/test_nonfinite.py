"""An update with numbers that are none changes nothing, is told with all it takes to look into it.

Loss or gradient are spoilt at given steps; the log, the checkpoints and what a resumed run goes on
from are looked at.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from batch_toys import same
from torch import Tensor

import train as train_script
from minibert.data.batches import Batches
from minibert.data.corpus import Corpus
from minibert.errors import InputError, run_command
from minibert.run_config import RunConfig
from minibert.training.checkpoint import State, checkpoints, load_newest
from train import train


class Spoilt(torch.autograd.Function):
    """The loss as it is, its gradient infinite."""

    @staticmethod
    def forward(context, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return gradient * math.inf


WAYS = {
    "loss is NaN": lambda loss: loss * math.nan,
    "loss is infinite": lambda loss: loss + math.inf,
    "loss is minus infinite": lambda loss: loss - math.inf,
    "gradient is infinite": Spoilt.apply,
}


class World:
    """What the student and its optimiser were around each update."""

    def __init__(self):
        self.bad: set[int] = set()  # steps, counted from 1
        self.way = WAYS["loss is NaN"]
        self.step = self.micro_batches = 0
        self.around: dict[int, tuple[list[Tensor], list[Tensor]]] = {}


@pytest.fixture
def world(monkeypatch) -> World:
    """Updates whose `bad` steps have one spoilt micro-batch, the first."""
    world = World()
    update, loss_terms = train_script.update, train_script.loss_terms

    def watched(student, teacher, optimizer, batch, step, run):
        world.step, world.micro_batches = step + 1, 0
        before = tensors(student, optimizer)
        figures = update(student, teacher, optimizer, batch, step, run)
        world.around[world.step] = before, tensors(student, optimizer)
        return figures

    def spoilt(student, teacher, micro_batch, batch, run):
        terms = loss_terms(student, teacher, micro_batch, batch, run)
        world.micro_batches += 1
        if world.step not in world.bad or world.micro_batches > 1:
            return terms
        return terms._replace(vocabulary_loss=world.way(terms.vocabulary_loss))

    monkeypatch.setattr(train_script, "update", watched)
    monkeypatch.setattr(train_script, "loss_terms", spoilt)
    return world


def tensors(student, optimizer) -> list[Tensor]:
    """Copies of the weights, then of what the optimiser remembers of each."""
    memory = [
        optimizer.state[p][kind] if kind in optimizer.state[p] else torch.zeros(())
        for p in student.parameters()
        for kind in ("step", "exp_avg", "exp_avg_sq")
    ]
    return [t.detach().clone() for t in (*student.parameters(), *memory)]


def lines(run: RunConfig) -> list[dict]:
    """The log, by the rules of JSON, which has no NaN."""
    text = (run.out / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def updates(run: RunConfig) -> list[dict]:
    return [line for line in lines(run) if "learning_rate" in line]


@pytest.mark.parametrize("way", WAYS)
def test_a_bad_update_ends_the_run(toy_run, world, capsys, way):
    world.bad, world.way = {6}, WAYS[way]
    run = dataclasses.replace(toy_run, save_every=2, keep=1)
    assert run_command(lambda: train(run)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    report = run.out / "nonfinite_step_000006.json"
    assert told.startswith("error: step 6 is not finite: loss ")
    for term in ("loss", "mlm_loss", "hidden_loss", "attention_loss", "output_loss", "grad_norm"):
        assert f"{term} " in told
    assert str(report) in told
    assert [path.name for path in checkpoints(run.out)] == ["step_000004"]
    assert [line["step"] for line in updates(run)] == [1, 2, 3, 4, 5]
    content = json.loads(report.read_text(), parse_constant=pytest.fail)
    assert content["step"] == 6
    loss, grad_norm = (float(content["figures"][name]) for name in ("loss", "grad_norm"))
    assert math.isfinite(loss) == (way == "gradient is infinite")
    assert not math.isfinite(loss + grad_norm)
    assert not list(run.out.rglob("*.partial"))


@pytest.mark.parametrize("folder", ["corpus", "a 'quoted' {folder}"])
def test_the_report_names_the_documents_and_rebuilds_the_batch(toy_run, tmp_path, world, folder):
    world.bad = {5}
    data = tmp_path / folder
    data.symlink_to(toy_run.data)
    run = dataclasses.replace(toy_run, data=data, seed=3)
    with pytest.raises(InputError, match="step 5 is not finite"):
        train(run)
    content = json.loads((run.out / "nonfinite_step_000005.json").read_text())
    corpus = Corpus.open(run.data)
    sizes = {"batch_size": run.batch_size, "seed": run.seed}
    expected = Batches(corpus, run.max_length, **sizes, packed=True).at(4)
    assert content["documents"] == [corpus.document_id(number) for number in expected.documents]
    assert "\n" not in content["rebuild"]
    names = {}
    exec(content["rebuild"], names)
    batch = names["batch"]
    assert batch[1:] == expected[1:]
    for ours, theirs in zip(batch.micro_batches, expected.micro_batches, strict=True):
        assert same(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
def test_a_bad_update_changes_no_weight_and_no_moment(toy_run, world, way):
    """To the last bit; also the first of all, when there are no moments yet."""
    world.bad, world.way = {1, 4, 5}, WAYS[way]
    train(dataclasses.replace(toy_run, steps=6, skip_nonfinite=3))
    assert world.micro_batches > 1
    for step, (before, after) in world.around.items():
        same = [bool((a == b).all()) for a, b in zip(before, after, strict=True)]
        assert all(same) if step in world.bad else not any(same[: len(same) // 4]), step
    weights = world.around[6][1]
    assert all(tensor.isfinite().all() for tensor in weights)


def test_passed_over_updates_are_counted(toy_run, world):
    world.bad = {2, 7}
    run = dataclasses.replace(toy_run, skip_nonfinite=2)
    train(run)
    counts = [line.get("skipped_updates") for line in updates(run)]
    assert counts == [None, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert [line["step"] for line in updates(run) if line["loss"] is None] == [2, 7]
    state = json.loads((run.out / "step_000010" / "state.json").read_text())
    assert state["skipped"] == 2
    assert sorted(path.name for path in run.out.glob("nonfinite*")) == [
        "nonfinite_step_000002.json",
        "nonfinite_step_000007.json",
    ]


def test_one_more_than_allowed_ends_the_run(toy_run, world):
    world.bad = {2, 3, 9}
    run = dataclasses.replace(toy_run, skip_nonfinite=2, save_every=4)
    with pytest.raises(InputError, match="step 9 is not finite"):
        train(run)
    assert [path.name for path in checkpoints(run.out)] == ["step_000004", "step_000008"]


def test_the_count_goes_on_after_a_resumption(toy_run, world):
    """Two before, one after: three in all are one too many for two, and enough for three."""
    world.bad = {2, 3}
    run = dataclasses.replace(toy_run, steps=4, skip_nonfinite=2)
    train(run)
    world.bad = {7}
    longer = dataclasses.replace(run, steps=8, resume=True, save_every=5)
    with pytest.raises(InputError, match="step 7 is not finite"):
        train(longer)
    assert [path.name for path in checkpoints(run.out)] == ["step_000004", "step_000005"]
    train(dataclasses.replace(longer, skip_nonfinite=3))
    assert updates(run)[-1]["skipped_updates"] == 3
    assert json.loads((run.out / "step_000008" / "state.json").read_text())["skipped"] == 3


def test_a_run_that_passed_over_an_update_goes_on_bitwise(toy_run, world, tmp_path):
    """Stopped after the bad step and resumed, it ends as if it had never been stopped."""
    world.bad = {3}
    whole = dataclasses.replace(toy_run, skip_nonfinite=1, save_every=5)
    train(whole)
    halves = dataclasses.replace(whole, out=tmp_path / "halves")
    world.bad = {3, 8}  # one too many: ends after the checkpoint of step 5
    with pytest.raises(InputError, match="step 8"):
        train(halves)
    world.bad = {3}
    train(dataclasses.replace(halves, resume=True))
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        ours, theirs = (run.out / "step_000010" / name for run in (whole, halves))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.parametrize("bad", [1, 3, 4, 7, 8, 9, 10, 11])
def test_no_bad_step_slips_through_between_two_looks(toy_run, world, bad):
    """Logged every 10 updates, saved every 4, 11 in all: none is seen when it happens."""
    world.bad = {bad}
    run = dataclasses.replace(toy_run, steps=11, log_every=10, save_every=4, keep=9)
    with pytest.raises(InputError, match=f"step {bad} is not finite"):
        train(run)
    good = [f"step_{step:06d}" for step in (4, 8) if step < bad]
    assert [path.name for path in checkpoints(run.out)] == good
    assert [line["step"] for line in updates(run)] == ([10] if bad == 11 else [])
    folder = run.out / good[-1] if good else None
    if folder is not None:  # and it is a good one
        student, _, _ = train_script.build_models(run, Corpus.open(run.data), torch.device("cpu"))
        optimizer = train_script.build_optimizer(student, run.weight_decay)
        assert load_newest(run.out, student, optimizer) == State(int(folder.name[5:]))
        assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_between_two_log_steps_it_is_counted_at_the_next(toy_run, world):
    world.bad = {3, 4}
    run = dataclasses.replace(toy_run, steps=11, log_every=5, skip_nonfinite=2)
    train(run)
    assert [line["step"] for line in updates(run)] == [5, 10, 11]
    assert [line["skipped_updates"] for line in updates(run)] == [2, 2, 2]
    assert all(math.isfinite(line["loss"]) for line in updates(run))


def test_an_evaluation_that_is_not_finite_is_valid_json(toy_run, monkeypatch, capsys):
    figures = {"mlm_loss": math.nan, "mlm_accuracy": 0.0, "teacher_kl": math.inf}
    monkeypatch.setattr(train_script, "evaluate", lambda *models, **settings: figures)
    train(dataclasses.replace(toy_run, steps=2))
    for line in lines(toy_run):
        if "held_out_mlm_loss" in line:
            assert line["held_out_mlm_loss"] is line["held_out_teacher_kl"] is None
    assert "after 2 steps" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_one_line(toy_run, world, monkeypatch, capsys):
    world.bad = {3}
    write_text = Path.write_text

    def full(path, text, **options):
        if "nonfinite" in path.name:
            raise OSError(28, "No space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert run_command(lambda: train(toy_run)) == 2
    report = toy_run.out / "nonfinite_step_000003.json"
    told = capsys.readouterr().err
    assert told.startswith("error: step 3 is not finite: loss nan, ") and told.count("\n") == 1
    assert f"could not be written ({report}: No space left on device)" in told
    assert checkpoints(toy_run.out) == []
