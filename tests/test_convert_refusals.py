"""What cannot be converted ends in one line that says why, status 2, and nothing is written."""

import json
import os
import pickle
import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import tokenizers
import torch
from hugging_face_toys import (
    BIAS,
    DECODER_BIAS,
    DECODER_WEIGHT,
    WORD_EMBEDDINGS,
    save_state,
    save_toy,
    toy_model,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert_weights
from minibert.errors import InputError, run_command
from minibert.hugging_face import read_checkpoint

QUERY = "bert.encoder.layer.1.attention.self.query.weight"


class Code:
    """What a hostile pickle is made of: unpickling it would leave a file behind."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Run convert_weights.py with `tmp_path / "out"` as OUT, and return its one line of error."""

    def run(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        out = str(tmp_path / "out")
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments), out])
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as other_lines:
            try:
                status = run_command(convert_weights.main)
            except SystemExit as leaving:  # argparse leaves by itself
                status = leaving.code
        printed = capsys.readouterr()
        assert status == 2
        assert not other_lines
        assert printed.out == ""
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return printed.err

    return run


@pytest.fixture
def source(tmp_path) -> Path:
    """A good source, for a test to spoil."""
    return save_toy(tmp_path / "source", toy_model())


def set_config(folder: Path, **values) -> None:
    content = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(content))


def test_a_source_that_is_not_there(refusal, tmp_path):
    assert "nowhere: no such file or folder" in refusal(tmp_path / "nowhere")


def test_a_folder_without_a_checkpoint(refusal, source):
    (source / "model.safetensors").unlink()
    assert "no checkpoint in this folder; expected model.safetensors or" in refusal(source)


def test_a_file_that_is_no_checkpoint(refusal, source):
    assert "vocab.txt: expected a folder, *.safetensors" in refusal(source / "vocab.txt")
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        (source / name).write_text("a page of text, not weights\n" * 50)
        assert name in refusal(source / name)


def test_a_missing_config(refusal, source):
    (source / "config.json").unlink()
    assert "config.json: no such file" in refusal(source)
    assert "config.json: no such file" in refusal(source / "model.safetensors")


@pytest.mark.parametrize(
    "setting, value",
    [
        ("is_decoder", True),
        ("position_embedding_type", "relative_key"),
        ("model_type", "roberta"),
        ("hidden_act", "gelu_new"),
        ("tie_word_embeddings", False),
        ("num_attention_heads", 5),
    ],
)
def test_a_config_of_another_model(setting, value, refusal, source):
    set_config(source, **{setting: value})
    message = refusal(source)
    assert "config.json" in message and setting in message and str(value) in message


def test_an_output_that_exists(refusal, source, tmp_path):
    (tmp_path / "out").mkdir()
    assert "out: exists already" in refusal(source)
    (tmp_path / "out").rmdir()
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert "out: exists already" in refusal(source)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(name, kept, refusal, source):
    file = source / name
    if name == "pytorch_model.bin":
        torch.save(toy_model().state_dict(), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    assert name in refusal(file)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_holds_code(zipped, refusal, tmp_path):
    proof = tmp_path / "proof"
    state = {**toy_model().state_dict(), "extra": Code(proof)}
    source = save_state(tmp_path / "source", state, _use_new_zipfile_serialization=zipped)
    message = refusal(source)
    assert "pytorch_model.bin: refused, for it holds code" in message and "mkdir" in message
    assert not proof.exists()


def test_a_pickle_that_torch_did_not_write(refusal, source, tmp_path):
    proof = tmp_path / "proof"
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Code(proof)}, protocol=4))
    assert "pytorch_model.bin: damaged, or not" in refusal(source / "pytorch_model.bin")
    assert not proof.exists()


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.zeros(3), {"a": {"b": 1}}, {}])
def test_a_bin_that_holds_no_state_dict(content, refusal, tmp_path):
    source = save_state(tmp_path / "source", content)
    assert "pytorch_model.bin" in refusal(source)


def test_every_fault_of_the_tensors_is_listed_at_once(refusal, tmp_path):
    state = dict(toy_model().state_dict())
    state[QUERY] = torch.zeros(24, 23)
    state["bert.embeddings.LayerNorm.bias"] = torch.zeros(24, dtype=torch.int64)
    state[DECODER_BIAS] = state[DECODER_BIAS] + 1
    state["classifier.weight"] = torch.zeros(3, 24)
    state["bert.encoder.layer.4.output.dense.bias"] = torch.zeros(24)  # the toy has layers 0 to 3
    del state["bert.encoder.layer.3.intermediate.dense.bias"]
    message = refusal("--drop", "nothing*", save_state(tmp_path / "source", state))
    for part in (
        "unknown tensors (--drop PATTERN leaves them out): "
        "classifier.weight, bert.encoder.layer.4.output.dense.bias;",
        "missing tensors: bert.encoder.layer.3.intermediate.dense.bias;",
        f"{QUERY} (24, 23) float32, not (24, 24) floats",
        "bert.embeddings.LayerNorm.bias (24,) int64, not (24,) floats",
        f"tied, but not equal: {DECODER_BIAS} and {BIAS};",
        "--drop matches nothing: nothing*",
    ):
        assert part in message, part


