"""At BioBERT's true size the whole way holds: convert, prepare real PubMed, two updates.

The weights are random, so what is learnt says nothing; that it is the same as before does.
"""

import dataclasses
import json
import math
import shutil

import pytest
import torch

import convert_weights
import train
from minibert.config import BIOBERT
from minibert.folder import load_model, read_tensors, save_model
from minibert.model import BertForMaskedLM
from minibert.prepare import prepare
from minibert.recipes import RECIPES
from minibert.run_config import RunConfig
from minibert.training.checkpoint import checkpoints
from minibert.training.runlog import read_metrics

TERMS = ("loss", "mlm_loss", "hidden_loss", "attention_loss", "output_loss")
LAYERS = {
    "compactbiobert": [1, 3, 5, 7, 9, 11],
    "distilbiobert": [0, 2, 4, 6, 8, 10],
    "tinybiobert": [2, 5, 8, 11],
    "mlm": None,
}
PARAMETERS = {  # of the result, without pooler
    "compactbiobert": 65_813_572,
    "distilbiobert": 65_813_572,
    "tinybiobert": 13_903_756,
    "mlm": 108_340_804,
}
# TERMS at each of 2 updates, without those that the recipe has not; float32, dropout 0.
GOLDEN = {
    "compactbiobert": [
        (15.3922, 10.4085, 1.43319, 0.000424391, 0.136555),
        (16.1656, 10.2858, 1.78341, 0.000430519, 0.105655),
    ],
    "distilbiobert": [
        (21.915, 10.4817, 0.366495, 0.117026),
        (21.605, 10.0896, 0.587839, 0.167594),
    ],
    "tinybiobert": [
        (15.9934, 10.3328, 5.65506, 3.91876e-06, 10.3384),
        (15.3417, 10.2672, 5.03361, 3.65016e-06, 10.3081),
    ],
    "mlm": [
        (10.455, 10.455),
        (10.034, 10.034),
    ],
}


@pytest.fixture(scope="module")
def world(shared_data, tmp_path_factory):
    """A folder with teacher/, random weights that came by Hugging Face's layout, and corpus/."""
    world = tmp_path_factory.mktemp("biobert")
    config = dataclasses.replace(BIOBERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    save_model(world / "random", BertForMaskedLM(config), shared_data / "vocab")
    convert_weights.to_hugging_face(world / "random", world / "hf")
    convert_weights.from_hugging_face(world / "hf", world / "teacher")
    meta = prepare(
        [shared_data / "pubmed-xml" / "pubmed21n1298.xml.gz"],
        shared_data / "vocab" / "vocab.txt",
        world / "corpus",
    )
    assert meta["documents"] == 18_440
    assert meta["unk_tokens"] / meta["tokens"] < 0.001
    yield world
    shutil.rmtree(world)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_updates_of_every_recipe(world, tmp_path, recipe):
    source = "model" if recipe == "mlm" else "teacher"
    given = {"recipe": recipe, source: world / "teacher", "data": world / "corpus"}
    given |= {"out": tmp_path / "run", "steps": 2, "warmup_steps": 0, "batch_size": 4}
    given |= {"micro_batch_tokens": 512, "eval_documents": 4, "log_every": 1, "device": "cpu"}
    run = RunConfig.from_flags(given)
    train.train(run)

    updates = [line for line in read_metrics(run.out / "metrics.jsonl") if "loss" in line]
    for line in updates:
        figures = [value for value in line.values() if not isinstance(value, list)]
        figures += line.get("hidden_loss_per_layer", []) + line.get("attention_loss_per_layer", [])
        assert all(math.isfinite(value) for value in figures)
    # Every parameter had a gradient: AdamW's second moment remembers it.
    (newest,) = checkpoints(run.out)
    moments, _ = read_tensors(newest / "optimizer.safetensors")
    second = {name: tensor for name, tensor in moments.items() if name.endswith(".exp_avg_sq")}
    assert all(tensor.any() for name, tensor in second.items() if "key.bias" not in name)
    result = load_model(run.out / ("model" if recipe == "mlm" else "student"))
    projection = [name for name in second if name.startswith("projection.")]
    assert len(projection) == (2 if recipe == "tinybiobert" else 0)
    assert len(second) == len(list(result.parameters())) + len(projection)
    assert sum(parameter.numel() for parameter in result.parameters()) == PARAMETERS[recipe]
    recorded = json.loads((run.out / "config.json").read_text())["run"]
    assert recorded["teacher_layers"] == LAYERS[recipe]
    shutil.rmtree(run.out)  # over a gigabyte

    curve = [tuple(line[term] for term in TERMS if term in line) for line in updates]
    assert curve == [pytest.approx(row, rel=1e-3) for row in GOLDEN[recipe]]
