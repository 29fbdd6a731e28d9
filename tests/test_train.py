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
from minibert.data.corpus import Corpus
from minibert.data.merge import write_corpus
from minibert.data.tokenizer import load_tokenizer
from minibert.errors import InputError
from minibert.folder import load_model
from minibert.run_config import RunConfig
from minibert.training.runlog import TIMES, read_metrics
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
        (11.0692, 5.08836, 0.775605, 0.0209459, 0.718231),
        (7.22996, 4.42222, 0.521769, 0.0201905, 0.236373),
        (7.3385, 4.83652, 0.503842, 0.0165204, 0.18818),
        (6.62932, 4.88996, 0.439029, 0.0173705, 0.0740334),
        (7.09171, 5.47367, 0.356002, 0.0174788, 0.0995197),
        (6.68948, 4.79534, 0.404848, 0.0183187, 0.124927),
        (6.2238, 4.62018, 0.339019, 0.0180496, 0.106482),
        (5.96041, 4.72213, 0.298957, 0.0169633, 0.0581033),
        (6.52748, 5.29957, 0.254996, 0.0162463, 0.0828351),
        (6.11023, 4.86316, 0.282147, 0.0158926, 0.0705895),
    ],
    "distilbiobert": [
        (13.3118, 5.38023, 0.395549, 0.431162),
        (11.3556, 5.16991, 0.379455, 0.127267),
        (10.7788, 4.78674, 0.32538, 0.175984),
        (10.5366, 4.7524, 0.353525, 0.135661),
        (12.0263, 5.57939, 0.275702, 0.11837),
        (10.7755, 4.90827, 0.280698, 0.135652),
        (10.0655, 4.62365, 0.256141, 0.112409),
        (10.0276, 4.66392, 0.221988, 0.095549),
        (11.1937, 5.15446, 0.22719, 0.131523),
        (10.6588, 4.9224, 0.22788, 0.117225),
    ],
    "tinybiobert": [
        (9.6465, 5.20527, 4.66679, 0.00524364, 4.97446),
        (8.87595, 5.02608, 4.03099, 0.00710711, 4.83785),
        (8.15019, 5.14197, 3.43309, 0.0066524, 4.71045),
        (7.52884, 4.73625, 2.92213, 0.00503039, 4.60168),
        (7.18883, 4.77151, 2.68543, 0.00488499, 4.49851),
        (6.93094, 4.91679, 2.44106, 0.00559868, 4.48429),
        (6.66044, 4.6455, 2.26888, 0.00531335, 4.38624),
        (6.52003, 4.79356, 2.1464, 0.00553932, 4.36808),
        (6.44096, 4.9623, 2.08795, 0.00591214, 4.34709),
        (6.40089, 4.71338, 2.05928, 0.00457442, 4.33704),
    ],
    "mlm": [
        (5.49777, 5.49777),
        (4.64827, 4.64827),
        (5.07575, 5.07575),
        (4.70115, 4.70115),
        (5.25814, 5.25814),
        (5.27148, 5.27148),
        (4.71195, 4.71195),
        (4.40459, 4.40459),
        (5.01654, 5.01654),
        (4.75535, 4.75535),
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
        for term in ours.keys() - {"step", *TIMES}:
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
        [{k: v for k, v in line.items() if k not in TIMES} for line in updates(run)]
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
    documents = [("one", corpus.tokens(0).tolist()), ("two", corpus.tokens(1).tolist())]
    write_corpus(tmp_path / "corpus", load_tokenizer(toy_world), documents, held_out=0.0)
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
