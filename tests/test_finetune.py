"""Fine-tuning learns, can be stopped and gone on with, and refuses what is wrong in one line."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
from conftest import SPECIAL_TOKENS, TOY_CONFIG
from finetune_toys import DATA, SPLITS, toy_settings
from safetensors.torch import load_file

from convert_weights import to_hugging_face
from minibert import finetune
from minibert.errors import InputError, run_command
from minibert.finetune import fine_tune, over_seeds
from minibert.folder import load_model, save_model
from minibert.heads import HEADS, load_fine_tuned
from minibert.model import BertModel
from minibert.ops import plain
from minibert.tasks.task import Feature, collate, shuffled
from minibert.training.optimizer import learning_rate_at

TASKS = sorted(DATA)
PREDICTIONS = {"ner": "tsv", "relation": "jsonl", "qa": "json"}


def metrics(run) -> list[dict]:
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run.out / "model" / "model.safetensors")


def assert_same_result(one, other) -> None:
    assert metrics(one) == metrics(other)
    expected = weights(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, expected[name]), name
    scores = [json.loads((run.out / "scores.json").read_text()) for run in (one, other)]
    assert scores[0]["devel"] == scores[1]["devel"] and scores[0]["test"] == scores[1]["test"]
    for path in one.out.glob("predictions_*"):
        assert path.read_bytes() == (other.out / path.name).read_bytes()


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=[pytest.mark.slow] * (task == "qa")) for task in TASKS]
)
def test_a_task_is_learnt(task, toy_world, tmp_path):
    """The rule of the toy data is found, and test confirms it; chance would stay below a half."""
    run = toy_settings(task, toy_world, tmp_path, epochs=12)
    scores = fine_tune(run)
    assert scores["test"]["mrr" if task == "qa" else "f1"] > 0.8
    assert {path.name for path in run.out.iterdir()} == {
        "config.json", "lock", "metrics.jsonl", "model", "scores.json",
        f"step_{scores['steps']:06d}",
        *(f"predictions_{split}.{PREDICTIONS[task]}" for split in ("devel", "test")),
    }  # fmt: skip
    lines = metrics(run)
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert json.loads((run.out / "scores.json").read_text()) == scores


@pytest.mark.parametrize(
    ("task", "dies_in", "calls"),
    [
        ("ner", "clip_grad_norm_", 30),  # in the middle of an epoch
        ("qa", "save_checkpoint", 2),  # the best model is saved, the epoch is not
        ("relation", "save_fine_tuned", 1),  # in the first epoch
        ("relation", "conclude", 1),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    task, dies_in, calls, toy_world, tmp_path, monkeypatch
):
    undisturbed = toy_settings(task, toy_world, tmp_path, out=tmp_path / "undisturbed")
    fine_tune(undisturbed)
    run = toy_settings(task, toy_world, tmp_path)
    with monkeypatch.context() as patched:
        original = getattr(finetune, dies_in)

        def dying(*arguments, **options):
            nonlocal calls
            calls -= 1
            if calls == 0:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        patched.setattr(finetune, dies_in, dying)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(run)
    fine_tune(dataclasses.replace(run, resume=True))
    assert_same_result(run, undisturbed)


def test_the_best_epoch_is_kept(toy_world, tmp_path, monkeypatch):
    """Not the last: the model folder is that of the first epoch with the highest figure."""
    figures = iter([0.2, 0.6, 0.6, 0.4])
    models = []

    def scores(self, split, predictions):
        return {"f1": next(figures, 0.5)}

    def saving(run_folder, state, model, optimizer, keep):
        models.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    monkeypatch.setattr(finetune.Ner, "scores", scores)
    monkeypatch.setattr(finetune, "save_checkpoint", saving)
    run = toy_settings("ner", toy_world, tmp_path, epochs=4)
    assert fine_tune(run)["best_epoch"] == 2
    kept = weights(run)
    assert all(torch.equal(kept[name], models[1][name]) for name in kept)
    assert not torch.equal(kept["classifier.weight"], models[3]["classifier.weight"])


def test_a_finished_run_is_not_run_again(toy_world, tmp_path, monkeypatch):
    run = toy_settings("ner", toy_world, tmp_path, epochs=1)
    scores = fine_tune(run)
    monkeypatch.setattr(finetune, "conclude", None)
    assert fine_tune(dataclasses.replace(run, resume=True)) == scores


def test_a_checkpoint_without_its_line_is_refused(toy_world, tmp_path, monkeypatch):
    """Which epoch was best stands in metrics.jsonl alone."""
    run = toy_settings("relation", toy_world, tmp_path, epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "conclude", lambda *arguments: None)
        fine_tune(run)
    (run.out / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics.jsonl: no line about update 13"):
        fine_tune(dataclasses.replace(run, resume=True))


def test_seeds_give_mean_and_deviation(toy_world, tmp_path):
    run = toy_settings("relation", toy_world, tmp_path, epochs=2, seed=4, resume=True)
    summary = over_seeds(run, 3)
    assert summary["seeds"] == [4, 5, 6]
    parts = [json.loads((run.out / f"seed_{n}/scores.json").read_text()) for n in (4, 5, 6)]
    values = torch.tensor([part["test"]["f1"] for part in parts], dtype=torch.float64)
    assert summary["test"]["f1"]["mean"] == pytest.approx(values.mean().item())
    assert summary["test"]["f1"]["standard_deviation"] == pytest.approx(values.std().item())
    heads = [
        load_file(run.out / f"seed_{n}/model/model.safetensors")["classifier.weight"]
        for n in (4, 5, 6)
    ]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])


def test_bfloat16_learns_the_same_in_short(toy_world, tmp_path):
    exact = toy_settings("relation", toy_world, tmp_path, epochs=2)
    rounded = dataclasses.replace(exact, dtype="bfloat16", out=tmp_path / "rounded")
    fine_tune(exact)
    fine_tune(rounded)
    losses = [metrics(run)[0]["loss"] for run in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert {tensor.dtype for tensor in weights(rounded).values()} == {torch.float32}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_begins_from_the_models_encoder(task, toy_world, tmp_path):
    """Under a head that differs from seed to seed."""
    teacher = load_model(toy_world / "teacher").state_dict()
    run = toy_settings(task, toy_world, tmp_path)
    (_, one, _), (_, other, _) = (
        finetune.load_task_and_model(dataclasses.replace(run, seed=seed)) for seed in (0, 1)
    )
    other = other.state_dict()
    for name, tensor in one.state_dict().items():
        if name in teacher:
            assert torch.equal(tensor, teacher[name]), name
        elif name.endswith("weight"):
            assert not torch.equal(tensor, other[name]), name
    assert {name for name in teacher if not name.startswith("head.")} < other.keys()


def test_a_bare_encoder_serves_as_well(toy_world, tmp_path):
    """The same encoder without its MLM head gives the same run, bit for bit."""
    teacher = load_model(toy_world / "teacher")
    encoder = BertModel(teacher.config)
    encoder.load_state_dict(
        {name: t for name, t in teacher.state_dict().items() if not name.startswith("head.")}
    )
    save_model(tmp_path / "encoder", encoder, tokenizer_from=toy_world)
    runs = [
        toy_settings("ner", toy_world, tmp_path, epochs=1, model=model, out=tmp_path / name)
        for name, model in (("a", toy_world / "teacher"), ("b", tmp_path / "encoder"))
    ]
    for run in runs:
        fine_tune(run)
    assert all(torch.equal(t, weights(runs[1])[name]) for name, t in weights(runs[0]).items())


def test_every_feature_has_its_turn_once_an_epoch():
    features = [Feature([number], [0], [0]) for number in range(23)]
    for epoch in range(3):
        batches = shuffled(features, 5, seed=7, epoch=epoch)
        assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
        assert sorted(f.input_ids[0] for batch in batches for f in batch) == list(range(23))
        assert batches == shuffled(features, 5, seed=7, epoch=epoch)
    assert shuffled(features, 5, 7, 0) != shuffled(features, 5, 7, 1)
    assert shuffled(features, 5, 7, 0) != shuffled(features, 5, 8, 0)


@pytest.mark.parametrize("task", TASKS)
def test_padding_changes_no_loss(task, toy_world, tmp_path):
    """The loss of a feature beside a longer one is its loss alone."""
    run = toy_settings(task, toy_world, tmp_path)
    loaded, model, tokenizer = finetune.load_task_and_model(run)
    by_length = sorted(loaded.features["train"], key=lambda feature: len(feature.input_ids))
    short, long = by_length[0], by_length[-1]
    assert len(short.input_ids) < len(long.input_ids)
    model.double().eval()

    def loss(*features) -> float:
        batch = collate(features, tokenizer.pad_id, torch.device("cpu"))
        logits = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
        ).item()

    assert loss(short, long) == pytest.approx(loss(short) + loss(long), rel=1e-9)


def test_every_update_has_its_rate_and_dropout(toy_world, tmp_path, monkeypatch):
    """A tenth of warm-up over all updates, one each batch; after devel dropout is on again."""
    asked, dropout = [], []
    forward = finetune.Relation.head.forward

    def rate(step, steps, warmup_steps, highest):
        asked.append((step, steps, warmup_steps, highest))
        return learning_rate_at(step, steps, warmup_steps, highest)

    def watched(self, *inputs, **options):
        if torch.is_grad_enabled():
            dropout.append(self.training)
        return forward(self, *inputs, **options)

    monkeypatch.setattr(finetune, "learning_rate_at", rate)
    monkeypatch.setattr(finetune.Relation.head, "forward", watched)
    fine_tune(toy_settings("relation", toy_world, tmp_path))
    updates = 3 * 13  # 61 texts in batches of 5
    assert asked[::2] == [(step, updates, 4, 3e-3) for step in range(updates)]  # of two groups
    assert dropout == [True] * updates


def test_heads_have_dropout_in_training_alone():
    """As Hugging Face's: before the classifier of tokens and texts, none before an answer's."""
    config = dataclasses.replace(TOY_CONFIG, hidden_dropout_prob=0.5)
    for head, has_dropout in zip(HEADS, (True, True, False), strict=True):
        model = head(config, 2)
        hidden = torch.randn(2, 7, config.hidden_size)
        for training in (True, False):
            model.train(training)
            one, other = (model.logits(hidden, torch.ones(2, 7), plain) for _ in range(2))
            same = torch.equal(one, other)
            assert same == (not (training and has_dropout))


@pytest.fixture
def refused(toy_world, tmp_path, monkeypatch, capsys):
    """Run the command with good flags, changed as told, and return its one line of complaint."""
    (tmp_path / "data").exists() or DATA["ner"](tmp_path / "data")

    def run(*more: str, **changes) -> str:
        flags = {
            "model": toy_world / "teacher", "data": tmp_path / "data", "out": tmp_path / "run",
            "epochs": 1, "max_length": 19, "device": "cpu",
        } | changes  # fmt: skip
        arguments = ["finetune", flags.pop("task", "ner"), *more]
        for name, value in flags.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            status = run_command(finetune.main)
        except SystemExit as leaving:
            status = leaving.code
        printed = capsys.readouterr()
        assert status == 2
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        return printed.err

    yield run
    assert not list(tmp_path.rglob("*.partial"))


def test_wrong_flags(refused, tmp_path):
    assert "invalid choice: 'pos'" in refused(task="pos")
    assert "not a whole number from 1 up" in refused(epochs=0)
    assert "not a number above 0" in refused(learning_rate=0)
    assert "--max-length 30: " in refused(max_length=30)
    assert not (tmp_path / "run").exists()


def test_wrong_data(refused, tmp_path):
    assert "nowhere: no such folder" in refused(data=tmp_path / "nowhere")
    assert "train.json: no such file; expected train.json" in refused(task="qa")
    (tmp_path / "data" / "devel.tsv").rename(tmp_path / "aside")
    assert "devel.tsv: no such file; expected devel.tsv or dev.tsv" in refused()
    (tmp_path / "aside").rename(tmp_path / "data" / "dev.tsv")
    shutil.copy(tmp_path / "data" / "dev.tsv", tmp_path / "data" / "devel.tsv")
    assert "devel.tsv and dev.tsv; expected one of them" in refused()
    assert not (tmp_path / "run").exists()


def test_wrong_models(refused, toy_world, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(toy_world / "teacher", model)
    (model / "vocab.txt").unlink()
    assert "neither tokenizer.json nor vocab.txt in this folder" in refused(model=model)
    tokens = [*SPECIAL_TOKENS, *(f"w{n:02}" for n in range(TOY_CONFIG.vocab_size - 4))]
    (model / "vocab.txt").write_text("\n".join(tokens) + "\n")
    assert "100 tokens; vocab_size in config.json is 99" in refused(model=model)
    assert "nowhere: no such" in refused(model=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_a_fine_tuned_model_is_not_fine_tuned_again(refused, toy_world, tmp_path):
    run = toy_settings("relation", toy_world, tmp_path / "first", epochs=1)
    fine_tune(run)
    complaint = refused(model=run.out / "model")
    assert "fine-tuned already" in complaint


def test_a_hugging_face_folder_serves_as_well(toy_world, tmp_path):
    """The folder that --to-hf makes of the model gives the same run, bit for bit."""
    theirs = tmp_path / "theirs"
    to_hugging_face(toy_world / "teacher", theirs)
    models = (toy_world / "teacher", theirs)
    runs = [
        toy_settings("ner", toy_world, tmp_path, epochs=1, model=model, out=tmp_path / f"run_{i}")
        for i, model in enumerate(models)
    ]
    for run in runs:
        fine_tune(run)
    assert all(torch.equal(t, weights(runs[1])[name]) for name, t in weights(runs[0]).items())


def test_an_epoch_that_was_lost_leaves_no_model(toy_world, tmp_path, monkeypatch):
    """It was the best, its checkpoint was not written, and gone through again it is not the best:
    so it can be on a GPU, where a second time is not the same to the last bit."""
    figures = iter([0.5, 0.9, 0.3, 0.0, 0.0])
    monkeypatch.setattr(finetune.Ner, "scores", lambda *_: {"f1": next(figures)})
    run = toy_settings("ner", toy_world, tmp_path, epochs=2)
    first = []
    saving = finetune.save_checkpoint

    def dying(folder, state, model, optimizer, keep):
        if first:
            raise KeyboardInterrupt
        first.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        saving(folder, state, model, optimizer, keep)

    with monkeypatch.context() as patched:
        patched.setattr(finetune, "save_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(run)
    assert fine_tune(dataclasses.replace(run, resume=True))["best_epoch"] == 1
    assert all(torch.equal(tensor, first[0][name]) for name, tensor in weights(run).items())
    assert not list(run.out.glob("best_epoch_*"))


def test_from_python_too_the_task_decides(toy_world, tmp_path):
    paths = {name: tmp_path for name in ("model", "data", "out")}
    settings = {task: finetune.FineTuning(task=task, **paths) for task in TASKS}
    assert {task: run.learning_rate for task, run in settings.items()} == finetune.LEARNING_RATE
    assert {task: run.max_length for task, run in settings.items()} == finetune.MAX_LENGTH


def test_a_run_is_not_overwritten_and_not_mixed(refused, toy_world, tmp_path):
    run = toy_settings("ner", toy_world, tmp_path, epochs=1)
    fine_tune(run)
    assert "holds a run; --resume goes on with it" in refused()
    same = {"batch_size": run.batch_size, "learning_rate": run.learning_rate}
    complaint = refused("--resume", **(same | {"epochs": 2, "seed": 1}))
    assert "--resume with another --epochs and --seed than the run began with" in complaint
    assert "holds a run of one seed" in refused("--seeds", "2")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert "is not empty and no run" in refused(out=tmp_path / "other")


def test_a_loss_that_is_no_number_ends_the_run(refused):
    complaint = refused(learning_rate=1e18, epochs=9)
    assert "the loss is nan; a smaller --learning-rate may help" in complaint


def test_sizes_of_the_toy_data(toy_world, tmp_path):
    """The promise of the toys: as many examples as they say."""
    for task in TASKS:
        (tmp_path / task).mkdir()
        run = toy_settings(task, toy_world, tmp_path / task)
        loaded, _, _ = finetune.load_task_and_model(run)
        assert all(len(loaded.features[split]) >= count for split, count in SPLITS.items())


def test_the_model_that_was_saved_is_the_one_that_is_loaded(toy_world, tmp_path):
    run = toy_settings("qa", toy_world, tmp_path, epochs=1)
    fine_tune(run)
    model = load_fine_tuned(run.out / "model")
    assert all(torch.equal(t, weights(run)[name]) for name, t in model.state_dict().items())
    assert not model.training
