"""Answers: files are read or refused, windows cover a context, the likeliest spans are found."""

import json
from itertools import pairwise

import pytest
import torch
from conftest import SPECIAL_TOKENS
from finetune_toys import logits_that_say, qa_data

from minibert.data.tokenizer import load_tokenizer
from minibert.errors import InputError
from minibert.tasks.qa import (
    LONGEST_ANSWER,
    Question,
    QuestionAnswering,
    Window,
    best_spans,
    read_questions,
    window_starts,
)


@pytest.fixture
def tokenizer(tmp_path):
    pieces = ["the", "gene", "p", "##53", "is", "which", "?", ".", "TP", "##5", "##3"]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *pieces]) + "\n")
    return load_tokenizer(tmp_path / "vocab.txt")


def entry(name="q1", question="which gene?", answers=(("p53", 4),)) -> dict:
    return {
        "id": name,
        "question": question,
        "answers": [{"text": text, "answer_start": start} for text, start in answers],
    }


def write(folder, *paragraphs: tuple[str, list[dict]], splits=("train", "devel", "test")):
    folder.mkdir(exist_ok=True)
    content = {"data": [{"paragraphs": [{"context": c, "qas": qas} for c, qas in paragraphs]}]}
    for split in splits:
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def test_a_feature_is_question_and_context(tmp_path, tokenizer):
    data = write(tmp_path / "data", ("the p53 gene.", [entry()]))
    task = QuestionAnswering(data, tokenizer, max_length=20)
    (feature,) = task.features["train"]
    tokens = " ".join(tokenizer.backend.id_to_token(i) for i in feature.input_ids)
    assert tokens == "[CLS] which gene ? [SEP] the p ##53 gene . [SEP]"
    assert feature.token_type_ids == [0] * 5 + [1] * 6
    assert feature.labels == [6, 7]


@pytest.mark.parametrize("max_length", [11, 19, 70])
def test_what_windows_say_comes_back(tmp_path, toy_world, max_length):
    """Logits that point at the answer, or at [CLS] where a window lacks it, give the answer."""
    task = QuestionAnswering(qa_data(tmp_path / "data"), load_tokenizer(toy_world), max_length)
    predictions = task.predict("train", logits_that_say(task, "train"))
    assert task.scores("train", predictions) == {
        "mrr": 1.0, "strict_accuracy": 1.0, "lenient_accuracy": 1.0,
    }  # fmt: skip
    assert max(len(feature.input_ids) for feature in task.features["train"]) <= max_length
    for feature, window in zip(task.features["train"], task.windows["train"], strict=True):
        first, last = (label - window.begins for label in feature.labels)
        if feature.labels != [0, 0]:
            start, end = window.offsets[first][0], window.offsets[last][1]
            assert window.question.context[start:end] == window.question.answers[0]
    assert all(len(answers) <= 5 for answers in predictions)


