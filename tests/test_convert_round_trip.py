"""From Hugging Face and back: every tensor bit for bit, in a folder that transformers reads."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SPECIAL_TOKENS, TOY_CONFIG
from hugging_face_toys import (
    assert_same_logits,
    same_bits,
    save_state,
    save_toy,
    toy_model,
    transformers,
)
from safetensors import safe_open
from safetensors.torch import load_file

from convert_weights import from_hugging_face, to_hugging_face
from minibert.folder import load_model

FORMS = {
    "BertForMaskedLM": lambda folder: save_toy(folder, toy_model()),
    "BertForPreTraining": lambda folder: save_toy(folder, toy_model("BertForPreTraining")),
    "sharded": lambda folder: save_toy(folder, toy_model(), max_shard_size="20KB"),
    "bin": lambda folder: save_state(folder, toy_model("BertForPreTraining").state_dict()),
    "float16": lambda folder: save_toy(folder, toy_model(dtype=torch.float16)),
    "bfloat16": lambda folder: save_toy(folder, toy_model(dtype=torch.bfloat16)),
}
DROPPED = ("bert.pooler.", "pooler.", "cls.seq_relationship.")


def there_and_back(source: Path, folder: Path, encoder_only: bool = False) -> Path:
    from_hugging_face(source, folder / "ours", encoder_only)
    to_hugging_face(folder / "ours", folder / "theirs")
    return folder / "theirs"


def source_tensors(source: Path) -> dict[str, torch.Tensor]:
    """What a source holds, less what is dropped and the second names of tied tensors."""
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    for file in source.glob("*.bin"):
        tensors |= torch.load(file, weights_only=True)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith((*DROPPED, "cls.predictions.decoder."))
    }


def assert_same_tensors(theirs: Path, source: Path) -> None:
    expected, found = source_tensors(source), load_file(theirs / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert same_bits(tensor, expected[name]), name


def read_by_transformers(auto_class: str, folder: Path):
    """The model, after making sure that its file had just what it needs."""
    model, report = getattr(transformers, auto_class).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_bitwise(form, tmp_path):
    source = FORMS[form](tmp_path / "source")
    theirs = there_and_back(source, tmp_path)
    assert_same_tensors(theirs, source)
    model = read_by_transformers("AutoModelForMaskedLM", theirs)
    assert_same_logits(load_model(tmp_path / "ours"), model)


def test_rxnfp_comes_back_bitwise(shared_data, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pytorch_model.bin", "config.json", "vocab.txt", "tokenizer.json"):
        (source / name).symlink_to(shared_data / "rxnfp" / name)  # as the hub's cache has them
    theirs = there_and_back(source, tmp_path)
    assert_same_tensors(theirs, source)
    model = read_by_transformers("AutoModelForMaskedLM", theirs)
    golden = load_file(shared_data / "rxnfp" / "golden_hf.safetensors")
    batch = golden["input_ids"], golden["attention_mask"], torch.zeros_like(golden["input_ids"])
    assert_same_logits(load_model(tmp_path / "ours"), model, batch)


def test_a_bare_encoder_comes_back_bitwise(tmp_path):
    source = save_toy(tmp_path / "source", toy_model("BertModel"))
    theirs = there_and_back(source, tmp_path, encoder_only=True)
    assert_same_tensors(theirs, source)
    model, report = transformers.AutoModel.from_pretrained(theirs, output_loading_info=True)
    assert set(report["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not report["unexpected_keys"]
    assert same_bits(
        model.embeddings.LayerNorm.bias, toy_model("BertModel").embeddings.LayerNorm.bias
    )


def test_the_way_back_and_in_again_is_the_same_model_folder(tmp_path):
    theirs = there_and_back(save_toy(tmp_path / "source", toy_model()), tmp_path)
    from_hugging_face(theirs, tmp_path / "again")
    for name in ("config.json", "vocab.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    ours, again = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert ours.keys() == again.keys()
    assert all(same_bits(tensor, again[name]) for name, tensor in ours.items())


def test_the_file_says_what_it_is_and_where_it_is_from(tmp_path):
    theirs = there_and_back(save_toy(tmp_path / "source", toy_model()), tmp_path)
    with safe_open(theirs / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["source"] == "model.safetensors"


def test_padding_is_named_where_it_is_not_token_0(tmp_path):
    """transformers takes id 0 for padding unless config.json says otherwise."""
    source = save_toy(tmp_path / "source", toy_model())
    words = [f"w{number:02}" for number in range(TOY_CONFIG.vocab_size - len(SPECIAL_TOKENS))]
    (source / "vocab.txt").write_text("\n".join(words + SPECIAL_TOKENS) + "\n")
    theirs = there_and_back(source, tmp_path)
    assert json.loads((theirs / "config.json").read_text())["pad_token_id"] == len(words)


def test_a_model_without_tokenizer_files_comes_back_too(tmp_path):
    source = save_toy(tmp_path / "source", toy_model())
    (source / "vocab.txt").unlink()
    theirs = there_and_back(source, tmp_path)
    assert sorted(file.name for file in theirs.iterdir()) == ["config.json", "model.safetensors"]
    read_by_transformers("AutoModelForMaskedLM", theirs)
