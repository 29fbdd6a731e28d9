"""A corpus gives back what was written, training first, and a damaged one is refused."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert.data.corpus import Corpus
from minibert.data.merge import is_held_out, write_corpus
from minibert.data.shards import document_keys
from minibert.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from minibert.errors import InputError

NUM_WORDS = 31  # and five special tokens


def make_tokenizer(folder, num_words):
    words = [f"w{number}" for number in range(num_words)]
    (folder / "vocab.txt").write_text("\n".join([*words, *SPECIAL_TOKENS.values()]) + "\n")
    return load_tokenizer(folder / "vocab.txt")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), NUM_WORDS)


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A corpus of 29 documents, some held out."""
    documents = [(f"id {n}", [n, 32, *range(n % 7)]) for n in range(29)]
    write_corpus(tmp_path / "corpus", tokenizer, documents, held_out=0.3)
    return tmp_path / "corpus"


def ids():
    return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1)


@settings(max_examples=30, deadline=None)
@given(
    documents=st.dictionaries(
        ids(),
        st.lists(st.integers(0, NUM_WORDS + 4), min_size=1, max_size=9),
        min_size=1,
        max_size=23,
    ),
    held_out=st.floats(0, 0.99),
)
def test_what_was_written_is_read(tokenizer, tmp_path_factory, documents, held_out):
    sides = is_held_out(document_keys(documents), held_out)
    training, others = (
        [pair for pair, side in zip(documents.items(), sides, strict=True) if side == wanted]
        for wanted in (False, True)
    )
    path = tmp_path_factory.mktemp("corpora") / "corpus"
    if not training:
        with pytest.raises(InputError, match="no documents to train on"):
            write_corpus(path, tokenizer, documents.items(), held_out)
        assert list(path.parent.iterdir()) == []
        return
    meta = write_corpus(path, tokenizer, documents.items(), held_out)
    assert [file.name for file in path.parent.iterdir()] == ["corpus"]
    corpus = Corpus.open(path)
    assert (corpus.num_training, corpus.num_held_out) == (len(training), len(others))
    for number, (document_id, tokens) in enumerate(training + others):
        assert corpus.document_id(number) == document_id
        assert corpus.tokens(number).tolist() == tokens
    unknown = sum(tokens.count(tokenizer.unk_id) for tokens in documents.values())
    assert (meta["tokens"], meta["unk_tokens"]) == (corpus.offsets[-1], unknown)


def test_meta_says_what_the_corpus_is(folder, tokenizer):
    corpus = Corpus.open(folder)
    assert corpus.meta == json.loads((folder / "meta.json").read_text())
    assert corpus.meta["documents"] == 29 == corpus.num_training + corpus.num_held_out
    assert corpus.meta["held_out_documents"] == corpus.num_held_out > 0
    assert corpus.meta["unk_tokens"] == 29
    assert corpus.tokenizer.special_ids == tokenizer.special_ids == (31, 32, 33, 34, 35)
    assert corpus.tokenizer.vocabulary_sha256 == tokenizer.vocabulary_sha256
    assert load_tokenizer(folder).vocabulary_sha256 == tokenizer.vocabulary_sha256
    content = (folder / "tokens.bin").read_bytes() + (folder / "offsets.npy").read_bytes()
    assert corpus.corpus_sha256 == hashlib.sha256(content).hexdigest()
    names = {"tokens.bin", "offsets.npy", "ids.txt", "meta.json", "vocab.txt"}
    assert {path.name for path in folder.iterdir()} == names


def test_the_hash_of_the_id_decides_who_is_held_out():
    # printf 31878634 | sha256sum: 89d91e84..., and 0x89d91e84 / 2**32 = 0.538469
    (key,) = keys = document_keys(["31878634"])
    assert key >> np.uint64(32) == 0x89D91E84
    assert not is_held_out(keys, 0.538469)
    assert is_held_out(keys, 0.538470)
    keys = document_keys(str(pmid) for pmid in range(20_000))
    assert not is_held_out(keys, 0).any()
    assert 900 < is_held_out(keys, 0.05).sum() < 1100
    ends = np.array([0, 2**64 - 1], np.uint64)
    assert is_held_out(ends, 1e-300).tolist() == [True, False]
    assert is_held_out(ends, np.nextafter(1, 0)).tolist() == [True, False]