@pytest.mark.parametrize(("length", "room"), [(0, 7), (6, 7), (7, 7), (8, 7), (50, 7), (700, 320)])
def test_windows_cover_a_context_and_overlap(length, room):
    starts = window_starts(length, room)
    covered = [range(start, min(length, start + room)) for start in starts]
    assert set().union(*covered) == set(range(length))
    overlap = min(128, room // 2)
    assert all(later - earlier == room - overlap for earlier, later in pairwise(starts))
    assert len(starts) == 1 or starts[-2] + room < length  # the last is needed


def test_the_likeliest_span_by_search():
    """Every span of at most LONGEST_ANSWER tokens, looked at one by one."""
    generator = torch.Generator().manual_seed(3)
    n, begins = 43, 5
    logits = torch.randn(2, begins + n + 1, generator=generator)
    question = Question("q", "?", "".join(chr(97 + i % 26) for i in range(n)), ["a"], None)
    window = Window(question, begins, [(i, i + 1) for i in range(n)])
    logs = logits.log_softmax(-1)
    spans = {
        (i, j): (logs[0, begins + i] + logs[1, begins + j]).item()
        for i in range(n)
        for j in range(i, min(n, i + LONGEST_ANSWER))
    }
    expected = sorted(spans.items(), key=lambda item: -item[1])[:20]
    found = best_spans(logits, window)
    assert [answer.text for answer in found] == [
        question.context[i : j + 1] for (i, j), _ in expected
    ]
    assert [answer.log_probability for answer in found] == pytest.approx([v for _, v in expected])


def test_contexts_of_one_question_compete(tmp_path, tokenizer):
    """BioASQ asks one question of several texts; each right answer counts for all of them."""
    data = write(
        tmp_path / "data",
        ("the p53 gene.", [entry("54d6_001")]),
        ("which is TP53.", [entry("54d6_002", answers=[("TP53", 9)])]),
        ("the gene.", [entry("99", answers=[("the", 0)])]),
    )
    task = QuestionAnswering(data, tokenizer, max_length=20)
    assert task.gold["test"] == {"54d6": ["p53", "TP53"], "99": ["the"]}
    logits = logits_that_say(task, "train")
    logits[1] *= 2  # surer
    answers, _ = task.predict("train", logits)
    assert [answer.text for answer in answers[:2]] == ["TP53", "p53"]
    written = json.loads(task.written("train", [answers, []]))
    assert written["54d6"]["right"] == ["p53", "TP53"]
    assert written["54d6"]["told"][0]["text"] == "TP53"


def test_a_text_counts_once_however_often_it_stands(tmp_path, tokenizer):
    data = write(tmp_path / "data", ("p53 is P53 the  p53", [entry(answers=[("p53", 0)])]))
    task = QuestionAnswering(data, tokenizer, max_length=30)
    (answers,) = task.predict("train", logits_that_say(task, "train"))
    texts = [answer.text.lower() for answer in answers]
    assert len(set(texts)) == len(texts) == 5
    assert answers[0].text == "p53"


@pytest.mark.parametrize("sure", [0, 1])
def test_a_text_has_the_probability_of_its_likeliest_place(tmp_path, tokenizer, sure):
    contexts = [("the p53 gene.", [entry(f"7_00{number}")]) for number in (1, 2)]
    task = QuestionAnswering(write(tmp_path / "data", *contexts), tokenizer, max_length=20)
    logits = logits_that_say(task, "train")
    logits[1 - sure] *= 0.1
    ((first, *others),) = task.predict("train", logits)
    assert first.text == "p53" and first.log_probability > -0.1
    assert all(other.log_probability < first.log_probability for other in others)


@pytest.mark.parametrize("length", [LONGEST_ANSWER, LONGEST_ANSWER + 1])
def test_the_longest_answer(length):
    n = LONGEST_ANSWER + 9
    logits = torch.zeros(2, n)
    logits[0, 3], logits[1, 3 + length - 1] = 50.0, 50.0
    question = Question("q", "?", "".join(chr(65 + i) for i in range(n)), ["a"], None)
    best = best_spans(logits, Window(question, 0, [(i, i + 1) for i in range(n)]))[0]
    assert (len(best.text) == length) == (length == LONGEST_ANSWER)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "train.json: empty"),
        ("{", "train.json: not readable as JSON"),
        ('{"questions": []}', "train.json: not in the form of SQuAD"),
        ('{"data": [{"paragraphs": 3}]}', "train.json: not in the form of SQuAD"),
        ('{"data": []}', "train.json: no question in it"),
    ],
)
def test_what_is_not_squad_is_refused(tmp_path, content, complaint):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(InputError, match=complaint):
        read_questions(tmp_path / "train.json", with_starts=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answers": []}, "question 'q1': expected at least one answer"),
        ({"answers": [{"text": " ", "answer_start": 3}]}, "question 'q1': expected at least one"),
        (
            {"answers": [{"text": "p53", "answer_start": 5}]},
            "'p53' does not stand at answer_start 5",
        ),
        ({"answers": [{"text": "p53", "answer_start": -9}]}, "does not stand at answer_start -9"),
        ({"answers": [{"text": "p53"}]}, "not in the form of SQuAD"),
        ({"question": 7}, "question 'q1': expected texts"),
    ],
)
def test_a_question_that_cannot_be_learnt_is_refused(tmp_path, change, complaint):
    data = write(tmp_path / "data", ("the p53 gene.", [entry() | change]))
    with pytest.raises(InputError, match=complaint):
        read_questions(data / "train.json", with_starts=True)


def test_where_the_answer_stands_is_asked_of_train_alone(tmp_path):
    data = write(tmp_path / "data", ("the gene.", [entry() | {"answers": [{"text": "p53"}]}]))
    (question,) = read_questions(data / "test.json", with_starts=False)
    assert question.answers == ["p53"] and question.start is None


def test_only_contexts_of_the_same_question_are_pooled(tmp_path):
    questions = [entry(f"q_{n:03}", text) for n, text in enumerate(("which?", "which?", "is it?"))]
    data = write(tmp_path, ("the p53 gene", [*questions[:2], entry("r_1"), entry("r_2")]))
    names = [question.name for question in read_questions(data / "test.json", False)]
    assert names == ["q", "q", "r_1", "r_2"]
    write(tmp_path, ("the p53 gene", questions))
    names = [question.name for question in read_questions(data / "test.json", False)]
    assert names == ["q_000", "q_001", "q_002"]


def test_a_question_that_stands_there_twice_is_refused(tmp_path):
    write(tmp_path, ("the p53 gene", [entry(), entry()]))
    with pytest.raises(InputError, match="'q1' stands there twice"):
        read_questions(tmp_path / "test.json", False)
