"""The figures of tasks: entities, classes, answers. Plain counting, no tensors.

Each is tested against seqeval or against counts made by hand. A ratio of nothing to nothing is 0.
"""

import math
from collections.abc import Sequence


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities in a sentence's tags as (type, first, one past the last).

    By the rule of CoNLL's `conlleval`, which forgives what is no IOB2: B- begins an entity, and so
    does I- where none of its type is open (Tjong Kim Sang and De Meulder, CoNLL 2003).
    """
    found = set()
    open_type, first = None, 0
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, entity_type = tag.partition("-")
        if open_type is not None and (prefix != "I" or entity_type != open_type):
            found.add((open_type, first, position))
            open_type = None
        if prefix != "O" and open_type is None:
            open_type, first = entity_type, position
    return found


def entity_scores(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Micro precision, recall and F1 of entities over sentences of tags.

    An entity is right where type, beginning and end are.
    """
    correct = num_predicted = num_gold = 0
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        assert len(gold_tags) == len(predicted_tags), "a tag for each word"
        gold_entities, predicted_entities = entities(gold_tags), entities(predicted_tags)
        correct += len(gold_entities & predicted_entities)
        num_predicted += len(predicted_entities)
        num_gold += len(gold_entities)
    return precision_recall_f1(correct, num_predicted, num_gold)


def class_scores(
    gold: Sequence[str], predicted: Sequence[str], negative: Sequence[str]
) -> dict[str, float]:
    """Micro precision, recall and F1 over all classes but the `negative` ones.

    Where no class is negative the three are one, the accuracy.
    """
    pairs = list(zip(gold, predicted, strict=True))
    correct = sum(right == told and right not in negative for right, told in pairs)
    num_predicted = sum(told not in negative for _, told in pairs)
    num_gold = sum(right not in negative for right, _ in pairs)
    return precision_recall_f1(correct, num_predicted, num_gold)


def precision_recall_f1(correct: int, num_predicted: int, num_gold: int) -> dict[str, float]:
    """F1 = 2 P R / (P + R), written without the quotients that may be of nothing."""
    return {
        "f1": ratio(2 * correct, num_predicted + num_gold),
        "precision": ratio(correct, num_predicted),
        "recall": ratio(correct, num_gold),
    }


def answer_scores(
    gold: Sequence[Sequence[str]], ranked: Sequence[Sequence[str]]
) -> dict[str, float]:
    """BioASQ's figures for factoid questions: the answers that count, and ours, best first.

    Strict accuracy: the first is right. Lenient: one of the first five is. MRR: the mean of
    1 / rank of the first right one among the five. Case and amount of white space do not count.
    """
    ranks = []
    for right, told in zip(gold, ranked, strict=True):
        wanted = {normal_form(answer) for answer in right}
        hits = [rank for rank, text in enumerate(told[:5], 1) if normal_form(text) in wanted]
        ranks.append(min(hits, default=math.inf))
    return {
        "mrr": ratio(sum(1 / rank for rank in ranks), len(ranks)),
        "strict_accuracy": ratio(sum(rank == 1 for rank in ranks), len(ranks)),
        "lenient_accuracy": ratio(sum(rank <= 5 for rank in ranks), len(ranks)),
    }


def normal_form(answer: str) -> str:
    """`Beta  Catenin ` and `beta catenin` are one answer."""
    return " ".join(answer.lower().split())


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation of a sample (n - 1; 0 for a single value)."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
