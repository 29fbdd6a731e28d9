"""PubMed XML and plainer text formats to documents: pairs of an id and a text.

    .xml    PubMed: title, then every section of the abstract with its label; ids are PMIDs
    .tsv    id, title, abstract
    .jsonl  one object a line: "text" and, if there is one, "id"
    .txt    one document a line

each also as .gz, or from standard input. Files are read as streams: memory does not grow with them.
Records without an abstract (titles alone) are left out and counted. A document without an id is
named by its text, so that duplicates share a name.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from minibert.data.citations import pubmed_records
from minibert.data.lines import json_records, text_records, tsv_records
from minibert.data.reading import (
    STANDARD_INPUT,
    Reading,
    Record,
    check_is_file,
    name_of,
    read_blocks,
)
from minibert.errors import InputError


def read_documents(
    path: Path,
    reading: Reading | None = None,
    *,
    section_labels: bool = True,
    titles_only: bool = False,
    stdin_format: str | None = None,
) -> Iterator[tuple[str, str]]:
    """The (id, text) of each document in a file, white space folded; `reading` is kept up to date.

    An empty text says: from here on there is no document of that id. It was deleted, or its newest
    record has no abstract. A record replaces those of the same id before it (NLM's update files
    hold revised ones, and the versions of one record stand in their order); the caller sees to it.

    Args:
        path: what to read; Path("-") is standard input.
        section_labels: put before each section of a structured abstract its label and a colon.
        titles_only: a title without an abstract is a document as well.
        stdin_format: how standard input is to be read: xml, tsv, jsonl or txt, plain or compressed.

    Raises InputError for a missing file or unknown format at once, for broken content when the
    reading comes to it.
    """
    read_records = _format_of(path, stdin_format)
    if path != STANDARD_INPUT:
        check_is_file(path)
    reading = Reading() if reading is None else reading
    records = read_records(name_of(path), read_blocks(path, reading))
    return _documents(records, reading, section_labels, titles_only)


def _format_of(path: Path, stdin_format: str | None) -> Callable[..., Iterator[Record]]:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if path == STANDARD_INPUT:
        suffix = f".{stdin_format}"
    if suffix in FORMATS:
        return FORMATS[suffix]
    if path == STANDARD_INPUT:
        kinds = ", ".join(known.removeprefix(".") for known in FORMATS)
        raise InputError(f"{name_of(path)}: format {stdin_format}; expected one of {kinds}")
    raise InputError(f"{path}: unknown suffix; expected {', '.join(FORMATS)}, or these and .gz")


def _documents(
    records: Iterable[Record], reading: Reading, section_labels: bool, titles_only: bool
) -> Iterator[tuple[str, str]]:
    for record in records:
        document_id = _fold(record.id)
        title = _clean_title(_fold(record.title))
        abstract = _abstract(record.sections, section_labels)
        text = f"{title} {abstract}".strip() if abstract or titles_only else ""
        reading.deleted += record.deleted
        reading.citations += not record.deleted
        if text:
            reading.documents += 1
            reading.structured += any(label for label, _ in record.sections)
            yield document_id or hashlib.sha256(text.encode()).hexdigest()[:16], text
        else:
            reading.titles_only += bool(title)
            reading.empty += not (title or record.deleted)
            if document_id:
                yield document_id, ""


def _abstract(sections: Sequence[tuple[str, str]], section_labels: bool) -> str:
    """All sections that hold text (some have a label alone), each behind its label."""
    parts = []
    for label, text in sections:
        text = _fold(text)
        label = _fold(label).rstrip(" :") if section_labels else ""
        parts.append(f"{label}: {text}" if text and label not in ("", "UNLABELLED") else text)
    return " ".join(filter(None, parts))


def _fold(text: str) -> str:
    """Each run of white space, be it line breaks or no-break spaces, becomes one space."""
    return " ".join(text.split())


# ---- Titles --------------------------------------------------------------------------------------

NO_TITLE = ("[not available]", "[in process citation]")  # what NLM puts where a title is wanting
NOTE = re.compile(  # NLM's indexers' remark, or where the article stands that this one is about
    r"(\[((article in|comments?|corrected|editorial|letter|proceedings|published erratum"
    r"|response to|retracted|see comments?)\b|[^]]*\b(19|20)\d\d\b)[^]]*\]"
    r"|\(author'?s transl\))[.?!]?",
    re.IGNORECASE,
)
MAX_NOTE = 300  # letters


def _clean_title(title: str) -> str:
    """A title without what NLM adds: the brackets of translated titles, and notes at the end."""
    without_note = _without_note(_without_brackets(title))
    return without_note if without_note == title else _without_brackets(without_note)


def _without_note(title: str) -> str:
    """Of "Tablets [proceedings]." the first word; "Growth at elevated [CO2]." as it is."""
    start = max(title.rfind("["), title.rfind("(author"))
    if start <= 0 or len(title) - start > MAX_NOTE or not NOTE.fullmatch(title, start):
        return title
    before, end = title[:start].rstrip(" :"), title[-1]
    return before if end in "])" or before.endswith((".", "?", "!")) else before + end


def _without_brackets(title: str) -> str:
    """A title without the brackets that mark it as translated, as in "[Malaria in Chad]."."""
    translated = re.fullmatch(r"\[(.*)\]([.?!]?)", title)
    if translated is None:
        return title
    inner, end = translated.groups()
    if title.removesuffix(".").lower() in NO_TITLE:
        return ""
    depths = accumulate((letter == "[") - (letter == "]") for letter in inner)
    if min(depths, default=0) < 0:  # "[18F]FDG or [11C]." begins and ends with different pairs
        return title
    return inner if inner.endswith((".", "?", "!")) else inner + end


FORMATS = {
    ".xml": pubmed_records,
    ".tsv": tsv_records,
    ".jsonl": json_records,
    ".txt": text_records,
}
