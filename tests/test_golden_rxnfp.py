"""A really trained BERT, converted, computes what transformers computed from it: stored figures.

Only real positions are compared. The network was never trained on padding, where rounding grows:
there the stored logits are 4e-4 off a float64 run, at real positions 7e-6.
"""

import pytest
import torch
from safetensors.torch import load_file

from convert_weights import from_hugging_face
from minibert.folder import load_model
from minibert.ops.plain import attention_scores

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden(shared_data) -> dict[str, torch.Tensor]:
    """What transformers gave for three reactions, padded to 105 tokens, with two masks in each."""
    return load_file(shared_data / "rxnfp" / "golden_hf.safetensors")


@pytest.fixture(scope="module")
def model(shared_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("rxnfp") / "model"
    from_hugging_face(shared_data / "rxnfp", out)
    return load_model(out)


@pytest.fixture(scope="module")
def output(model, golden):
    layers = range(model.config.num_hidden_layers)
    with torch.no_grad():
        return model(golden["input_ids"], golden["attention_mask"], keep=layers)


def assert_close(found: torch.Tensor, expected: torch.Tensor, golden: dict) -> None:
    """found, expected (B, S, ...): equal to 1e-4 wherever the position is a real one."""
    real = golden["attention_mask"].bool()  # (B, S)
    assert found.shape == expected.shape
    assert (found[real] - expected[real]).abs().max() < TOLERANCE


def test_hidden_states(output, golden):
    ours = (output.embedding_output, *output.hidden_states)
    assert len(ours) == len(golden["hidden_states"]) == 13
    for found, expected in zip(ours, golden["hidden_states"], strict=True):
        assert_close(found, expected, golden)


def test_attention_maps(output, golden):
    """Of real queries, over all keys: those of padding are exact zeros in both."""
    assert len(golden["attentions"]) == 12
    for layer, expected in enumerate(golden["attentions"]):  # (B, N, S, S)
        query, key = output.queries[layer], output.keys[layer]
        maps = attention_scores(query, key, golden["attention_mask"]).softmax(dim=-1)
        assert_close(maps.transpose(1, 2), expected.transpose(1, 2), golden)


def test_prediction_logits(model, output, golden):
    expected = golden["prediction_logits"]  # (B, S, V)
    assert_close(model.logits(output.head_output).view(expected.shape), expected, golden)
