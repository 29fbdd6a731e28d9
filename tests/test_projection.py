"""The projection of a narrower student is trained and kept with it, and left behind in the end."""

import dataclasses
import shutil

import pytest
import torch
from conftest import TOY_CONFIG
from recipe_toys import TOY_STUDENT, run_of

import train
from minibert.data.corpus import Corpus
from minibert.evaluate import evaluate
from minibert.folder import load_model, read_tensors
from minibert.model import BertForMaskedLM
from minibert.student import ProjectedStudent, without_projection
from minibert.training.checkpoint import checkpoints

WIDTH = 24  # the toy teacher's


@pytest.fixture
def learner() -> ProjectedStudent:
    torch.manual_seed(5)
    config = dataclasses.replace(TOY_CONFIG, **TOY_STUDENT)
    learner = ProjectedStudent(BertForMaskedLM(config), WIDTH)
    learner.projection.bias.data.normal_()  # it begins at 0
    return learner.eval()


def test_hidden_states_are_projected_and_nothing_else(learner):
    input_ids = torch.arange(5, 19).view(2, 7)
    inputs = (input_ids, torch.ones_like(input_ids))
    narrow, wide = learner.student(*inputs, keep=[1]), learner(*inputs, keep=[1])
    weight, bias = learner.projection.weight, learner.projection.bias
    levels = zip(
        (narrow.embedding_output, *narrow.hidden_states),
        (wide.embedding_output, *wide.hidden_states),
        strict=True,
    )
    for state, seen in levels:
        assert seen.shape == (2, 7, WIDTH)
        torch.testing.assert_close(seen, state @ weight.T + bias)
    assert torch.equal(narrow.head_output, wide.head_output)
    assert torch.equal(narrow.queries[1], wide.queries[1])
    assert torch.equal(narrow.keys[1], wide.keys[1])
    assert learner.decoder is learner.student.decoder
    assert learner.decoder_bias is learner.student.decoder_bias


def test_one_projection_serves_all_levels(learner):
    names = [name for name, _ in learner.named_parameters() if not name.startswith("student.")]
    assert names == ["projection.weight", "projection.bias"]


def test_without_a_projection_a_student_is_itself(learner):
    assert without_projection(learner) is learner.student
    assert without_projection(learner.student) is learner.student


def test_it_is_in_the_checkpoint_with_its_moments_and_not_in_the_result(toy_run):
    run = run_of("tinybiobert", toy_run, steps=2)
    train.train(run)
    (newest,) = checkpoints(run.out)
    weights, _ = read_tensors(newest / "model.safetensors")
    moments, _ = read_tensors(newest / "optimizer.safetensors")
    assert weights["projection.weight"].shape == (WIDTH, TOY_STUDENT["hidden_size"])
    for name in ("projection.weight", "projection.bias"):
        assert moments[f"{name}.exp_avg_sq"].any()
    result = load_model(run.out / "student")
    assert type(result) is BertForMaskedLM
    assert result.config == dataclasses.replace(TOY_CONFIG, **TOY_STUDENT)
    for name, tensor in result.state_dict().items():
        assert torch.equal(tensor, weights[f"student.{name}"]), name


def test_a_run_goes_on_with_its_projection(toy_run, tmp_path):
    """Bitwise, with dropout: were the projection drawn anew, the weights would tell."""
    whole = run_of("tinybiobert", toy_run, steps=4, save_every=2, keep=9, out=tmp_path / "whole")
    train.train(whole)
    shutil.copytree(whole.out, tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "step_000004")
    train.train(dataclasses.replace(whole, out=tmp_path / "halves", resume=True))
    one, other = (
        read_tensors(tmp_path / name / "step_000004" / "model.safetensors")[0]
        for name in ("whole", "halves")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_evaluations_see_the_student_alone(toy_run, monkeypatch):
    seen = []

    def watched(model, *arguments, **settings):
        seen.append(type(model))
        return evaluate(model, *arguments, **settings)

    monkeypatch.setattr(train, "evaluate", watched)
    train.train(run_of("tinybiobert", toy_run, steps=2))
    assert seen == [BertForMaskedLM] * 2


@pytest.mark.parametrize(
    ("recipe", "settings", "projected"),
    [
        ("tinybiobert", {}, True),
        ("tinybiobert", {"hidden_weight": 0.0}, False),
        ("compactbiobert", {}, False),
    ],
)
def test_there_is_one_where_widths_differ_and_are_compared(toy_run, recipe, settings, projected):
    run = run_of(recipe, toy_run, **settings)
    learner, *_ = train.build_models(run, Corpus.open(run.data), torch.device("cpu"))
    assert isinstance(learner, ProjectedStudent) == projected


def test_bfloat16_states_stay_so(learner):
    input_ids = torch.arange(5, 19).view(2, 7)
    output = learner(input_ids, torch.ones_like(input_ids), dtype=torch.bfloat16)
    assert output.hidden_states[0].dtype == torch.bfloat16
    assert learner.projection.weight.dtype == torch.float32
