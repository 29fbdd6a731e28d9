"""PubMed and plainer files become the documents that they hold, as a stream, or are refused."""

import gzip
import hashlib
import io
import json
import re
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from xml.sax.saxutils import escape, quoteattr

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert.data import reading as reading_module
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


def read(folder, name, content, **options):
    """The documents of a file with that name and content, and how its reading went."""
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    reading = Reading()
    documents = list(read_documents(folder / name, reading, **options))
    assert reading.documents == sum(text != "" for _, text in documents)
    assert reading.documents + reading.titles_only + reading.empty == reading.citations
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
        ("<em>in</em><span>fer</span>", "infer"),
        ("one<DispFormula>two</DispFormula>three<br/>four", "one two three four"),
        ("&lt;p&gt;One.&lt;/p&gt;&lt;p&gt;H&lt;sub&gt;2&lt;/sub&gt;O", "One. H2O"),
        ("a &lt;b and c&gt; d, &lt;o:p/&gt; and &lt;/x&gt;", "a <b and c> d, and </x>"),
        ("if &lt;p&gt; = 5", "if <p> = 5"),
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
        (
            "<m:mmultiscripts><m:mi>He</m:mi><m:mn>2</m:mn><m:none/><m:mprescripts/><m:none/>"
            "<m:mn>3</m:mn></m:mmultiscripts>",
            "3He2",
        ),
        ("<m:mtable><m:mtr><m:mtd>1</m:mtd><m:mtd>2</m:mtd></m:mtr></m:mtable>", "1 2"),
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


def test_labels_may_be_left_out(tmp_path):
    abstract = section("One.", Label=" AIM:\u2003") + section("Two.", Label="And\u00a0so")
    assert text_of(tmp_path, abstract=abstract) == "T. AIM: One. And so: Two."
    xml = article_set(citation(abstract=abstract))
    documents, reading = read(tmp_path, "a.xml", xml, section_labels=False)
    assert (documents, reading.structured) == ([("7", "T. One. Two.")], 1)


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


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Tablets [proceedings].", "Tablets."),
        ("[Tablets (author's transl)].", "Tablets."),
        ("[Tablets] [letter].", "Tablets."),
        ("Are they tablets? [see comments].", "Are they tablets?"),
        ("Tablets [published erratum appears in Tablets 1994;2(1):3]", "Tablets"),
        (
            'Corrigendum to "Tablets" [J. Pills 101 (2) (2021) 138-140].',
            'Corrigendum to "Tablets".',
        ),
        ("Erratum to 'Tablets': [Annals of Pills 31 (2020) 8-9].", "Erratum to 'Tablets'."),
        ("Response of sorghum [Sorghum bicolor (L.) Moench].", None),
        ("Growth at elevated [CO2].", None),
        ("Tablets [correctedness].", None),
        ("Tablets [proceedings] in the stomach.", None),
        ("Tablets (proceedings).", None),
        ("(author's transl).", None),
        ("A [" + "very " * 80 + "long note of 1994].", None),
        ("[Malaria in Chad 1994].", "Malaria in Chad 1994."),
        ("[Letter].", "Letter."),
    ],
)
def test_notes_at_the_end_of_titles_go(tmp_path, title, expected):
    assert text_of(tmp_path, title=title) == f"{expected or title} A."


def test_records_without_an_abstract_are_counted(tmp_path):
    xml = article_set(
        citation(),
        citation(abstract="", pmid="8"),
        citation(abstract=section(" "), pmid="9"),
        citation(abstract=section("", Label="AIM"), pmid="10"),
        citation(title="", abstract="", pmid="11"),
        citation(abstract=section("B.", Label="AIM"), pmid="12"),
    )
    documents, reading = read(tmp_path, "six.xml.gz", xml)
    left_out = [(pmid, "") for pmid in ("8", "9", "10", "11")]
    assert documents == [("7", "T. A."), *left_out, ("12", "T. AIM: B.")]
    assert (reading.titles_only, reading.empty, reading.structured) == (3, 1, 1)
    documents, reading = read(tmp_path, "six.xml.gz", xml, titles_only=True)
    titles = [(pmid, "T.") for pmid in ("8", "9", "10")]
    assert documents == [("7", "T. A."), *titles, ("11", ""), ("12", "T. AIM: B.")]
    assert (reading.titles_only, reading.empty) == (0, 1)


