"""Formats of one record a line: .tsv, .jsonl, .txt.

Lines end with a line feed, or a carriage return and a line feed, and are UTF-8. A blank line is no
record. What is wrong raises InputError that names the line, counted from 1.
"""

import json
from collections.abc import Iterable, Iterator

from minibert.data.reading import MAX_RECORD_BYTES, Record
from minibert.errors import InputError


def _lines(name: str, blocks: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank."""
    for number, line in enumerate(_split(name, blocks), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}: line {number}: not UTF-8 (byte {error.start + 1} of the line)"
            ) from None
        if "\0" in text:
            raise InputError(f"{name}: line {number}: holds null characters; expected UTF-8 text")
        if text.strip():
            yield number, text


def _split(name: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines, each without its line feed."""
    number, unfinished = 1, bytearray()
    for block in blocks:
        unfinished += block
        if b"\n" in block:
            *lines, rest = unfinished.split(b"\n")
            yield from lines
            number, unfinished = number + len(lines), rest
        if len(unfinished) > MAX_RECORD_BYTES:
            limit = MAX_RECORD_BYTES >> 20
            raise InputError(f"{name}: line {number}: longer than {limit} MB, the most for a line")
    yield unfinished


def tsv_records(name: str, blocks: Iterable[bytes]) -> Iterator[Record]:
    """id, title, abstract; a first line that begins with "id" or "pmid" is a header."""
    for number, line in _lines(name, blocks):
        columns = line.split("\t")
        if number == 1 and columns[0].strip().lower() in ("id", "pmid"):
            continue
        if len(columns) != 3:
            raise InputError(
                f"{name}: line {number}: {len(columns)} columns; expected 3: id, title, abstract"
            )
        document_id, title, abstract = columns
        yield Record(document_id, title, [("", abstract)])


def json_records(name: str, blocks: Iterable[bytes]) -> Iterator[Record]:
    """An object with "text" and, if there is one, "id"."""
    for number, line in _lines(name, blocks):
        where = f"{name}: line {number}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # without json's own count of lines
            raise InputError(f"{where}: not readable as JSON ({reason})") from None
        text = content.get("text") if isinstance(content, dict) else None
        if not isinstance(text, str):
            raise InputError(f'{where}: expected an object with a string "text"')
        document_id = content.get("id")
        if document_id is not None and type(document_id) not in (str, int):
            raise InputError(f'{where}: "id" is {document_id!r}; expected a string or whole number')
        try:
            f"{document_id}{text}".encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: half a surrogate pair (\\ud800 to \\udfff)") from None
        yield Record("" if document_id is None else str(document_id), sections=[("", text)])


def text_records(name: str, blocks: Iterable[bytes]) -> Iterator[Record]:
    """A document."""
    for _, line in _lines(name, blocks):
        yield Record("", sections=[("", line)])
