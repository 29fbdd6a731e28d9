"""Answers in a context: SQuAD's JSON, as BioASQ's factoid questions are also handed around in.

`{"data": [{"paragraphs": [{"context": ..., "qas": [{"id": ..., "question": ..., "answers":
[{"text": ..., "answer_start": ...}]}]}]}]}`. In train the first answer of each is learnt, and
`answer_start` must be where it stands; in devel and test each text counts as right. Every question
has an answer: those of SQuAD 2.0 that have none are refused.

A context that is longer than the window is read in windows that overlap. In a window without the
answer, [CLS] is the answer. Spans of all windows of a question compete by their probability there,
and so do those of all its contexts: BioASQ asks one question of several texts, under the ids
`QUESTION_001`, `QUESTION_002` and so on.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Encoding
from torch import Tensor

from minibert.data.tokenizer import Tokenizer
from minibert.errors import InputError
from minibert.files import file_size, parse_json
from minibert.heads import BOUNDS, BertForQuestionAnswering
from minibert.tasks.scores import answer_scores, normal_form
from minibert.tasks.task import SPLITS, Feature, find_files

# As google-research/bert has them for SQuAD, and BioBERT for BioASQ.
LONGEST_QUESTION, LONGEST_ANSWER = 64, 30  # tokens
OVERLAP = 128  # tokens that a window shares with the one before, or half a window if less
SPANS_OF_A_WINDOW, ANSWERS_OF_A_QUESTION = 20, 5
NUMBERED = re.compile(r"_\d{3}$")


class Question(NamedTuple):
    """A question about one context."""

    name: str  # the same for all contexts of a question
    question: str
    context: str
    answers: list[str]
    start: int | None  # the character where the first answer begins; None outside train


class Window(NamedTuple):
    """The part of a context that a feature holds."""

    question: Question
    begins: int  # where in the feature
    offsets: list[tuple[int, int]]  # characters of each token of the window


class Answer(NamedTuple):
    text: str
    log_probability: float


class QuestionAnswering:
    """The task; see `minibert.tasks.task.Task`."""

    head = BertForQuestionAnswering
    chosen_by = "mrr"
    predictions_file = "predictions_{}.json"
    labels = BOUNDS

    def __init__(self, data: Path, tokenizer: Tokenizer, max_length: int):
        self.files = find_files(data, [".json"])
        self.features: dict[str, list[Feature]] = {}
        self.windows: dict[str, list[Window]] = {}
        self.gold: dict[str, dict[str, list[str]]] = {}  # split -> question -> right answers
        for split in SPLITS:
            questions = read_questions(self.files[split], with_starts=split == "train")
            asked = tokenizer.encode_with_offsets([each.question for each in questions])
            read = tokenizer.encode_with_offsets([each.context for each in questions])
            pairs = [
                pair
                for each, ask, context in zip(questions, asked, read, strict=True)
                for pair in features_of(each, ask.ids, context, tokenizer, max_length)
            ]
            self.features[split] = [feature for feature, _ in pairs]
            self.windows[split] = [window for _, window in pairs]
            self.gold[split] = {}
            for each in questions:
                self.gold[split].setdefault(each.name, []).extend(each.answers)

    def predict(self, split: str, logits: Sequence[Tensor]) -> list[list[Answer]]:
        """The best answers to each question, best first; a text counts once."""
        found: dict[str, dict[str, Answer]] = {name: {} for name in self.gold[split]}
        for window, rows in zip(self.windows[split], logits, strict=True):
            answers = found[window.question.name]
            for answer in best_spans(rows, window):
                known = answers.get(normal_form(answer.text))
                if known is None or known.log_probability < answer.log_probability:
                    answers[normal_form(answer.text)] = answer
        return [
            sorted(answers.values(), key=lambda answer: -answer.log_probability)[
                :ANSWERS_OF_A_QUESTION
            ]
            for answers in found.values()
        ]

    def scores(self, split: str, predictions: list[list[Answer]]) -> dict[str, float]:
        """MRR, strict and lenient accuracy over questions."""
        ranked = [[answer.text for answer in answers] for answers in predictions]
        return answer_scores(list(self.gold[split].values()), ranked)

    def written(self, split: str, predictions: list[list[Answer]]) -> str:
        """JSON: for each question the right answers and ours, best first."""
        content = {
            name: {"right": right, "told": [answer._asdict() for answer in answers]}
            for (name, right), answers in zip(self.gold[split].items(), predictions, strict=True)
        }
        return json.dumps(content, indent=1) + "\n"


def features_of(
    question: Question,
    question_ids: list[int],
    context: Encoding,
    tokenizer: Tokenizer,
    max_length: int,
) -> Iterator[tuple[Feature, Window]]:
    """[CLS] question [SEP] window of the context [SEP], for each window."""
    question_ids = question_ids[: min(LONGEST_QUESTION, (max_length - 3) // 2)]
    room = max_length - len(question_ids) - 3
    begins = len(question_ids) + 2
    answer = answer_tokens(question, context.offsets)
    for first in window_starts(len(context.ids), room):
        ids, offsets = (part[first : first + room] for part in (context.ids, context.offsets))
        input_ids = [tokenizer.cls_id, *question_ids, tokenizer.sep_id, *ids, tokenizer.sep_id]
        token_type_ids = [0] * begins + [1] * (len(ids) + 1)
        labels = [0, 0]  # [CLS]
        if answer and first <= answer[0] and answer[1] < first + len(ids):
            labels = [begins + token - first for token in answer]
        window = Window(question, begins, offsets)
        yield Feature(input_ids, token_type_ids, labels), window


def answer_tokens(question: Question, offsets: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The first and the last token of a context that the learnt answer stands on."""
    if question.start is None:
        return None
    start, end = question.start, question.start + len(question.answers[0])
    tokens = [i for i, (begin, finish) in enumerate(offsets) if finish > start and begin < end]
    return (tokens[0], tokens[-1]) if tokens else None


