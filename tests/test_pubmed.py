"""PubMed and plainer files become the documents that they hold, as a stream, or are refused."""

import gzip
import hashlib
import json
import re
import tracemalloc
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert.data import pubmed
from minibert.data.pubmed import Reading, read_documents
from minibert.errors import InputError

MATH = '<m:math xmlns:m="http://www.w3.org/1998/Math/MathML">{}</m:math>'


def citation(title="T.", abstract="<AbstractText>A.</AbstractText>", pmid="7", more=""):
    return (
        f'<MedlineCitation><PMID Version="1">{pmid}</PMID><Article>'
        f"<ArticleTitle>{title}</ArticleTitle><Abstract>{abstract}</Abstract>{more}</Article>"
        "<CommentsCorrectionsList><CommentsCorrections><PMID>8</PMID></CommentsCorrections>"
        "</CommentsCorrectionsList></MedlineCitation>"
    )


def article_set(*citations):
    articles = "".join(f"<PubmedArticle>{one}<PubmedData/></PubmedArticle>" for one in citations)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        '<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle//EN" "pubmed.dtd">\n'
        f"<PubmedArticleSet>{articles}</PubmedArticleSet>\n"
    )


def read(folder, name, content):
    """The documents of a file with that name and content, and how its reading went."""
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    reading = Reading()
    documents = list(read_documents(folder / name, reading))
    assert reading.documents == len(documents)
    assert reading.bytes_read == (folder / name).stat().st_size
    return documents, reading


def text_of(folder, *args, **kwargs):
    """The text of the one document that a citation becomes."""
    documents, _ = read(folder, "one.xml", article_set(citation(*args, **kwargs)))
    assert [document_id for document_id, _ in documents] == ["7"]
    return documents[0][1]


def section(text, **attributes):
    labels = "".join(f' {name}="{value}"' for name, value in attributes.items())
    return f"<AbstractText{labels}>{text}</AbstractText>"


# ---- PubMed XML ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("xml", "expected"),
    [
        ("<i>BRCA1</i> gene", "BRCA1 gene"),
        ("the<b> <i>E. coli</i></b> gene", "the E. coli gene"),
        ("H<sub>2</sub>O and Ca<sup>2+</sup>", "H2O and Ca2+"),
        ("<b><i>in</i> <u>vitro</u></b>", "in vitro"),
        ("p &lt; 0.05 &amp; &#945;&#x3b2;", "p < 0.05 & αβ"),
        ("&amp;#945;-lipoic, P&amp;lt;0.05, AT&amp;T; R&amp;D", "α-lipoic, P<0.05, AT&T; R&D"),
        ("  two\n\t lines\u00a0and\u2009thin", "two lines and thin"),
        ("<![CDATA[a < b]]><!-- not this --> c", "a < b c"),
    ],
)
def test_inline_markup_neither_glues_nor_splits_words(tmp_path, xml, expected):
    assert text_of(tmp_path, title=f"<i>On</i> {xml}.") == f"On {expected}. A."
    assert text_of(tmp_path, abstract=section(xml)) == f"T. {expected}"


@pytest.mark.parametrize(
    ("math", "expected"),
    [
        ("<m:msub>\n <m:mi>T</m:mi>\n <m:mn>2</m:mn>\n</m:msub>", "T2"),
        ("<m:mn>1.5</m:mn> <m:mspace/> <m:mi>s</m:mi>", "1.5 s"),
        ("<m:mn>3</m:mn><m:mtext>\u00a0or\u00a0</m:mtext><m:mn>4</m:mn>", "3 or 4"),
        ("<m:mfrac><m:mn>1</m:mn> <m:mn>12</m:mn></m:mfrac>", "1/12"),
        ("<m:mi>f</m:mi> <m:mfenced><m:mi>a</m:mi><m:mi>b</m:mi></m:mfenced>", "f(a,b)"),
        ("<m:semantics><m:mi>x</m:mi><m:annotation>x</m:annotation></m:semantics>", "x"),
        ("<m:msup><m:mi/><m:mo>+</m:mo></m:msup>", "+"),
    ],
)
def test_mathematics_stands_on_one_line(tmp_path, math, expected):
    abstract = section(f"The value {MATH.format(math)} of K{MATH.format(math)}, here")
    assert text_of(tmp_path, abstract=abstract) == f"T. The value {expected} of K{expected}, here"


