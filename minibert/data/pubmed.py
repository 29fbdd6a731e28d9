"""PubMed XML and plainer text formats to documents: pairs of an id and a text.

    .xml    PubMed: title, then every section of the abstract with its label; ids are PMIDs
    .tsv    id, title, abstract
    .jsonl  one object a line: "text" and, if there is one, "id"
    .txt    one document a line

each also as .gz. Files are read as streams: memory does not grow with them. Records without an
abstract (titles alone) are left out and counted. A document without an id is named by its text, so
that duplicates share a name.
"""

import gzip
import hashlib
import html
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree
from xml.etree.ElementTree import Element
from xml.parsers import expat

from minibert.errors import InputError

BLOCK_BYTES = 1 << 16
Record = tuple[str, str, str]  # id, title, abstract; an empty string for what is not there


@dataclass
class Reading:
    """How far the reading of one file has come."""

    bytes_read: int = 0  # of the file as it lies on the disk
    documents: int = 0
    titles_only: int = 0  # records left out because they have no abstract


def read_documents(path: Path, reading: Reading | None = None) -> Iterator[tuple[str, str]]:
    """The (id, text) of each document in a file, white space folded; `reading` is kept up to date.

    Raises InputError for a missing file or unknown suffix at once, for broken content when the
    reading comes to it.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in FORMATS:
        raise InputError(f"{path}: unknown suffix; expected {', '.join(FORMATS)}, or these and .gz")
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    return _documents(path, suffix, Reading() if reading is None else reading)


def _documents(path: Path, suffix: str, reading: Reading) -> Iterator[tuple[str, str]]:
    with _opened(path) as (on_disk, file):
        for document_id, title, abstract in FORMATS[suffix](path, file):
            reading.bytes_read = on_disk.tell()
            title, abstract = _fold(title), _fold(abstract)
            if not abstract:
                reading.titles_only += bool(title)
                continue
            text = f"{title} {abstract}" if title else abstract
            reading.documents += 1
            yield _fold(document_id) or hashlib.sha256(text.encode()).hexdigest()[:16], text
        reading.bytes_read = on_disk.tell()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file as it lies on the disk, and its decompressed content; failures to read name it."""
    compressed = path.name.lower().endswith(".gz")
    if compressed and path.stat().st_size == 0:  # to the gzip module, nothing at all is no error
        raise InputError(f"{path}: empty; expected gzip-compressed content")
    with open(path, "rb") as on_disk:
        try:
            with gzip.open(on_disk) if compressed else nullcontext(on_disk) as file:
                yield on_disk, file
        except (EOFError, zlib.error, OSError) as error:
            raise InputError(f"{path}: unreadable near byte {on_disk.tell()}: {error}") from None


def _fold(text: str) -> str:
    """Each run of white space, be it line breaks or no-break spaces, becomes one space."""
    return " ".join(text.split())


# ---- PubMed XML ----------------------------------------------------------------------------------

SETS = ("PubmedArticleSet", "PubmedBookArticleSet", "MedlineCitationSet")  # roots of NLM's files
RECORDS = ("MedlineCitation", "BookDocument")
SINGLE_ARTICLES = ("PubmedArticle", "PubmedBookArticle", *RECORDS)  # roots of excerpts
MATHML = "{http://www.w3.org/1998/Math/MathML}"
NO_TITLE = ("[not available]", "[in process citation]")  # what NLM puts where a title is wanting


def _pubmed_records(path: Path, file: BinaryIO) -> Iterator[Record]:
    """One record for each citation or book chapter of a PubMed file.

    The tree is looked at after each block of the file: what has ended is taken out of it, so that
    it does not grow. (To be told of every element, as by iterparse, takes half as long again.)
    """
    builder = ElementTree.TreeBuilder()
    top = builder.start("top", {})  # its only child will be the root of the file
    parser = ElementTree.XMLParser(target=builder)
    try:
        for block in _without_entities(path, file):
            parser.feed(block)
            yield from _take_records(path, top, unfinished=1)
        parser.close()
        yield from _take_records(path, top, unfinished=0)
    except (ElementTree.ParseError, expat.ExpatError) as error:  # it tells line and column
        raise InputError(f"{path}: malformed XML: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: markup nested too deeply") from None


