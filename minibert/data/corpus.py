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

import hashlib
import reprlib
import shutil
import warnings
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np

from minibert.data.tokenizer import Tokenizer, load_tokenizer
from minibert.errors import InputError
from minibert.files import atomic_folder, file_size, read_json, sha256_of_files, write_json

FORMAT_VERSION = 1
TOKENS, OFFSETS, IDS, META = "tokens.bin", "offsets.npy", "ids.txt", "meta.json"


def is_held_out(document_id: str, share: float) -> bool:
    """Whether a document belongs to the held-out `share` (0 to 1): its id's SHA-256 decides."""
    return int(hashlib.sha256(document_id.encode()).hexdigest()[:16], 16) / 2**64 < share


class _Side:
    """The documents of one side, training or held out, in the order they came."""

    def __init__(self, tokens: BinaryIO, ids: BinaryIO):
        self.tokens, self.ids = tokens, ids
        self.lengths = array("q")  # 8 bytes a document: all that stays in memory

    def add(self, document_id: str, tokens: np.ndarray) -> None:
        self.tokens.write(tokens.tobytes())
        self.ids.write(document_id.encode() + b"\n")
        self.lengths.append(len(tokens))

    def append(self, other: "_Side") -> None:
        """Add all documents of the other side; both sides' files are closed."""
        for whole, part in ((self.tokens, other.tokens), (self.ids, other.ids)):
            part.seek(0)
            shutil.copyfileobj(part, whole)
            part.close()
            whole.close()
        self.lengths += other.lengths


class CorpusWriter:
    """Writes a corpus folder, a few documents at a time.

        with CorpusWriter(folder, tokenizer, held_out=0.05) as writer:
            writer.add(ids, token_lists)
            meta = writer.finish()

    The folder appears at `finish`, whole; who leaves without it leaves nothing behind.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, held_out: float):
        self.folder, self.tokenizer, self.held_out = folder, tokenizer, held_out
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.unk_tokens = 0
        folder.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._partial = partial = stack.enter_context(atomic_folder(folder))
            tokenizer.save(partial)
            names = (TOKENS, IDS)
            kept = [stack.enter_context(open(partial / name, "wb")) for name in names]
            waiting = [stack.enter_context(TemporaryFile(dir=partial)) for _ in names]
            self._stack = stack.pop_all()  # from here on ours to close
        self._training, self._held_out = _Side(*kept), _Side(*waiting)

    def add(self, ids: Sequence[str], token_lists: Sequence[Sequence[int]]) -> None:
        """Append documents: their ids (without line breaks) and their token ids.

        One without any token is not a document and is left out.
        """
        for document_id, token_list in zip(ids, token_lists, strict=True):
            if not token_list:
                continue
            tokens = np.array(token_list, dtype=self.dtype)  # (length,)
            self.unk_tokens += int((tokens == self.tokenizer.unk_id).sum())
            side = self._held_out if is_held_out(document_id, self.held_out) else self._training
            side.add(document_id, tokens)

    def finish(self, inputs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Put the folder in its place and return its meta.json; `inputs` describes the text files.

        Raises InputError where there is no document to train on.
        """
        num_training, num_held_out = len(self._training.lengths), len(self._held_out.lengths)
        if num_training == 0:
            raise InputError(f"{self.folder}: no documents to train on ({num_held_out} held out)")
        self._training.append(self._held_out)
        partial = self._partial
        offsets = np.zeros(num_training + num_held_out + 1, dtype=np.int64)
        np.cumsum(self._training.lengths, out=offsets[1:])
        np.save(partial / OFFSETS, offsets, allow_pickle=False)
        meta = {
            "format_version": FORMAT_VERSION,
            "documents": num_training + num_held_out,
            "held_out_documents": num_held_out,
            "held_out_share": self.held_out,
            "tokens": int(offsets[-1]),
            "unk_tokens": self.unk_tokens,
            "dtype": self.dtype.name,
            "vocab_size": self.tokenizer.vocab_size,
            "special_ids": self.tokenizer.special_ids._asdict(),
            "vocabulary_sha256": self.tokenizer.vocabulary_sha256,
            "corpus_sha256": sha256_of_files(partial / TOKENS, partial / OFFSETS),
            "inputs": list(inputs),
        }
        write_json(partial / META, meta)
        self._stack.close()
        return meta

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        # After finish() nothing is left to undo. Before it, no reason for leaving is good enough:
        # the partial folder must be told of an error even where there was none, or it is kept.
        unfinished = RuntimeError(f"{self.folder} was not finished")
        self._stack.__exit__(type(unfinished), unfinished, None)


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
        tokens = np.memmap(folder / TOKENS, dtype, mode="r")
        return cls(folder, meta, tokenizer, np.asarray(tokens), np.asarray(offsets))

    def __reduce__(self) -> tuple[Callable[[Path], "Corpus"], tuple[Path]]:
        """Another process opens the folder itself rather than being sent the tokens."""
        return Corpus.open, (self.folder,)

    def tokens(self, document: int) -> np.ndarray:
        """(length,) ids of a document, uint16 or uint32, read-only, without special tokens."""
        tokens = self._tokens[self.offsets[document] : self.offsets[document + 1]]
        if tokens.max() >= self.tokenizer.vocab_size:
            raise InputError(
                f"{self.folder / TOKENS}: damaged; document {document} holds {tokens.max()}"
            )
        return tokens

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
    not_longer = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if len(not_longer):
        raise InputError(f"{path}: document {not_longer[0]} ends where it begins, or before")
    return offsets
