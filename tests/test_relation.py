"""Relations: both forms of file are read or refused, marks stay in sight, positives count."""

import json

import pytest
from conftest import SPECIAL_TOKENS
from finetune_toys import logits_that_say, relation_data

from minibert.data.tokenizer import load_tokenizer
from minibert.errors import InputError
from minibert.tasks.relation import (
    GROUP_OF,
    Relation,
    around_marks,
    read_columns,
    read_objects,
)


@pytest.fixture
def tokenizer(tmp_path):
    signs = ["<", ">", "[", "]", "@", "$", "gene", "GENE", "a", "b", "drug"]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *signs]) + "\n")
    return load_tokenizer(tmp_path / "vocab.txt")


def write(folder, ending: str, *examples: tuple[str, object]) -> None:
    """The same examples as all three splits."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "devel", "test"):
        lines = [
            json.dumps({"text": text, "label": label}) if ending == "jsonl" else f"{text}\t{label}"
            for text, label in examples
        ]
        (folder / f"{split}.{ending}").write_text("\n".join(lines) + "\n")


def test_a_text_is_one_feature(tmp_path, tokenizer):
    write(tmp_path / "data", "jsonl", ("<< gene >> a [[ drug ]]", "UP"), ("a gene", "false"))
    task = Relation(tmp_path / "data", tokenizer, max_length=17)
    assert task.labels == ["UP", "false"]
    feature = task.features["devel"][0]
    tokens = " ".join(tokenizer.backend.id_to_token(i) for i in feature.input_ids)
    assert tokens == "[CLS] < < gene > > a [ [ drug ] ] [SEP]"
    assert feature.labels == [0]
    assert task.features["devel"][1].labels == [1]


def test_predictions_are_scored_and_written(tmp_path, toy_world):
    task = Relation(relation_data(tmp_path / "data"), load_tokenizer(toy_world), max_length=19)
    predictions = task.predict("test", logits_that_say(task, "test"))
    assert set(task.scores("test", predictions).values()) == {1.0}
    written = [json.loads(line) for line in task.written("test", predictions).splitlines()]
    assert [line["predicted"] for line in written] == [line["label"] for line in written]
    assert 0.99 < written[0]["probability"] <= 1


def test_negative_classes_do_not_count(tmp_path, tokenizer):
    write(tmp_path / "data", "jsonl", ("a", "false"), ("b", "UP"), ("a b", "DOWN"), ("b a", "UP"))
    task = Relation(tmp_path / "data", tokenizer, max_length=9)
    told = [("false", 1.0), ("UP", 1.0), ("UP", 1.0), ("false", 1.0)]
    scores = task.scores("test", told)
    assert scores == {"f1": 2 / 5, "precision": 1 / 2, "recall": 1 / 3}


def test_binary_counts_the_positive_class(tmp_path, tokenizer):
    """As GAD: labels 0 and 1, in JSON as numbers too."""
    write(tmp_path / "data", "jsonl", ("a", 0), ("b", 1), ("a b", 1), ("b a", 0))
    task = Relation(tmp_path / "data", tokenizer, max_length=9)
    told = [("1", 1.0), ("1", 1.0), ("0", 1.0), ("0", 1.0)]
    assert task.scores("test", told) == {"f1": 0.5, "precision": 0.5, "recall": 0.5}


def test_columns_come_in_two_forms(tmp_path):
    """GAD's train has text and label; its test a heading, and an index before."""
    (tmp_path / "two.tsv").write_text("a @GENE$\t1\nb\t0\n")
    (tmp_path / "three.tsv").write_text("index\tsentence\tlabel\n7\ta @GENE$\t1\n8\tb\t0\n")
    two, three = read_columns(tmp_path / "two.tsv"), read_columns(tmp_path / "three.tsv")
    assert list(two.values()) == list(three.values())
    assert (list(two), list(three)) == ([1, 2], [2, 3])


def test_a_long_text_keeps_what_is_marked():
    words = ["w"] * 20 + ["<<", "g", ">>"] + ["v"] * 3 + ["[[", "d", "]]"] + ["u"] * 20
    text, offsets, position = " ".join(words), [], 0
    for word in words:
        offsets.append((position, position + len(word)))
        position += len(word) + 1
    marked = slice(20, 29)
    assert around_marks(text, offsets, room=60) == slice(None)
    assert around_marks(text, offsets, room=15) == slice(17, 32)
    assert around_marks(text, offsets, room=9) == marked
    assert around_marks(text, offsets, room=5) == slice(20, 25)  # too far apart
    assert around_marks(text, offsets, room=45) == slice(2, 47)
    assert around_marks(text.replace("<", "x").replace("[", "x"), offsets, 15) == slice(15)


