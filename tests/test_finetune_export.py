"""A fine-tuned model, exported, gives the same logits in transformers."""

import json
import sys

import pytest
import torch
from finetune_toys import toy_settings
from safetensors.torch import load_file

import convert_weights
from minibert.errors import InputError, run_command
from minibert.finetune import fine_tune, load_task_and_model
from minibert.folder import read_folder
from minibert.heads import load_fine_tuned, read_fine_tuned
from minibert.ops import fused
from minibert.tasks.task import collate

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

CLASSES = {
    "ner": "AutoModelForTokenClassification",
    "relation": "AutoModelForSequenceClassification",
    "qa": "AutoModelForQuestionAnswering",
}


@pytest.fixture(scope="module", params=sorted(CLASSES))
def exported(request, toy_world, tmp_path_factory):
    """A task, its run and the Hugging Face folder made of its model."""
    folder = tmp_path_factory.mktemp(request.param)
    run = toy_settings(request.param, toy_world, folder, epochs=1)
    fine_tune(run)
    convert_weights.to_hugging_face(run.out / "model", folder / "theirs")
    return run, folder / "theirs"


def theirs(run, folder):
    model, report = getattr(transformers, CLASSES[run.task]).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def a_batch(run):
    task, _, tokenizer = load_task_and_model(run)
    return collate(task.features["test"][:7], tokenizer.pad_id, torch.device("cpu"))


def test_the_logits_are_the_same(exported):
    run, folder = exported
    batch, ours = a_batch(run), load_fine_tuned(run.out / "model").double()
    assert batch.attention_mask.sum() < batch.attention_mask.numel()  # some of it is padding
    inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    with torch.no_grad():
        expected = theirs(run, folder).double()(*inputs)
        found = ours(*inputs)  # (B, P, C)
    real = batch.attention_mask.bool()
    if run.task == "ner":
        torch.testing.assert_close(found[real], expected.logits[real], rtol=0, atol=1e-10)
    elif run.task == "relation":
        torch.testing.assert_close(found[:, 0], expected.logits, rtol=0, atol=1e-10)
    else:
        for row, logits in enumerate((expected.start_logits, expected.end_logits)):
            torch.testing.assert_close(found[:, row][real], logits[real], rtol=0, atol=1e-10)
            assert (found[:, row][~real] == -torch.inf).all()


def test_fused_operations_give_the_same_logits_and_gradients(exported):
    """What training runs, less its dropout, against plain in float64."""
    run, _ = exported
    batch, model = a_batch(run), load_fine_tuned(run.out / "model").double().eval()
    inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    gradients = []
    for options in ({}, {"ops": fused}):
        model.zero_grad()
        logits = model(*inputs, **options)
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100
        ).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-8, atol=1e-10)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())


def test_every_tensor_is_there_bit_for_bit(exported):
    run, folder = exported
    ours = load_file(run.out / "model" / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert len(found) == len(ours)
    assert found.keys() == theirs(run, folder).state_dict().keys() - {
        "bert.embeddings.position_ids"
    }
    assert sum(t.double().sum() for t in found.values()) == pytest.approx(
        sum(t.double().sum().item() for t in ours.values())
    )


def test_the_labels_are_named(exported):
    run, folder = exported
    config = transformers.AutoConfig.from_pretrained(folder)
    if run.task == "qa":
        assert config.num_labels == 2
        return
    task, _, _ = load_task_and_model(run)
    assert config.id2label == dict(enumerate(task.labels))
    assert config.label2id == {label: number for number, label in enumerate(task.labels)}
    single = "single_label_classification"
    assert config.problem_type == (single if run.task == "relation" else None)


def test_their_tokenizer_and_pipeline_open_the_folder(exported):
    """As a user would: text in, our prediction out."""
    run, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w11 w40 w41", add_special_tokens=True)["input_ids"]
    _, _, our_tokenizer = load_task_and_model(run)
    inside = our_tokenizer.encode_batch(["w11 w40 w41"])[0]
    assert ids == [our_tokenizer.cls_id, *inside, our_tokenizer.sep_id]


def test_what_is_exported_is_said(exported, tmp_path, monkeypatch, capsys):
    run, _ = exported
    monkeypatch.setattr(
        sys, "argv", ["convert_weights.py", "--to-hf", str(run.out / "model"), str(tmp_path / "o")]
    )
    assert run_command(convert_weights.main) == 0
    assert f"transformers.{CLASSES[run.task]}.from_pretrained" in capsys.readouterr().out


def test_the_folder_of_a_run_is_told_where_its_model_is(exported, tmp_path):
    run, _ = exported
    with pytest.raises(InputError, match=r"the folder of a run; its model is .*run/model"):
        convert_weights.to_hugging_face(run.out, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_folder_is_refused(exported, tmp_path):
    run, _ = exported
    config = json.loads((run.out / "model" / "config.json").read_text())
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in (run.out / "model").iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"layers\.3\.\S+ has shape .*; config.json calls for no"):
        read_fine_tuned(damaged)
    (damaged / "config.json").write_text(json.dumps(config | {"id2label": []}))
    with pytest.raises(InputError, match="id2label names no labels"):
        read_fine_tuned(damaged)


def test_a_fine_tuned_model_is_no_teacher(exported):
    """Nor can masks be filled with it: said in one line, not by the names of its tensors."""
    run, _ = exported
    with pytest.raises(InputError, match="fine-tuned; expected an encoder or a masked-language"):
        read_folder(run.out / "model")
