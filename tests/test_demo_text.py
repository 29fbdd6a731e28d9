"""The demonstration's abstracts agree with themselves, and are the same on every machine."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from minibert.data.demo import (
    KNOWLEDGE,
    SPECIAL_TOKENS,
    STUDIES,
    read_knowledge,
    train_vocabulary,
    write_abstracts,
)
from minibert.data.tokenizer import load_tokenizer

DOCUMENTS, VOCABULARY = 1_999, 811
DISEASES = read_knowledge(KNOWLEDGE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with abstracts.jsonl and the vocab.txt learnt from it."""
    folder = tmp_path_factory.mktemp("demo")
    write_abstracts(folder / "abstracts.jsonl", DOCUMENTS, seed=0)
    train_vocabulary(folder / "abstracts.jsonl", folder / "vocab.txt", VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def documents(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "abstracts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def texts(documents) -> list[str]:
    return [document["text"] for document in documents]


@pytest.mark.parametrize("threads", ["1", "2"])
def test_another_process_writes_the_same_files(folder, tmp_path, threads):
    program = (
        "from pathlib import Path; from minibert.data.demo import *\n"
        f"write_abstracts(Path('abstracts.jsonl'), {DOCUMENTS}, seed=0)\n"
        f"train_vocabulary(Path('abstracts.jsonl'), Path('vocab.txt'), {VOCABULARY})\n"
    )
    settings = {"PYTHONHASHSEED": "77", "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    environment = os.environ | settings
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    for name in ("abstracts.jsonl", "vocab.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_text_is_the_same_on_every_machine(folder):
    """A frozen hash: whoever changes the grammar changes the demonstration's figures too."""
    digest = hashlib.sha256((folder / "abstracts.jsonl").read_bytes()).hexdigest()
    assert digest[:16] == "71b89faf6b61095b"


def test_a_longer_corpus_begins_with_the_shorter_one(folder, tmp_path):
    write_abstracts(tmp_path / "short.jsonl", 13, seed=0)
    write_abstracts(tmp_path / "other.jsonl", 13, seed=1)
    whole = (folder / "abstracts.jsonl").read_text()
    assert whole.startswith((tmp_path / "short.jsonl").read_text())
    assert not whole.startswith((tmp_path / "other.jsonl").read_text())


def test_each_document_has_its_own_id(documents):
    expected = [f"demo-{number:06d}" for number in range(1, DOCUMENTS + 1)]
    assert [document["id"] for document in documents] == expected


def test_of_twenty_thousand_texts_fewer_than_one_in_a_thousand_repeats(tmp_path):
    write_abstracts(tmp_path / "many.jsonl", 20_000, seed=0)
    lines = (tmp_path / "many.jsonl").read_text().splitlines()
    assert len(lines) - len({json.loads(line)["text"] for line in lines}) < 20


def test_every_template_is_filled(texts):
    assert not [text for text in texts if re.search(r"[\[\]{}|]|  |None", text)]


def test_every_study_comes_to_each_of_its_endings(texts):
    for opening, *endings in STUDIES:
        title = re.escape(re.split(r"[{\[]", opening)[0])
        for ending in endings:
            # Its words between facts, in their order.
            pieces = map(re.escape, re.split(r"\{\w+\}", ending))
            pattern = re.compile(title + ".*" + ".+".join(pieces) + "$")
            assert any(pattern.match(text) for text in texts), ending


def test_a_drug_treats_its_own_disease_and_no_other(texts):
    names = [disease["facts"]["disease"] for disease in DISEASES]
    treats: dict[str, set[str]] = {}
    for disease, name in zip(DISEASES, names, strict=True):
        for drug, *_ in disease["drugs"]:
            treats.setdefault(drug, set()).add(name)
    for text in texts:
        mentioned = {name for name in names if re.search(rf"\b{name}\b", text)}
        for drug in treats:
            if re.search(rf"\b{drug}\b", text):
                assert mentioned & treats[drug], text


def test_a_side_effect_is_no_symptom_of_what_its_drug_treats():
    for disease in DISEASES:
        assert len(disease["drugs"]) > 1 and len(disease["symptoms"]) > 1 and disease["genes"]
        assert not {drug[3] for drug in disease["drugs"]} & set(disease["symptoms"])


def test_equal_arms_add_up(texts):
    pattern = re.compile(r"(\d+) (?:patients|people over \d+) took part: (\d+) .* and (\d+) ")
    sizes = [tuple(map(int, match.groups())) for text in texts if (match := pattern.search(text))]
    assert len(sizes) > 500
    assert all(total == one + other and one == other for total, one, other in sizes)


@pytest.mark.parametrize(
    "result, conclusion",
    [
        (r"With (?!half).* went away\.", r"helps in|was well"),
        (r" stayed\.", r"useless|better|not well|not enough"),
        (r"Only \d of|All controls", r"is not linked"),
        (r"All but|All patients", r"is linked"),
    ],
)
def test_the_conclusion_follows_from_the_result(texts, result, conclusion):
    parts = [text.split(" In short, ") for text in texts]
    conclusions = [end for start, end in parts if re.search(result, start)]
    assert len(conclusions) > 50
    assert all(re.search(conclusion, end) for end in conclusions)


def test_the_vocabulary_knows_every_word(folder, texts):
    tokenizer = load_tokenizer(folder / "vocab.txt")
    encoded = tokenizer.encode_batch(texts)
    assert tokenizer.vocab_size == VOCABULARY
    assert tokenizer.special_ids == tuple(range(len(SPECIAL_TOKENS)))
    assert not any(tokenizer.unk_id in ids for ids in encoded)
