"""The model computes what an independent implementation computes, layer by layer."""

import dataclasses

import pytest
import torch
from conftest import TOY_CONFIG
from torch import nn

from minibert.config import BIOBERT
from minibert.model import BertForMaskedLM, EncoderLayer
from minibert.ops import plain

B, S = 5, 13
H, N = TOY_CONFIG.hidden_size, TOY_CONFIG.num_attention_heads


def torch_twin(layer: EncoderLayer) -> nn.TransformerEncoderLayer:
    """torch's own post-norm layer with the same weights."""
    twin = nn.TransformerEncoderLayer(
        H,
        N,
        TOY_CONFIG.intermediate_size,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=1e-12,
        batch_first=True,
        norm_first=False,
    ).double()
    three = (layer.query, layer.key, layer.value)
    twin.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([linear.weight for linear in three]),
            "self_attn.in_proj_bias": torch.cat([linear.bias for linear in three]),
            "self_attn.out_proj.weight": layer.attention_output.weight,
            "self_attn.out_proj.bias": layer.attention_output.bias,
            "linear1.weight": layer.intermediate.weight,
            "linear1.bias": layer.intermediate.bias,
            "linear2.weight": layer.output.weight,
            "linear2.bias": layer.output.bias,
            "norm1.weight": layer.attention_layer_norm.weight,
            "norm1.bias": layer.attention_layer_norm.bias,
            "norm2.weight": layer.output_layer_norm.weight,
            "norm2.bias": layer.output_layer_norm.bias,
        }
    )
    return twin


@pytest.fixture
def model() -> BertForMaskedLM:
    """A toy model in float64, in which every parameter differs from its simple start."""
    torch.manual_seed(1)
    model = BertForMaskedLM(TOY_CONFIG).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask (B, S) of unequal lengths."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(0, TOY_CONFIG.vocab_size, (B, S), generator=generator)
    lengths = torch.tensor([13, 1, 7, 12, 4])
    return input_ids, (torch.arange(S) < lengths[:, None]).long()


def test_every_layer_equals_torchs(model, batch):
    input_ids, attention_mask = batch
    output = model(input_ids, attention_mask)
    hidden_state = output.embedding_output
    for layer, ours in zip(model.layers, output.hidden_states, strict=True):
        padding = attention_mask == 0
        hidden_state = torch_twin(layer)(hidden_state, src_key_padding_mask=padding)
        real = attention_mask.bool()
        torch.testing.assert_close(ours[real], hidden_state[real], rtol=1e-9, atol=1e-9)
        hidden_state = ours


