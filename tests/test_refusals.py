"""What is wrong in a call of `train.py` ends in one clear line and status 2; nothing is lost."""

import json
import shutil
import sys

import pytest
import torch
from conftest import TOY_CONFIG
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit

import train
from minibert.data.merge import write_corpus
from minibert.data.tokenizer import load_tokenizer
from minibert.errors import run_command
from minibert.folder import save_model
from minibert.model import BertModel


@pytest.fixture
def refused(toy_world, tmp_path, monkeypatch, capsys):
    """Run `train.py` with good flags, changed as told, and return its one line of complaint."""

    def run(**changes: str | None) -> str:
        flags = {
            "teacher": toy_world / "teacher",
            "data": toy_world / "corpus",
            "out": tmp_path / "run",
            "steps": 2,
            "batch_size": 3,
            "max_length": 19,
        } | changes
        arguments = ["train.py"]
        for name, value in flags.items():
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}", *([str(value)] if value != "" else [])]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            status = run_command(train.main)
        except SystemExit as exit:  # argparse's own way out
            status = exit.code
        complaint = capsys.readouterr().err
        assert status == 2
        assert complaint.startswith("error: ")
        assert complaint.count("\n") == 1
        return complaint

    yield run
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("recipe", "tinybert", "'tinybert' is no file and none of compactbiobert, distilbiobert"),
        ("dtype", "float8", "invalid choice: 'float8'"),
        ("steps", "0", "'0' is not a whole number from 1 up"),
        ("steps", "ten", "'ten' is not a whole number"),
        ("learning_rate", "0", "'0' is not a number above 0"),
        ("learning_rate", "nan", "'nan' is not a number above 0"),
        ("mlm_weight", "-1", "'-1' is not a number from 0 up"),
        ("teacher_layers", "1,x", "'1,x' is not a list of layers"),
        ("teacher_layers", "1,4", "expected ascending numbers from 0 to 3"),
        ("teacher_layers", "3,1", "expected ascending numbers from 0 to 3"),
        ("warmup_steps", "3", "--warmup-steps 3 of --steps 2"),
        ("max_length", "30", "--max-length 30: the model has 29 positions"),
        ("max_lengt", "19", "unrecognized arguments: --max-lengt 19"),
        ("seed", "99999999999999999999", "is not a whole number from 0 up"),
        ("colour", "red", "unrecognized arguments: --colour red"),
        ("recipe", "mlm", "recipe mlm needs --model and has no --teacher"),
        ("model", "there", "recipe compactbiobert needs --teacher"),
        ("teacher", None, "recipe compactbiobert needs --teacher"),
        ("data", None, "--data is needed"),
        ("teacher", "nowhere", "nowhere: no such folder"),
        ("data", "nowhere", "nowhere: no such corpus folder"),
    ],
)
def test_flags(refused, flag, value, complaint):
    assert complaint in refused(**{flag: value})


def test_no_cuda(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: this machine has no CUDA device" in refused(device="cuda")


def test_a_folder_that_is_not_empty_is_left_as_it_is(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert "is not empty" in refused()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_corpus_of_another_vocabulary(refused, toy_world, tmp_path):
    words = (toy_world / "vocab.txt").read_text().split()
    (tmp_path / "vocab.txt").write_text("\n".join([*words[:-1], "other"]) + "\n")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    write_corpus(tmp_path / "corpus", tokenizer, [("one", [7, 8, 9])], held_out=0.0)
    assert "was made with another vocabulary" in refused(data=tmp_path / "corpus")


def test_a_corpus_that_was_cut_off(refused, toy_world, tmp_path):
    shutil.copytree(toy_world / "corpus", tmp_path / "corpus")
    tokens = (tmp_path / "corpus" / "tokens.bin").read_bytes()
    (tmp_path / "corpus" / "tokens.bin").write_bytes(tokens[:-2])
    assert "tokens.bin" in refused(data=tmp_path / "corpus")


def test_a_teacher_without_head(refused, toy_world, tmp_path):
    save_model(tmp_path / "headless", BertModel(TOY_CONFIG), tokenizer_from=toy_world)
    assert "without the masked-language-modelling head" in refused(teacher=tmp_path / "headless")


def test_a_teacher_that_was_cut_off(refused, toy_world, tmp_path):
    shutil.copytree(toy_world / "teacher", tmp_path / "teacher")
    weights = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    (tmp_path / "teacher" / "model.safetensors").write_bytes(weights[:-100])
    assert "not a whole safetensors file" in refused(teacher=tmp_path / "teacher")


def test_a_teacher_whose_config_is_another(refused, toy_world, tmp_path):
    shutil.copytree(toy_world / "teacher", tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 38}))
    assert "config.json calls for (38,)" in refused(teacher=tmp_path / "teacher")


