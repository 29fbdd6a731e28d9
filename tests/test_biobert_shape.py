"""At BioBERT's true size the whole way holds: convert, prepare real PubMed, three updates."""

import json
import math

import pytest
import torch
from conftest import BIOBERT

import convert_weights
import train
from minibert.config import RunConfig
from minibert.folder import load_model, read_tensors, save_model
from minibert.model import BertForMaskedLM
from minibert.prepare import prepare
from minibert.training.checkpoint import checkpoints
from minibert.training.runlog import read_metrics


@pytest.mark.slow
def test_three_updates_of_compactbiobert(shared_data, tmp_path):
    # Seeded random weights in the Hugging Face layout, converted.
    torch.manual_seed(0)
    save_model(tmp_path / "random", BertForMaskedLM(BIOBERT), shared_data / "vocab")
    convert_weights.to_hugging_face(tmp_path / "random", tmp_path / "hf")
    convert_weights.from_hugging_face(tmp_path / "hf", tmp_path / "teacher")
    meta = prepare(
        [shared_data / "pubmed-xml" / "pubmed21n1298.xml.gz"],
        shared_data / "vocab" / "vocab.txt",
        tmp_path / "corpus",
    )
    assert meta["documents"] == 18_445
    assert meta["unk_tokens"] / meta["tokens"] < 0.001

    run = RunConfig(teacher=tmp_path / "teacher", data=tmp_path / "corpus", out=tmp_path / "run")
    settings = {"steps": 3, "batch_size": 8, "eval_documents": 4, "log_every": 1}
    train.train(RunConfig.from_flags({**vars(run), **settings, "device": "cpu"}))

    updates = [line for line in read_metrics(run.out / "metrics.jsonl") if "loss" in line]
    assert len(updates) == 3
    for line in updates:
        figures = [value for value in line.values() if not isinstance(value, list)]
        figures += line["hidden_loss_per_layer"] + line["attention_loss_per_layer"]
        assert all(math.isfinite(value) for value in figures)
    # Every parameter had a gradient: AdamW's second moment remembers it.
    moments, _ = read_tensors(checkpoints(run.out)[-1] / "optimizer.safetensors")
    second = {name: tensor for name, tensor in moments.items() if name.endswith(".exp_avg_sq")}
    student = load_model(run.out / "student")
    assert len(second) == len(list(student.parameters()))
    assert all(tensor.any() for name, tensor in second.items() if "key.bias" not in name)
    assert sum(parameter.numel() for parameter in student.parameters()) == 65_813_572
    config = json.loads((run.out / "config.json").read_text())["run"]
    assert config["teacher_layers"] == [1, 3, 5, 7, 9, 11]
