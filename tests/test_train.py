"""The loop learns, repeats itself exactly, and goes on where it stood."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from recipe_toys import run_of

import train as train_script
from minibert.data.batches import Batches
from minibert.data.corpus import Corpus, CorpusWriter
from minibert.data.tokenizer import load_tokenizer
from minibert.errors import InputError
from minibert.folder import load_model
from minibert.run_config import RunConfig
from minibert.training.runlog import read_metrics
from train import train

TERMS = ("mlm_loss", "hidden_loss", "attention_loss", "output_loss")


@pytest.fixture
def still_run(toy_world, toy_run, tmp_path) -> RunConfig:
    """The toy run without dropout: its curve depends on the mathematics alone."""
    folder = tmp_path / "still"
    folder.mkdir()
    for name in ("model.safetensors", "vocab.txt"):
        (folder / name).write_bytes((toy_world / "teacher" / name).read_bytes())
    config = json.loads((toy_world / "teacher" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return dataclasses.replace(toy_run, teacher=folder)


def updates(run: RunConfig) -> list[dict]:
    """The lines of metrics.jsonl about updates."""
    return [line for line in read_metrics(run.out / "metrics.jsonl") if "loss" in line]


def evaluations(run: RunConfig) -> list[dict]:
    """The lines of metrics.jsonl about held-out documents."""
    lines = read_metrics(run.out / "metrics.jsonl")
    return [line for line in lines if "held_out_mlm_loss" in line]


def assert_same_weights(one: Path, other: Path) -> None:
    one, other = load_model(one).state_dict(), load_model(other).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# loss, mlm, hidden, attention, output at each of 10 updates, without those that the recipe has not;
# from this code, float32, dropout 0.
GOLDEN = {
    "compactbiobert": [
        (11.6216, 5.15626, 0.803557, 0.0226283, 0.797355),
        (8.43012, 5.56532, 0.607646, 0.0185333, 0.197251),
        (7.08015, 5.2538, 0.43087, 0.0187185, 0.0955155),
        (7.00593, 5.09811, 0.388002, 0.0191962, 0.137245),
        (6.45519, 4.59948, 0.362459, 0.0179509, 0.142895),
        (6.57783, 4.97817, 0.33345, 0.0186832, 0.108652),
        (6.59793, 5.12759, 0.282573, 0.0179277, 0.113767),
        (5.71929, 4.12641, 0.335957, 0.0181857, 0.10609),
        (6.28754, 5.11831, 0.243549, 0.0162278, 0.0779806),
        (6.58748, 5.22259, 0.260851, 0.0176681, 0.105868),
    ],
    "distilbiobert": [
        (13.7633, 5.64882, 0.422909, 0.408555),
        (12.8709, 5.89132, 0.392124, 0.139231),
        (10.9341, 5.05191, 0.311045, 0.10384),
        (11.0499, 4.98734, 0.364528, 0.142135),
        (10.269, 4.52486, 0.367394, 0.170368),
        (10.4929, 4.78059, 0.30102, 0.12614),
        (11.1341, 5.07016, 0.267569, 0.145232),
        (9.37153, 4.12367, 0.347522, 0.155336),
        (10.998, 5.07356, 0.226395, 0.124902),
        (11.3658, 5.23914, 0.235679, 0.130373),
    ],
    "tinybiobert": [
        (9.55461, 5.35711, 4.64459, 0.00516011, 4.90486),
        (8.93744, 5.14321, 4.02465, 0.00609682, 4.90669),
        (8.16047, 5.12518, 3.4438, 0.00581395, 4.71086),
        (7.58768, 5.08023, 2.96864, 0.00528279, 4.61376),
        (7.19499, 4.84627, 2.65424, 0.00688639, 4.53387),
        (6.81279, 4.80133, 2.38821, 0.00584951, 4.41872),
        (6.66475, 4.93492, 2.22391, 0.00419563, 4.43664),
        (6.68715, 4.6075, 2.2833, 0.00540853, 4.39844),
        (6.43931, 4.86376, 2.09462, 0.00507452, 4.33961),
        (6.45742, 4.90945, 2.09691, 0.00498596, 4.35552),
    ],
    "mlm": [
        (5.65622, 5.65622),
        (6.02803, 6.02803),
        (5.25147, 5.25147),
        (4.82518, 4.82518),
        (4.6762, 4.6762),
        (4.40913, 4.40913),
        (4.87408, 4.87408),
        (4.55352, 4.55352),
        (5.32826, 5.32826),
        (5.39576, 5.39576),
    ],
}


@pytest.mark.parametrize("ops", ["plain", "fused"])
@pytest.mark.parametrize("recipe", GOLDEN)
def test_golden_curves(still_run, recipe, ops):
    run = run_of(recipe, still_run, ops=ops)
    train(run)
    curve = [tuple(line[t] for t in ("loss", *TERMS) if t in line) for line in updates(run)]
    assert curve == [pytest.approx(row, rel=2e-4) for row in GOLDEN[recipe]]


def test_the_weighted_terms_make_the_loss(toy_run):
    train(toy_run)
    for line in updates(toy_run):
        mlm, hidden, attention, output = (line[term] for term in TERMS)
        assert line["loss"] == pytest.approx(mlm + 3 * hidden + 3 * attention + 5 * output)
        assert line["hidden_loss"] == pytest.approx(sum(line["hidden_loss_per_layer"]))
        assert line["attention_loss"] == pytest.approx(sum(line["attention_loss_per_layer"]))
        assert len(line["hidden_loss_per_layer"]) == len(line["attention_loss_per_layer"]) == 2


@pytest.mark.parametrize("recipe", ["compactbiobert", "distilbiobert", "tinybiobert"])
def test_how_a_batch_is_cut_does_not_matter(still_run, tmp_path, recipe):
    run = run_of(recipe, still_run)
    whole = dataclasses.replace(run, micro_batch_tokens=10_000, out=tmp_path / "whole")
    cut = dataclasses.replace(run, micro_batch_tokens=20, out=tmp_path / "cut")
    train(whole)
    train(cut)
    for ours, theirs in zip(updates(whole), updates(cut), strict=True):
        for term in ours.keys() - {"step", "tokens_per_second"}:
            assert ours[term] == pytest.approx(theirs[term], rel=1e-4), term


def test_two_steps_and_two_more_are_four(toy_run, tmp_path):
    """Bitwise, with dropout, and although the first two leave other files behind."""
    four = dataclasses.replace(toy_run, steps=4, save_every=2, out=tmp_path / "four")
    train(four)
    halves = dataclasses.replace(four, out=tmp_path / "halves", keep=9)
    train(halves)
    shutil.rmtree(halves.out / "step_000004")  # as if it had been killed after step 3
    train(dataclasses.replace(halves, resume=True))
    assert_same_weights(four.out / "student", halves.out / "student")
    timeless = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in updates(run)]
        for run in (four, halves)
    ]
    assert timeless[0] == timeless[1]


def test_a_run_repeats_itself_bitwise_and_another_seed_does_not(toy_run, tmp_path):
    runs = [
        dataclasses.replace(toy_run, steps=3, seed=seed, out=tmp_path / name)
        for seed, name in ((0, "one"), (0, "same"), (1, "other"))
    ]
    for run in runs:
        train(run)
    losses = [[line["loss"] for line in updates(run)] for run in runs]
    assert losses[0] == losses[1] != losses[2]
    assert_same_weights(runs[0].out / "student", runs[1].out / "student")


def test_one_batch_can_be_learnt_by_heart(still_run, monkeypatch):
    """The same documents, windows and masks in every update: the masked words are learnt."""
    batch_at = Batches.at
    monkeypatch.setattr(Batches, "at", lambda batches, step: batch_at(batches, 0))
    labels_alone = {"hidden_weight": 0.0, "attention_weight": 0.0, "output_weight": 0.0}
    train(dataclasses.replace(still_run, steps=120, **labels_alone))
    assert updates(still_run)[0]["mlm_loss"] > 4
    assert updates(still_run)[-1]["mlm_loss"] < 0.05


def test_a_student_can_follow_its_teacher_by_heart(still_run, monkeypatch):
    """Without the labels the three signals of the teacher agree, and all of them vanish."""
    batch_at = Batches.at
    monkeypatch.setattr(Batches, "at", lambda batches, step: batch_at(batches, 0))
    run = dataclasses.replace(still_run, steps=200, mlm_weight=0.0)
    train(run)
    first, last = updates(run)[0], updates(run)[-1]
    for term in ("hidden_loss", "attention_loss", "output_loss"):
        assert last[term] < 0.2 * first[term], term


def test_evaluations_stand_at_the_start_between_and_at_the_end(toy_run):
    train(dataclasses.replace(toy_run, eval_every=4))
    assert [line["step"] for line in evaluations(toy_run)] == [0, 4, 8, 10]
    figures = {
        f"held_out_{name}"
        for name in ("mlm_loss", "mlm_accuracy", "teacher_kl", "teacher_agreement")
    }
    assert all(figures <= line.keys() for line in evaluations(toy_run))


def test_mlm_begins_at_random_or_goes_on_with_a_model(toy_world, toy_run, tmp_path):
    begun = RunConfig(
        recipe="mlm",
        model=toy_world / "teacher" / "config.json",
        data=toy_run.data,
        out=tmp_path / "begun",
        steps=60,
        batch_size=30,
        max_length=19,
        learning_rate=1e-2,
        log_every=1,
    ).resolved()
    train(begun)
    begin, end = evaluations(begun)
    assert end["held_out_mlm_loss"] < begin["held_out_mlm_loss"] - 0.3
    assert "hidden_loss" not in updates(begun)[0]
    continued = dataclasses.replace(begun, model=begun.out / "model", out=tmp_path / "continued")
    train(continued)
    assert evaluations(continued)[0]["held_out_mlm_loss"] == pytest.approx(end["held_out_mlm_loss"])


def test_dropout_is_on_also_where_a_model_is_continued(toy_world, still_run, tmp_path):
    losses = []
    for name, model in (("with", toy_world / "teacher"), ("without", still_run.teacher)):
        settings = {"recipe": "mlm", "teacher": None, "teacher_layers": None, "steps": 1}
        run = dataclasses.replace(still_run, model=model, out=tmp_path / name, **settings)
        train(run)
        losses.append(updates(run)[0]["loss"])
    assert losses[0] != losses[1]


def test_mlm_alone_does_not_run_the_teacher(toy_run):
    weights = {"hidden_weight": 0.0, "attention_weight": 0.0, "output_weight": 0.0}
    train(dataclasses.replace(toy_run, steps=2, **weights))
    assert "output_loss" not in updates(toy_run)[0]
    assert updates(toy_run)[0]["loss"] == pytest.approx(updates(toy_run)[0]["mlm_loss"])
    assert "held_out_teacher_kl" in evaluations(toy_run)[-1]


def test_a_corpus_without_held_out_documents_can_be_learnt_from(
    toy_world, toy_run, tmp_path, capsys
):
    corpus = Corpus.open(toy_run.data)
    with CorpusWriter(tmp_path / "corpus", load_tokenizer(toy_world), held_out=0.0) as writer:
        writer.add(["one", "two"], [corpus.tokens(n).tolist() for n in (0, 1)])
        writer.finish()
    train(dataclasses.replace(toy_run, data=tmp_path / "corpus", steps=2))
    assert len(updates(toy_run)) == 2
    assert evaluations(toy_run) == []
    assert "written" in capsys.readouterr().out


def test_an_extended_run_remembers_how_far_it_was_to_go(toy_run):
    train(dataclasses.replace(toy_run, steps=2))
    longer = dataclasses.replace(toy_run, steps=6, save_every=1, resume=True)
    train(longer)
    shutil.rmtree(toy_run.out / "step_000006")
    train(RunConfig.from_flags({"out": toy_run.out, "resume": True}))
    assert [line["step"] for line in updates(toy_run)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InputError, match="6 updates are done already; --steps is 5"):
        train(RunConfig.from_flags({"out": toy_run.out, "resume": True, "steps": 5}))


def test_a_run_can_be_moved_and_resumed_elsewhere(toy_world, toy_run, tmp_path):
    train(dataclasses.replace(toy_run, steps=2))
    for name in ("corpus", "teacher"):
        shutil.copytree(toy_world / name, tmp_path / "elsewhere" / name)
    shutil.move(toy_run.out, tmp_path / "elsewhere" / "run")
    moved = {name: tmp_path / "elsewhere" / name for name in ("teacher",)}
    moved |= {"data": tmp_path / "elsewhere" / "corpus", "out": tmp_path / "elsewhere" / "run"}
    train(RunConfig.from_flags({**moved, "resume": True, "steps": 3}))
    assert (tmp_path / "elsewhere" / "run" / "step_000003").is_dir()


def test_numbers_that_are_none_end_the_run_and_keep_the_good_checkpoint(toy_run):
    """A learning rate beyond reason: the next gradient is not finite."""
    train(dataclasses.replace(toy_run, steps=2))
    worse = dataclasses.replace(toy_run, steps=9, learning_rate=1e30, keep=1, resume=True)
    with pytest.raises(InputError, match="step 4 is not finite: loss nan, "):
        train(worse)
    assert [path.name for path in toy_run.out.glob("step_*")] == ["step_000002"]
    assert all(math.isfinite(line["loss"]) for line in updates(toy_run))


def test_a_run_that_never_saved_begins_again(toy_run):
    train(dataclasses.replace(toy_run, steps=3))
    shutil.rmtree(toy_run.out / "step_000003")
    train(dataclasses.replace(toy_run, steps=3, resume=True))
    assert [line["step"] for line in updates(toy_run)] == [1, 2, 3]
    assert [line["step"] for line in evaluations(toy_run)] == [0, 3]


def test_the_teacher_is_left_alone(toy_run, monkeypatch):
    corpus, device = Corpus.open(toy_run.data), torch.device("cpu")
    models = train_script.build_models(toy_run, corpus, device)
    monkeypatch.setattr(train_script, "build_models", lambda *arguments: models)
    train(dataclasses.replace(toy_run, steps=2))
    _, teacher, _ = models
    before, after = load_model(toy_run.teacher).state_dict(), teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_the_newest_checkpoints_are_kept(toy_run):
    train(dataclasses.replace(toy_run, save_every=2, keep=3))
    names = sorted(path.name for path in toy_run.out.glob("step_*"))
    assert names == ["step_000006", "step_000008", "step_000010"]


def test_bfloat16_learns_the_same_within_its_precision(still_run, tmp_path):
    half = dataclasses.replace(still_run, dtype="bfloat16", out=tmp_path / "half")
    train(still_run)
    train(half)
    for ours, theirs in zip(updates(still_run)[:3], updates(half)[:3], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.03)
        assert theirs["loss"] != ours["loss"]
    assert all(t.dtype == torch.float32 for t in load_model(half.out / "student").parameters())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_models_learn_the_same(still_run, tmp_path, dtype):
    """Batches of different sizes, so that what was compiled for one must serve or be replaced."""
    eager = dataclasses.replace(still_run, steps=3, dtype=dtype)
    compiled = dataclasses.replace(eager, compile=True, out=tmp_path / "compiled")
    train(eager)
    train(compiled)
    for ours, theirs in zip(updates(eager), updates(compiled), strict=True):
        tolerance = 1e-4 if dtype == "float32" else 0.02
        for term in ("loss", *TERMS, "grad_norm"):
            assert ours[term] == pytest.approx(theirs[term], rel=tolerance), term
