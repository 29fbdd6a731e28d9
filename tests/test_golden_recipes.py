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
        (9.30151, 0.932547, 1.40942, 0.0180366, 0.817317),
        (8.85424, 0.948345, 1.45393, 0.0183127, 0.697836),
        (6.77705, 0.532772, 1.37788, 0.0170973, 0.411868),
    ],
    "distilbiobert": [
        (22.8243, 1.16418, 0.479984, 4.0032),
        (14.3088, 0.874062, 0.442316, 2.42368),
        (13.2934, 0.697571, 0.42567, 2.29452),
    ],
    "tinybiobert": [
        (12.3003, 6.51996, 5.7868, 0.00702627, 6.50652),
        (10.6516, 5.31949, 5.34262, 0.00704072, 5.30198),
        (9.9917, 4.86445, 5.12437, 0.00705317, 4.86027),
    ],
    "mlm": [
        (0.22123, 0.22123),
        (0.377977, 0.377977),
        (0.155232, 0.155232),
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
