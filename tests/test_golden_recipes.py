"""On a really trained BERT of 12 layers every recipe runs, with the losses that it had before.

rxnfp (hidden 256, 4 heads) is the teacher, dropout off; the corpus is its own reactions.
"""

import dataclasses

import pytest
import torch

import train
from convert_weights import from_hugging_face
from minibert.folder import load_model, save_model
from minibert.prepare import prepare
from minibert.recipes import RECIPES
from minibert.run_config import RunConfig
from minibert.training.runlog import read_metrics

TERMS = ("loss", "mlm_loss", "hidden_loss", "attention_loss", "output_loss")
LAYERS = {"compactbiobert": 6, "distilbiobert": 6, "tinybiobert": 4, "mlm": 12}

# TERMS at each of 3 updates, without those that the recipe has not; from this code, float32.
GOLDEN = {
    "compactbiobert": [
        (6.92488, 0.660878, 1.35161, 0.0169363, 0.431672),
        (7.75389, 0.861811, 1.34646, 0.0168969, 0.5604),
        (9.3364, 1.20067, 1.38181, 0.0173865, 0.787632),
    ],
    "distilbiobert": [
        (17.3876, 0.887414, 0.475201, 3.02752),
        (13.7036, 0.844663, 0.428114, 2.31724),
        (12.6546, 1.06536, 0.439263, 2.01693),
    ],
    "tinybiobert": [
        (12.2852, 6.47851, 5.79949, 0.00693056, 6.47878),
        (10.6709, 5.32622, 5.37503, 0.00711387, 5.28876),
        (9.97411, 4.87766, 5.12788, 0.00715904, 4.83907),
    ],
    "mlm": [
        (0.28489, 0.28489),
        (0.434988, 0.434988),
        (0.621724, 0.621724),
    ],
}


@pytest.fixture(scope="module")
def world(shared_data, tmp_path_factory):
    """A folder with teacher/, without dropout, and corpus/."""
    world = tmp_path_factory.mktemp("rxnfp")
    from_hugging_face(shared_data / "rxnfp", world / "converted")
    teacher = load_model(world / "converted")
    teacher.config = dataclasses.replace(
        teacher.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    save_model(world / "teacher", teacher, tokenizer_from=world / "converted")
    reactions = shared_data / "rxnfp" / "uspto50k_eval_test_reactions.txt"
    prepare([reactions], shared_data / "rxnfp" / "tokenizer.json", world / "corpus")
    return world


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_three_updates(world, tmp_path, recipe):
    source = {"model" if recipe == "mlm" else "teacher": world / "teacher"}
    run = RunConfig(
        recipe=recipe,
        data=world / "corpus",
        out=tmp_path / "run",
        steps=3,
        warmup_steps=0,
        batch_size=8,
        eval_documents=4,
        log_every=1,
        device="cpu",
        **source,
    ).resolved()
    train.train(run)
    lines = [line for line in read_metrics(run.out / "metrics.jsonl") if "loss" in line]
    curve = [tuple(line[term] for term in TERMS if term in line) for line in lines]
    result = load_model(run.out / ("model" if recipe == "mlm" else "student"))
    assert result.config.num_hidden_layers == LAYERS[recipe]
    assert all(torch.isfinite(part).all() for part in result.parameters())
    assert curve == [pytest.approx(row, rel=1e-3) for row in GOLDEN[recipe]]
