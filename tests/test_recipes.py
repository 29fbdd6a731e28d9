"""A recipe is data: the published ones are as published, one's own is a JSON file, or refused."""

import dataclasses
import json
import sys

import pytest
import torch
from recipe_toys import TOY_STUDENT, run_of

import train
from minibert.config import BIOBERT, BertConfig
from minibert.data.corpus import Corpus
from minibert.errors import ArgumentParser, InputError, run_command
from minibert.folder import load_model
from minibert.model import BertForMaskedLM
from minibert.recipes import RECIPES, Recipe
from minibert.run_config import RunConfig
from minibert.student import ProjectedStudent, layers_to_follow, new_student


@pytest.mark.parametrize(
    ("name", "weights", "temperature", "optimiser"),
    [
        ("compactbiobert", (1, 3, 3, 5), 1, (5e-4, 1e-4, 5_000, 100_000)),
        ("distilbiobert", (2, 1, 0, 5), 2, (5e-4, 0, 5_000, 100_000)),
        ("tinybiobert", (0, 1, 1, 1), 1, (5e-4, 1e-4, 10_000, 100_000)),
        ("mlm", (1, 0, 0, 0), 1, (1e-4, 1e-4, 10_000, 200_000)),
    ],
)
def test_the_numbers_are_the_published_ones(name, weights, temperature, optimiser):
    recipe = RECIPES[name]
    found = (
        recipe.mlm_weight, recipe.hidden_weight, recipe.attention_weight, recipe.output_weight,
    )  # fmt: skip
    assert found == weights
    assert recipe.temperature == temperature
    settings = (recipe.learning_rate, recipe.weight_decay, recipe.warmup_steps, recipe.steps)
    assert settings == optimiser
    assert (recipe.batch_size, recipe.max_length) == (192, 256)


# Of BioBERT's 12 layers: those that start and supervise, and the levels and maps compared.
@pytest.mark.parametrize(
    ("name", "layers", "hidden", "maps"),
    [
        ("compactbiobert", range(1, 12, 2), [(i, 2 * i) for i in range(1, 7)], range(1, 12, 2)),
        ("distilbiobert", range(0, 12, 2), [(-1, -1)], []),
        ("tinybiobert", range(2, 12, 3), [(i, 3 * i) for i in range(5)], range(2, 12, 3)),
    ],
)
def test_what_is_compared_at_biobert(tmp_path, name, layers, hidden, maps):
    chosen = layers_to_follow(RECIPES[name], 12)
    run = RunConfig(recipe=name, teacher=tmp_path, data=tmp_path, out=tmp_path).resolved()
    run = dataclasses.replace(run, teacher_layers=chosen)
    assert chosen == tuple(layers)
    assert run.hidden_pairs == tuple(hidden)
    assert run.attention_pairs == tuple(enumerate(maps))


def test_the_tiny_student_of_biobert(tmp_path):
    with torch.device("meta"):
        teacher = BertForMaskedLM(BIOBERT)
        run = RunConfig(recipe="tinybiobert", teacher=tmp_path, data=tmp_path, out=tmp_path)
        run = dataclasses.replace(run.resolved(), teacher_layers=(2, 5, 8, 11))
        learner = new_student(teacher, run)
    assert isinstance(learner, ProjectedStudent)
    assert learner.projection.weight.shape == (768, 312) and learner.projection.bias.shape == (768,)
    assert learner.config == BertConfig(
        vocab_size=28_996,
        hidden_size=312,
        num_hidden_layers=4,
        num_attention_heads=12,
        intermediate_size=1200,
    )
    assert learner.config.num_parameters == 13_903_756


# A recipe of one's own.


def parsed(*arguments: str) -> RunConfig:
    parser = ArgumentParser()
    RunConfig.add_flags(parser)
    return RunConfig.from_flags(vars(parser.parse_args(arguments)))


