"""A corpus folder: documents as token ids in one memory-mapped file, held-out ones at its end.

    tokens.bin      the ids of all documents end to end, little-endian uint16 (uint32 for
                    vocabularies above 65,536): whole documents, without special tokens
    offsets.npy     int64, documents + 1: document i is tokens[offsets[i] : offsets[i + 1]]
    ids.txt         the documents' own ids, one a line, in the same order
    meta.json       counts, special ids, hashes, which files the text came from
    vocab.txt       or tokenizer.json: what the token ids mean

A document is held out when the hash of its id says so: it stays on its side whatever other files
are read, and in whatever order.
"""

import mmap
import reprlib
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minibert.data.tokenizer import Tokenizer, load_tokenizer
from minibert.errors import InputError
from minibert.files import file_size, read_json

FORMAT_VERSION = 1
TOKENS, OFFSETS, IDS, META = "tokens.bin", "offsets.npy", "ids.txt", "meta.json"

OFFSETS_AT_ONCE = 1 << 17  # to be checked: a megabyte


class Corpus:
    """A corpus folder, opened for reading; tokens are read from the disk as they are asked for.

    Documents are numbered from 0: the `num_training` ones first, then the `num_held_out` ones.
    """

    def __init__(
        self,
        folder: Path,
        meta: dict[str, Any],
        tokenizer: Tokenizer,
        tokens: np.ndarray,
        offsets: np.ndarray,
    ):
        self.folder, self.meta, self.tokenizer = folder, meta, tokenizer
        self.offsets = offsets  # (documents + 1,) int64
        self._tokens = tokens  # all documents end to end
        self.num_held_out: int = meta["held_out_documents"]
        self.num_training: int = meta["documents"] - self.num_held_out
        self.corpus_sha256: str = meta["corpus_sha256"]

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Open a corpus folder; files that do not fit each other or are damaged are an InputError.

        Offsets are all looked at, tokens are not (`corpus_sha256` is there to check them).
        """
        if not folder.is_dir():
            raise InputError(f"{folder}: no such corpus folder")
        meta = _read_meta(folder / META)
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocabulary_sha256 != meta["vocabulary_sha256"]:
            raise InputError(f"{tokenizer.source}: not the vocabulary that {META} names")
        offsets = _map_offsets(folder / OFFSETS, meta)
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        size = file_size(folder / TOKENS)
        if size != meta["tokens"] * dtype.itemsize:
            raise InputError(
                f"{folder / TOKENS}: {size} bytes; {META} calls for {meta['tokens']} tokens "
                f"as {meta['dtype']}, {meta['tokens'] * dtype.itemsize} bytes"
            )
        tokens = _mapped(folder / TOKENS, dtype, meta["tokens"])
        return cls(folder, meta, tokenizer, tokens, offsets)

    def __reduce__(self) -> tuple[Callable[[Path], "Corpus"], tuple[Path]]:
        """Another process opens the folder itself rather than being sent the tokens."""
        return Corpus.open, (self.folder,)

    def tokens(self, document: int) -> np.ndarray:
        """(length,) ids of a document, uint16 or uint32, read-only, without special tokens."""
        tokens = self._tokens[self.offsets[document] : self.offsets[document + 1]]
        if (largest := tokens.max()) >= self.tokenizer.vocab_size:
            raise self._damaged(document, largest)
        return tokens

    def tokens_at(self, places: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """(B, S) int64 ids at `places` in tokens.bin, a row of each of `documents` (B,)."""
        tokens = self._tokens[places]
        if tokens.max() >= self.tokenizer.vocab_size:
            largest = tokens.max(axis=1)  # (B,)
            row = int((largest >= self.tokenizer.vocab_size).argmax())
            raise self._damaged(documents[row], largest[row])
        return tokens.astype(np.int64)

    def _damaged(self, document: int, token: int) -> InputError:
        return InputError(f"{self.folder / TOKENS}: damaged; document {document} holds {token}")

    def document_ids(self, documents: Sequence[int]) -> list[str]:
        """The ids that documents came with (reads ids.txt once: for people, not for loops)."""
        path = self.folder / IDS
        file_size(path)  # refuses what is no file
        wanted = dict.fromkeys(documents, "")
        try:
            with open(path, encoding="utf-8", newline="\n") as file:
                for document, line in enumerate(islice(file, max(wanted, default=-1) + 1)):
                    if document in wanted:
                        wanted[document] = line
        except UnicodeDecodeError:
            raise InputError(f"{path}: not UTF-8 text") from None
        for document, line in wanted.items():
            if not line.endswith("\n"):
                raise InputError(f"{path}: ends before document {document}")
        return [wanted[document][:-1] for document in documents]

    def document_id(self, document: int) -> str:
        """The id that a document came with; for several ask at once."""
        return self.document_ids([document])[0]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


EXPECTED_IN_META = {
    "format_version": lambda version: version == FORMAT_VERSION,
    "documents": _is_count,
    "held_out_documents": _is_count,
    "tokens": _is_count,
    "dtype": lambda name: name in ("uint16", "uint32"),
    "vocabulary_sha256": lambda digest: isinstance(digest, str),
    "corpus_sha256": lambda digest: isinstance(digest, str),
}


def _read_meta(path: Path) -> dict[str, Any]:
    """The meta.json of a corpus that can be trained on."""
    meta = read_json(path)
    for key, is_expected in EXPECTED_IN_META.items():
        if key not in meta:
            raise InputError(f"{path}: {key} missing")
        if not is_expected(meta[key]):
            raise InputError(
                f"{path}: {key} is {reprlib.repr(meta[key])}, not what this version writes"
            )
    if meta["documents"] <= meta["held_out_documents"]:
        raise InputError(f"{path}: no documents to train on ({meta['documents']} held out)")
    return meta


def _map_offsets(path: Path, meta: dict[str, Any]) -> np.ndarray:
    """(documents + 1,) int64, memory-mapped: rises from 0 to the number of tokens."""
    file_size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file that is refused, one line is enough
            offsets = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header makes NumPy raise nearly anything
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"{path}: not a whole NumPy file ({reason})") from None
    expected = (meta["documents"] + 1,)
    if not isinstance(offsets, np.ndarray):
        raise InputError(f"{path}: an archive; expected int64 of shape {expected}")
    if offsets.dtype != np.int64 or offsets.shape != expected:
        raise InputError(
            f"{path}: {offsets.dtype} of shape {offsets.shape}; expected int64 of shape {expected}"
        )
    if offsets[0] != 0 or offsets[-1] != meta["tokens"]:
        raise InputError(
            f"{path}: runs from {offsets[0]} to {offsets[-1]}; expected 0 to {meta['tokens']}"
        )
    _check_that_they_rise(path, offsets)
    return _mapped(path, offsets.dtype, len(offsets), offsets.offset)


def _mapped(path: Path, dtype: np.dtype, count: int, start: int = 0) -> np.ndarray:
    """(count,) the numbers from byte `start` of a file on, read from the disk as they are used.

    A page at a time: with the megabytes around it, which systems read for whoever will go on from
    there, a batch of documents from everywhere would take seconds.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mapped, "madvise"):  # not on Windows
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype, count, start)


def _check_that_they_rise(path: Path, offsets: np.memmap) -> None:
    """Read block by block: what is looked at through the map would stay in our memory."""
    for first in range(0, len(offsets) - 1, OFFSETS_AT_ONCE):
        count = min(OFFSETS_AT_ONCE + 1, len(offsets) - first)  # the next block's first as well
        start = offsets.offset + first * offsets.itemsize
        block = np.fromfile(path, np.int64, count, offset=start)
        not_longer = np.flatnonzero(block[1:] <= block[:-1])
        if len(not_longer):
            document = first + not_longer[0]
            raise InputError(f"{path}: document {document} ends where it begins, or before")