def test_every_section_is_kept_with_its_label(tmp_path):
    abstract = (
        section("None so far.", Label="BACKGROUND", NlmCategory="BACKGROUND")
        + section("", Label="AIM")
        + section("<b>Two</b> ways.", Label="METHODS")
        + section("And so on.", Label="UNLABELLED")
        + section("It is so.", Label="")
        + "<CopyrightInformation>Copyright 2021 Elsevier.</CopyrightInformation>"
    )
    expected = "T. BACKGROUND: None so far. METHODS: Two ways. And so on. It is so."
    assert text_of(tmp_path, abstract=abstract) == expected


def test_other_languages_are_left_out(tmp_path):
    more = "<VernacularTitle>Titel.</VernacularTitle>"
    other = f"<OtherAbstract>{section('Andere.')}</OtherAbstract></MedlineCitation>"
    xml = article_set(citation(more=more).replace("</MedlineCitation>", other))
    xml = xml.replace("<PubmedData/>", f"<PubmedData>{section('Elsewhere.')}</PubmedData>")
    assert read(tmp_path, "one.xml", xml)[0] == [("7", "T. A.")]


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("[Malaria in Chad].", "Malaria in Chad. A."),
        ("[Is it [18F]FDG?].", "Is it [18F]FDG? A."),
        ("[Is it so?]", "Is it so? A."),
        ("[Connected.]", "Connected. A."),
        ("[<i>E. coli</i>].", "E. coli. A."),
        ("[11C]Choline or [18F]FDG.", "[11C]Choline or [18F]FDG. A."),
        ("[11C] or [18F].", "[11C] or [18F]. A."),
        ("[Not Available].", "A."),
        ("", "A."),
    ],
)
def test_brackets_of_translated_titles_go(tmp_path, title, expected):
    assert text_of(tmp_path, title=title) == expected


def test_records_without_an_abstract_are_counted(tmp_path):
    xml = article_set(
        citation(),
        citation(abstract="", pmid="8"),
        citation(abstract=section(" "), pmid="9"),
        citation(abstract=section("", Label="AIM"), pmid="10"),
        citation(title="", abstract="", pmid="11"),
    )
    documents, reading = read(tmp_path, "five.xml.gz", xml)
    assert documents == [("7", "T. A.")]
    assert reading.titles_only == 3


def test_book_chapters_old_roots_and_single_records(tmp_path):
    chapter = (
        "<PubmedBookArticle><BookDocument><PMID>20301295</PMID>"
        "<Book><BookTitle>GeneReviews</BookTitle></Book>{}"
        "<Abstract><AbstractText>A.</AbstractText></Abstract></BookDocument></PubmedBookArticle>"
    )
    named = chapter.format("<ArticleTitle>Marfan</ArticleTitle>")
    content = f"<PubmedArticleSet>{named}<PubmedArticle>{citation()}</PubmedArticle>{{}}"
    deleted = "<DeleteCitation><PMID>5</PMID></DeleteCitation></PubmedArticleSet>"
    marfan = ("20301295", "Marfan A.")
    assert read(tmp_path, "a.xml", content.format(deleted))[0] == [marfan, ("7", "T. A.")]
    assert read(tmp_path, "b.xml", chapter.format(""))[0] == [("20301295", "GeneReviews A.")]
    old = f"<MedlineCitationSet>{citation()}{citation(pmid='9')}</MedlineCitationSet>"
    assert read(tmp_path, "c.xml", old)[0] == [("7", "T. A."), ("9", "T. A.")]
    assert read(tmp_path, "d.xml", citation())[0] == [("7", "T. A.")]
    assert read(tmp_path, "e.xml", f"<PubmedArticle>{citation()}</PubmedArticle>")[0]
    assert read(tmp_path, "f.xml", "<PubmedArticleSet/>")[0] == []