def test_revised_and_deleted_records_stand_in_their_order(tmp_path):
    deletion = "<DeleteCitation><PMID Version='1'>7</PMID> <PMID>9</PMID></DeleteCitation>"
    xml = article_set(citation(), citation(abstract=section("B.")), citation(abstract=""))
    xml = xml.replace("</PubmedArticleSet>", f"{deletion}</PubmedArticleSet>")
    documents, reading = read(tmp_path, "a.xml", xml)
    assert documents == [("7", "T. A."), ("7", "T. B."), ("7", ""), ("7", ""), ("9", "")]
    assert (reading.citations, reading.documents, reading.deleted) == (3, 2, 2)
    alone = "<PubmedBookArticleSet><DeleteDocument><PMID>4</PMID></DeleteDocument>{}"
    content = alone.format("</PubmedBookArticleSet>")
    assert read(tmp_path, "b.xml", content)[0] == [("4", "")]


def test_a_record_has_its_own_id_or_none(tmp_path):
    unnamed = citation().replace('<PMID Version="1">7</PMID>', "")
    ((document_id, text),) = read(tmp_path, "a.xml", article_set(unnamed))[0]
    assert (document_id, text) == (hashlib.sha256(b"T. A.").hexdigest()[:16], "T. A.")
    assert read(tmp_path, "b.xml", article_set(unnamed.replace("A.", "")))[0] == []
    old = citation().replace("<PMID V", "<MedlineID>1</MedlineID><PMID V")
    assert read(tmp_path, "c.xml", article_set(old))[0] == [("7", "T. A.")]


def test_book_chapters_old_roots_and_single_records(tmp_path):
    chapter = (
        "<PubmedBookArticle><BookDocument><PMID>20301295</PMID>"
        "<Book><BookTitle>GeneReviews</BookTitle></Book>{}"
        "<Abstract><AbstractText>A.</AbstractText></Abstract></BookDocument></PubmedBookArticle>"
    )
    named = chapter.format("<ArticleTitle>Marfan</ArticleTitle>")
    content = f"<PubmedArticleSet>{named}<PubmedArticle>{citation()}</PubmedArticle>"
    marfan = ("20301295", "Marfan A.")
    documents, _ = read(tmp_path, "a.xml", f"{content}</PubmedArticleSet>")
    assert documents == [marfan, ("7", "T. A.")]
    assert read(tmp_path, "b.xml", chapter.format(""))[0] == [("20301295", "GeneReviews A.")]
    old = f"<MedlineCitationSet>{citation()}{citation(pmid='9')}</MedlineCitationSet>"
    assert read(tmp_path, "c.xml", old)[0] == [("7", "T. A."), ("9", "T. A.")]
    assert read(tmp_path, "d.xml", citation())[0] == [("7", "T. A.")]
    assert read(tmp_path, "e.xml", f"<PubmedArticle>{citation()}</PubmedArticle>")[0]
    assert read(tmp_path, "f.xml", "<PubmedArticleSet/>")[0] == []


