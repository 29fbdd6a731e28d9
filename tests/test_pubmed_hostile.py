"""Broken and hostile files end in one line that names file and byte or line, in bounded memory.

What would be gigabytes never touches the disk: it is a gzip member of a megabyte written many
times, or blocks that a generator repeats.
"""

import gzip
import io
import itertools
import os
import re
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from minibert.data import citations, lines
from minibert.data import reading as reading_module
from minibert.data.citations import pubmed_records
from minibert.data.lines import json_records, text_records, tsv_records
from minibert.data.pubmed import Reading, read_documents
from minibert.data.reading import BLOCK_BYTES, INFLATED_FREELY, MAX_RECORD_BYTES
from minibert.errors import InputError, in_one_line

RECORD = (
    "<PubmedArticle><MedlineCitation><PMID>{}</PMID><Article><ArticleTitle>T.</ArticleTitle>\n"
    "<Abstract><AbstractText>A.</AbstractText></Abstract></Article></MedlineCitation>"
    "</PubmedArticle>\n"
)
CONTENT = {  # of 50 documents in each format
    "xml": f"<PubmedArticleSet>\n{''.join(map(RECORD.format, range(50)))}</PubmedArticleSet>\n",
    "tsv": "".join(f"{number}\tT.\tA.\n" for number in range(50)),
    "jsonl": "".join(f'{{"id": {number}, "text": "T. A."}}\n' for number in range(50)),
    "txt": "".join(f"T. {number}\n" for number in range(50)),
}


def refusal(path, **options) -> tuple[str, int]:
    """The message that the reading of a file ends in, and how many documents came before."""
    count = 0
    with pytest.raises(InputError) as caught:
        for _ in read_documents(path, **options):
            count += 1
    assert "\n" not in str(caught.value) and in_one_line(caught.value).startswith(str(path)[:99])
    return str(caught.value).removeprefix(f"{path}: "), count


# ---- gzip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", CONTENT)
def test_a_broken_gzip_file_is_named(tmp_path, suffix):
    whole = gzip.compress(CONTENT[suffix].encode())
    near = "unreadable near byte [0-9]+: "
    damaged = {
        "cut": (whole[: len(whole) // 2], near + "gzip-compressed content is cut short"),
        "without its sum": (whole[:-8], near + "gzip-compressed content is cut short"),
        "header alone": (whole[:5], near + "gzip-compressed content is cut short"),
        "garbage behind": (whole + b"garbage", near + "Error -3.*incorrect header check"),
        "half a header behind": (whole + b"\x1f", near + "gzip-compressed content is cut short"),
        "wrong checksum": (whole[:-8] + bytes(4) + whole[-4:], near + ".*incorrect data check"),
        "wrong length": (whole[:-4] + bytes(4), near + ".*incorrect length check"),
        "flipped": (whole[:12] + bytes([255] * 20) + whole[32:], near + "Error -3"),
        "empty": (b"", "empty; expected gzip-compressed content"),
        "plain": (CONTENT[suffix].encode(), "not gzip-compressed; expected gzip-compressed"),
    }
    for name, (content, complaint) in damaged.items():
        path = tmp_path / f"{name}.{suffix}.gz"
        path.write_bytes(content)
        message, _ = refusal(path)
        assert re.match(complaint, message), (name, message)


@pytest.mark.parametrize("block_bytes", [1, 5, BLOCK_BYTES])
@pytest.mark.parametrize("suffix", CONTENT)
def test_members_follow_each_other_and_zeros_fill_up(tmp_path, monkeypatch, suffix, block_bytes):
    monkeypatch.setattr(reading_module, "BLOCK_BYTES", block_bytes)
    content = CONTENT[suffix].encode()
    (tmp_path / f"plain.{suffix}").write_bytes(content)
    expected = list(read_documents(tmp_path / f"plain.{suffix}"))
    members = [content[:100], b"", content[100:101], content[101:]]
    path = tmp_path / f"members.{suffix}.gz"
    path.write_bytes(b"".join(map(gzip.compress, members)) + bytes(513))
    reading = Reading()
    assert list(read_documents(path, reading)) == expected
    assert len(expected) == 50 and reading.bytes_read == path.stat().st_size


BLANK = b" " * 4095 + b"\n"  # any of the formats may begin with any number of blank lines


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "txt"])
def test_a_file_that_inflates_without_end(tmp_path, suffix):
    """1 GB of blank lines, in 1,024 members of 1 MB."""
    path = tmp_path / f"bomb.{suffix}.gz"
    path.write_bytes(gzip.compress(BLANK * 256) * 1024)
    reading = Reading()
    with pytest.raises(InputError, match=r"bomb.* inflates without end: 67,[0-9,]* bytes from"):
        list(read_documents(path, reading))
    assert reading.bytes_read < 200_000 < path.stat().st_size


