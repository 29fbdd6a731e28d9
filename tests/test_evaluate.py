"""`minibert.evaluate` prints means over the masked positions, the same whoever asks."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from conftest import TOY_CONFIG

from minibert import evaluate as command
from minibert.data.batches import Batches
from minibert.data.corpus import Corpus
from minibert.errors import run_command
from minibert.evaluate import evaluate
from minibert.folder import save_model
from minibert.model import BertForMaskedLM

MAX_LENGTH = 19


@pytest.fixture
def models() -> tuple[BertForMaskedLM, BertForMaskedLM]:
    """Two different models, the first in training mode."""
    torch.manual_seed(7)
    return BertForMaskedLM(TOY_CONFIG), BertForMaskedLM(TOY_CONFIG).eval()


@pytest.fixture
def corpus(toy_world) -> Corpus:
    return Corpus.open(toy_world / "corpus")


def test_the_figures_are_means_over_masked_positions(models, corpus):
    model, teacher = (network.requires_grad_(False) for network in models)
    figures = evaluate(model, Batches(corpus, MAX_LENGTH).held_out(500), teacher)
    sums, count = [0.0] * 6, 0
    for batch in Batches(corpus, MAX_LENGTH, micro_batch_tokens=1).held_out(500):  # one by one
        for position, label in zip(batch.masked_positions, batch.labels, strict=True):
            rows = []
            for network in (model.eval(), teacher):
                output = network(*batch[:2], masked_positions=position[None])
                rows.append(network.logits(output.head_output)[0].double().softmax(-1))
            ours, theirs = rows
            kl = sum(float(t) * math.log(t / s) for t, s in zip(theirs, ours, strict=True))
            first_choices = int(ours.argmax()), int(theirs.argmax())
            values = (
                -math.log(ours[label]),
                first_choices[0] == label,
                kl,
                first_choices[0] == first_choices[1],
                -math.log(theirs[label]),
                first_choices[1] == label,
            )
            sums = [total + float(value) for total, value in zip(sums, values, strict=True)]
            count += 1
    assert count > 12
    names = ("mlm_loss", "mlm_accuracy", "teacher_kl", "teacher_agreement")
    names += ("teacher_mlm_loss", "teacher_mlm_accuracy")
    expected = {name: total / count for name, total in zip(names, sums, strict=True)}
    assert figures == pytest.approx(expected, rel=1e-4)


def test_a_model_agrees_with_itself(models, corpus):
    _, model = models
    figures = evaluate(model, Batches(corpus, MAX_LENGTH).held_out(500), model)
    assert figures["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert figures["teacher_agreement"] == 1


def test_training_goes_on_as_it_was(models, corpus):
    model, teacher = models
    evaluate(model, Batches(corpus, MAX_LENGTH).held_out(2), teacher)
    assert model.training
    assert not teacher.training


def evaluated(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Run the command; returns its status and what it wrote to the two outputs."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    status = run_command(command.main)
    return status, *capsys.readouterr()


def test_the_command(toy_world, models, tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "model", models[1], tokenizer_from=toy_world)
    where = [tmp_path / "model", "--data", toy_world / "corpus", "--max-length", MAX_LENGTH]
    teacher = ["--teacher", toy_world / "teacher"]
    status, alone, _ = evaluated(monkeypatch, capsys, *where, "--json")
    assert status == 0
    assert set(json.loads(alone)) == {"mlm_loss", "mlm_accuracy"}
    status, both, _ = evaluated(monkeypatch, capsys, *where, *teacher, "--json")
    assert status == 0
    assert json.loads(both)["mlm_loss"] == json.loads(alone)["mlm_loss"]
    status, text, _ = evaluated(monkeypatch, capsys, *where, *teacher)
    assert status == 0
    assert f"mlm_loss               {json.loads(alone)['mlm_loss']:.4f}\n" in text


def test_more_tokens_than_positions_is_one_clear_line(toy_world, monkeypatch, capsys):
    where = [toy_world / "teacher", "--data", toy_world / "corpus", "--max-length", 30]
    status, _, complaint = evaluated(monkeypatch, capsys, *where)
    assert status == 2
    assert complaint == "error: --max-length 30: the model has 29 positions\n"


def test_sequences_are_as_long_as_the_model_allows(toy_world, monkeypatch, capsys):
    where = [toy_world / "teacher", "--data", toy_world / "corpus", "--json"]
    status, printed, _ = evaluated(monkeypatch, capsys, *where)
    assert status == 0
    assert printed == evaluated(monkeypatch, capsys, *where, "--max-length", 29)[1]


def test_models_of_other_words_are_not_compared(toy_world, models, tmp_path, monkeypatch, capsys):
    wider = dataclasses.replace(TOY_CONFIG, vocab_size=101)  # two rows that are no word's
    save_model(tmp_path / "wider", BertForMaskedLM(wider), tokenizer_from=toy_world)
    where = [toy_world / "teacher", "--data", toy_world / "corpus"]
    status, _, complaint = evaluated(monkeypatch, capsys, *where, "--teacher", tmp_path / "wider")
    assert status == 2
    assert complaint == f"error: {tmp_path / 'wider'}: vocab_size 101; the model's 99\n"


def test_nothing_held_out_is_one_clear_line(toy_world, tmp_path, monkeypatch, capsys):
    from minibert.data.merge import write_corpus
    from minibert.data.tokenizer import load_tokenizer

    documents = [("one", [7, 8, 9])]
    write_corpus(tmp_path / "corpus", load_tokenizer(toy_world), documents, held_out=0.0)
    where = [toy_world / "teacher", "--data", tmp_path / "corpus", "--max-length", 19]
    status, _, complaint = evaluated(monkeypatch, capsys, *where)
    assert status == 2
    assert "nothing to fill in, 0 held-out documents" in complaint
