"""A shard: the records of one input file as token ids, in a folder that is whole or absent.

    tokens.bin      the token ids of all records end to end, little-endian uint16 or uint32
    lengths.bin     int64 a record: its tokens; 0 says that from here on its id is no document
    keys.bin        uint64 a record: which document it is
    ids.bin         the ids of all records, each with a line break behind it
    id_lengths.bin  int64 a record: the bytes of its line in ids.bin
    meta.json       what the shard was made from, and counts

Records stand in the order of the file. What becomes of them all together is said in merge.py.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from minibert.data.pubmed import read_documents
from minibert.data.reading import STANDARD_INPUT, Reading
from minibert.data.tokenizer import Tokenizer
from minibert.errors import InputError
from minibert.files import atomic_folder, naming, read_json, sha256_of_files, write_json

SHARD_VERSION = 1
TOKENS, LENGTHS, KEYS = "tokens.bin", "lengths.bin", "keys.bin"
IDS, ID_LENGTHS, META = "ids.bin", "id_lengths.bin", "meta.json"
COLUMNS = (TOKENS, LENGTHS, KEYS, IDS, ID_LENGTHS)

BATCH_CHARACTERS = 1 << 20  # tokenized at once: enough to keep every core busy


@dataclass(frozen=True)
class Settings:
    """What else than the file and the tokenizer decides what a shard holds."""

    section_labels: bool = True
    titles_only: bool = False
    stdin_format: str | None = None


@dataclass(frozen=True)
class Shard:
    """A finished shard; its columns are read from the disk as they are asked for."""

    folder: Path
    meta: dict[str, Any]

    @property
    def num_records(self) -> int:
        """Documents and deletions."""
        return self.meta["sizes"][KEYS] // 8

    @property
    def dtype(self) -> np.dtype:
        """Of token ids."""
        return np.dtype(self.meta["dtype"]).newbyteorder("<")

    def keys(self) -> np.ndarray:
        """(records,) uint64."""
        return np.fromfile(self.folder / KEYS, "<u8")

    def lengths(self) -> np.ndarray:
        """(records,) int64: tokens of each record."""
        return np.fromfile(self.folder / LENGTHS, "<i8")

    def id_lengths(self) -> np.ndarray:
        """(records,) int64: bytes of each record's line in ids.bin."""
        return np.fromfile(self.folder / ID_LENGTHS, "<i8")


def document_keys(ids: Iterable[str]) -> np.ndarray:
    """(len(ids),) uint64, the first 8 bytes of each id's SHA-256, as a big-endian number.

    Two records are the same document when their keys are equal. Among PubMed's 36 million ids the
    chance that any two share a key is n^2 / 2 / 2^64 = 3.5e-5; one of the two would then be lost.
    """
    heads = b"".join(hashlib.sha256(document_id.encode()).digest()[:8] for document_id in ids)
    return np.frombuffer(heads, ">u8").astype("<u8")


def dtype_for(tokenizer: Tokenizer) -> np.dtype:
    """The narrowest type that holds every id of a vocabulary."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


# ---- Making one ----------------------------------------------------------------------------------


def make_shard(
    path: Path, folder: Path, tokenizer: Tokenizer, settings: Settings
) -> Iterator[Reading]:
    """Make `folder` the shard of the file at `path`, unless it is that already.

    Yields how far the reading has come, after each batch. Raises InputError for a bad file; then,
    or where it is not gone through to its end, there is no such folder.
    """
    reading = Reading()
    documents = read_documents(path, reading, **asdict(settings))  # refuses what is no file
    version = _version(path)  # before it is hashed
    made_from = origin(path, tokenizer, settings)
    finished = find_shard(folder)
    if finished and finished.meta.get("made_from") == made_from and path != STANDARD_INPUT:
        return
    with atomic_folder(folder) as partial:
        without_tokens = 0
        for ids, texts in in_batches(documents):
            token_lists = tokenizer.encode_batch(texts)
            without_tokens += sum(map(bool, texts)) - sum(map(bool, token_lists))
            append(partial, ids, token_lists, dtype_for(tokenizer))
            yield reading
        if _version(path) != version:
            raise InputError(f"{path}: changed while it was read")
        counts = asdict(reading) | {"without_tokens": without_tokens}
        finish(partial, tokenizer, made_from, counts)


def origin(path: Path, tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    """All that decides what the shard of a file holds; of standard input nobody can tell."""
    with naming(path):
        digest = None if path == STANDARD_INPUT else sha256_of_files(path)
    return {
        "shard_version": SHARD_VERSION,
        "name": path.name,
        "bytes": None if path == STANDARD_INPUT else path.stat().st_size,
        "sha256": digest,
        **made_with(tokenizer, settings),
    }


def made_with(tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    """The part of it that all files share."""
    return {
        "tokenizer_sha256": sha256_of_files(tokenizer.source),
        "tokenizers_version": tokenizers.__version__,
        **asdict(settings),
    }


def _version(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written to."""
    if path == STANDARD_INPUT:
        return None
    with naming(path):
        status = path.stat()
    return status.st_size, status.st_mtime_ns


def find_shard(folder: Path, way: dict[str, Any] | None = None) -> Shard | None:
    """The shard in `folder`, if there is one, its files are as long as they should be and it was
    made in that `way` (`made_with`; None: in any).
    """
    if not (folder / META).is_file():
        return None
    shard = Shard(folder, read_json(folder / META))
    sizes = {name: (folder / name).stat().st_size for name in COLUMNS if (folder / name).exists()}
    made_from = shard.meta.get("made_from", {})
    is_asked_for = way is None or way.items() <= made_from.items()
    return shard if is_asked_for and shard.meta.get("sizes") == sizes else None


def append(
    folder: Path, ids: Sequence[str], token_lists: Sequence[Sequence[int]], dtype: np.dtype
) -> None:
    """Add records to the columns of a shard: their ids, without line breaks, and their tokens."""
    lengths = np.array([len(tokens) for tokens in token_lists], "<i8")
    lines = [f"{document_id}\n".encode() for document_id in ids]
    columns = {
        TOKENS: np.fromiter(chain.from_iterable(token_lists), dtype, int(lengths.sum())).tobytes(),
        LENGTHS: lengths.tobytes(),
        KEYS: document_keys(ids).tobytes(),
        IDS: b"".join(lines),
        ID_LENGTHS: np.array([len(line) for line in lines], "<i8").tobytes(),
    }
    for name, content in columns.items():
        with open(folder / name, "ab") as file:
            file.write(content)


def finish(
    folder: Path, tokenizer: Tokenizer, made_from: dict[str, Any], counts: dict[str, int]
) -> Shard:
    """Write the meta.json of a shard all of whose records have been added."""
    for name in COLUMNS:
        (folder / name).touch()  # a file may hold no record
    meta = {
        "made_from": made_from,
        "dtype": dtype_for(tokenizer).name,
        "counts": counts,
        "sizes": {name: (folder / name).stat().st_size for name in COLUMNS},
    }
    write_json(folder / META, meta)
    return Shard(folder, meta)


def in_batches(
    documents: Iterable[tuple[str, str]],
) -> Iterator[tuple[list[str], list[str]]]:
    """Ids and texts of the documents, in lists of about BATCH_CHARACTERS."""
    ids: list[str] = []
    texts: list[str] = []
    characters = 0
    for document_id, text in documents:
        ids.append(document_id)
        texts.append(text)
        characters += len(document_id) + len(text)  # millions of deletions are a batch, too
        if characters >= BATCH_CHARACTERS:
            yield ids, texts
            ids, texts, characters = [], [], 0
    if ids:
        yield ids, texts
