"""Named entities: files are read or refused, long sentences come back whole, words are counted."""

import pytest
from conftest import SPECIAL_TOKENS
from finetune_toys import logits_that_say, ner_data

from minibert.data.tokenizer import load_tokenizer
from minibert.errors import InputError
from minibert.ops.plain import IGNORED_LABEL
from minibert.tasks.ner import Ner, fitting, over_pieces, read_sentences

GOOD = "p53s\tB-Gene\nin\tO\n\nacute\tB-Disease\nillness\tI-Disease\nin\tO\np53\tB-Gene\n"


@pytest.fixture
def tokenizer(tmp_path):
    pieces = ["p", "##53", "##s", "in", "acute", "ill", "##ness"]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *pieces]) + "\n")
    return load_tokenizer(tmp_path / "vocab.txt")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "devel", "test"):
        (folder / f"{split}.tsv").write_text(GOOD)
    return folder


def test_the_first_piece_carries_the_tag(data, tokenizer):
    task = Ner(data, tokenizer, max_length=12)
    assert task.labels == ["O", "B-Disease", "I-Disease", "B-Gene", "I-Gene"]
    first, second = task.features["train"]
    assert [tokenizer.backend.id_to_token(i) for i in first.input_ids] == [
        "[CLS]", "p", "##53", "##s", "in", "[SEP]",
    ]  # fmt: skip
    no = IGNORED_LABEL
    assert first.labels == [no, 3, no, no, 0, no]
    assert second.labels == [no, 1, 2, no, 0, 3, no, no]


@pytest.mark.parametrize("max_length", [3, 5, 7, 19, 60])
def test_split_sentences_are_joined_again(tmp_path, toy_world, max_length):
    """What is read off the windows is the sentence's own tags, in its words' order."""
    task = Ner(ner_data(tmp_path / "data"), load_tokenizer(toy_world), max_length)
    for split, sentences in task.sentences.items():
        assert max(len(feature.input_ids) for feature in task.features[split]) <= max_length
        predictions = task.predict(split, logits_that_say(task, split))
        assert predictions == [sentence.tags for sentence in sentences]
        assert set(task.scores(split, predictions).values()) == {1.0}
    assert (len(task.features["train"]) > len(task.sentences["train"])) == (max_length < 42)


def test_windows_are_cut_between_words():
    assert fitting([3, 1, 2, 2, 4], room=4) == [(0, 2), (2, 4), (4, 5)]
    assert fitting([4, 4], room=4) == [(0, 1), (1, 2)]
    assert fitting([1], room=4) == [(0, 1)]


def test_a_word_longer_than_the_window_keeps_its_first_piece(data, tokenizer):
    task = Ner(data, tokenizer, max_length=4)
    assert [len(feature.input_ids) for feature in task.features["train"]] == [4, 3, 3, 4, 3, 4]
    assert task.predict("test", logits_that_say(task, "test"))[0] == ["B-Gene", "O"]


def test_the_count_over_pieces_is_that_of_the_paper(data, tokenizer):
    """p ##53 ##s, each B-Gene, are three entities there; for the field p53s is one."""
    task = Ner(data, tokenizer, max_length=12)
    told = [["B-Gene", "O"], ["O", "O", "O", "O"]]
    scores = task.scores("test", told)
    assert (scores["precision"], scores["recall"]) == (1.0, 1 / 3)
    gold = [sentence.tags for sentence in task.sentences["test"]]
    assert over_pieces(gold, task.pieces["test"]) == [
        ["B-Gene", "B-Gene", "B-Gene", "O"],
        ["B-Disease", "I-Disease", "I-Disease", "O", "B-Gene", "B-Gene"],
    ]
    assert scores["piece_f1"] == pytest.approx(2 * 3 / (3 + 6))