def test_a_teacher_of_odd_depth(refused, toy_world, tmp_path):
    shutil.copytree(toy_world / "teacher", tmp_path / "run-of-three")
    odd = {**TOY_CONFIG.__dict__, "num_hidden_layers": 3}
    save_model(
        tmp_path / "odd", train.BertForMaskedLM(type(TOY_CONFIG)(**odd)), tokenizer_from=toy_world
    )
    complaint = refused(teacher=tmp_path / "odd")
    assert "3 layers, which do not make 2 groups of one size; say with --teacher" in complaint


def test_a_hugging_face_folder(refused, toy_world, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(toy_world / "teacher", tmp_path / "hf")
    names = {"bert.embeddings.word_embeddings.weight": torch.zeros(99, 24)}
    save_file(names, tmp_path / "hf" / "model.safetensors")
    assert "a Hugging Face folder; convert it first" in refused(teacher=tmp_path / "hf")


def test_a_corpus_cut_by_other_rules(refused, toy_world, tmp_path):
    """The same vocabulary, but punctuation stays with its word: another language to the model."""
    shutil.copytree(toy_world / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus" / "vocab.txt").unlink()
    vocabulary = load_tokenizer(toy_world / "vocab.txt").backend.get_vocab()
    other = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    other.pre_tokenizer = WhitespaceSplit()
    other.save(str(tmp_path / "corpus" / "tokenizer.json"))
    assert "tokenizer.json cuts text otherwise than" in refused(data=tmp_path / "corpus")


def test_no_weight_at_all(refused):
    weights = {f"{name}_weight": "0" for name in ("mlm", "hidden", "attention", "output")}
    assert "every loss weight is 0" in refused(**weights)


def test_a_model_with_too_few_positions_leaves_nothing_behind(refused, toy_world, tmp_path):
    config = toy_world / "teacher" / "config.json"
    complaint = refused(recipe="mlm", teacher=None, model=config, max_length="30")
    assert "--max-length 30: the model has 29 positions" in complaint
    assert not (tmp_path / "run").exists()


def test_a_model_smaller_than_the_vocabulary(refused, toy_world, tmp_path):
    config = tmp_path / "small.json"
    config.write_text(json.dumps(TOY_CONFIG.to_dict() | {"vocab_size": 98}))
    complaint = refused(recipe="mlm", teacher=None, model=config)
    assert "vocab_size is 98" in complaint
    assert "needs 99" in complaint


def test_resuming_with_other_settings_or_other_data(refused, toy_run, toy_world, tmp_path):
    train.train(toy_run)
    again = {"resume": "", "teacher": None, "data": None, "steps": None, "max_length": None}
    again |= {"batch_size": None, "out": toy_run.out}
    assert "--learning-rate 0.1: the run began with 0.01" in refused(**again, learning_rate="0.1")
    settings = json.loads((toy_run.out / "config.json").read_text())
    settings["identity"]["corpus"] = "another"
    (toy_run.out / "config.json").write_text(json.dumps(settings))
    assert "another corpus than the run began with" in refused(**again)
