"""The studies do what their tables say: variants differ in one thing, and nothing is done twice."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY_CONFIG
from finetune_toys import ner_data, relation_data

from minibert.data.batches import Batches
from minibert.data.corpus import Corpus
from minibert.errors import InputError, Stopped
from minibert.evaluate import evaluate, load_for_corpus
from minibert.folder import load_model, save_model
from minibert.model import BertForMaskedLM

sys.path.insert(0, str(ROOT / "benchmarks"))
import biomedical
import study
from work import Job, do_what_is_left

FEW = {"steps": 2, "batch_size": 5, "max_length": 19, "eval_every": 1, "eval_documents": 3}
FEW |= {"dtype": "bfloat16", "log_every": 1}


@pytest.fixture
def place(toy_world, tmp_path, monkeypatch):
    """A folder with a toy teacher of 12 layers; studies are two steps long."""
    torch.manual_seed(1)
    teacher = BertForMaskedLM(dataclasses.replace(TOY_CONFIG, num_hidden_layers=12))
    save_model(tmp_path / "teacher", teacher, tokenizer_from=toy_world)
    monkeypatch.setitem(study.SCALES, "cpu", FEW)
    return tmp_path


def studied(place, toy_world, monkeypatch, *flags: str) -> dict:
    """What the command writes to --json."""
    monkeypatch.setattr(sys, "argv", [
        "study.py", "--teacher", f"{place}/teacher", "--data", f"{toy_world}/corpus",
        "--out", f"{place}/runs", "--json", f"{place}/all.json", *flags,
    ])  # fmt: skip
    study.main()
    return json.loads((place / "all.json").read_text())


def test_variants_differ_in_what_they_say(place, toy_world):
    flags = SimpleNamespace(
        teacher=place / "teacher", data=toy_world / "corpus", out=place, seeds=2, only=None,
        scale="cpu",
    )  # fmt: skip
    names = [(name, seed) for seed in range(flags.seeds) for name in study.VARIANTS]
    assert [job.result.parent.name for job in study.planned(flags)] == [
        f"{name}-seed{seed}" for name, seed in names
    ]
    runs = [study.run_of(name, seed, flags) for name, seed in names]
    assert [run.seed for run in runs] == [0] * len(study.VARIANTS) + [1] * len(study.VARIANTS)
    base = runs[0].to_dict()
    for (name, variant), run in zip(study.VARIANTS.items(), runs, strict=False):
        settings = run.to_dict()
        differs = {key for key in settings if settings[key] != base[key]} - {"out"}
        if "recipe" in variant.settings:  # it decides what else there is
            assert "recipe" in differs
        else:
            assert differs == set(variant.settings), name


@pytest.mark.slow
def test_every_variant_runs(place, toy_world, monkeypatch):
    told = studied(place, toy_world, monkeypatch, "--seeds", "1")
    assert list(told["runs"]) == list(study.VARIANTS)
    for run in told["runs"].values():
        assert [step for step, *_ in run["seeds"]["0"]["curve"]] == [0, 1, 2]


def test_what_was_measured_is_gathered(place, toy_world, monkeypatch):
    told = studied(place, toy_world, monkeypatch, "--only", "compactbiobert", "no-mlm")
    assert told["runs"]["no-mlm"]["settings"] == {"mlm_weight": 0.0}
    assert list(told["runs"]["no-mlm"]["seeds"]) == ["0", "1", "2"]
    run = told["runs"]["compactbiobert"]["seeds"]["1"]
    (before, _, after) = run["curve"]
    assert before[:2] == [0, 0] and after[0] == 2 and after[1] >= 0
    corpus = Corpus.open(toy_world / "corpus")
    student, teacher = (
        load_for_corpus(folder, corpus, 19)
        for folder in (place / "runs" / "compactbiobert-seed1" / "student", place / "teacher")
    )
    held_out = Batches(corpus, max_length=19).held_out(corpus.num_held_out)
    figures = evaluate(student, held_out, teacher)
    assert run["final"] == pytest.approx([figures[name] for name in told["figures"]], abs=1e-6)
    assert told["teacher"] == pytest.approx(
        {key: figures[key] for key in told["teacher"]}, abs=1e-6
    )


def test_what_is_done_or_in_use_is_passed_over(place, toy_world, monkeypatch):
    flags = ("--only", "mlm", "compactbiobert", "--seeds", "1")
    first = studied(place, toy_world, monkeypatch, *flags)
    monkeypatch.setattr(study, "do_run", lambda *_: pytest.fail("done, or in use"))
    assert studied(place, toy_world, monkeypatch, *flags) == first
    (place / "runs" / "mlm-seed0" / "result.json").unlink()
    with held(place / "runs" / "mlm-seed0.lock"):
        left = studied(place, toy_world, monkeypatch, *flags)
    assert list(left["runs"]) == ["compactbiobert"]


def test_what_was_done_otherwise_is_not_passed_over(place, toy_world, monkeypatch):
    flags = ("--only", "compactbiobert", "--seeds", "1")
    studied(place, toy_world, monkeypatch, *flags)
    monkeypatch.setitem(study.SCALES, "cpu", FEW | {"steps": 3})
    with pytest.raises(InputError, match="compactbiobert-seed0: done with steps 2, not 3"):
        studied(place, toy_world, monkeypatch, *flags)
    monkeypatch.setitem(study.SCALES, "cpu", FEW)
    other = load_model(place / "teacher")
    torch.nn.init.ones_(other.head.decoder_bias)
    save_model(place / "other", other, tokenizer_from=place / "teacher")
    with pytest.raises(InputError, match="compactbiobert-seed0: done with another teacher"):
        studied(place, toy_world, monkeypatch, *flags, "--teacher", f"{place}/other")


def test_what_is_wrong_is_told_before_anything_is_done(place, toy_world, monkeypatch):
    with pytest.raises(InputError, match="none"):
        studied(place, toy_world, monkeypatch, "--teacher", f"{place}/none")
    assert not (place / "runs").exists()
    beginning = ["biomedical.py", "--data", f"{toy_world}/corpus", "--out", f"{place}/bio"]
    for words, told in {
        ("--task", "words", str(place)): "--task words: unknown; known: ner, relation",
        ("--task", "ner", f"{place}/none"): "none: no such folder",
        ("--data", f"{place}/none"): "none",
    }.items():
        monkeypatch.setattr(sys, "argv", [*beginning, *words])
        with pytest.raises(InputError, match=told):
            biomedical.main()
    assert not (place / "bio").exists()


def test_work_ends_when_its_time_is_up(tmp_path):
    made = []

    def job(name: str, status: int | None = None) -> Job:
        def make(hours):
            made.append((name, hours))
            if status is not None:
                raise Stopped(status)

        return Job(name, tmp_path, tmp_path / name, tmp_path / f"{name}.lock", make)

    (tmp_path / "done").touch()
    lost = job("lost")._replace(source=tmp_path / "nowhere")
    do_what_is_left([job("done"), lost, job("first"), job("stopped", 0), job("never")], None)
    assert made == [("first", None), ("stopped", None)]
    do_what_is_left([job("never")], minutes=1e-9)
    assert len(made) == 2
    with pytest.raises(Stopped):  # by a signal
        do_what_is_left([job("broken off", 130)], minutes=30)
    assert made[-1][0] == "broken off" and made[-1][1] == pytest.approx(0.5, abs=0.01)


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """The lock is another process's."""
    hold = "import sys; from pathlib import Path; from minibert.files import locked\n"
    hold += "with locked(Path(sys.argv[1])): print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, str(lock)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        other.stdout.readline()
        yield
        other.communicate(b"\n")


