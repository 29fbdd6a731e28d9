"""PubMed XML to records: citations, book chapters, deletions.

Read are NLM's files, of today or of old (PubmedArticleSet, MedlineCitationSet), and excerpts whose
root is a single article. Not used: VernacularTitle, OtherAbstract, and CopyrightInformation, which
stands beside the sections of an abstract.
"""

import html
import re
from collections.abc import Callable, Iterable, Iterator
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from minibert.data.reading import MAX_RECORD_BYTES, Record
from minibert.errors import InputError

SETS = ("PubmedArticleSet", "PubmedBookArticleSet", "MedlineCitationSet")  # roots of NLM's files
RECORDS = ("MedlineCitation", "BookDocument")
SINGLE_ARTICLES = ("PubmedArticle", "PubmedBookArticle", *RECORDS)  # roots of excerpts
TEXTS = ("PMID", "ArticleTitle", "BookTitle", "Abstract")
AFTER_PMID = ("Article", "Book")  # a PMID in or behind these is another record's
DELETIONS = ("DeleteCitation", "DeleteDocument")
ENDS_OF_RECORDS = ("PubmedData", "PubmedBookData")  # what stands beside a record
MAX_DEPTH = 100  # of markup in a text; formulas come to some ten
OF_INTEREST = frozenset((*RECORDS, *TEXTS, *AFTER_PMID, *DELETIONS, *ENDS_OF_RECORDS))


def pubmed_records(name: str, blocks: Iterable[bytes]) -> Iterator[Record]:
    """The records of a PubMed file, each when all of it has been read.

    Raises InputError, with the line, for XML that is not well-formed or no PubMed's, for entities
    of its own (they may be a bomb: a few lines that expand to gigabytes), for records without end.
    """
    reader = _CitationReader(name)
    record_bytes = 0
    for block in blocks:
        reader.parse(block)
        record_bytes = 0 if reader.finished else record_bytes + len(block)
        if record_bytes > MAX_RECORD_BYTES:
            limit = MAX_RECORD_BYTES >> 20
            raise reader.error(f"in a record longer than {limit} MB, the most for a record")
        yield from reader.finished
        reader.finished.clear()
    reader.parse(b"", is_last=True)
    yield from reader.finished


class _CitationReader:
    """Puts records together while expat reads.

    Of most elements expat tells the name alone: authors and references, two thirds of PubMed's
    bytes, then cost little. Trees are built of the few that hold what we want. (A tree of
    everything takes half as long again.)
    """

    def __init__(self, name: str):
        self.finished: list[Record] = []
        self._name = name
        self._record: Element | None = None  # the one being read, of its elements TEXTS alone
        self._past_pmid = False
        self._parser = expat.ParserCreate(namespace_separator="}")
        self._parser.buffer_text = True
        self._parser.EntityDeclHandler = self._refuse_entity
        self._parser.SkippedEntityHandler = self._miss_entity
        self._parser.StartElementHandler = self._begin_root

    def parse(self, block: bytes, is_last: bool = False) -> None:
        """Read on; what ends in this block is added to `finished`."""
        try:
            self._parser.Parse(block, is_last)
            if is_last:
                self._finish_record()
        except InputError:
            raise
        except expat.ExpatError as error:  # it tells line and column
            raise InputError(f"{self._name}: malformed XML: {error}") from None
        except (LookupError, ValueError) as error:  # an encoding that expat does not know
            raise InputError(f"{self._name}: {error}") from None

    def error(self, problem: str) -> InputError:
        return InputError(f"{self._name}: line {self._parser.CurrentLineNumber}: {problem}")

    def _refuse_entity(self, entity: str, *_) -> None:
        raise self.error(f"defines the entity {entity!r}; refused")

    def _miss_entity(self, entity: str, is_parameter: bool) -> None:
        if not is_parameter:
            raise self.error(f"malformed XML: undefined entity &{entity};")

    def _begin_root(self, tag: str, attributes: dict[str, str]) -> None:
        if tag not in SETS + SINGLE_ARTICLES:
            found = tag.rpartition("}")[2]
            raise InputError(f"{self._name}: holds <{found}>; expected <{SETS[0]}>")
        self._watch()
        self._begin(tag, attributes)

    def _watch(self) -> None:
        self._parser.StartElementHandler = self._begin
        self._parser.EndElementHandler = self._parser.CharacterDataHandler = None

    def _begin(self, tag: str, attributes: dict[str, str]) -> None:
        """What to do where an element begins, outside of trees."""
        if tag not in OF_INTEREST:
            return
        if tag in RECORDS + ENDS_OF_RECORDS + DELETIONS:
            self._finish_record()
        if tag in RECORDS:
            self._record, self._past_pmid = Element(tag), False
        elif tag in DELETIONS:
            self._build(tag, attributes, self._delete)
        elif tag in AFTER_PMID:
            self._past_pmid = True
        elif self._record is not None and not (tag == "PMID" and self._past_pmid):
            self._build(tag, attributes, self._record.append)

    def _build(self, tag: str, attributes: dict[str, str], use: Callable[[Element], None]) -> None:
        """Have expat tell a tree builder of all that is in this element; then `use` the tree."""
        builder, depth = TreeBuilder(), 0

        def start(tag: str, attributes: dict[str, str]) -> None:
            nonlocal depth
            depth += 1
            if depth > MAX_DEPTH:
                raise self.error("markup nested too deeply")
            builder.start(tag, attributes)

        def end(tag: str) -> None:
            nonlocal depth
            depth -= 1
            element = builder.end(tag)
            if depth == 0:
                self._watch()
                use(element)

        start(tag, attributes)
        self._parser.StartElementHandler = start
        self._parser.CharacterDataHandler = builder.data
        self._parser.EndElementHandler = end

    def _delete(self, deletion: Element) -> None:
        for pmid in deletion.iter("PMID"):
            self.finished.append(Record(pmid.text or "", deleted=True))

    def _finish_record(self) -> None:
        if self._record is not None:
            self.finished.append(_record(self._record))
            self._record = None