def test_a_word_that_the_tokenizer_leaves_nothing_of_is_unknown(data, tokenizer):
    (data / "test.tsv").write_text("\u200e\tO\nin\tO\n", encoding="utf-8")
    (feature,) = Ner(data, tokenizer, max_length=12).features["test"]
    assert feature.input_ids[1] == tokenizer.unk_id


def test_predictions_are_written_beside_the_gold(data, tokenizer):
    task = Ner(data, tokenizer, max_length=12)
    told = [["O", "O"], ["B-Gene", "O", "O", "O"]]
    assert task.written("test", told) == (
        "p53s\tB-Gene\tO\nin\tO\tO\n\n"
        "acute\tB-Disease\tB-Gene\nillness\tI-Disease\tO\nin\tO\tO\np53\tB-Gene\tO\n"
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "devel.tsv: empty"),
        ("\n\n \n", "devel.tsv: no words in it"),
        ("p53\tB-Gene\tx\n", "line 1: 3 columns; expected token TAB tag"),
        ("in\tO\np53 B-Gene\n", "line 2: 1 columns; expected token TAB tag"),
        ("\tO\n", "line 1: 2 columns; expected token TAB tag"),
        ("p53\tS-Gene\n", "line 1: tag 'S-Gene'; expected O, B-TYPE or I-TYPE"),
        ("p53\tB\n", "line 1: tag 'B'; expected O, B-TYPE or I-TYPE"),
        ("in\tO\n\np53\tI-Gene\n", "line 3: I-Gene after nothing; in IOB2"),
        ("in\tO\np53\tI-Gene\n", "line 2: I-Gene after O; in IOB2"),
        ("in\tB-Disease\np53\tI-Gene\n", "line 2: I-Gene after B-Disease; in IOB2"),
        ("in\tO\np53\tB-Cell\n", "line 2: tag 'B-Cell'; train.tsv has O, B-Disease"),
    ],
)
def test_what_is_no_iob2_is_refused(data, tokenizer, content, complaint):
    (data / "devel.tsv").write_text(content)
    with pytest.raises(InputError) as refusal:
        Ner(data, tokenizer, max_length=12)
    assert complaint in str(refusal.value)
    assert str(data / "devel.tsv") in str(refusal.value)


def test_text_that_is_not_utf_8_is_refused(data):
    (data / "train.tsv").write_bytes(b"caf\xe9\tO\n")
    with pytest.raises(InputError, match=r"train.tsv: not UTF-8 text \(byte 3\)"):
        read_sentences(data / "train.tsv")


def test_a_corpus_without_an_entity_is_refused(data, tokenizer):
    (data / "train.tsv").write_text("in\tO\n")
    with pytest.raises(InputError, match="no entity in it"):
        Ner(data, tokenizer, max_length=12)


def test_line_ends_of_windows_are_read(data):
    plain = read_sentences(data / "train.tsv")
    (data / "train.tsv").write_bytes(GOOD.replace("\n", "\r\n").encode())
    assert read_sentences(data / "train.tsv") == plain


@pytest.mark.parametrize(
    ("corpus", "sentences", "mentions"),
    [("NCBI-disease", 5424, 5134), ("BC5CDR-chem", 4560, 5203), ("BC5CDR-disease", 4560, 4182)],
)
def test_the_real_corpora_are_read(shared_data, corpus, sentences, mentions):
    train = read_sentences(shared_data / "ner" / f"{corpus}-IOB" / "train.tsv")
    assert len(train) == sentences
    assert sum(tag[0] == "B" for sentence in train for tag in sentence.tags) == mentions


def test_marks_of_editors_and_of_conll_are_no_words(data):
    (data / "test.tsv").write_bytes(
        b"\xef\xbb\xbf-DOCSTART- -X- -X- O\n\np53\tB-Gene\n\n-DOCSTART-\tO\nbinds\tO\n"
    )
    words = [sentence.words for sentence in read_sentences(data / "test.tsv")]
    assert words == [["p53"], ["binds"]]