@settings(max_examples=25, deadline=None)
@given(title=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=9))
@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 16])
def test_any_title_survives_any_cutting_into_blocks(tmp_path_factory, block_bytes, title):
    title = f"A{title}z".replace("&", "and")
    xml = article_set(citation(title=escape(title)), citation(pmid="9"))
    folder = tmp_path_factory.mktemp("blocks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pubmed, "BLOCK_BYTES", block_bytes)
        documents, _ = read(folder, "two.xml", xml)
    assert documents == [("7", " ".join(f"{title} A.".split())), ("9", "T. A.")]


def test_memory_does_not_grow_with_the_file(tmp_path):
    abstract = section("word " * 400)

    def peak(num_records):
        path = tmp_path / f"{num_records}.xml.gz"
        path.write_bytes(
            gzip.compress(article_set(*[citation(abstract=abstract)] * num_records).encode())
        )
        tracemalloc.start()
        assert sum(1 for _ in read_documents(path)) == num_records
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(50)
    assert peak(1200) < 1.2 * peak(200)


def test_entities_of_its_own_are_refused(tmp_path):
    bomb = '<!DOCTYPE PubmedArticleSet [\n<!ENTITY a "ha">\n<!ENTITY b "&a;&a;">]>'
    xml = f"{bomb}<PubmedArticleSet>{citation(title='&b;')}</PubmedArticleSet>"
    with pytest.raises(InputError, match=r"bomb\.xml: defines the entity 'a'"):
        read(tmp_path, "bomb.xml", xml)
    outside = '<!DOCTYPE PubmedArticleSet [<!ENTITY % a SYSTEM "file:///etc/hosts">]>'
    with pytest.raises(InputError, match="defines the entity 'a'"):
        read(tmp_path, "outside.xml.gz", f"{outside}<PubmedArticleSet/>")


@pytest.mark.parametrize(
    ("xml", "complaint"),
    [
        (article_set(citation())[:-9], "malformed XML: .*line 3, column"),
        (article_set(citation(title="<i>a</b>")), "malformed XML: mismatched tag: line 3"),
        (article_set(citation(title="a&nbsp;b")), "malformed XML: undefined entity &nbsp;"),
        ("", "malformed XML: no element found"),
        ("not XML", "malformed XML"),
        ("<html><p>404</p></html>", "holds <html>; expected <PubmedArticleSet>"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "unknown encoding: klingon"),
        (article_set(citation(title="<i>" * 5000 + "</i>" * 5000)), "markup nested too deeply"),
    ],
)
def test_broken_xml_is_named(tmp_path, xml, complaint):
    with pytest.raises(InputError, match=rf"broken\.xml: {complaint}"):
        read(tmp_path, "broken.xml", xml)


# ---- Real PubMed files ---------------------------------------------------------------------------


def test_real_records(shared_data):
    folder = shared_data / "pubmed-xml" / "edge-cases"

    def only(name):
        reading = Reading()
        return dict(read_documents(folder / name, reading)), reading.titles_only

    documents, _ = only("doc_medline_mathml_newlines.xml")
    text = documents["30712376"]
    assert "different sized cuprous oxide (Cu2O) particles. Biofilms typically increase" in text
    assert "sizes of cuprous oxide (Cu2O). In this study, a series" in text
    assert text.endswith("panels coated with larger Cu2O, the roughness and drag measurement "
                         "results were both found to have fluctuating increments.")  # fmt: skip

    documents, _ = only("doc_medline_test_structured_abstract.xml")
    labels = re.findall(r"([A-Z ]{5,}): ", documents["15030341"])
    expected = ["BACKGROUND", "OBJECTIVES", "PATIENTS AND METHODS", "RESULTS", "CONCLUSIONS"]
    assert [label.strip() for label in labels] == expected

    documents, _ = only("biopython/pubmed6.xml")
    assert "velocity at MLSS (VMLSS) more accurate than" in documents["30108519"]

    assert only("18788097.xml") == ({}, 1)  # a title alone
    assert only("27805344.xml") == ({}, 1)  # four labels without a text


def test_real_sample(shared_data):
    reading = Reading()
    path = shared_data / "pubmed-xml" / "pubmedsample18n0001.xml.gz"
    documents = dict(read_documents(path, reading))
    assert (len(documents), reading.titles_only) == (109, 61)  # of 177; 7 have not even a title
    assert documents["1875346"].startswith(
        "3-Hydroxy-3-methylglutaryl-coenzyme a reductase inhibitors. 7. Modification of the "
        "hexahydronaphthalene moiety of simvastatin: 5-oxygenated and 5-oxa derivatives. "
        "Modification of the hexahydronaphthalene ring 5-position in simvastatin 2a via"
    )


@pytest.mark.slow
def test_real_update_file(shared_data):
    path = shared_data / "pubmed-xml" / "pubmed21n1298.xml.gz"
    reading = Reading()
    documents = list(read_documents(path, reading))  # 5 PMIDs in two versions each
    assert (reading.documents, reading.titles_only) == (18_445, 2_289)  # of 20,788
    assert dict(documents)["34096565"] == (
        "Ba2BS3Cl and Ba5B2S8Cl2: first alkaline-earth metal thioborate halides with [BS3] units. "
        "Ba2BS3Cl and Ba5B2S8Cl2 have been synthesized by using PbCl2 as the flux and source of "
        "halogen. The two compounds show 3D network structures built by isolated [BS3] units with "
        "different Ba-S-Cl groups. This work enriches the structural diversity of boron chemistry "
        "and provides an insight into the synthesis of thioborates."
    )
    # By another way: element by element, and all that is asked is how an abstract begins and ends.
    structured, remaining = 0, iter(documents)
    with gzip.open(path) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag != "MedlineCitation":
                continue
            sections = element.findall("Article/Abstract/AbstractText")
            structured += any(section.get("Label") for section in sections)
            words = " ".join("".join(section.itertext()) for section in sections).split()
            if words:
                document_id, text = next(remaining)
                assert document_id == element.findtext("PMID")
                assert words[0] in text
                assert text.endswith(words[-1])
            element.clear()
    assert structured == 6_495
    assert next(remaining, None) is None


# ---- Plainer files -------------------------------------------------------------------------------


def test_tsv(tmp_path):
    rows = ["PMID\tTitle\tAbstract", "7\t[T].\t A\u00a0b. ", "", "8\tT.\t", "\tT.\tA."]
    documents, reading = read(tmp_path, "a.tsv", "\r\n".join(rows))
    unnamed = (hashlib.sha256(b"T. A.").hexdigest()[:16], "T. A.")
    assert documents == [("7", "T. A b."), unnamed]
    assert reading.titles_only == 1
    assert read(tmp_path, "b.tsv.gz", "7\tT.\tA.\n")[0] == [("7", "T. A.")]


def test_json_lines(tmp_path):
    lines = [{"text": "a  b"}, {"id": 7, "text": "c\u2028d"}, {"id": "x y", "text": "e"}]
    lines += [{"id": None, "text": "f"}, {"id": "g", "text": " "}]
    content = "\n".join(map(json.dumps, lines)) + "\n\n"
    documents, _ = read(tmp_path, "a.jsonl.gz", content)
    names = [hashlib.sha256(text).hexdigest()[:16] for text in (b"a b", b"f")]
    expected = [(names[0], "a b"), ("7", "c d"), ("x y", "e"), (names[1], "f")]
    assert documents == expected


def test_text_lines(tmp_path):
    documents, _ = read(tmp_path, "A.TXT", b"\xef\xbb\xbfone  two\r\n\n \nthree\x0cfour\none two")
    assert [text for _, text in documents] == ["one two", "three four", "one two"]
    assert documents[0][0] == documents[2][0] != documents[1][0]  # the same text has the same id


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.tsv", b"1\ta\tb\n2\ta\n", "line 2: 2 columns; expected 3"),
        ("a.tsv.gz", b"1\ta\tb\tc", "line 1: 4 columns; expected 3"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text":\n', "line 3: not readable as JSON"),
        ("a.jsonl", b'["text"]', 'line 1: expected an object with a string "text"'),
        ("a.jsonl", b'{"text": 7}', 'line 1: expected an object with a string "text"'),
        ("a.jsonl", b'{"id": [], "text": "a"}', r'line 1: "id" is \[\]'),
        ("a.jsonl", b'{"text": "a \\ud800"}', "line 1: half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "line 1: not readable as JSON"),
        ("a.txt", b"a\nb\xffc\n", r"line 2: not UTF-8 \(byte 2 of the line\)"),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, content, complaint):
    with pytest.raises(InputError, match=rf"{re.escape(name)}: {complaint}"):
        read(tmp_path, name, content)


@pytest.mark.parametrize("suffix", ["txt", "tsv", "jsonl", "xml"])
def test_a_broken_gzip_file_is_named(tmp_path, suffix):
    whole = gzip.compress(article_set(*[citation()] * 50).encode())
    damaged = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "other": b"plain text",
        "garbage": whole + b"garbage",
        "checksum": whole[:-8] + bytes(8),
        "flipped": whole[:12] + bytes([255] * 20) + whole[32:],
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.{suffix}.gz"
        path.write_bytes(content)
        if suffix in ("tsv", "jsonl") and name in ("cut", "garbage", "checksum"):
            continue  # its first line is wrong already
        with pytest.raises(
            InputError, match=rf"{name}\.{suffix}\.gz: (unreadable near byte|empty)"
        ):
            list(read_documents(path))


def test_what_is_no_text_file_is_refused_at_once(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "a.csv").write_text("a,b\n")
    for name, complaint in (
        ("gone.txt", "no such file"),
        ("folder.txt", "not a file"),
        ("a.csv", r"unknown suffix; expected \.xml"),
        ("gz", "unknown suffix"),
    ):
        with pytest.raises(InputError, match=rf"{name}: {complaint}"):
            read_documents(tmp_path / name)
