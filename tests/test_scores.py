"""The figures of tasks are those of the field: seqeval's, scikit-learn's, or counts by hand."""

import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert.tasks.scores import (
    answer_scores,
    class_scores,
    entities,
    entity_scores,
    mean_and_deviation,
)

seqeval_metrics = pytest.importorskip("seqeval.metrics")
sklearn_metrics = pytest.importorskip("sklearn.metrics")

# Ill-formed ones too: I- at the beginning, after O, after another type; types with hyphens.
TAGS = st.sampled_from(["O", "B-Gene", "I-Gene", "B-Drug", "I-Drug", "B-Cell-line", "I-Cell-line"])
SENTENCES = st.lists(
    st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=12), min_size=1, max_size=6
)


@settings(max_examples=500, deadline=None)
@given(SENTENCES)
def test_entity_scores_are_those_of_seqeval(sentences):
    """In its default mode, which is that of conlleval: what is no IOB2 is forgiven."""
    gold = [[right for right, _ in sentence] for sentence in sentences]
    told = [[told for _, told in sentence] for sentence in sentences]
    found = entity_scores(gold, told)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ratios of nothing to nothing
        expected = {
            name: float(getattr(seqeval_metrics, f"{name}_score")(gold, told, zero_division=0))
            for name in ("f1", "precision", "recall")
        }
    assert found == pytest.approx(expected, abs=1e-12)


@settings(max_examples=500, deadline=None)
@given(st.lists(TAGS, max_size=15))
def test_entities_are_those_of_seqeval(tags):
    from seqeval.metrics.sequence_labeling import get_entities

    expected = {(kind, first, last + 1) for kind, first, last in get_entities(tags)}
    assert entities(tags) == expected


def test_entities_by_hand():
    tags = ["I-A", "I-A", "O", "B-A", "B-A", "I-B", "I-B", "B-B"]
    assert entities(tags) == {("A", 0, 2), ("A", 3, 4), ("A", 4, 5), ("B", 5, 7), ("B", 7, 8)}
    assert entities([]) == set()


def test_part_of_an_entity_is_no_entity():
    gold, told = [["B-A", "I-A", "O", "B-A"]], [["B-A", "O", "O", "B-A"]]
    assert entity_scores(gold, told) == {"f1": 0.5, "precision": 0.5, "recall": 0.5}
    assert entity_scores(gold, [["B-B", "I-B", "O", "O"]])["f1"] == 0.0
    assert entity_scores([], []) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


CLASSES = st.sampled_from(["0", "UP", "DOWN", "SAME"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(CLASSES, CLASSES), min_size=1))
def test_class_scores_are_those_of_scikit_learn(pairs):
    gold, told = zip(*pairs, strict=True)
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
        gold, told, labels=["UP", "DOWN", "SAME"], average="micro", zero_division=0
    )
    expected = {"f1": f1, "precision": precision, "recall": recall}
    assert class_scores(gold, told, negative=["0"]) == pytest.approx(expected)


def test_without_a_negative_class_f1_is_accuracy():
    assert class_scores("aabbc", "aabca", negative=["0"]) == {
        "f1": 0.6, "precision": 0.6, "recall": 0.6,
    }  # fmt: skip


def test_answer_scores_by_hand():
    gold = [["p53"], ["BRCA1", "breast cancer 1"], ["insulin"], ["X"]]
    ranked = [
        ["P53 ", "x"],  # the first; case and spaces do not count
        ["a", "b", "breast  Cancer 1"],  # the third
        ["a", "b", "c", "d", "e", "insulin"],  # the sixth is too late
        [],
    ]
    assert answer_scores(gold, ranked) == pytest.approx(
        {"mrr": (1 + 1 / 3) / 4, "strict_accuracy": 1 / 4, "lenient_accuracy": 2 / 4}
    )


def test_mean_and_deviation():
    mean, deviation = mean_and_deviation([0.5, 0.7, 0.9])
    assert mean == pytest.approx(0.7)
    assert deviation == pytest.approx(math.sqrt((0.04 + 0 + 0.04) / 2))
    assert mean_and_deviation([0.25]) == (0.25, 0.0)