WORDS = st.text(
    st.characters(
        codec="utf-8", exclude_categories=["Cs"], exclude_characters="&\ufffe\uffff"
    ).filter(lambda letter: letter in "\t\n\r" or letter >= " "),
    max_size=9,
).filter(lambda words: "</" not in words)  # else a word may be markup that was escaped twice
AS_XML = st.sampled_from(
    [
        lambda words: escape(words).replace("\r", "&#13;"),
        lambda words: "".join(f"&#{ord(letter)};" for letter in words),
        lambda words: f"<![CDATA[{words}]]>" if "]]>" not in words else escape(words),
        lambda words: f"<!-- no text -->{escape(words)}<?nor this?>",
    ]
)
PLAIN = st.builds(lambda words, as_xml: (as_xml(words), words), WORDS, AS_XML)
MARKED_UP = st.recursive(  # pairs of XML and the text that it says
    PLAIN,
    lambda inner: st.builds(
        lambda tag, parts: (
            f"<{tag}>{''.join(xml for xml, _ in parts)}</{tag}>",
            "".join(text for _, text in parts),
        ),
        st.sampled_from(["i", "b", "sub", "sup", "u"]),
        st.lists(inner, max_size=3),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(
    title=MARKED_UP,
    sections=st.lists(st.tuples(st.none() | WORDS, MARKED_UP), max_size=4),
    block_bytes=st.sampled_from([1, 7, 1 << 16]),
)
def test_any_document_survives_escaping_and_cutting_into_blocks(
    tmp_path_factory, title, sections, block_bytes
):
    abstract = "".join(
        f"<AbstractText{'' if label is None else f' Label={quoteattr(label)}'}>{xml}</AbstractText>"
        for label, (xml, _) in sections
    )
    xml = article_set(citation(f"A{title[0]}z", abstract), citation(pmid="9"))
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading_module, "BLOCK_BYTES", block_bytes)
        documents, _ = read(folder, "two.xml.gz", xml)
    texts = []
    for label, (_, text) in sections:
        label = " ".join((label or "").split()).rstrip(": ")
        if text.strip():
            texts.append(f"{label}: {text}" if label else text)
    expected = " ".join(" ".join([f"A{title[1]}z", *texts]).split()) if texts else ""
    assert documents == [("7", expected), ("9", "T. A.")]


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
    with pytest.raises(InputError, match=r"bomb\.xml: line 2: defines the entity 'a'"):
        read(tmp_path, "bomb.xml", xml)
    outside = '<!DOCTYPE PubmedArticleSet [<!ENTITY % a SYSTEM "file:///etc/hosts">]>'
    with pytest.raises(InputError, match="defines the entity 'a'"):
        read(tmp_path, "outside.xml.gz", f"{outside}<PubmedArticleSet/>")


@pytest.mark.parametrize(
    ("xml", "complaint"),
    [
        (article_set(citation())[:-9], "malformed XML: .*line 3, column"),
        (article_set(citation(title="<i>a</b>")), "malformed XML: mismatched tag: line 3"),
        (article_set(citation(title="a&nbsp;b")), "line 3: malformed XML: undefined entity &nbsp;"),
        ("", "malformed XML: no element found"),
        ("not XML", "malformed XML"),
        ("<html><p>404</p></html>", "holds <html>; expected <PubmedArticleSet>"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "unknown encoding: klingon"),
        (article_set(citation(title="<i>" * 5000 + "</i>" * 5000)), "line 3: markup nested"),
    ],
)
def test_broken_xml_is_named(tmp_path, xml, complaint):
    with pytest.raises(InputError, match=rf"broken\.xml: {complaint}"):
        read(tmp_path, "broken.xml", xml)


# ---- Plainer files -------------------------------------------------------------------------------


def test_tsv(tmp_path):
    rows = ["PMID\tTitle\tAbstract", "7\t[T].\t A\u00a0b. ", "", "8\tT.\t", "\tT.\tA."]
    documents, reading = read(tmp_path, "a.tsv", "\r\n".join(rows))
    unnamed = (hashlib.sha256(b"T. A.").hexdigest()[:16], "T. A.")
    assert documents == [("7", "T. A b."), ("8", ""), unnamed]
    assert (reading.citations, reading.titles_only) == (3, 1)
    assert read(tmp_path, "b.tsv.gz", "7\tT.\tA.\n")[0] == [("7", "T. A.")]


def test_json_lines(tmp_path):
    lines = [{"text": "a  b"}, {"id": 7, "text": "c\u2028d"}, {"id": "x y", "text": "e"}]
    lines += [{"id": None, "text": "f"}, {"id": "g", "text": " "}]
    content = "\n".join(map(json.dumps, lines)) + "\n\n"
    documents, reading = read(tmp_path, "a.jsonl.gz", content)
    names = [hashlib.sha256(text).hexdigest()[:16] for text in (b"a b", b"f")]
    expected = [(names[0], "a b"), ("7", "c d"), ("x y", "e"), (names[1], "f"), ("g", "")]
    assert documents == expected
    assert (reading.citations, reading.empty) == (5, 1)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("stdin_format", "content"),
    [
        ("xml", article_set(citation())),
        ("tsv", "7\tT.\tA."),
        ("jsonl", '{"id": 7, "text": "T. A."}'),
    ],
)
def test_standard_input_in_any_format(monkeypatch, stdin_format, content, compress):
    data = compress(content.encode())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    reading = Reading()
    documents = read_documents(Path("-"), reading, stdin_format=stdin_format)
    assert list(documents) == [("7", "T. A.")]
    assert reading.bytes_read == len(data)


def test_standard_input_is_named(monkeypatch):
    for stdin_format in (None, "csv", ".xml"):
        with pytest.raises(InputError, match=r"standard input: format .*expected one of xml, tsv"):
            read_documents(Path("-"), stdin_format=stdin_format)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a\n\xff")))
    with pytest.raises(InputError, match=r"^standard input: line 2: not UTF-8"):
        list(read_documents(Path("-"), stdin_format="txt"))


def test_gzip_is_known_by_its_first_bytes(tmp_path):
    assert (
        read(tmp_path, "a.txt", gzip.compress(b"one\ntwo"))[0]
        == read(tmp_path, "b.txt", "one\ntwo")[0]
    )


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
        ("a.txt", "a\nb".encode("utf-16"), r"line 1: not UTF-8 \(byte 1 of the line\)"),
        ("a.txt", "a\nb".encode("utf-16-be"), "line 1: holds null characters"),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, content, complaint):
    with pytest.raises(InputError, match=rf"{re.escape(name)}: {complaint}"):
        read(tmp_path, name, content)
