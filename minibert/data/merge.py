"""Shards to a corpus folder (what lies in it: corpus.py): of each document its last record.

All is done for many records at once, and block by block: 36 million of them take 0.6 GB of memory,
however long their texts are.
"""

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from minibert.data import shards
from minibert.data.corpus import FORMAT_VERSION, IDS, META, OFFSETS, TOKENS
from minibert.data.reading import Reading
from minibert.data.shards import Shard
from minibert.data.tokenizer import Tokenizer
from minibert.errors import InputError
from minibert.files import atomic_folder, sha256_of_files, write_json
from minibert.progress import counted

KEPT, REPLACED, DELETED, NO_TEXT = range(4)  # what becomes of a record

SORTED_IN_PARTS = 16  # by the keys' leading bits: sorting takes a sixteenth of the memory
BLOCK_ITEMS = 1 << 22  # tokens, or bytes of ids, copied at once

COUNTS = ("citations", "documents", "structured", "replaced", "deleted", "titles_only", "empty")


class Part(NamedTuple):
    """A shard, and what becomes of each of its records."""

    shard: Shard
    fates: np.ndarray  # (records,) uint8
    sides: tuple[np.ndarray, np.ndarray]  # (records,) bool each: for training, held out


def merge(
    shards_in_order: Sequence[Shard],
    folder: Path,
    tokenizer: Tokenizer,
    held_out: float,
    more_meta: dict[str, Any] | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Write the corpus folder of some shards and return its meta.json.

    Documents for training come first, then those held out: the share `held_out` of all. Raises
    InputError where nothing is left to train on, and where the disk has no room for the folder.
    """
    parts = what_becomes(shards_in_order, held_out)
    num_training, num_held_out = (sum(int(part.sides[n].sum()) for part in parts) for n in (0, 1))
    if num_training == 0:
        raise InputError(f"{folder}: no documents to train on ({num_held_out} held out)")
    check_room(folder.parent, corpus_bytes(parts), folder.name)
    with atomic_folder(folder) as partial:
        tokenizer.save(partial)
        _copy_ids(parts, partial / IDS)
        unk_tokens = _copy_tokens(parts, partial / TOKENS, tokenizer.unk_id, quiet)
        offsets = _offsets(parts, num_training, num_held_out)
        _write_npy(partial / OFFSETS, offsets)
        inputs = [_about(part, unk) for part, unk in zip(parts, unk_tokens, strict=True)]
        meta = {
            "format_version": FORMAT_VERSION,
            "documents": num_training + num_held_out,
            "held_out_documents": num_held_out,
            "held_out_share": held_out,
            "tokens": int(offsets[-1]),
            "unk_tokens": sum(unk_tokens),
            "dtype": shards.dtype_for(tokenizer).name,
            "vocab_size": tokenizer.vocab_size,
            "special_ids": tokenizer.special_ids._asdict(),
            "vocabulary_sha256": tokenizer.vocabulary_sha256,
            "corpus_sha256": sha256_of_files(partial / TOKENS, partial / OFFSETS),
            "totals": {name: sum(about[name] for about in inputs) for name in COUNTS},
            "inputs": inputs,
            **(more_meta or {}),
        }
        write_json(partial / META, meta)
    return meta


# ---- Which records are documents -----------------------------------------------------------------


def what_becomes(shards_in_order: Sequence[Shard], held_out: float) -> list[Part]:
    """The shards, with the fate and the side of each record."""
    ends = np.cumsum([shard.num_records for shard in shards_in_order])
    begins = ends - [shard.num_records for shard in shards_in_order]
    places = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
    keys = np.empty(ends[-1], "<u8")
    has_text = np.empty(ends[-1], bool)
    for shard, place in zip(shards_in_order, places, strict=True):
        keys[place] = shard.keys()
        has_text[place] = shard.lengths() > 0
    fates = fates_of(keys, has_text)
    is_kept, is_aside = fates == KEPT, is_held_out(keys, held_out)
    training, aside = is_kept & ~is_aside, is_kept & is_aside
    return [
        Part(shard, fates[place], (training[place], aside[place]))
        for shard, place in zip(shards_in_order, places, strict=True)
    ]


def is_held_out(keys: np.ndarray, share: float) -> np.ndarray:
    """(documents,) bool: whether each belongs to the held-out `share` (0 to 1) of all keys."""
    return keys < np.uint64(math.ceil(share * 2**64))


def fates_of(keys: np.ndarray, has_text: np.ndarray) -> np.ndarray:
    """(records,) uint8: what becomes of each record, given its key and whether it has a text.

    A record with a text is kept if none of the same key comes after it. Else the next of them
    replaces it or, if it has no text, deletes it.
    """
    fates = np.where(has_text, np.uint8(KEPT), np.uint8(NO_TEXT))
    leading = keys.astype("<u8", copy=False).view(np.uint8)[7::8] % SORTED_IN_PARTS
    for part in range(SORTED_IN_PARTS):
        records = np.flatnonzero(leading == part)
        records = records[np.argsort(keys[records], kind="stable")]  # equal keys stay in order
        earlier, later = records[:-1], records[1:]
        is_followed = (keys[earlier] == keys[later]) & has_text[earlier]
        fates[earlier[is_followed]] = np.where(has_text[later[is_followed]], REPLACED, DELETED)
    return fates


# ---- Copying them --------------------------------------------------------------------------------


def _copy_tokens(parts: Sequence[Part], path: Path, unk_id: int, quiet: bool) -> list[int]:
    """Write tokens.bin; returns how many [UNK] each part has in it."""
    unk_tokens = [0] * len(parts)
    middle = sum(int(part.shard.lengths()[part.sides[0]].sum()) for part in parts)
    with _open_twice(path, middle * parts[0].shard.dtype.itemsize) as files:
        for number, part in enumerate(counted(parts, "merging file", quiet)):
            source, dtype = part.shard.folder / shards.TOKENS, part.shard.dtype
            for side, tokens in _chosen(source, dtype, part.shard.lengths(), part.sides):
                unk_tokens[number] += int(np.count_nonzero(tokens == unk_id))
                files[side].write(tokens)
    return unk_tokens


def _copy_ids(parts: Sequence[Part], path: Path) -> None:
    """Write ids.txt."""
    middle = sum(int(part.shard.id_lengths()[part.sides[0]].sum()) for part in parts)
    with _open_twice(path, middle) as files:
        for part in parts:
            source = part.shard.folder / shards.IDS
            for side, letters in _chosen(source, np.uint8, part.shard.id_lengths(), part.sides):
                files[side].write(letters)


@contextmanager
def _open_twice(path: Path, middle: int) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A new file opened to be written from its beginning and, at the same time, from `middle`."""
    with open(path, "wb") as beginning, open(path, "r+b") as rest:
        rest.seek(middle)
        yield beginning, rest


def _chosen(
    source: Path, dtype: Any, lengths: np.ndarray, sides: tuple[np.ndarray, np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """Side by side, the items of a file that belong to its records; block by block of the file.

    `lengths` are the records' numbers of items, `sides` say which records to choose for which side.
    """
    ends = np.cumsum(lengths)
    first = done = 0
    with open(source, "rb") as file:
        while first < len(lengths):
            last = max(first + 1, int(np.searchsorted(ends, done + BLOCK_ITEMS, side="right")))
            items = np.fromfile(file, dtype, int(ends[last - 1]) - done)
            for side, is_chosen in enumerate(sides):
                yield side, items[np.repeat(is_chosen[first:last], lengths[first:last])]
            first, done = last, int(ends[last - 1])


def _offsets(parts: Sequence[Part], num_training: int, num_held_out: int) -> np.ndarray:
    """(documents + 1,) int64: where in tokens.bin each document begins, and the last one ends."""
    offsets = np.zeros(num_training + num_held_out + 1, "<i8")
    places = [1, 1 + num_training]
    for part in parts:
        lengths = part.shard.lengths()
        for side, is_chosen in enumerate(part.sides):
            chosen = lengths[is_chosen]
            offsets[places[side] : places[side] + len(chosen)] = chosen
            places[side] += len(chosen)
    return np.cumsum(offsets, out=offsets)


def _write_npy(path: Path, array: np.ndarray) -> None:
    """What np.save writes; but a full disk is told as the system tells it."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array)


# ---- What is said of them ------------------------------------------------------------------------


def _about(part: Part, unk_tokens: int) -> dict[str, Any]:
    """What meta.json says of an input.

    citations = documents + replaced + deleted + titles_only + empty, where `documents` are those
    that stand in the corpus, and `structured` some of all that had an abstract.
    """
    counts, made_from = part.shard.meta["counts"], part.shard.meta["made_from"]
    lengths = part.shard.lengths()
    tokens = sum(int(lengths[is_chosen].sum()) for is_chosen in part.sides)
    return {
        "name": made_from["name"],
        "bytes": counts["bytes_read"],
        "sha256": made_from["sha256"],
        "citations": counts["citations"],
        "documents": int(np.count_nonzero(part.fates == KEPT)),
        "structured": counts["structured"],
        "replaced": int(np.count_nonzero(part.fates == REPLACED)),
        "deleted": int(np.count_nonzero(part.fates == DELETED)),
        "titles_only": counts["titles_only"],
        "empty": counts["empty"] + counts["without_tokens"],
        "deletions": counts["deleted"],
        "tokens": tokens,
        "unk_tokens": unk_tokens,
        "unk_rate": unk_tokens / max(1, tokens),
    }


# ---- Room on the disk ----------------------------------------------------------------------------


def corpus_bytes(parts: Sequence[Part]) -> int:
    """Bytes of the files of a corpus folder that grow with it."""
    total = 0
    for part in parts:
        is_kept = part.fates == KEPT
        total += int(part.shard.lengths()[is_kept].sum()) * part.shard.dtype.itemsize
        total += int(part.shard.id_lengths()[is_kept].sum()) + 8 * int(np.count_nonzero(is_kept))
    return total


def check_room(folder: Path, needed: int, purpose: str) -> None:
    """Refuse to begin where the disk of `folder` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {purpose} needs {needed / 1e6:,.2f} MB; {free / 1e6:,.2f} MB are free"
        )


# ---- All at once, for what is small --------------------------------------------------------------


def write_corpus(
    folder: Path,
    tokenizer: Tokenizer,
    documents: Iterable[tuple[str, Sequence[int]]],
    held_out: float,
) -> dict[str, Any]:
    """Write a corpus folder of documents at hand, (id, token ids) each; returns its meta.json."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    ids, token_lists = zip(*documents, strict=True)
    counts = asdict(Reading(citations=len(ids))) | {"without_tokens": token_lists.count([])}
    with TemporaryDirectory(dir=folder.parent) as temporary:
        shards.append(Path(temporary), ids, token_lists, shards.dtype_for(tokenizer))
        made_from = {"name": None, "sha256": None}  # of no file
        shard = shards.finish(Path(temporary), tokenizer, made_from, counts)
        return merge([shard], folder, tokenizer, held_out)
