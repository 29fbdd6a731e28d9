"""The tokenizer is BERT's, its special ids are looked up, and its files name one vocabulary."""

import itertools
import json

import pytest

from minibert.data.pubmed import read_documents
from minibert.data.tokenizer import load_tokenizer
from minibert.errors import InputError

# No special token stands where the usual vocabularies have it.
VOCABULARY = [
    "the", "gene", "[MASK]", "BRCA", "##1", "[SEP]", "-", "[CLS]", "[", "]", "PA", "##D",
    "[UNK]", "[PAD]", "β", "(", ")", "H", "##2", "##O", "中", "中文", "Gene",
]  # fmt: skip


@pytest.fixture
def vocab_file(tmp_path):
    return write_vocabulary(tmp_path / "vocab.txt", VOCABULARY)


def write_vocabulary(path, tokens):
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def pieces(tokenizer, text):
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode_batch([text])[0]]


def test_special_ids_are_found_by_name(vocab_file):
    tokenizer = load_tokenizer(vocab_file)
    assert tokenizer.vocab_size == len(VOCABULARY)
    assert tokenizer.special_ids == (13, 12, 7, 5, 2)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id) == (13, 12, 7)
    assert (tokenizer.sep_id, tokenizer.mask_id) == (5, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the BRCA1-gene", "the BRCA ##1 - gene"),
        ("The Gene", "[UNK] Gene"),  # cased
        ("  H2O\n(β)\t", "H ##2 ##O ( β )"),
        ("ge\u200bne\x00 the", "gene the"),  # zero-width and control characters go
        ("gene中文the", "gene 中 [UNK] the"),  # each CJK character is a word
        ("H" + "2" * 99, "H" + " ##2" * 99),
        ("H" + "2" * 100, "[UNK]"),  # more than 100 characters
        ("", ""),
    ],
)
def test_text_is_split_as_bert_splits_it(vocab_file, text, expected):
    assert pieces(load_tokenizer(vocab_file), text) == expected.split()


def test_what_looks_like_a_special_token_is_text(vocab_file, tmp_path):
    expected = ["the", "[", "PA", "##D", "]", "gene"]
    tokenizer = load_tokenizer(vocab_file)
    assert pieces(tokenizer, "the [PAD] gene") == expected
    tokenizer.backend.add_special_tokens(["[PAD]", "[MASK]"])
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    assert pieces(load_tokenizer(tmp_path / "tokenizer.json"), "the [PAD] gene") == expected


def test_nothing_is_added_cut_off_or_padded(vocab_file, tmp_path):
    backend = load_tokenizer(vocab_file).backend
    backend.enable_truncation(3)
    backend.enable_padding(pad_id=13, pad_token="[PAD]", length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode_batch(["gene " * 7, "the"]) == [[1] * 7, [0]]


def test_both_kinds_of_file_name_the_same_vocabulary(vocab_file, tmp_path):
    from_text = load_tokenizer(vocab_file)
    from_text.backend.save(str(tmp_path / "tokenizer.json"))
    from_json = load_tokenizer(tmp_path / "tokenizer.json")
    assert from_json.vocabulary_sha256 == from_text.vocabulary_sha256
    assert from_json.special_ids == from_text.special_ids
    swapped = [VOCABULARY[1], VOCABULARY[0], *VOCABULARY[2:]]
    other = load_tokenizer(write_vocabulary(tmp_path / "swapped.txt", swapped))
    assert other.vocabulary_sha256 != from_text.vocabulary_sha256


def test_an_id_without_a_token_counts(vocab_file, tmp_path):
    load_tokenizer(vocab_file).backend.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["late"] = 40
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path / "tokenizer.json").vocab_size == 41


def test_a_folder_prefers_tokenizer_json(vocab_file, tmp_path):
    assert load_tokenizer(tmp_path).source == tmp_path / "vocab.txt"
    load_tokenizer(vocab_file).backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).source == tmp_path / "tokenizer.json"


def test_saved_under_the_standard_name(tmp_path):
    source = write_vocabulary(tmp_path / "bert-vocabulary.txt", VOCABULARY)
    (tmp_path / "model").mkdir()
    load_tokenizer(source).save(tmp_path / "model")
    assert (tmp_path / "model" / "vocab.txt").read_bytes() == source.read_bytes()
    load_tokenizer(tmp_path / "model").backend.save(str(tmp_path / "any.json"))
    load_tokenizer(tmp_path / "any.json").save(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").source == tmp_path / "model" / "tokenizer.json"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\nword\n", r"no \[SEP\] \[MASK\]"),
        ("vocab.txt", b"one\ntwo\none\n", "line 3 repeats 'one' of line 1"),
        ("vocab.txt", b"", "empty"),
        ("vocab.txt", b"gr\xfcn\n", "not UTF-8"),
        ("tokenizer.json", b'{"version": "1.0"', "not a readable tokenizer.json"),
        ("tokenizer.json", b"{}", "not a readable tokenizer.json"),
        ("tokenizer.json", b"\xff", "not a readable tokenizer.json"),
        ("model.bin", b"", "expected a vocab.txt or a tokenizer.json"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: .*{complaint}"):
        load_tokenizer(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt: no such"):
        load_tokenizer(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="neither"):
        load_tokenizer(tmp_path)


def test_real_files_agree(shared_data):
    from_json = load_tokenizer(shared_data / "rxnfp")
    assert from_json.source.name == "tokenizer.json"
    from_text = load_tokenizer(shared_data / "rxnfp" / "vocab.txt")
    assert from_json.vocabulary_sha256 == from_text.vocabulary_sha256
    assert from_json.special_ids == from_text.special_ids == (0, 11, 12, 13, 14)
    assert load_tokenizer(shared_data / "vocab").special_ids == (0, 100, 101, 102, 103)


def test_equals_hugging_face_on_real_text(shared_data):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.BertTokenizerFast.from_pretrained(
        shared_data / "vocab", do_lower_case=False
    )
    abstracts = read_documents(shared_data / "pubmed-text" / "pubmed_abstracts_en.tsv.gz")
    texts = [text for _, text in itertools.islice(abstracts, 300)]
    texts += [
        "naïve Ångström 中文",
        "μ-opioid\u00ad ﬁbre",
        "a\u2009b\u200bc\ufeff",
        "x" * 101,
        "😀 é",
    ]
    expected = oracle(texts, add_special_tokens=False, truncation=False)["input_ids"]
    assert load_tokenizer(shared_data / "vocab").encode_batch(texts) == expected
