"""What `--to-hf` writes is tokenised by transformers as the model was trained: cased, same ids."""

import csv
import dataclasses
import gzip
import shutil
from itertools import islice
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import TOY_CONFIG
from hugging_face_toys import transformers

from convert_weights import to_hugging_face
from minibert.folder import save_model
from minibert.model import BertForMaskedLM

AWKWARD = [
    "TNF-α and β-catenin in naïve CD4+ T cells, 37°C; Sjögren's",
    "decomposed: e\u0301 A\u030a, CJK 中文字, \u2028 separator\u00a0space",
    "control \x00 \x07 \ufffd characters, [MASK] and [PAD] in text",
    "x" * 101 + " " + "x" * 100,
    "",
]


def exported(vocabulary: int, tokenizer_files: list[Path], folder: Path):
    """A toy model with these tokenizer files, taken to Hugging Face, and its `AutoTokenizer`."""
    (folder / "files").mkdir()
    for file in tokenizer_files:
        shutil.copyfile(file, folder / "files" / file.name)
    config = dataclasses.replace(TOY_CONFIG, vocab_size=vocabulary, max_position_embeddings=512)
    save_model(folder / "ours", BertForMaskedLM(config), tokenizer_from=folder / "files")
    to_hugging_face(folder / "ours", folder / "theirs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "theirs")
    assert tokenizer.model_max_length == 512
    assert (tokenizer.pad_token, tokenizer.mask_token) == ("[PAD]", "[MASK]")
    return tokenizer


def exported_cased(shared_data: Path, folder: Path):
    """From BioBERT's vocab.txt alone."""
    return exported(28_996, [shared_data / "vocab" / "vocab.txt"], folder)


def exported_rxnfp(shared_data: Path, folder: Path):
    """From a tokenizer.json with its own way of splitting, a vocab.txt beside it."""
    files = [shared_data / "rxnfp" / name for name in ("tokenizer.json", "vocab.txt")]
    return exported(591, files, folder)


def test_a_vocab_txt_is_read_cased(shared_data, tmp_path):
    tokenizer = exported_cased(shared_data, tmp_path)
    reference = tokenizers.BertWordPieceTokenizer(
        str(shared_data / "vocab" / "vocab.txt"), lowercase=False
    )
    with gzip.open(shared_data / "pubmed-text" / "pubmed_abstracts_en.tsv.gz", "rt") as file:
        rows = list(islice(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 500))
    texts = [text for row in rows for text in row[1:]] + AWKWARD
    assert len(texts) > 1000
    expected = [encoding.ids for encoding in reference.encode_batch(texts)]
    assert tokenizer(texts, verbose=False)["input_ids"] == expected


def test_a_custom_tokenizer_json_is_taken_as_it_is(shared_data, tmp_path):
    tokenizer = exported_rxnfp(shared_data, tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(shared_data / "rxnfp" / "tokenizer.json"))
    with open(shared_data / "rxnfp" / "uspto50k_eval_test_reactions.txt") as file:
        reactions = [line.rstrip("\n") for line in islice(file, 1000)]
    expected = [encoding.ids for encoding in reference.encode_batch(reactions)]
    assert tokenizer(reactions, verbose=False)["input_ids"] == expected


@pytest.mark.parametrize("export", [exported_cased, exported_rxnfp])
def test_pairs_and_padding_are_ready_for_the_model(export, shared_data, tmp_path):
    tokenizer = export(shared_data, tmp_path)
    batch = tokenizer(["CCO", "C"], ["ClCN", "O"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
    assert batch["token_type_ids"].sum() > 0
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert torch.equal(batch["input_ids"] == tokenizer.pad_token_id, padding)
