"""`minibert.load` gives the model and its tokenizer in one line, from either kind of folder."""

import dataclasses
import doctest
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SPECIAL_TOKENS, TOY_CONFIG
from hugging_face_toys import assert_same_logits, save_state, save_toy, toy_batch, toy_model

import minibert
from convert_weights import from_hugging_face
from minibert.errors import InputError, in_one_line
from minibert.folder import save_model
from minibert.model import BertForMaskedLM, BertModel


def modules_after(program: str, *arguments: str) -> set[str]:
    """What a new process has imported at the end of a program."""
    command = [sys.executable, "-c", f"{program}\nimport sys; print(*sys.modules)", *arguments]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split())


def test_importing_minibert_is_quick():
    modules = modules_after("import minibert")
    assert "minibert" in modules
    assert not {"torch", "numpy", "tokenizers", "safetensors", "transformers"} & modules


def test_importing_train_and_reading_a_model_do_not_import_torch_compile(tmp_path):
    """Its import takes as long as all of torch; a run needs it, for torch's optimisers do."""
    assert "train" in (modules := modules_after("import train"))
    assert not {"torch._dynamo", "triton", "transformers"} & modules
    save_toy(tmp_path / "hf", toy_model())
    program = "import minibert, sys; model, _ = minibert.load(sys.argv[1])"
    assert "minibert.folder" in (modules := modules_after(program, str(tmp_path / "hf")))
    assert not {"torch._dynamo", "triton", "transformers"} & modules


def test_the_example_in_the_docstring(tmp_path, monkeypatch):
    words = ["a", "gene", "of", "the", "cell"]
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL_TOKENS + words) + "\n")
    sizes = {"vocab_size": 10, "hidden_size": 768, "num_hidden_layers": 1}
    config = dataclasses.replace(TOY_CONFIG, **sizes)
    save_model(tmp_path / "models" / "biobert", BertForMaskedLM(config), tokenizer_from=tmp_path)
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder().find(minibert.load, globs={})
    result = doctest.DocTestRunner().run(example)
    assert result.attempted == 6
    assert result.failed == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["model folder", "safetensors", "shards", "bin"])
def test_either_folder_gives_the_model_ready_to_use(kind, dtype, tmp_path):
    theirs = toy_model(dtype=dtype)
    if kind == "bin":
        save_state(tmp_path / "hf", theirs.state_dict())
    else:
        size = {"max_shard_size": "20KB"} if kind == "shards" else {}
        save_toy(tmp_path / "hf", theirs, **size)
        assert (tmp_path / "hf" / "model.safetensors.index.json").is_file() == bool(size)
    folder = tmp_path / "hf"
    if kind == "model folder":
        folder = tmp_path / "ours"
        from_hugging_face(tmp_path / "hf", folder)
    model, tokenizer = minibert.load(str(folder))  # a string, as people have it
    assert type(model) is BertForMaskedLM
    assert not model.training
    for parameter in model.parameters():
        assert parameter.dtype is torch.float32
        assert not parameter.requires_grad
    assert tokenizer.encode_batch(["w00 w93"]) == [[5, 98]]
    assert_same_logits(model, theirs)


@pytest.mark.parametrize("kind", ["model folder", "hugging face"])
def test_a_folder_without_the_head_gives_an_encoder(kind, tmp_path):
    theirs = toy_model("BertModel")
    folder = save_toy(tmp_path / "hf", theirs)
    if kind == "model folder":
        folder = tmp_path / "ours"
        from_hugging_face(tmp_path / "hf", folder, encoder_only=True)
    model, _ = minibert.load(folder)
    assert type(model) is BertModel
    input_ids, attention_mask, token_type_ids = toy_batch()
    found = model(input_ids, attention_mask, token_type_ids).hidden_states[-1]  # (B, S, H)
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask, token_type_ids).last_hidden_state
    real = attention_mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)


def refusal(folder) -> str:
    """What a folder is refused with."""
    with pytest.raises(InputError) as caught:
        minibert.load(folder)
    return in_one_line(caught.value)


def test_what_is_no_folder_is_told(tmp_path):
    assert refusal(tmp_path / "absent") == f"{tmp_path / 'absent'}: no such folder"
    (tmp_path / "file.bin").touch()
    assert refusal(tmp_path / "file.bin") == f"{tmp_path / 'file.bin'}: no such folder"
    assert refusal(tmp_path).startswith(f"{tmp_path}: no checkpoint in this folder; expected")


@pytest.mark.parametrize("kind", ["ours", "hf"])
def test_files_that_do_not_fit_are_told(kind, tmp_path):
    save_toy(tmp_path / "hf", toy_model())
    from_hugging_face(tmp_path / "hf", tmp_path / "ours")
    folder = tmp_path / kind
    words = (folder / "vocab.txt").read_text()
    (folder / "vocab.txt").write_text(words + "more\n")
    told = refusal(folder)
    assert told == f"{folder / 'vocab.txt'}: 100 tokens; vocab_size in config.json is 99"
    (folder / "vocab.txt").unlink()
    assert refusal(folder) == f"{folder}: neither tokenizer.json nor vocab.txt in this folder"
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder / 'config.json'}: no such file"


def test_an_uncased_vocabulary_is_told(tmp_path):
    folder = save_toy(tmp_path / "hf", toy_model())
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert refusal(folder).startswith(f"{folder / 'tokenizer_config.json'}: do_lower_case is true")


def test_a_model_of_ours_may_have_rows_to_spare(toy_world, tmp_path):
    """As train.py makes one from a config.json whose vocabulary is rounded up."""
    shutil.copytree(toy_world / "teacher", tmp_path / "model")
    words = (tmp_path / "model" / "vocab.txt").read_text().split("\n")[:90]
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(words) + "\n")
    model, tokenizer = minibert.load(tmp_path / "model")
    assert (model.config.vocab_size, tokenizer.vocab_size) == (99, 90)


def test_weights_that_cannot_be_used_are_told(tmp_path):
    tensors = toy_model().state_dict()
    half = {name: tensor for name, tensor in tensors.items() if "transform" not in name}
    told = refusal(save_state(tmp_path / "half", half))
    assert "pytorch_model.bin: missing tensors: cls.predictions.transform.dense.weight" in told
    name = "bert.encoder.layer.2.output.dense.bias"
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    told = refusal(save_state(tmp_path / "nan", tensors))
    assert told.endswith("pytorch_model.bin: layers.2.output.bias holds NaN or numbers beyond "
                         "float32")  # fmt: skip
