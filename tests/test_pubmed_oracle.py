"""Three other ways of reading the same files find the same records, words and sections.

    expressions    the file is one string, elements are what regular expressions find: the words
    trees          xml.etree, a tree of each citation, all text in an element: letter for letter
    pubmed_parser  the package of that name (0.5.1 was compared), where it is installed: likewise

Records that are meant to differ, or that another way is known to read less of, are listed.
"""

import gzip
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from minibert.data.pubmed import Reading, read_documents

EXPLAINED = {
    "33403765": "a formula's <mfenced> is put between parentheses",
    "33880799": "a formula's <mfenced> and <mfrac>: MR(SWI/ADC) for MRSWIADC",
    "34091678": "its publisher's <p> and <o:p>, escaped twice, are no text",
    "34094884": "a title's note, [Internet Interv. 22 (2020) ...]",
    "34095420": "a title's note",
    "34095618": "a title's note",
    "34095745": "a title's note",
}


class Found(NamedTuple):
    """A record as another way sees it, nothing cleaned."""

    pmid: str
    title: str
    sections: list[tuple[str, str]]  # label and text
    peculiar: bool = False  # pubmed_parser is known to read it otherwise


# ---- The other ways ------------------------------------------------------------------------------


def by_expressions(path: Path) -> Iterator[Found]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        content = file.read()
    for article in content.split("<PubmedArticle>")[1:]:
        ((_, title), *_) = elements("ArticleTitle", article)
        abstract = "".join(xml for _, xml in elements("Abstract", article))
        yield Found(
            elements("PMID", article)[0][1],
            plain(title),
            [
                (html.unescape("".join(re.findall(r'\bLabel="([^"]*)"', attributes))), plain(xml))
                for attributes, xml in elements("AbstractText", abstract)
            ],
        )


def elements(tag: str, xml: str) -> list[tuple[str, str]]:
    """Attributes and content of all elements of a name; of NLM's none holds another of its name."""
    return re.findall(rf"<{tag}((?: [^>]*?)?)(?:/>|>(.*?)</{tag}>)", xml, re.S)


def plain(xml: str) -> str:
    """What is between tags. NLM's five join what they part, formulas are joined within."""
    xml = re.sub(r"<mml:math.*?</mml:math>", plain_formula, xml, flags=re.S)
    xml = re.sub(r"</?(b|i|sub|sup|u)/?>", "", xml)
    return html.unescape(html.unescape(re.sub(r"<[^>]*>", " ", xml)))


def plain_formula(formula: re.Match[str]) -> str:
    xml = re.sub(r"\s*<mml:mspace/>\s*", "&#32;", formula[0])
    return re.sub(r"[ \t\n]*<[^>]*>[ \t\n]*", "", xml)


def by_trees(path: Path) -> Iterator[Found]:
    with gzip.open(path) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag == "MedlineCitation":
                title = element.find("Article/ArticleTitle")
                sections = element.findall("Article/Abstract/AbstractText")
                labels = [section.get("Label", "") for section in sections]
                texts = ["".join(section.itertext()) for section in sections]
                nested = any(len(child) for part in (title, *sections) for child in part)
                lone = len(sections) == 1 and labels[0] != ""
                empty = any(not text.strip() for text in texts)
                yield Found(
                    element.findtext("PMID"),
                    "".join(title.itertext()),
                    list(zip(labels, texts, strict=True)),
                    peculiar=nested or lone or empty or "UNLABELLED" in labels,
                )
                element.clear()


def by_pubmed_parser(path: Path) -> Iterator[Found]:
    reason = "pubmed_parser is not installed: the other two ways are enough, it is a third opinion"
    pubmed_parser = pytest.importorskip("pubmed_parser", reason=reason)
    for article in pubmed_parser.parse_medline_xml(str(path)):
        yield Found(article["pmid"], article["title"], [("", article["abstract"])])


# ---- Comparisons ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def real_file(request, shared_data) -> tuple[Path, list[tuple[str, str]], Reading]:
    """A file of NLM's, what we read in it, and its counts."""
    name = ("pubmedsample18n0001.xml.gz", "pubmed21n1298.xml.gz")[request.param]
    path, reading = shared_data / "pubmed-xml" / name, Reading()
    return path, list(read_documents(path, reading)), reading