def _take_records(path: Path, top: Element, unfinished: int) -> Iterator[Record]:
    """Take the articles out of the tree and yield their records, but for the `unfinished` last."""
    if len(top) == 0:
        return
    root = top[0]
    if root.tag not in SETS + SINGLE_ARTICLES:
        raise InputError(f"{path}: holds <{root.tag}>; expected <{SETS[0]}>")
    parent = root if root.tag in SETS else top
    finished = parent[: max(0, len(parent) - unfinished)]
    del parent[: len(finished)]
    for article in finished:
        for record in (article, *article):
            if record.tag in RECORDS:
                yield _pubmed_record(record)


def _without_entities(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The blocks of an XML file that defines no entities, as no PubMed file does.

    One that defines some may be a bomb, a few lines that expand to gigabytes. Definitions stand
    before the first element: as far as that, a parser of our own reads ahead and refuses them.
    """

    entities: list[str] = []
    elements: list[str] = []
    prolog = expat.ParserCreate()
    prolog.EntityDeclHandler = lambda name, *_: entities.append(name)
    prolog.StartElementHandler = lambda name, _: elements.append(name)
    while block := file.read(BLOCK_BYTES):
        if not elements:
            try:
                prolog.Parse(block, False)
            except (LookupError, ValueError) as error:  # an encoding that expat does not know
                raise InputError(f"{path}: {error}") from None
            if entities:
                raise InputError(f"{path}: defines the entity {entities[0]!r}; refused")
        yield block


def _pubmed_record(record: Element) -> Record:
    """Id, title and abstract of a MedlineCitation or BookDocument.

    Not used: VernacularTitle, OtherAbstract, and CopyrightInformation, a sibling of AbstractText.
    """
    article = record if record.tag == "BookDocument" else record.find("Article")
    if article is None:
        return "", "", ""
    title = article.find("ArticleTitle")
    if title is None:
        title = article.find("Book/BookTitle")
    sections = []
    for section in article.findall("Abstract/AbstractText"):
        label, text = section.get("Label", ""), _text(section)
        if text:  # some records have labels alone
            sections.append(text if label in ("", "UNLABELLED") else f"{label}: {text}")
    return (
        record.findtext("PMID", ""),
        "" if title is None else _without_brackets(_text(title)),
        " ".join(sections),
    )


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


def _text(element: Element) -> str:
    """The text of an element on one line; some publishers' entities are escaped twice."""
    return re.sub(r"&#?\w+;", lambda entity: html.unescape(entity[0]), _fold(_flatten(element)))


def _flatten(element: Element) -> str:
    """All text in an element, inline markup removed: H<sub>2</sub>O is H2O."""
    if element.tag == MATHML + "math":
        return _flatten_math(element)
    parts = [element.text or ""]
    for child in element:
        parts += _flatten(child), child.tail or ""
    return "".join(parts)


def _flatten_math(element: Element) -> str:
    """MathML on one line: only its leaves hold text; white space between elements means nothing."""
    tag = element.tag.removeprefix(MATHML)
    if tag == "mspace":
        return " "
    if tag.startswith("annotation"):  # the same once more, in another notation
        return ""
    children = [_flatten_math(child) for child in element]
    if tag == "mfrac":
        return "/".join(children)
    if tag == "mfenced":
        return f"({','.join(children)})"
    return (element.text or "").strip(" \t\r\n") + "".join(children)


# ---- One record a line ---------------------------------------------------------------------------


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank."""
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: line {number}: not UTF-8 (byte {error.start + 1} of the line)"
            ) from None
        if text.strip():
            yield number, text


def _tsv_records(path: Path, file: BinaryIO) -> Iterator[Record]:
    """One record a line; a first line that begins with "id" or "pmid" is a header."""
    for number, line in _lines(path, file):
        columns = line.rstrip("\r\n").split("\t")
        if number == 1 and columns[0].strip().lower() in ("id", "pmid"):
            continue
        if len(columns) != 3:
            raise InputError(
                f"{path}: line {number}: {len(columns)} columns; expected 3: id, title, abstract"
            )
        document_id, title, abstract = columns
        yield document_id, _without_brackets(title.strip()), abstract


def _json_records(path: Path, file: BinaryIO) -> Iterator[Record]:
    """One object a line."""
    for number, line in _lines(path, file):
        where = f"{path}: line {number}"
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
        yield "" if document_id is None else str(document_id), "", text


def _text_records(path: Path, file: BinaryIO) -> Iterator[Record]:
    """One document a line."""
    for _, line in _lines(path, file):
        yield "", "", line


FORMATS = {
    ".xml": _pubmed_records,
    ".tsv": _tsv_records,
    ".jsonl": _json_records,
    ".txt": _text_records,
}
