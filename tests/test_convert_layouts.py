"""Every form that a BERT checkpoint comes in is read, and read as the same model."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TOY_CONFIG
from hugging_face_toys import (
    BIAS,
    DECODER_BIAS,
    DECODER_WEIGHT,
    WORD_EMBEDDINGS,
    assert_same_logits,
    same_bits,
    save_state,
    save_toy,
    toy_model,
)
from safetensors.torch import load_file

from convert_weights import from_hugging_face, hugging_face_names_of, names_of
from minibert.files import sha256_of_files
from minibert.folder import WEIGHTS, load_model, read_tensors
from minibert.model import BertForMaskedLM, BertModel

L = TOY_CONFIG.num_hidden_layers


def masked_lm_state() -> dict[str, torch.Tensor]:
    """The state dict of the toy, decoder included: the form of `torch.save(model.state_dict())`."""
    return dict(toy_model().state_dict())


def without(tensors: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def older_layer_norm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that the first PyTorch conversions of google-research/bert had."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    return {
        name.replace(new, old[new]) if (new := ".".join(name.split(".")[-2:])) in old else name: t
        for name, t in tensors.items()
    }


LAYOUTS = {
    "everything": lambda state: state,
    "first bias name": lambda state: without(state, DECODER_BIAS, DECODER_WEIGHT),
    "second bias name": lambda state: without(state, BIAS),
    "tied matrix absent": lambda state: without(state, DECODER_WEIGHT),
    "decoder before embeddings": lambda state: dict(reversed(state.items())),
    "LayerNorm gamma and beta": older_layer_norm,
    "no prefix": lambda state: {name.removeprefix("bert."): t for name, t in state.items()},
    "position_ids": lambda state: {"bert.embeddings.position_ids": torch.arange(29)[None], **state},
    "pooler and next-sentence head": lambda state: {
        "bert.pooler.dense.weight": torch.ones(24, 24),
        "bert.pooler.dense.bias": torch.ones(24),
        "cls.seq_relationship.weight": torch.ones(2, 24),
        "cls.seq_relationship.bias": torch.ones(2),
        **state,
    },
}


def files_of_each_kind(folder: Path) -> dict[str, Path]:
    """The toy saved once in each container: what to call convert_weights.py with."""
    model, state = toy_model(), masked_lm_state()
    sharded = save_toy(folder / "sharded", model, max_shard_size="20KB")
    index = sharded / "model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    shards = save_state(folder / "sharded-bin", {})
    (shards / "pytorch_model.bin").unlink()
    places = {name: f"part-{number % 3}.bin" for number, name in enumerate(state)}
    for shard in set(places.values()):
        torch.save({name: state[name] for name in state if places[name] == shard}, shards / shard)
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    safetensors = save_toy(folder / "safetensors", model)
    return {
        "folder": safetensors,
        "safetensors file": safetensors / "model.safetensors",
        "sharded folder": sharded,
        "index file": index,
        "bin folder": save_state(folder / "bin", state),
        "bin file": folder / "bin" / "pytorch_model.bin",
        "bin before PyTorch 1.6": save_state(
            folder / "legacy", state, _use_new_zipfile_serialization=False
        ),
        "sharded bin": shards,
    }


def assert_is_the_toy(folder: Path) -> None:
    """The folder computes what transformers computes with the toy."""
    model = load_model(folder)
    assert type(model) is BertForMaskedLM
    assert_same_logits(model, toy_model())
    assert (folder / "vocab.txt").is_file()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_layout_gives_the_same_model(layout, tmp_path):
    source = save_state(tmp_path / "source", LAYOUTS[layout](masked_lm_state()))
    from_hugging_face(source, tmp_path / "out")
    assert_is_the_toy(tmp_path / "out")


def test_every_container_gives_the_same_model(tmp_path):
    for kind, source in files_of_each_kind(tmp_path).items():
        from_hugging_face(source, tmp_path / "out" / kind)
        assert_is_the_toy(tmp_path / "out" / kind)


def test_the_table_is_total():
    """Each tensor that transformers knows of is on its left, each of ours on its right."""
    names = names_of(L)
    state = toy_model("BertForPreTraining").state_dict()
    assert names.keys() == state.keys() | {"bert.embeddings.position_ids"}
    ours = BertForMaskedLM(TOY_CONFIG).state_dict().keys()
    assert {name for name in names.values() if name is not None} == ours
    assert hugging_face_names_of(L).keys() == ours


def test_half_precision_is_kept(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype)
        source = save_toy(tmp_path / name, toy_model(dtype=dtype))
        summary = from_hugging_face(source, tmp_path / "out" / name)
        stored = load_file(tmp_path / "out" / name / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {dtype}
        assert {p.dtype for p in load_model(tmp_path / "out" / name).parameters()} == {
            torch.float32
        }
        assert name.removeprefix("torch.") in summary


def test_what_is_dropped_is_said(tmp_path):
    source = save_toy(tmp_path / "source", toy_model("BertForPreTraining"))
    summary = from_hugging_face(source, tmp_path / "out")
    (dropped,) = [line for line in summary.splitlines() if line.startswith("dropped")]
    assert sorted(dropped.removeprefix("dropped").replace(",", "").split()) == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    ]


def test_foreign_heads_are_dropped_on_request(tmp_path):
    foreign = {"classifier.weight": torch.ones(3, 24), "qa.outputs.bias": torch.ones(2)}
    source = save_state(tmp_path / "source", masked_lm_state() | foreign)
    summary = from_hugging_face(source, tmp_path / "out", drop=["classifier.*", "qa.*"])
    assert_is_the_toy(tmp_path / "out")
    assert "classifier.weight" in summary and "qa.outputs.bias" in summary


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_encoder_only_takes_the_encoder(architecture, tmp_path):
    model = toy_model(architecture)
    source = save_toy(tmp_path / "source", model)
    from_hugging_face(source, tmp_path / "out", encoder_only=True)
    encoder = load_model(tmp_path / "out")
    assert type(encoder) is BertModel
    theirs = model if architecture == "BertModel" else model.bert
    assert same_bits(
        encoder.layers[3].output.bias, theirs.encoder.layer[3].output.dense.bias.detach()
    )


def test_the_source_is_recorded(tmp_path):
    source = save_toy(tmp_path / "source", toy_model())
    from_hugging_face(source, tmp_path / "out")
    _, metadata = read_tensors(tmp_path / "out" / "model.safetensors")
    digest = sha256_of_files(source / "model.safetensors")
    assert metadata == {"source": "model.safetensors", "source_sha256": digest}


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    from_hugging_face(save_toy(tmp_path / "source", toy_model()), tmp_path / "out")
    modes = {(tmp_path / "out" / name).stat().st_mode for name in ("config.json", WEIGHTS)}
    assert len(modes) == 1


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    """As in a file saved from a model two of whose layers are one object."""
    state = masked_lm_state()
    shared, other = (f"bert.encoder.layer.{i}.intermediate.dense.weight" for i in (0, 2))
    state[other] = state[shared]
    from_hugging_face(save_state(tmp_path / "source", state), tmp_path / "out")
    layers = load_model(tmp_path / "out").layers
    assert torch.equal(layers[0].intermediate.weight, layers[2].intermediate.weight)


def test_a_negative_zero_is_no_zero(tmp_path):
    """Tied means bitwise equal: == would let this pass."""
    state = masked_lm_state()
    state[WORD_EMBEDDINGS] = state[WORD_EMBEDDINGS].clone()
    state[WORD_EMBEDDINGS][3, 5] = 0.0
    state[DECODER_WEIGHT] = state[WORD_EMBEDDINGS].clone()
    state[DECODER_WEIGHT][3, 5] = -0.0
    with pytest.raises(ValueError, match="tied, but not equal"):
        from_hugging_face(save_state(tmp_path / "source", state), tmp_path / "out")