@pytest.fixture(scope="module")
def trees(real_file) -> list[Found]:
    return list(by_trees(real_file[0]))


def bare(title: str) -> str:
    """A translated title without its brackets, by another way than ours."""
    if not title.startswith("[") or not re.search(r"\][.?!]?$", title.strip()):
        return title
    inner, _, end = title.strip()[1:].rpartition("]")
    return inner if inner[-1] in ".?!" else inner + end


def expected_text(found: Found) -> str:
    """The document that these parts should become, white space aside."""
    sections = [
        f"{label.strip()}: {text}" if label not in ("", "UNLABELLED") else text
        for label, text in found.sections
        if text.strip()
    ]
    return " ".join([bare(found.title), *sections]) if sections else ""


def test_the_same_words(real_file):
    """Word for word: none is glued to its neighbour, none is split, and no section is lost."""
    path, documents, _ = real_file
    others = list(by_expressions(path))
    assert [pmid for pmid, _ in documents[: len(others)]] == [found.pmid for found in others]
    differing = [
        found.pmid
        for found, (_, text) in zip(others, documents, strict=False)
        if text.split() != expected_text(found).split()
    ]
    assert set(differing) <= set(EXPLAINED)


def test_the_same_letters(real_file, trees):
    _, documents, _ = real_file
    assert [pmid for pmid, _ in documents[: len(trees)]] == [found.pmid for found in trees]
    differing = [
        found.pmid
        for found, (_, text) in zip(trees, documents, strict=False)
        if squeezed(text) != squeezed(expected_text(found))
    ]
    assert differing == [found.pmid for found in trees if found.pmid in EXPLAINED]


def squeezed(text: str) -> str:
    return "".join(html.unescape(text).split())


def test_the_same_as_pubmed_parser(real_file, trees):
    """It loses markup within markup and the label of an only section, and keeps empty sections."""
    path, documents, _ = real_file
    others = list(by_pubmed_parser(path))
    assert [pmid for pmid, _ in documents[: len(others)]] == [found.pmid for found in others]
    peculiar = {found.pmid for found in trees if found.peculiar}
    differing = {
        found.pmid
        for found, (_, text) in zip(others, documents, strict=False)
        if squeezed(text).replace(":", "") != squeezed(expected_text(found)).replace(":", "")
    }
    assert differing <= peculiar | set(EXPLAINED)


def test_the_counts(real_file, trees):
    _, _, reading = real_file
    has_abstract = [any(text.strip() for _, text in found.sections) for found in trees]
    has_title = [found.title not in ("", "[Not Available].") for found in trees]
    has_label = [any(label for label, _ in found.sections) for found in trees]
    both = list(zip(has_abstract, has_title, has_label, strict=True))
    assert reading.citations == len(trees)
    assert reading.documents == sum(has_abstract)
    assert reading.titles_only == sum(title and not abstract for abstract, title, _ in both)
    assert reading.empty == sum(not title and not abstract for abstract, title, _ in both)
    assert reading.structured == sum(abstract and label for abstract, _, label in both)


@pytest.mark.slow
def test_the_figures_of_the_update_file(shared_data):
    """Deletions stand at the end; versions of one record in the order of their numbers."""
    path, reading = shared_data / "pubmed-xml" / "pubmed21n1298.xml.gz", Reading()
    documents = list(read_documents(path, reading))
    counts = (reading.citations, reading.documents, reading.titles_only, reading.empty)
    assert counts == (20_788, 18_445, 2_289, 54)
    assert (reading.structured, reading.deleted) == (6_495, 20)
    deleted = [pmid for pmid, _ in documents[20_788:]]
    assert len(deleted) == 20 and (deleted[0], deleted[-1]) == ("31688362", "34096142")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        pmids = re.findall(r'<MedlineCitation [^>]*>\s*<PMID Version="(\d+)">(\d+)', file.read())
    assert [pmid for _, pmid in pmids] == [pmid for pmid, _ in documents[:20_788]]
    revised = {pmid for version, pmid in pmids if version != "1"}
    assert revised == {"30271887", "33728380", "34017925"}
    for pmid in revised:
        versions = [int(version) for version, other in pmids if other == pmid]
        assert versions == list(range(1, len(versions) + 1))
