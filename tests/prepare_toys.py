"""Toy inputs for the tests of minibert.prepare: a file of each format, with revised records."""

import gzip
import subprocess
import sys
from pathlib import Path

from minibert.data.tokenizer import SPECIAL_TOKENS

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_vocabulary(folder: Path) -> Path:
    """A vocab.txt that knows letters alone."""
    words = [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join([*words, *SPECIAL_TOKENS.values()]) + "\n")
    return folder / "vocab.txt"


def citation(pmid: int, text: str) -> str:
    """A PubmedArticle; without a text it has a title alone."""
    abstract = f"<Abstract><AbstractText>{text}</AbstractText></Abstract>" if text else ""
    return (
        f"<PubmedArticle><MedlineCitation><PMID>{pmid}</PMID><Article><ArticleTitle>title"
        f"</ArticleTitle>{abstract}</Article></MedlineCitation></PubmedArticle>"
    )


def write_inputs(folder: Path, times: int = 1) -> tuple[list[Path], dict[str, str]]:
    """Four files, in the order of their names, and the documents they come to, in order.

    a.tsv.gz has ids from 0 on; b.xml revises some, leaves others without an abstract, deletes some;
    c.jsonl brings some of those back; d.txt repeats its own lines. `times` makes them longer.
    """
    first = {str(n): f"title abstract {LETTERS[: n % 19]} ok" for n in range(61 * times)}
    revised = {str(n): f"title revised {LETTERS[n % 7 :]}" for n in range(0, 90 * times, 3)}
    revised |= {str(n): "" for n in range(1, 61 * times, 20)}
    deleted = [str(n) for n in range(2, 61 * times, 10)]
    back = {name: f"back {name}" for name in [*deleted[::2], "new"]}
    lines = ["\u200b", "\u2060"]  # nothing that becomes a token
    lines += [f"{LETTERS[n % 11 :]} x {n % 5}" for n in range(67 * times)]

    rows = [f"{pmid}\t{text.replace(' ', chr(9), 1)}" for pmid, text in first.items()]
    (folder / "a.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode(), mtime=0))
    articles = "".join(citation(int(n), text.removeprefix("title ")) for n, text in revised.items())
    gone = "".join(f"<PMID>{name}</PMID>" for name in deleted)
    (folder / "b.xml").write_text(
        f"<PubmedArticleSet>{articles}<DeleteCitation>{gone}</DeleteCitation></PubmedArticleSet>"
    )
    records = [f'{{"id": "{name}", "text": "{text}"}}\n' for name, text in back.items()]
    (folder / "c.jsonl").write_text("".join(records))
    (folder / "d.txt").write_text("\n".join(lines))

    documents: dict[str, str] = {}
    for part in (first, revised, dict.fromkeys(deleted, ""), back):
        for name, text in part.items():
            documents.pop(name, None)
            if text:
                documents[name] = text
    return [folder / name for name in ("a.tsv.gz", "b.xml", "c.jsonl", "d.txt")], documents


def command(inputs: list[Path], out: Path, *flags: str | Path) -> list[str]:
    """The command line that prepares them with the nearest vocabulary around `out`."""
    (vocabulary, *_) = (path / "vocab.txt" for path in out.parents if (path / "vocab.txt").exists())
    flags = ("--tokenizer", vocabulary, "--out", out, *flags)
    return [sys.executable, "-m", "minibert.prepare", *map(str, (*inputs, *flags))]


def run(
    inputs: list[Path], out: Path, *flags: str | Path, **options
) -> subprocess.CompletedProcess:
    """What became of that command."""
    line = command(inputs, out, *flags)
    return subprocess.run(line, capture_output=True, timeout=100, **options)


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
