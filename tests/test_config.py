"""`config.json` is read and written as BERT's, and what is not implemented is refused by name."""

import dataclasses
import json

import pytest
from conftest import TOY_CONFIG

from minibert.config import BertConfig
from minibert.errors import ArgumentParser, InputError
from minibert.files import write_json
from minibert.recipes import Recipe
from minibert.run_config import RunConfig


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TOY_CONFIG.to_dict() | {"architectures": ["BertForMaskedLM"]}))
    assert BertConfig.read(path) == TOY_CONFIG


def test_what_an_old_config_leaves_out_is_as_in_bert():
    sizes = {"vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 3, "intermediate_size": 37}
    config = BertConfig.from_dict(sizes)
    assert (config.layer_norm_eps, config.max_position_embeddings) == (1e-12, 512)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("hidden_act", "gelu_new"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("model_type", "roberta"),
        ("tie_word_embeddings", False),
        ("pruned_heads", {"1": [0]}),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(key, value):
    with pytest.raises(InputError, match=f"{key} is .* only .* is implemented here"):
        BertConfig.from_dict(TOY_CONFIG.to_dict() | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", 25),
        ("vocab_size", "99"),
        ("num_hidden_layers", True),
        ("hidden_dropout_prob", 1.0),
        ("layer_norm_eps", None),
        ("initializer_range", float("nan")),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_name(tmp_path, key, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TOY_CONFIG.to_dict() | {key: value}))
    with pytest.raises(InputError, match=f"config.json: {key}"):
        BertConfig.read(path)


def test_missing_sizes_are_all_named():
    with pytest.raises(InputError, match="num_hidden_layers, num_attention_heads missing"):
        BertConfig.from_dict({"vocab_size": 9, "hidden_size": 24, "intermediate_size": 37})


def parsed(*arguments: str) -> RunConfig:
    parser = ArgumentParser()
    RunConfig.add_flags(parser)
    return RunConfig.from_flags(vars(parser.parse_args(arguments)))


def test_the_published_settings_are_the_defaults():
    run = parsed("--teacher", "t", "--data", "d", "--out", "o")
    assert (run.mlm_weight, run.hidden_weight, run.attention_weight, run.output_weight) == (
        1,
        3,
        3,
        5,
    )
    assert (run.steps, run.warmup_steps, run.batch_size, run.max_length) == (
        100_000,
        5_000,
        192,
        256,
    )
    assert (run.learning_rate, run.weight_decay, run.temperature) == (5e-4, 1e-4, 1.0)


def test_a_shorter_run_keeps_the_share_of_warm_up():
    run = parsed("--teacher", "t", "--data", "d", "--out", "o", "--steps", "300")
    assert run.warmup_steps == 15
    run = parsed(
        "--teacher", "t", "--data", "d", "--out", "o", "--steps", "300", "--warmup-steps", "0"
    )
    assert run.warmup_steps == 0


def test_a_run_is_written_and_read_again(tmp_path):
    run = parsed("--teacher", "t", "--data", "d", "--out", "o", "--teacher-layers", "0,2,5")
    (tmp_path / "config.json").write_text(json.dumps({"run": run.to_dict()}))
    assert RunConfig.read(tmp_path / "config.json") == run


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ([], "no settings of a run"),
        ({"recipe": "tinybert"}, "recipe: 'tinybert' is no file and none of compactbiobert, "),
        ({"recipe": ["mlm", "m"]}, "recipe: 'mlm,m' is no file"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"steps": 2.5}, "steps: '2.5' is not a whole number from 1 up"),
        ({"steps": {"a": 1}}, "steps: .* is not a whole number"),
        ({"teacher_layers": ["a"]}, "teacher_layers: 'a' is not a list of layers"),
    ],
)
def test_a_recorded_run_is_read_by_the_rules_of_flags(tmp_path, settings, complaint):
    (tmp_path / "config.json").write_text(json.dumps({"run": settings}))
    with pytest.raises(InputError, match=f"config.json: {complaint}"):
        RunConfig.read(tmp_path / "config.json")


def test_every_number_of_a_recipe_is_a_setting_of_a_run():
    run = {entry.name for entry in dataclasses.fields(RunConfig)}
    recipe = {entry.name for entry in dataclasses.fields(Recipe) if entry.type in (int, float)}
    assert recipe and recipe <= run


def test_a_restart_of_a_resumed_run_needs_no_more_than_its_folder(toy_run):
    """torchrun starts the same command again: `--out RUN --resume`, no corpus and no teacher."""
    toy_run.out.mkdir()
    write_json(toy_run.out / "config.json", {"run": toy_run.to_dict()})
    given = {"out": toy_run.out, "resume": True}
    run = RunConfig.from_flags(given, restarted=True)
    assert run == RunConfig.from_flags(given)
    assert (run.data, run.resume) == (toy_run.data, True)


@pytest.mark.parametrize(
    "changes", [{"hidden_weight": 3.0}, {"output_weight": 1.0}, {"teacher_layers": (1, 3)}], ids=str
)
def test_without_a_teacher_there_is_nothing_to_follow(tmp_path, changes):
    with pytest.raises(InputError, match="has no teacher to follow"):
        RunConfig(recipe="mlm", model=tmp_path, data=tmp_path, out=tmp_path, **changes).resolved()
