"""Named entities: `token TAB tag` files, a tag for each word, F1 of entities.

The tag of a word is learnt and read at its first piece. A sentence that is longer than the window
is cut between words, and its parts are joined again before anything is counted.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from minibert.data.tokenizer import Tokenizer
from minibert.errors import InputError
from minibert.heads import BertForTokenClassification
from minibert.ops.plain import IGNORED_LABEL
from minibert.tasks.scores import entity_scores
from minibert.tasks.task import SPLITS, Feature, find_files, read_lines

TAG = re.compile(r"O|[BI]-\S+")


class Sentence(NamedTuple):
    words: list[str]
    tags: list[str]
    first_line: int  # of the file, from 1


class Ner:
    """The task; see `minibert.tasks.task.Task`."""

    head = BertForTokenClassification
    chosen_by = "f1"
    predictions_file = "predictions_{}.tsv"

    def __init__(self, data: Path, tokenizer: Tokenizer, max_length: int):
        self.files = find_files(data, [".tsv"])
        self.sentences = {split: read_sentences(self.files[split]) for split in SPLITS}
        self.labels = self._labels()
        self.pieces: dict[str, list[list[list[int]]]] = {}  # split -> sentence -> word -> ids
        self.features: dict[str, list[Feature]] = {}
        for split, sentences in self.sentences.items():
            pieces = [pieces_of(sentence.words, tokenizer) for sentence in sentences]
            self.pieces[split] = pieces
            self.features[split] = [
                feature
                for sentence, words in zip(sentences, pieces, strict=True)
                for feature in self._windows(words, sentence.tags, tokenizer, max_length)
            ]

    def _labels(self) -> list[str]:
        """O, and B- and I- of each type in train; what devel and test have beyond is refused."""
        tags = {tag for sentence in self.sentences["train"] for tag in sentence.tags}
        types = sorted({tag[2:] for tag in tags - {"O"}})
        if not types:
            raise InputError(f"{self.files['train']}: no entity in it; every tag is O")
        labels = ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]
        for split in ("devel", "test"):
            for sentence in self.sentences[split]:
                for line, tag in enumerate(sentence.tags, sentence.first_line):
                    if tag not in labels:
                        raise InputError(
                            f"{self.files[split]}: line {line}: tag {tag!r}; "
                            f"{self.files['train'].name} has {', '.join(labels)}"
                        )
        return labels

    def _windows(
        self, words: list[list[int]], tags: list[str], tokenizer: Tokenizer, max_length: int
    ) -> Iterator[Feature]:
        """A sentence as one feature, or several where it does not fit into one."""
        room = max_length - 2  # for [CLS] and [SEP]
        words = [pieces[:room] for pieces in words]
        for first, end in fitting(list(map(len, words)), room):
            input_ids = [tokenizer.cls_id, *chain(*words[first:end]), tokenizer.sep_id]
            labels = [IGNORED_LABEL]
            for pieces, tag in zip(words[first:end], tags[first:end], strict=True):
                labels += [self.labels.index(tag)] + [IGNORED_LABEL] * (len(pieces) - 1)
            yield Feature(input_ids, [0] * len(input_ids), [*labels, IGNORED_LABEL])

    def predict(self, split: str, logits: Sequence[Tensor]) -> list[list[str]]:
        """The tags of each sentence, its parts joined."""
        told = (
            self.labels[choice]
            for feature, rows in zip(self.features[split], logits, strict=True)
            for choice, label in zip(rows.argmax(dim=-1).tolist(), feature.labels, strict=True)
            if label != IGNORED_LABEL
        )
        return [list(islice(told, len(sentence.words))) for sentence in self.sentences[split]]

    def scores(self, split: str, predictions: list[list[str]]) -> dict[str, float]:
        """Entities on words; `piece_f1`: as the paper's script counts, see `over_pieces`."""
        gold = [sentence.tags for sentence in self.sentences[split]]
        piece_scores = entity_scores(
            over_pieces(gold, self.pieces[split]), over_pieces(predictions, self.pieces[split])
        )
        return entity_scores(gold, predictions) | {"piece_f1": piece_scores["f1"]}

    def written(self, split: str, predictions: list[list[str]]) -> str:
        """`token TAB tag TAB predicted tag`, sentences apart."""
        blocks = (
            "".join(
                f"{word}\t{tag}\t{told}\n"
                for word, tag, told in zip(sentence.words, sentence.tags, tags, strict=True)
            )
            for sentence, tags in zip(self.sentences[split], predictions, strict=True)
        )
        return "\n".join(blocks)


def over_pieces(tags: list[list[str]], pieces: list[list[list[int]]]) -> list[list[str]]:
    """Every word piece with its word's tag, which is how the paper's script scores.

    A first word of an entity that is cut into three pieces counts as three entities there, for
    each piece has a B-: long words count more, and the figure is not one of entities.
    """
    return [
        [tag for tag, word in zip(sentence_tags, words, strict=True) for _ in word]
        for sentence_tags, words in zip(tags, pieces, strict=True)
    ]


def pieces_of(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The pieces of each word; [UNK] for one that the tokenizer leaves nothing of."""
    return [ids or [tokenizer.unk_id] for ids in tokenizer.encode_batch(words)]


def fitting(lengths: list[int], room: int) -> list[tuple[int, int]]:
    """Neighbours taken together as long as they fit into `room`: (first, one past the last)."""
    windows, first = [], 0
    ends = list(accumulate(lengths))
    for number, end in enumerate(ends):
        if end - (ends[first - 1] if first else 0) > room:
            windows.append((first, number))
            first = number
    return [*windows, (first, len(lengths))]


def read_sentences(path: Path) -> list[Sentence]:
    """The sentences of a `token TAB tag` file, IOB2, an empty line between two of them."""
    sentences: list[Sentence] = []
    before = ""  # the line before; empty at the beginning of a sentence
    for number, line in enumerate(read_lines(path), start=1):
        if line.startswith("-DOCSTART-"):  # CoNLL's line between two documents
            line = ""
        if line.strip(" "):
            if not before:
                sentences.append(Sentence([], [], number))
            word, tag = _word_and_tag(line, f"{path}: line {number}")
            tags = sentences[-1].tags
            if tag[0] == "I" and (not tags or tags[-1][1:] != tag[1:]):
                raise InputError(
                    f"{path}: line {number}: {tag} after {tags[-1] if tags else 'nothing'}; "
                    f"in IOB2 an entity begins with B-"
                )
            sentences[-1].words.append(word)
            tags.append(tag)
        before = line.strip(" ")
    if not sentences:
        raise InputError(f"{path}: no words in it")
    return sentences


def _word_and_tag(line: str, place: str) -> tuple[str, str]:
    columns = line.split("\t")
    if len(columns) != 2 or not columns[0]:
        raise InputError(f"{place}: {len(columns)} columns; expected token TAB tag")
    word, tag = columns[0], columns[1].strip()
    if not TAG.fullmatch(tag):
        raise InputError(f"{place}: tag {tag[:50]!r}; expected O, B-TYPE or I-TYPE")
    return word, tag