@pytest.mark.parametrize(("num_words", "width"), [(65_536 - 5, 2), (65_537 - 5, 4)])
def test_tokens_are_as_wide_as_the_vocabulary_asks(tmp_path, num_words, width):
    tokenizer = make_tokenizer(tmp_path, num_words)
    documents = [("a", [0, tokenizer.mask_id]), ("b", [7])]
    write_corpus(tmp_path / "corpus", tokenizer, documents, held_out=0)
    assert (tmp_path / "corpus" / "tokens.bin").stat().st_size == 3 * width
    assert Corpus.open(tmp_path / "corpus").tokens(0).tolist() == [0, tokenizer.vocab_size - 1]


def test_a_text_without_tokens_is_no_document(tmp_path, tokenizer):
    documents = [("a", []), ("b", [3, 4]), ("c", [])]
    write_corpus(tmp_path / "corpus", tokenizer, documents, held_out=0)
    corpus = Corpus.open(tmp_path / "corpus")
    assert (corpus.num_training, corpus.document_id(0)) == (1, "b")


def test_opening_reads_neither_tokens_nor_ids(folder):
    corpus = Corpus.open(folder)
    with open(folder / "tokens.bin", "r+b") as file:
        file.write(bytes([17, 0]))
    assert corpus.tokens(0)[0] == 17  # mapped: read only now
    assert not corpus.tokens(0).flags.writeable
    (folder / "ids.txt").unlink()
    with pytest.raises(InputError, match=r"ids\.txt: no such file"):
        Corpus.open(folder).document_id(0)


def test_there_is_no_document_behind_the_last(folder):
    corpus = Corpus.open(folder)
    with pytest.raises(IndexError):
        corpus.tokens(29)
    with pytest.raises(InputError, match="ends before document 29"):
        corpus.document_id(29)


def save_offsets(change):
    """A damage: `change` is applied to the offsets."""

    def damage(folder):
        np.save(folder / "offsets.npy", change(np.load(folder / "offsets.npy")))

    return damage


def set_meta(**values):
    """A damage: meta.json with other values; None removes the key."""

    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text()) | values
        meta = {key: value for key, value in meta.items() if value is not None}
        (folder / "meta.json").write_text(json.dumps(meta))

    return damage


def backwards(offsets):
    offsets[3], offsets[4] = offsets[4], offsets[3]
    return offsets


def cut(name, num_bytes):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) - num_bytes])

    return damage


@pytest.mark.parametrize(
    ("damage", "file", "complaint"),
    [
        (shutil.rmtree, "", "no such corpus folder"),
        (lambda folder: (folder / "meta.json").unlink(), "meta.json", "no such file"),
        (lambda folder: (folder / "tokens.bin").unlink(), "tokens.bin", "no such file"),
        (lambda folder: (folder / "offsets.npy").unlink(), "offsets.npy", "no such file"),
        (cut("tokens.bin", 1), "tokens.bin", "bytes; meta.json calls for"),
        (cut("offsets.npy", 8), "offsets.npy", "not a whole NumPy file"),
        (cut("offsets.npy", 10**6), "offsets.npy", "not a whole NumPy file"),
        (save_offsets(lambda offsets: offsets[:-1]), "offsets.npy", "shape"),
        (save_offsets(lambda offsets: offsets.astype(np.int32)), "offsets.npy", "int32"),
        (save_offsets(lambda offsets: offsets.astype(object)), "offsets.npy", "not a whole"),
        (save_offsets(lambda offsets: offsets + 1), "offsets.npy", "expected 0 to"),
        (save_offsets(lambda offsets: np.maximum(offsets, 1)), "offsets.npy", "runs from 1 to"),
        (save_offsets(backwards), "offsets.npy", "document 3 ends where it begins, or before"),
        (set_meta(tokens=5), "offsets.npy", "expected 0 to 5"),
        (set_meta(dtype="uint32"), "tokens.bin", "as uint32"),
        (set_meta(dtype="float64"), "meta.json", "dtype is 'float64'"),
        (set_meta(format_version=2), "meta.json", "format_version is 2"),
        (set_meta(tokens=None), "meta.json", "tokens missing"),
        (set_meta(vocabulary_sha256="0" * 64), "vocab.txt", "not the vocabulary"),
        (set_meta(documents=-29), "meta.json", "documents is -29"),
        (set_meta(held_out_documents=29), "meta.json", "no documents to train on"),
    ],
)
def test_a_damaged_corpus_is_refused(folder, damage, file, complaint):
    damage(folder)
    with pytest.raises(InputError, match=complaint) as error:
        Corpus.open(folder)
    assert str(error.value).startswith(str(folder / file))