def test_a_fresh_head_is_all_that_is_fresh(place, toy_world, monkeypatch):
    monkeypatch.setitem(study.SCALES, "cpu", FEW | {"learning_rate": 1e-30})
    studied(place, toy_world, monkeypatch, "--only", "compactbiobert", "fresh-head", "--seeds", "1")
    copied, fresh = (
        load_model(place / "runs" / f"{name}-seed0" / "student").state_dict()
        for name in ("compactbiobert", "fresh-head")
    )
    differs = {name for name in copied if not torch.allclose(copied[name], fresh[name])}
    assert differs == {"head.dense.weight"}  # biases and LayerNorm begin as they are drawn anew


@pytest.mark.slow
def test_the_biomedical_stages_follow_from_each_other(toy_world, tmp_path, monkeypatch):
    few = {"hidden_size": 64, "shallow_steps": 4, "teacher_steps": 4, "student_steps": 4}
    monkeypatch.setitem(biomedical.SCALES, "cpu", few | {"batch_size": 5, "max_length": 19})
    monkeypatch.setitem(biomedical.FINE_TUNING, "epochs", 1)
    ner, relation = ner_data(tmp_path / "names"), relation_data(tmp_path / "relations")
    monkeypatch.setattr(sys, "argv", [
        "biomedical.py", "--data", f"{toy_world}/corpus", "--out", f"{tmp_path}/out",
        "--task", "ner", str(ner), "--task", "relation", str(relation),
        "--seeds", "2", "--json", f"{tmp_path}/all.json",
    ])  # fmt: skip
    biomedical.main()
    told = json.loads((tmp_path / "all.json").read_text())
    assert list(told["pretraining"]) == [
        "shallow",
        "teacher",
        "compactbiobert",
        "mlm",
        "distilbiobert",
    ]
    assert {name: list(models) for name, models in told["tasks"].items()} == {
        "names": list(biomedical.MODELS), "relations": list(biomedical.MODELS),
    }  # fmt: skip
    score = told["tasks"]["names"]["teacher"]["f1"]
    assert score["mean"] == pytest.approx(sum(score["values"]) / 2)
    assert "piece_f1" in told["tasks"]["names"]["teacher"]

    shallow, stacked, teacher, copied = (
        load_model(tmp_path / "out" / name)
        for name in ("shallow/model", "stacked", "teacher/model", "copied")
    )
    for i, layer in enumerate(stacked.layers):
        assert_same(layer, shallow.layers[i % 4])
    assert_same(stacked.embeddings, shallow.embeddings)
    assert_same(stacked.head, shallow.head)
    assert_same(copied.layers[2], teacher.layers[5])
    assert_same(copied.head, teacher.head)

    monkeypatch.setattr(biomedical.train, "train", lambda *_: pytest.fail("done twice"))
    monkeypatch.setattr(biomedical, "fine_tune", lambda *_: pytest.fail("done twice"))
    biomedical.main()
    assert json.loads((tmp_path / "all.json").read_text()) == told

    monkeypatch.setitem(biomedical.FINE_TUNING, "epochs", 2)
    with pytest.raises(InputError, match="teacher/seed_0: done with another --epochs"):
        biomedical.main()
    monkeypatch.setitem(biomedical.SCALES["cpu"], "hidden_size", 128)
    with pytest.raises(InputError, match=r"shallow\.json: of another --scale"):
        biomedical.main()


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
