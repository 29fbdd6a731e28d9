"""Reading a text file: its content as blocks of bytes, what its records say, how far it has come.

A file lies on the disk or comes from standard input, plain or gzip-compressed. Nothing is read
before it is asked for, and no block is larger than BLOCK_BYTES: memory does not grow with a file,
whatever it inflates to.
"""

import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from minibert.errors import InputError

BLOCK_BYTES = 1 << 16
STANDARD_INPUT = Path("-")
GZIP = b"\x1f\x8b"  # its first two bytes; no UTF-8 text begins so

# PubMed's files inflate to 6 times their size, or 9; one record that is repeated for ever to 100 to
# 190 times, zeros to 1,030. A small file may be that dull; what goes on for gigabytes is no text.
INFLATED_FREELY = 64 << 20
MAX_INFLATION = 100
MAX_RECORD_BYTES = 32 << 20  # PubMed's largest, articles of thousands of authors, have a few MB


@dataclass
class Reading:
    """How far the reading of one file has come."""

    bytes_read: int = 0  # of the file as it lies on the disk
    citations: int = 0  # records of any kind, deletions apart
    documents: int = 0  # given out
    structured: int = 0  # of the documents, those whose abstract has labelled sections
    titles_only: int = 0  # records left out because they have no abstract
    empty: int = 0  # records with neither title nor abstract
    deleted: int = 0  # ids that DeleteCitation names


class Record(NamedTuple):
    """What one record of any format says; an empty string for what is not there."""

    id: str
    title: str = ""
    sections: Sequence[tuple[str, str]] = ()  # of the abstract: label and text
    deleted: bool = False  # from here on there is no document of that id


def name_of(path: Path) -> str:
    """What messages call a file."""
    return "standard input" if path == STANDARD_INPUT else str(path)


def check_is_file(path: Path) -> None:
    """Raise InputError unless there is a regular file: a pipe could be waited for without end."""
    try:
        found, is_file = path.exists(), path.is_file()
    except OSError as error:  # a name too long, a folder that is closed to us
        raise InputError(f"{path}: {error.strerror}") from None
    if not is_file:
        raise InputError(f"{path}: {'not a file' if found else 'no such file'}")


def read_blocks(path: Path, reading: Reading) -> Iterator[bytes]:
    """The content of a file, decompressed; `reading.bytes_read` is kept up to date.

    gzip is known by its first two bytes. Raises InputError that names the byte, to within a block,
    where the file is cut short, damaged, unreadable or inflates without end.
    """
    try:
        with nullcontext(sys.stdin.buffer) if path == STANDARD_INPUT else open(path, "rb") as file:
            blocks = _blocks_on_disk(file, reading)
            first = next(blocks)
            if first.startswith(GZIP):
                yield from _inflated(path, chain([first], blocks), reading)
            elif path.name.lower().endswith(".gz"):
                found = "not gzip-compressed" if first else "empty"
                raise InputError(f"{path}: {found}; expected gzip-compressed content")
            else:
                yield from chain([first], blocks)
    except (EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        where = f"{name_of(path)}: unreadable near byte {reading.bytes_read}"
        raise InputError(f"{where}: {reason}") from None


def _blocks_on_disk(file: BinaryIO, reading: Reading) -> Iterator[bytes]:
    """The bytes as they lie there; the first block has two of them, if there are two."""
    kept = b""
    while block := file.read1(BLOCK_BYTES):
        reading.bytes_read += len(block)
        kept += block
        if len(kept) >= len(GZIP):
            yield kept
            kept = b""
    yield kept


def _inflated(path: Path, blocks: Iterator[bytes], reading: Reading) -> Iterator[bytes]:
    """What gzip's members hold, one after the other; zlib checks their sums and lengths."""
    inflated, member = 0, zlib.decompressobj(wbits=31)
    for block in blocks:
        while block:
            if member.eof:
                block = block.lstrip(b"\0")  # what fills up the last member
                if not block:
                    break
                member = zlib.decompressobj(wbits=31)
            content = member.decompress(block, BLOCK_BYTES)
            block = member.unconsumed_tail or member.unused_data
            inflated += len(content)
            if inflated > max(INFLATED_FREELY, MAX_INFLATION * reading.bytes_read):
                raise InputError(
                    f"{name_of(path)}: inflates without end: {inflated:,} bytes from the first "
                    f"{reading.bytes_read:,}; expected at most {MAX_INFLATION} times as many"
                )
            yield content
    if not member.eof:
        raise EOFError("gzip-compressed content is cut short")