def test_marks_at_an_end_of_a_long_text():
    offsets = [(2 * i, 2 * i + 1) for i in range(30)]
    first = "<<a>>" + "b" * 55
    assert around_marks(first, offsets, room=10) == slice(0, 10)
    assert around_marks(first[::-1].replace(">", "]").replace("<", "["), offsets, 10) == slice(10)
    assert around_marks("b" * 50 + "@GENE$" + "bbb", offsets, room=10) == slice(20, 30)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "test.jsonl: empty"),
        ("\n \n", "test.jsonl: empty lines alone; expected examples"),
        ('{"text": "a", "label": "UP"}\n{"text"\n', "line 2: not readable as JSON"),
        ('{"text": "a"}\n', "line 1: expected an object with text and label"),
        ('{"text": "a", "label": 1.5}\n', "line 1: expected an object with text and label"),
        ('["a", "UP"]\n', "line 1: expected an object with text and label"),
        ('{"text": " ", "label": "UP"}\n', "line 1: an empty text or label"),
        ('{"text": "a", "label": "SIDEWAYS"}\n', "line 1: label 'SIDEWAYS'; train.jsonl has UP"),
    ],
)
def test_what_is_no_example_is_refused(tmp_path, tokenizer, content, complaint):
    data = tmp_path / "data"
    write(data, "jsonl", ("a", "UP"), ("b", "false"))
    (data / "test.jsonl").write_text(content)
    with pytest.raises(InputError) as refusal:
        Relation(data, tokenizer, max_length=9)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("a\n", "line 1: 1 columns; expected text TAB label"),
        ("a\tb\tc\td\n", "line 1: 4 columns"),
        ("sentence\tlabel\n", "a heading alone"),
    ],
)
def test_columns_that_are_no_examples_are_refused(tmp_path, content, complaint):
    (tmp_path / "test.tsv").write_text(content)
    with pytest.raises(InputError, match=complaint):
        read_columns(tmp_path / "test.tsv")


def test_one_class_is_nothing_to_learn(tmp_path, tokenizer):
    write(tmp_path / "data", "tsv", ("a", "1"), ("b", "1"))
    with pytest.raises(InputError, match="one class, '1'; expected several"):
        Relation(tmp_path / "data", tokenizer, max_length=9)


def test_chemprot_is_read_and_grouped(shared_data):
    train = list(read_objects(shared_data / "re" / "train.jsonl").values())
    assert len(train) == 4169
    assert {example.label for example in train} == set(GROUP_OF)  # no negative class among them
    assert set(GROUP_OF.values()) == {"CPR:3", "CPR:4", "CPR:5", "CPR:6", "CPR:9"}


def test_groups_count_where_the_classes_are_chemprots(tmp_path, tokenizer):
    write(
        tmp_path / "data", "jsonl", ("a", "AGONIST"), ("b", "AGONIST-ACTIVATOR"), ("c", "INHIBITOR")
    )
    task = Relation(tmp_path / "data", tokenizer, max_length=9)
    scores = task.scores("test", [("AGONIST", 1.0), ("AGONIST", 1.0), ("AGONIST", 1.0)])
    assert scores["f1"] == pytest.approx(1 / 3)
    assert scores["group_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("negative", ["CPR:10", "cpr:0", "CPR:8", "FALSE", "No", "None"])
def test_what_corpora_call_no_relation(tmp_path, tokenizer, negative):
    """Told for everything, it is no hit; whatever the case of its letters."""
    write(tmp_path / "data", "jsonl", ("a", "CPR:3"), ("b", negative))
    task = Relation(tmp_path / "data", tokenizer, max_length=9)
    assert task.scores("test", [(negative, 1.0)] * 2)["f1"] == 0
    assert task.scores("test", [("CPR:3", 1.0), (negative, 1.0)])["f1"] == 1


def test_empty_lines_are_no_examples(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('\ufeff{"text": "a", "label": "x"}\n\n{"text": "b", "label": "y"}\n\n')
    assert list(read_objects(path)) == [1, 3]