def test_an_untied_decoder(refusal, tmp_path):
    state = dict(toy_model().state_dict())
    state[DECODER_WEIGHT] = state[DECODER_WEIGHT].clone()
    state[DECODER_WEIGHT][98, 23] += 1e-6
    message = refusal(save_state(tmp_path / "source", state))
    assert f"tied, but not equal: {DECODER_WEIGHT} and {WORD_EMBEDDINGS}" in message


def test_a_source_without_a_head(refusal, tmp_path):
    message = refusal(save_toy(tmp_path / "source", toy_model("BertModel")))
    assert "no MLM head" in message and "--encoder-only" in message and BIAS in message


def sharded(folder: Path) -> tuple[Path, dict[str, str]]:
    """A sharded source: its index file and what it says."""
    save_toy(folder, toy_model(), max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())["weight_map"]


def test_a_missing_shard(refusal, tmp_path):
    index, places = sharded(tmp_path / "source")
    (index.parent / places[QUERY]).unlink()
    assert f"{places[QUERY]}: no such file" in refusal(index.parent)


def test_shards_outside_the_folder(refusal, tmp_path):
    index, places = sharded(tmp_path / "source")
    shutil.copy(index.parent / places[QUERY], tmp_path / "outside.safetensors")
    absolute = str(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", absolute, "..", "a/../../outside.safetensors"):
        index.write_text(json.dumps({"weight_map": places | {QUERY: name}}))
        assert f"shard {name!r}; expected the name of a file beside it" in refusal(index)


def test_an_index_at_odds_with_its_shards(refusal, tmp_path):
    index, places = sharded(tmp_path / "source")
    elsewhere = next(shard for shard in places.values() if shard != places[QUERY])
    for wrong in (places | {QUERY: elsewhere}, places | {"ghost": elsewhere}):
        index.write_text(json.dumps({"weight_map": wrong}))
        assert "the shards hold something else; at odds: " in refusal(index)
    for nonsense in ({}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}, {"weight_map": None}):
        index.write_text(json.dumps(nonsense))
        assert "no weight_map" in refusal(index)


def test_a_vocabulary_of_another_size(refusal, source):
    """More tokens or fewer: in a vocab.txt the line number is the row of the embeddings."""
    lines = (source / "vocab.txt").read_text().splitlines(keepends=True)
    for tokens in (lines[:-1], [*lines, "one-more\n"]):
        (source / "vocab.txt").write_text("".join(tokens))
        found = f"vocab.txt: {len(tokens)} tokens; vocab_size in config.json is 99"
        assert found in refusal(source)


def test_a_tokenizer_json_with_ids_beyond_the_embeddings(refusal, source):
    lines = (source / "vocab.txt").read_text().splitlines()
    (source / "vocab.txt").unlink()
    vocabulary = {token: number for number, token in enumerate([*lines, "one-more"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.save(str(source / "tokenizer.json"))
    assert "tokenizer.json: 100 tokens; vocab_size in config.json is 99" in refusal(source)


def test_an_uncased_vocabulary(refusal, source):
    (source / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert "do_lower_case is true" in refusal(source)


def test_a_model_folder_of_ours_as_a_source(refusal, source, tmp_path):
    convert_weights.from_hugging_face(source, tmp_path / "ours")
    assert "a model folder of minibert already" in refusal(tmp_path / "ours")


def test_the_way_back_wants_a_model_folder_of_ours(refusal, source, tmp_path):
    assert "a Hugging Face folder; convert it first" in refusal("--to-hf", source)
    assert "no such folder" in refusal("--to-hf", tmp_path / "nowhere")
    assert "--encoder-only and --drop" in refusal("--to-hf", "--encoder-only", source)


@pytest.fixture(scope="module")
def good_files(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of one good checkpoint of each kind, few tensors long."""
    folder = save_toy(tmp_path_factory.mktemp("good"), toy_model())
    tensors = {"a": torch.arange(35.0).view(5, 7), "b": torch.ones(3, dtype=torch.float16)}
    torch.save(tensors, folder / "zip.bin")
    torch.save(tensors, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    return {
        name: (folder / name).read_bytes()
        for name in ("model.safetensors", "zip.bin", "legacy.bin")
    }


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["model.safetensors", "zip.bin", "legacy.bin"]), seed=st.integers())
def test_damaged_bytes_never_raise_anything_else(name, seed, good_files, tmp_path):
    """Bytes cut off, changed, repeated: read all the same, or refused in one line."""
    draw = random.Random(seed)
    content = bytearray(good_files[name])
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(min(len(content), draw.choice([40, 2000, 10**9])))
        content[start : start + draw.randint(0, 9)] = draw.randbytes(draw.randint(0, 9))
    if draw.random() < 0.3:
        del content[draw.randrange(len(content)) :]
    (tmp_path / name).write_bytes(content)
    try:
        read_checkpoint(tmp_path / name)
    except InputError as error:
        assert "\n" not in str(error) and name in str(error)
