"""The demonstration's abstracts agree with themselves, and are the same on every machine."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from minibert.data.demo import KNOWLEDGE, STUDIES, read_knowledge, train_vocabulary, write_abstracts
from minibert.data.tokenizer import load_tokenizer

DOCUMENTS, VOCABULARY = 1_999, 800


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with abstracts.jsonl and the vocab.txt learnt from it."""
    folder = tmp_path_factory.mktemp("demo")
    write_abstracts(folder / "abstracts.jsonl", DOCUMENTS, seed=0)
    train_vocabulary(folder / "abstracts.jsonl", folder / "vocab.txt", VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def texts(folder) -> list[str]:
    lines = (folder / "abstracts.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_the_same_seed_gives_the_same_files_in_another_process(folder, tmp_path):
    program = (
        "from pathlib import Path; from minibert.data.demo import *\n"
        f"write_abstracts(Path('abstracts.jsonl'), {DOCUMENTS}, seed=0)\n"
        f"train_vocabulary(Path('abstracts.jsonl'), Path('vocab.txt'), {VOCABULARY})\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    for name in ("abstracts.jsonl", "vocab.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_text_is_the_same_on_every_machine(folder):
    """A frozen hash: whoever changes the grammar changes the demonstration's figures too."""
    digest = hashlib.sha256((folder / "abstracts.jsonl").read_bytes()).hexdigest()
    assert digest[:16] == "5914a31e3d6b82ab"


def test_a_longer_corpus_begins_with_the_shorter_one(folder, tmp_path):
    write_abstracts(tmp_path / "short.jsonl", 10, seed=0)
    write_abstracts(tmp_path / "other.jsonl", 10, seed=1)
    whole = (folder / "abstracts.jsonl").read_text()
    assert whole.startswith((tmp_path / "short.jsonl").read_text())
    assert not whole.startswith((tmp_path / "other.jsonl").read_text())


def test_texts_hardly_repeat_and_none_has_a_hole(texts):
    assert len(set(texts)) > 0.99 * DOCUMENTS
    assert not [text for text in texts if re.search(r"[\[\]{}|]|  |None", text)]


def test_every_study_comes_to_each_of_its_endings(texts):
    for opening, *endings in STUDIES:
        title = re.escape(opening.split("{")[0])
        for ending in endings:
            # Its words between facts and choices, in their order.
            pieces = map(re.escape, re.split(r"\{\w+\}|\[[^]]*\]", ending))
            pattern = re.compile(title + ".*" + ".+".join(pieces) + "$")
            assert any(pattern.match(text) for text in texts), ending


def test_a_drug_treats_its_own_disease_and_no_other(texts):
    diseases = read_knowledge(KNOWLEDGE)
    of_drug: dict[str, set[str]] = {}
    for disease in diseases:
        for name, *_ in disease["drugs"]:
            of_drug.setdefault(name, set()).add(disease["facts"]["disease"])
    names = {disease["facts"]["disease"] for disease in diseases}
    for text in texts:
        mentioned = {name for name in names if re.search(rf"\b{name}\b", text)}
        for drug in of_drug:
            if re.search(rf"\b{drug}\b", text):
                assert mentioned & of_drug[drug], text


def test_counts_and_shares_agree(texts):
    surveys = [text for text in texts if text.startswith("A survey")]
    assert len(surveys) > 100
    for text in surveys:
        (group,) = re.findall(r"we asked (\d+) patients", text)
        ((count, share),) = re.findall(r"(\d+) \((\d+) %\)", text)
        assert int(count) * 100 == int(group) * int(share)


def test_the_vocabulary_knows_every_word(folder, texts):
    tokenizer = load_tokenizer(folder / "vocab.txt")
    encoded = tokenizer.encode_batch(texts)
    assert tokenizer.vocab_size == VOCABULARY
    assert not any(tokenizer.unk_id in ids for ids in encoded)
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert 40 < sum(map(len, encoded)) / DOCUMENTS < 80