def test_gradients_of_a_layer_equal_torchs(model, batch):
    _, attention_mask = batch
    hidden_state = torch.randn(B, S, H, dtype=torch.float64)
    twin, layer = torch_twin(model.layers[2]), model.layers[2]
    weight = torch.randn(B, S, H, dtype=torch.float64) * attention_mask[..., None]
    (layer(hidden_state, attention_mask)[0] * weight).sum().backward()
    (twin(hidden_state, src_key_padding_mask=attention_mask == 0) * weight).sum().backward()
    three = torch.cat([linear.weight.grad for linear in (layer.query, layer.key, layer.value)])
    torch.testing.assert_close(three, twin.self_attn.in_proj_weight.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(layer.output.weight.grad, twin.linear2.weight.grad)
    torch.testing.assert_close(
        layer.attention_layer_norm.weight.grad, twin.norm1.weight.grad, rtol=1e-8, atol=1e-10
    )


def test_embeddings_are_a_normalised_sum(model, batch):
    input_ids, _ = batch
    token_type_ids = (torch.arange(B * S).view(B, S) % 3 == 0).long()
    parts = model.embeddings
    total = (
        parts.word_embeddings.weight[input_ids]
        + parts.position_embeddings.weight[torch.arange(S)]
        + parts.token_type_embeddings.weight[token_type_ids]
    )
    centred = total - total.mean(-1, keepdim=True)
    normal = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
    expected = normal * parts.layer_norm.weight + parts.layer_norm.bias
    embeddings, table = parts(input_ids, token_type_ids)
    torch.testing.assert_close(embeddings, expected)
    assert table is parts.word_embeddings.weight
    without, _ = parts(input_ids, None)
    torch.testing.assert_close(without, parts(input_ids, torch.zeros_like(input_ids))[0])


def test_logits_come_from_the_tied_matrix(model, batch):
    output = model(*batch)
    logits = model.logits(output.head_output)  # (B * S, V)
    last = output.hidden_states[-1].reshape(B * S, H)
    transformed = nn.functional.gelu(last @ model.head.dense.weight.T + model.head.dense.bias)
    transformed = nn.functional.layer_norm(
        transformed, (H,), model.head.layer_norm.weight, model.head.layer_norm.bias, 1e-12
    )
    decoder = model.embeddings.word_embeddings.weight
    torch.testing.assert_close(logits, transformed @ decoder.T + model.head.decoder_bias)
    rounded = model.logits(model(*batch, dtype=torch.bfloat16).head_output)
    assert rounded.dtype == logits.dtype
    assert (rounded - logits).norm() < 0.05 * logits.norm()


def test_the_head_runs_at_masked_positions_only(model, batch):
    masked_positions = torch.tensor([0, 3, 27, 40])
    everywhere = model(*batch).head_output
    there = model(*batch, masked_positions=masked_positions).head_output
    assert there.shape == (4, H)
    torch.testing.assert_close(there, everywhere[masked_positions])


def test_padding_changes_nothing(model, batch):
    input_ids, attention_mask = batch
    alone = model(input_ids[2:3, :7], attention_mask[2:3, :7])
    padded = model(input_ids, attention_mask)
    torch.testing.assert_close(padded.hidden_states[-1][2, :7], alone.hidden_states[-1][0])


def test_queries_and_keys_are_kept_where_asked(model, batch):
    output = model(*batch, keep=(1, 3))
    assert output.queries.keys() == output.keys.keys() == {1, 3}
    assert output.queries[1].shape == (B, N, S, H // N)
    expected = model.layers[3].key(output.hidden_states[2]).view(B, S, N, H // N).transpose(1, 2)
    torch.testing.assert_close(output.keys[3], expected)


def test_dropout_acts_in_training_alone(model, batch):
    assert torch.equal(model(*batch).head_output, model(*batch).head_output)
    model.train()
    assert not torch.equal(model(*batch).head_output, model(*batch).head_output)
    still = BertForMaskedLM(
        dataclasses.replace(TOY_CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    assert torch.equal(still(*batch).head_output, still(*batch).head_output)


def test_attention_dropout_keeps_the_mean():
    torch.manual_seed(3)
    query, key = torch.randn(2, 2, 3, 6, 5)  # (B, N, S, D) each
    value = torch.eye(6).expand(2, 3, 6, 6)  # the context is the map itself
    mask = torch.ones(2, 6, dtype=torch.long)
    drawn = torch.stack([plain.attention(query, key, value, mask, 0.4) for _ in range(2000)])
    whole = plain.attention(query, key, value, mask, 0.0)
    assert (drawn == 0).float().mean().item() == pytest.approx(0.4, abs=0.01)
    torch.testing.assert_close(drawn.mean(0), whole, atol=0.05, rtol=0.1)


def test_a_sequence_longer_than_the_positions_is_refused(model):
    input_ids = torch.zeros(1, 30, dtype=torch.long)
    with pytest.raises(ValueError, match="30 tokens; the model has 29 positions"):
        model(input_ids, torch.ones_like(input_ids))


def test_the_start_is_that_of_bert():
    torch.manual_seed(4)
    config = dataclasses.replace(TOY_CONFIG, hidden_size=96, vocab_size=500)
    model = BertForMaskedLM(config)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    assert all(matrix.std().item() == pytest.approx(0.2, rel=0.1) for matrix in matrices)
    assert all(not layer.query.bias.any() for layer in model.layers)
    assert (model.embeddings.layer_norm.weight == 1).all()


def test_parameter_count_of_compactbiobert():
    config = dataclasses.replace(BIOBERT, num_hidden_layers=6)
    with torch.device("meta"):
        model = BertForMaskedLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 65_813_572