def test_dull_files_are_read_as_long_as_they_are_small(tmp_path):
    blank = BLANK * (INFLATED_FREELY // len(BLANK))
    (tmp_path / "small.txt.gz").write_bytes(gzip.compress(blank, 1))
    assert list(read_documents(tmp_path / "small.txt.gz")) == []
    (tmp_path / "large.txt.gz").write_bytes(gzip.compress(blank + b"\n", 1))
    assert refusal(tmp_path / "large.txt.gz")[0].startswith("inflates without end: 67,108,865 ")


# ---- Records without end -------------------------------------------------------------------------

OPEN_TITLE = b"<PubmedArticleSet><MedlineCitation><PMID>7</PMID><Article><ArticleTitle>"
ENDLESS = {
    "a title": (pubmed_records, OPEN_TITLE, b"word "),
    "a title of lines": (pubmed_records, OPEN_TITLE, b"a\nb\n"),
    "empty elements in a title": (pubmed_records, OPEN_TITLE, b"<i/>" * 9),
    "elements in elements": (pubmed_records, OPEN_TITLE + b"</ArticleTitle>", b"<A>"),
    "a list of authors": (pubmed_records, OPEN_TITLE + b"</ArticleTitle><AuthorList>", b"<A/>"),
    "a comment": (pubmed_records, b"<!-- ", b"word "),
    "an attribute": (pubmed_records, b'<PubmedArticleSet a="', b"word "),
    "a document type": (pubmed_records, b"<!DOCTYPE a [", b"<!ELEMENT a ANY> "),
    "white space": (pubmed_records, b"", b" \n"),
    "no citation": (pubmed_records, b"<PubmedArticleSet>", b"<a>word</a>"),
    "a line of text": (text_records, b"one\n\ntwo\n", b"word "),
    "a row": (tsv_records, b"1\tT.\tA.\n", b"word\t"),
    "an object": (json_records, b'{"text": "one"}\n', b"[[{"),
}


def without_end(start: bytes, repeated: bytes, given: list[int]):
    """A gigabyte, block by block; `given` is told how long each was."""
    block = repeated * (BLOCK_BYTES // len(repeated))
    for content in itertools.chain([start], itertools.repeat(block, (1 << 30) // len(block))):
        given.append(len(content))
        yield content


@pytest.mark.parametrize("name", ENDLESS)
def test_a_record_without_end_is_refused_in_bounded_memory(name, monkeypatch):
    """Text is held twice or so; an element of three bytes takes expat and us a hundred."""
    limit = 1 << 20
    for module in (citations, lines):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", limit)
    read_records, start, repeated = ENDLESS[name]
    given = []
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"^name: line [0-9]+: .*longer than 1 MB"):
            list(read_records("name", without_end(start, repeated, given)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(given) <= limit + 2 * BLOCK_BYTES
    assert peak < (60 if b"<A>" in repeated else 40 if b"<i/>" in repeated else 4) * limit


@pytest.mark.parametrize("name", ["a title", "a line of text"])
def test_the_limit_is_above_what_pubmed_has(name):
    """An article of 15,000 authors has perhaps 9 MB; 32 MB are refused, and no more is read."""
    read_records, start, repeated = ENDLESS[name]
    given = []
    line = 1 + start.count(b"\n")
    with pytest.raises(InputError, match=rf"^name: line {line}: .*longer than 32 MB, the most for"):
        list(read_records("name", without_end(start, repeated, given)))
    assert 20 << 20 < sum(given) < MAX_RECORD_BYTES + 2 * BLOCK_BYTES


def test_records_just_within_the_limit_are_read(monkeypatch):
    for module in (citations, lines):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 3 * BLOCK_BYTES)
    word = b"x" * (2 * BLOCK_BYTES)
    line = word + b"\n"
    assert [record.sections[0][1] for record in text_records("name", [line] * 9)] == [
        word.decode()
    ] * 9
    title = b"</ArticleTitle></Article></MedlineCitation>"
    records = [OPEN_TITLE] + [word, title + OPEN_TITLE.removeprefix(b"<PubmedArticleSet>")] * 9
    records += [word, title + b"</PubmedArticleSet>"]
    assert [record.title for record in pubmed_records("name", records)] == [word.decode()] * 10


# ---- XML -----------------------------------------------------------------------------------------


def test_malformed_xml_in_the_middle(tmp_path):
    """Its line is named, and what came before in other blocks has been given out whole."""
    line = 2 + 2 * 3000
    good = "".join(map(RECORD.format, range(3000)))
    for spoilt, complaint in {
        "<PubmedArticle><b></i>": "malformed XML: mismatched tag: line {}, column",
        "a < b": "malformed XML: not well-formed .*line {}, column",
        "a & b": "malformed XML: not well-formed .*line {}, column",
        "\x01": "malformed XML: not well-formed .*line {}, column",
        "</PubmedArticleSet><a/>": "malformed XML: junk after document element: line {}",
        "<!DOCTYPE a>": "malformed XML: .*line {}, column",
        "&nbsp;": "malformed XML: undefined entity.*line {}, column",
        "<x:y/>": "malformed XML: unbound prefix: line {}, column",
    }.items():
        path = tmp_path / "broken.xml.gz"
        content = f"<PubmedArticleSet>\n{good}{spoilt}\n{good}</PubmedArticleSet>"
        path.write_bytes(gzip.compress(content.encode()))
        message, count = refusal(path)
        assert re.match(complaint.format(line), message), (spoilt, message)
        assert 2000 < count < 3000


def test_markup_may_be_nested_as_deep_as_mathematics(tmp_path):
    path = tmp_path / "deep.xml"
    for depth, readable in ((99, True), (100, False), (3_000_000, False)):
        deep = "<i>" * depth + "T." + "</i>" * min(depth, 100)
        path.write_text(
            f"<PubmedArticleSet>\n{RECORD.format(7).replace('T.', deep)}</PubmedArticleSet>"
        )
        if readable:
            assert list(read_documents(path)) == [("7", "T. A.")]
        else:
            assert refusal(path) == ("line 2: markup nested too deeply", 0)


def test_wrong_encodings_are_named(tmp_path):
    path = tmp_path / "coded.xml"
    text = "<PubmedArticleSet>\n" + RECORD.format(7).replace("T.", "Entit\u00e9.")
    text += "</PubmedArticleSet>"
    path.write_bytes(text.encode("latin-1"))
    assert refusal(path)[0].startswith("malformed XML: not well-formed (invalid token): line 2")
    for encoding in ("latin-1", "utf-16"):  # said, or told by its first bytes
        declaration = f'<?xml version="1.0" encoding="{encoding}"?>\n'
        path.write_bytes((declaration + text).encode(encoding))
        assert list(read_documents(path)) == [("7", "Entit\u00e9. A.")]
    path.write_bytes(b'<?xml version="1.0" encoding="shift-jis"?>\n' + text.encode())
    assert "multi-byte encodings are not supported" in refusal(path)[0]


def test_entity_bombs_are_refused_where_they_are_defined(tmp_path):
    path = tmp_path / "bomb.xml"
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">\n' for n in range(1, 10))
    for definitions in (
        f'<!ENTITY l0 "ha">\n{laughs}',
        f'<!ENTITY long "{"a" * 100_000}">',
        '<!ENTITY file SYSTEM "file:///etc/passwd">',
        '<!ENTITY % file SYSTEM "file:///etc/passwd">',
        '<!ENTITY picture SYSTEM "a.gif" NDATA gif>',
    ):
        path.write_text(
            f"<!DOCTYPE PubmedArticleSet [\n{definitions}]>\n<PubmedArticleSet>"
            + RECORD.format(7).replace("A.", "&l9;&long;&file;&picture;")
        )
        message, count = refusal(path)
        assert re.match(r"line 2: defines the entity '(l0|long|file|picture)'; refused", message)
        assert count == 0


def test_what_takes_long_to_look_at_is_refused_or_read_soon(tmp_path):
    """Repeated openings of whatever the cleaning of texts searches for."""
    path = tmp_path / "dull.xml"
    for piece in (
        "[",
        "]",
        "[1994 ",
        "&amp;",
        "&amp;a",
        "&lt;a",
        "&lt;/",
        ": ",
        "(author",
        "&lt;a:",
    ):
        title = f"[{piece * 100_000}]x"
        record = RECORD.format(7).replace("T.", title).replace("A.", title)
        path.write_text(f"<PubmedArticleSet>{record}</PubmedArticleSet>")
        started = time.process_time()
        ((_, text),) = read_documents(path)
        assert len(text) > 100_000
        assert time.process_time() - started < 2


# ---- What is no file -----------------------------------------------------------------------------


def test_what_is_no_text_file_is_refused_at_once(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "a.csv").write_text("a,b\n")
    os.mkfifo(tmp_path / "pipe.xml")  # to open it would be to wait for a writer
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "round.txt").symlink_to(tmp_path / "round.txt")
    for name, complaint in {
        "gone.txt": "no such file",
        "folder.txt": "not a file",
        "pipe.xml": "not a file",
        "zero.txt": "not a file",
        "nowhere.txt": "no such file",
        "round.txt": "no such file",
        "a.csv": r"unknown suffix; expected \.xml, \.tsv, \.jsonl, \.txt, or these and \.gz",
        "gz": "unknown suffix",
        f"{'a' * 300}.txt": "File name too long",
        "a\0b.txt": "no such file",
    }.items():
        with pytest.raises(InputError, match=f"{re.escape(name)}: {complaint}"):
            read_documents(tmp_path / name)


def test_a_file_that_cannot_be_opened_or_read(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one\n")

    class Failing(io.BytesIO):
        def read1(self, size=-1):
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().read1(2)

    def no_permission(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", no_permission)
    assert refusal(path) == ("unreadable near byte 0: Permission denied", 0)
    monkeypatch.setattr("builtins.open", lambda *_: Failing(b"a\nb\n"))
    assert refusal(path) == ("unreadable near byte 2: Input/output error", 1)


@pytest.mark.parametrize("suffix", CONTENT)
def test_empty_files(tmp_path, suffix):
    """Of lines an empty file has none; to XML it is cut short."""
    path = tmp_path / f"empty.{suffix}"
    for content in (b"", b"\n \n"):
        path.write_bytes(content)
        if suffix == "xml":
            assert refusal(path)[0].startswith("malformed XML: no element found: line ")
        else:
            assert list(read_documents(path)) == []


def test_standard_input_is_read_as_it_comes(monkeypatch):
    """What a pipe has brought so far is given out while its writer is still at work."""
    for stdin_format, start in {
        "txt": b"one\ntw",
        "xml": f"<PubmedArticleSet>{RECORD.format(7) * 2}<Pub".encode(),
    }.items():
        reader, writer = os.pipe()
        with open(reader, "rb") as pipe, open(writer, "wb", buffering=0) as other_end:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
            other_end.write(start)
            assert next(read_documents(Path("-"), stdin_format=stdin_format))[1] in ("one", "T. A.")


def test_standard_input_is_named_where_it_is_broken(monkeypatch):
    cut = gzip.compress(CONTENT["txt"].encode())[:-9]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(cut)))
    with pytest.raises(InputError, match=r"^standard input: unreadable near byte [0-9]+: gzip"):
        list(read_documents(Path("-"), stdin_format="txt"))


@pytest.mark.parametrize("suffix", CONTENT)
@pytest.mark.parametrize("cut", [b"", b"\n", b"\0", b"\xff", b"<", b"\x1f\x8b"])
def test_any_place_cut_or_spoilt_ends_in_documents_or_one_line(tmp_path, suffix, cut):
    """A file of 50 records, cut at places all over it, with a byte put there."""
    content = CONTENT[suffix].encode()
    path = tmp_path / f"cut.{suffix}"
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + cut)
        try:
            documents = list(read_documents(path))
        except InputError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            assert suffix != "xml" and len(documents) <= 50