def window_starts(length: int, room: int) -> list[int]:
    """Where windows begin that cover so many tokens."""
    step = room - min(OVERLAP, room // 2)
    return list(range(0, max(1, length - room + step), step))


def best_spans(logits: Tensor, window: Window) -> list[Answer]:
    """The likeliest spans of a window's context, at most LONGEST_ANSWER tokens each.

    logits (2, S): a span's probability is that of its first token times that of its last.
    """
    n = len(window.offsets)
    if n == 0:
        return []
    here = slice(window.begins, window.begins + n)
    first, last = logits.log_softmax(dim=-1)[:, here]  # (n,) each
    spans = first[:, None] + last[None, :]  # (n, n)
    allowed = spans.new_ones(n, n).triu().tril(LONGEST_ANSWER - 1).bool()  # (n, n)
    spans = spans.masked_fill(~allowed, float("-inf"))
    best = spans.flatten().topk(min(SPANS_OF_A_WINDOW, n))
    answers = []
    for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        begin, end = window.offsets[place // n][0], window.offsets[place % n][1]
        answers.append(Answer(window.question.context[begin:end], value))
    return answers


def read_questions(path: Path, with_starts: bool) -> list[Question]:
    """The questions of a file; with_starts: the first answer of each must stand in the context."""
    if file_size(path) == 0:
        raise InputError(f"{path}: empty")
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    questions = []
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    questions.append(_question(entry, paragraph["context"], path, with_starts))
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: not in the form of SQuAD ({error})") from None
    if not questions:
        raise InputError(f"{path}: no question in it")
    return pooled(questions, path)


def pooled(questions: list[Question], path: Path) -> list[Question]:
    """BioASQ asks a question of several contexts, as ID_001, ID_002, ...: all get the name ID."""
    ids = Counter(question.name for question in questions)
    if repeated := [name for name, count in ids.items() if count > 1]:
        raise InputError(f"{path}: question {repeated[0][:50]!r} stands there twice")
    asked: dict[str, set[str]] = {}
    for question in questions:
        asked.setdefault(NUMBERED.sub("", question.name), set()).add(question.question)
    return [
        question._replace(name=name) if len(asked[name]) == 1 else question
        for question in questions
        for name in [NUMBERED.sub("", question.name)]
    ]


def _question(entry: dict[str, Any], context: str, path: Path, with_starts: bool) -> Question:
    """One entry of `qas`, checked."""
    place = f"{path}: question {str(entry['id'])[:50]!r}"
    texts = [answer["text"] for answer in entry.get("answers", ())]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{place}: expected at least one answer, and no empty one")
    if not isinstance(context, str) or not isinstance(entry["question"], str):
        raise InputError(f"{place}: expected texts as question and context")
    start = entry["answers"][0]["answer_start"] if with_starts else None
    if with_starts and (
        type(start) is not int or start < 0 or not context.startswith(texts[0], start)
    ):
        raise InputError(f"{place}: {texts[0][:50]!r} does not stand at answer_start {start!r}")
    return Question(str(entry["id"]), entry["question"], context, texts, start)