def printed(name: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        parsed("--print-recipe", name)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_printed_is_read_as_the_same_recipe(name, tmp_path, capsys):
    path = tmp_path / "my.json"
    path.write_text(printed(name, capsys))
    source = "--model" if name == "mlm" else "--teacher"
    run = parsed("--recipe", str(path), source, "t", "--data", "d", "--out", "o")
    assert run.recipe == RECIPES[name]
    assert str(run.recipe) == "my.json"
    named = parsed("--recipe", name, source, "t", "--data", "d", "--out", "o")
    assert run == named


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The complaint of `train.py` about a recipe's file, without the file's name."""

    def complaint(text: str) -> str:
        path = tmp_path / "my.json"
        path.write_text(text)
        flags = ["--recipe", str(path), "--teacher", "t", "--data", "d", "--out", "o"]
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        assert run_command(train.main) == 2
        told = capsys.readouterr().err
        start = f"error: argument --recipe: {path}: "
        assert told.startswith(start) and told.count("\n") == 1
        return told.removeprefix(start)

    return complaint


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hiden_weight": 3}, "'hiden_weight' is unknown; known: start, mlm_weight, "),
        ({"name": "mine"}, "'name' is unknown"),
        ({"start": None}, "start is None; expected one of 'teacher', 'random', 'model'"),
        ({"start": ["teacher"]}, "start is ['teacher']; expected one of"),
        ({"hidden_loss": "cosines"}, "hidden_loss is 'cosines'; expected one of 'cosine', 'mse'"),
        ({"hidden_levels": "all"}, "expected one of 'each', 'last', 'embeddings and each'"),
        ({"attention_loss": "cosine"}, "attention_loss is 'cosine'; expected one of 'kl', 'mse'"),
        ({"output_loss": "mse"}, "output_loss is 'mse'; expected one of 'kl', 'cross_entropy'"),
        ({"layer_of_group": "middle"}, "expected one of 'first', 'last'"),
        ({"hidden_weight": -3}, "hidden_weight is -3; expected a number from 0 up"),
        ({"hidden_weight": "3"}, "hidden_weight is '3'; expected a number from 0 up"),
        ({"hidden_weight": True}, "hidden_weight is True; expected a number"),
        ({"mlm_weight": float("nan")}, "mlm_weight is nan; expected a number from 0 up"),
        ({"output_weight": float("inf")}, "output_weight is inf; expected a number from 0 up"),
        ({"temperature": 0}, "temperature is 0; expected a number above 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a number above 0"),
        ({"steps": 2.5}, "steps is 2.5; expected a whole number from 1 up"),
        ({"max_length": 2}, "max_length is 2; expected a whole number from 3 up"),
        ({"warmup_steps": 100_001}, "warmup_steps is 100001 of 100000 steps"),
        (
            dict.fromkeys(("mlm_weight", "hidden_weight", "attention_weight", "output_weight"), 0),
            "every loss weight is 0",
        ),
        ({"student": 6}, "student is 6; expected an object with sizes"),
        ({"student": {"vocab_size": 9}}, "student: 'vocab_size'; where start is 'teacher', num_"),
        ({"student": {"hidden_size": 9}}, "student: 'hidden_size'; where start is 'teacher', num"),
        (
            {"student": {"num_hidden_layers": 0}},
            "student: num_hidden_layers is 0; expected a whole",
        ),
        ({"start": "model"}, "start is 'model', without a teacher: mlm_weight alone"),
        (
            {"start": "model", "student": {"num_hidden_layers": 3}},
            "student: 'num_hidden_layers'; where start is 'model', nothing can be said",
        ),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(refused, changes, complaint):
    assert complaint in refused(json.dumps(RECIPES["compactbiobert"].to_dict() | changes))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"steps": 1, "steps": 2}', "'steps' stands twice"),
        (
            '{"start": "random"}',
            "mlm_weight, hidden_weight, attention_weight, output_weight, learn",
        ),
    ],
)
def test_a_file_that_is_no_recipe(refused, text, complaint):
    assert complaint in refused(text)


def test_a_run_remembers_its_recipe_and_needs_no_file(toy_run, tmp_path):
    content = RECIPES["tinybiobert"].to_dict() | {"student": TOY_STUDENT, "hidden_weight": 2.5}
    file = tmp_path / "my.json"
    file.write_text(json.dumps(content))
    given = {"teacher": toy_run.teacher, "data": toy_run.data, "out": toy_run.out, "steps": 4}
    given |= {"batch_size": 3, "max_length": 19, "device": "cpu", "recipe": str(file)}
    train.train(RunConfig.from_flags(given | {"steps": 2}))
    recorded = json.loads((toy_run.out / "config.json").read_text())["run"]["recipe"]
    assert recorded == {"name": "my.json"} | content
    file.unlink()
    train.train(RunConfig.from_flags({"out": toy_run.out, "resume": True, "steps": 3}))
    assert load_model(toy_run.out / "student").config.hidden_size == TOY_STUDENT["hidden_size"]

    again = {"out": toy_run.out, "resume": True}
    file.write_text(json.dumps(content))
    RunConfig.from_flags(again | {"recipe": str(file)})  # the same again may be said
    file.write_text(json.dumps(content | {"hidden_levels": "each"}))
    with pytest.raises(InputError, match=r"my.json: the run began with my.json with other set"):
        RunConfig.from_flags(again | {"recipe": str(file)})
    with pytest.raises(InputError, match=r"--recipe compactbiobert: the run began with my.json"):
        RunConfig.from_flags(again | {"recipe": "compactbiobert"})


def test_a_recorded_recipe_that_is_wrong_is_named(tmp_path):
    recipe = RECIPES["mlm"].to_dict() | {"name": "mine", "mlm_weight": -1}
    (tmp_path / "config.json").write_text(json.dumps({"run": {"recipe": recipe}}))
    with pytest.raises(InputError, match=r"config.json: recipe: mlm_weight is -1; expected a num"):
        RunConfig.read(tmp_path / "config.json")


# What shows with the teacher at hand.


@pytest.mark.parametrize(
    ("changes", "settings", "complaint"),
    [
        ({"student": {"num_hidden_layers": 3}}, {}, "4 layers, which do not make 3 groups"),
        ({}, {"teacher_layers": (0, 1, 3)}, "teacher layers 0,1,3; expected 2 of them"),
        ({}, {"teacher_layers": (3, 1)}, "teacher layers 3,1; expected ascending"),
        ({"student": {"hidden_size": 20}}, {}, "my.json: hidden_size 20 is not a multiple of num"),
        (
            {"student": {"num_attention_heads": 6}},
            {},
            "my.json: num_attention_heads 6; the teacher has 3, and attention maps are compared",
        ),
    ],
)
def test_a_student_that_does_not_fit_its_teacher(toy_run, changes, settings, complaint):
    student = TOY_STUDENT | changes.get("student", {})
    recipe = dataclasses.replace(RECIPES["tinybiobert"], name="my.json", student=student)
    run = run_of("tinybiobert", toy_run, recipe=recipe, **settings)
    with pytest.raises(InputError, match=complaint):
        train.build_models(run, Corpus.open(run.data), torch.device("cpu"))


def test_heads_may_differ_where_no_maps_are_compared(toy_run):
    student = TOY_STUDENT | {"num_attention_heads": 6}
    recipe = dataclasses.replace(RECIPES["tinybiobert"], student=student, attention_weight=0.0)
    run = run_of("tinybiobert", toy_run, recipe=recipe)
    learner, *_ = train.build_models(run, Corpus.open(run.data), torch.device("cpu"))
    assert learner.config.num_attention_heads == 6


def test_the_tiny_student_is_drawn_by_the_seed(toy_run):
    corpus, cpu = Corpus.open(toy_run.data), torch.device("cpu")
    first, same, other = (
        train.build_models(run_of("tinybiobert", toy_run, seed=seed), corpus, cpu)[0].state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["projection.weight"], other["projection.weight"])
    word_embeddings = "student.embeddings.word_embeddings.weight"
    assert not torch.equal(first[word_embeddings], other[word_embeddings])


def test_a_recipe_is_checked_wherever_it_is_made():
    with pytest.raises(InputError, match="temperature is 0"):
        dataclasses.replace(RECIPES["mlm"], temperature=0.0)
    assert Recipe.from_dict("mlm", RECIPES["mlm"].to_dict()) == RECIPES["mlm"]