def _record(record: Element) -> Record:
    """Id, title and sections of a MedlineCitation or BookDocument."""
    title = record.find("ArticleTitle")
    if title is None:
        title = record.find("BookTitle")
    return Record(
        record.findtext("PMID", ""),
        "" if title is None else _text(title),
        [
            (section.get("Label", ""), _text(section))
            for section in record.iterfind("Abstract/AbstractText")
        ],
    )


# ---- Markup --------------------------------------------------------------------------------------

MATHML = "http://www.w3.org/1998/Math/MathML}"
INLINE = frozenset(  # NLM's b, i, sub, sup, u and mathematics; what some publishers write instead
    ("b", "i", "sub", "sup", "u", MATHML + "math", "bold", "em", "font", "italic", "span", "strong")
)
BLOCKS = frozenset(("br", "div", "li", "ol", "p", "ul"))


def _text(element: Element) -> str:
    """The text of an element; some publishers' entities and markup are escaped twice."""
    text = _flatten(element)
    if "&" in text:
        text = re.sub(r"&#?\w+;", lambda entity: html.unescape(entity[0]), text)
    return re.sub(r"</?(?:\w+:)?(\w+) */?>", _without_tag, text) if "</" in text else text


def _without_tag(tag: re.Match[str]) -> str:
    """What stands for a tag that was escaped twice, if it is one of HTML's."""
    name = tag[1].lower()
    return "" if name in INLINE else " " if name in BLOCKS else tag[0]


def _flatten(element: Element) -> str:
    """All text in an element: inline markup joins, H<sub>2</sub>O is H2O, any other separates."""
    if element.tag == MATHML + "math":
        return _flatten_math(element)
    parts = [element.text or ""]
    for child in element:
        gap = "" if child.tag in INLINE else " "
        parts += gap, _flatten(child), gap, child.tail or ""
    return "".join(parts)


def _flatten_math(element: Element) -> str:
    """MathML on one line: only its leaves hold text; white space between elements means nothing."""
    tag = element.tag.removeprefix(MATHML)
    if tag == "mspace":
        return " "
    if tag.startswith("annotation"):  # the same once more, in another notation
        return ""
    children = [_flatten_math(child) for child in element]
    tags = [child.tag for child in element]
    if MATHML + "mprescripts" in tags:  # what follows stands before: 3He, not He3
        start = tags.index(MATHML + "mprescripts")
        children = children[start:] + children[:start]
    if tag == "mfrac":
        return "/".join(children)
    if tag == "mfenced":
        return f"({','.join(children)})"
    if tag in ("mtable", "mtr"):
        return " ".join(children)
    return (element.text or "").strip(" \t\r\n") + "".join(children)
