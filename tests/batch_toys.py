"""What tests of batches share: corpora that are no files, and a batch taken apart again."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from conftest import SPECIAL_TOKENS

from minibert.data.batches import GlobalBatch, MicroBatch
from minibert.data.corpus import Corpus
from minibert.data.tokenizer import Tokenizer, load_tokenizer


def tokenizer_of(folder: Path, num_words: int, first_special: int = 0) -> Tokenizer:
    """`num_words` words, and five special tokens from the id `first_special` on."""
    words = [f"w{number}" for number in range(num_words)]
    tokens = words[:first_special] + SPECIAL_TOKENS + words[first_special:]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return load_tokenizer(folder / "vocab.txt")


def corpus_of(
    tokenizer: Tokenizer, documents: Sequence[Sequence[int]], held_out: int = 0
) -> Corpus:
    """A corpus of these documents, the last `held_out` of them held out."""
    tokens = np.concatenate([np.array(ids, dtype=np.uint16) for ids in documents])
    offsets = np.cumsum([0, *map(len, documents)])
    meta = {"documents": len(documents), "held_out_documents": held_out, "corpus_sha256": "0"}
    return Corpus(Path("toy"), meta, tokenizer, tokens, offsets)


def rows(batch: GlobalBatch) -> Iterator[tuple[list[int], dict[int, int]]]:
    """Every sequence of a global batch, without padding: (ids, {place: label})."""
    return rows_of(batch.micro_batches)


def rows_of(micro_batches: list[MicroBatch]) -> Iterator[tuple[list[int], dict[int, int]]]:
    """The same of some micro-batches."""
    for micro_batch in micro_batches:
        S = micro_batch.input_ids.shape[1]
        labels = dict(
            zip(micro_batch.masked_positions.tolist(), micro_batch.labels.tolist(), strict=True)
        )
        for number, (ids, mask) in enumerate(
            zip(micro_batch.input_ids, micro_batch.attention_mask, strict=True)
        ):
            length = int(mask.sum())
            assert mask[:length].all(), "real tokens come first"
            places = {p - number * S: label for p, label in labels.items() if p // S == number}
            yield ids[:length].tolist(), places


def same(batch: MicroBatch, other: MicroBatch) -> bool:
    """Whether two micro-batches hold the same, to the last number."""
    pairs = zip(batch, other, strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def original(corpus: Corpus, ids: list[int], places: dict[int, int]) -> list[int]:
    """The sequence before masking, [CLS] and [SEP] taken off."""
    ids = [places.get(place, token) for place, token in enumerate(ids)]
    assert ids[0] == corpus.tokenizer.cls_id
    assert ids[-1] == corpus.tokenizer.sep_id
    return ids[1:-1]
