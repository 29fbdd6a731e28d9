"""`python -m minibert.prepare` writes a whole corpus that is always the same, or nothing."""

import gzip
import hashlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from minibert import prepare as command
from minibert.data.corpus import Corpus
from minibert.data.pubmed import Reading
from minibert.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from minibert.errors import InputError, run_command
from minibert.prepare import in_batches, prepare, progress

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def texts(tmp_path):
    """A folder with vocab.txt, a.tsv.gz (61 documents, 2 titles alone) and b.txt (7 documents)."""
    words = [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *SPECIAL_TOKENS.values()]) + "\n")
    rows = [f"{pmid}\ttitle\tabstract {LETTERS[: pmid % 19]} ok" for pmid in range(61)]
    rows += ["70\tonly a title\t", "71\tanother\t"]
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode(), mtime=0))
    (tmp_path / "b.txt").write_text("\n".join(f"{letter} Ü {letter}" for letter in "stuvwxy"))
    return tmp_path


def run(monkeypatch, *arguments):
    """The exit status of the command with these arguments."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    return run_command(command.main)


def documents_of(folder, part=slice(None)):
    """The (id, tokens) of the documents of a corpus, in order."""
    corpus = Corpus.open(folder)
    numbers = range(corpus.num_training + corpus.num_held_out)[part]
    return [(corpus.document_id(n), corpus.tokens(n).tolist()) for n in numbers]


def test_the_corpus_holds_the_tokens_of_every_text(texts):
    meta = prepare([texts / "a.tsv.gz", texts / "b.txt"], texts / "vocab.txt", texts / "out", 0.25)
    tokenizer = load_tokenizer(texts / "vocab.txt")
    expected = {str(pmid): f"title abstract {LETTERS[: pmid % 19]} ok" for pmid in range(61)}
    for letter in "stuvwxy":
        text = f"{letter} Ü {letter}"
        expected[hashlib.sha256(text.encode()).hexdigest()[:16]] = text
    found = dict(documents_of(texts / "out"))
    assert found == {name: tokenizer.encode_batch([text])[0] for name, text in expected.items()}
    assert meta == Corpus.open(texts / "out").meta
    assert (meta["documents"], meta["unk_tokens"], meta["held_out_share"]) == (68, 7, 0.25)
    assert [source["name"] for source in meta["inputs"]] == ["a.tsv.gz", "b.txt"]
    assert [source["documents"] for source in meta["inputs"]] == [61, 7]
    assert [source["titles_only"] for source in meta["inputs"]] == [2, 0]
    digest = hashlib.sha256((texts / "b.txt").read_bytes()).hexdigest()
    assert meta["inputs"][1]["sha256"] == digest


def test_twice_the_same_byte_for_byte(texts, monkeypatch):
    inputs = [texts / "a.tsv.gz", texts / "b.txt"]
    prepare(inputs, texts / "vocab.txt", texts / "first")
    monkeypatch.setattr(command, "BATCH_CHARACTERS", 17)
    prepare(inputs, texts / "vocab.txt", texts / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (texts / name).iterdir()}
        for name in ("first", "second")
    )
    assert first == second


def test_a_document_stays_on_its_side(texts):
    a, b = texts / "a.tsv.gz", texts / "b.txt"
    prepare([a, b], texts / "vocab.txt", texts / "ab", 0.3)
    prepare([b, a], texts / "vocab.txt", texts / "ba", 0.3)
    prepare([a], texts / "vocab.txt", texts / "just_a", 0.3)
    held_out = {
        name: {document for document, _ in documents_of(texts / name, slice(-num, None))}
        for name in ("ab", "ba", "just_a")
        for num in [Corpus.open(texts / name).num_held_out]
    }
    assert held_out["ab"] == held_out["ba"]
    assert held_out["just_a"] == held_out["ab"] & {str(pmid) for pmid in range(61)} != set()


def test_batches_hold_every_document_in_order(monkeypatch):
    monkeypatch.setattr(command, "BATCH_CHARACTERS", 10)
    documents = [(str(n), "x" * n) for n in (3, 4, 5, 30, 1, 2)]
    batches = list(in_batches(documents))
    assert [ids for ids, _ in batches] == [["3", "4", "5"], ["30"], ["1", "2"]]
    assert [pair for ids, texts in batches for pair in zip(ids, texts, strict=True)] == documents


def test_the_summary_tells_what_was_made(texts, monkeypatch, capsys):
    out = texts / "out"
    arguments = (texts / "a.tsv.gz", "--tokenizer", texts, "--out", out, "--held-out", "0")
    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "documents   61, 0 of them held out\n" in printed.out
    assert "left out    2 titles without an abstract\n" in printed.out
    assert "[UNK]       0.000% of the tokens\n" in printed.out
    assert f"next        python train.py --data {out} " in printed.out
    assert run(monkeypatch, texts / "b.txt", "--tokenizer", texts, "--out", texts / "out2") == 0
    assert "is this the tokenizer for this text?" in capsys.readouterr().out


def test_progress_in_bytes_of_the_files():
    readings = [Reading(bytes_read=6_000_000, documents=1500), Reading()]
    assert progress(readings, total_bytes=24_000_000, seconds=30) == (
        " 25%  1,500 documents  50 documents/s  0.20 MB/s  0:01:30 left"
    )


def bad_cases():
    """Arguments by name of a bad thing, and what the one line says."""
    return {
        "cut.tsv.gz": (["cut.tsv.gz"], "cut.tsv.gz: unreadable near byte"),
        "bad line": (["a.tsv.gz", "bad.jsonl"], "bad.jsonl: line 2"),
        "no documents": (["empty.txt", "titles.tsv"], "empty.txt and 1 more: no documents (1 tit"),
        "no file": (["gone.txt"], "gone.txt: no such file"),
        "no tokenizer": (["b.txt", "--tokenizer", "gone"], "gone: no such tokenizer file"),
        "all held out": (["one.txt", "--held-out", "0.999999"], "no documents to train on (1 held"),
        "share": (["b.txt", "--held-out", "1"], "held-out share 1.0: expected"),
        "no share": (["b.txt", "--held-out", "x"], "argument --held-out: 'x' is not a number"),
        "out is here": (["b.txt", "--out", "."], ".: expected the name of a new folder"),
        "out is a file": (["b.txt", "--out", "one.txt"], "one.txt exists already"),
    }


@pytest.mark.parametrize("case", bad_cases())
def test_bad_input_is_one_line_and_leaves_nothing(texts, monkeypatch, capsys, case):
    whole = (texts / "a.tsv.gz").read_bytes()
    (texts / "cut.tsv.gz").write_bytes(whole[: len(whole) * 3 // 4])
    (texts / "bad.jsonl").write_text('{"text": "fine"}\n{"text"\n')
    (texts / "empty.txt").write_text("\n \n")
    (texts / "titles.tsv").write_text("1\ttitle\t\n")
    (texts / "one.txt").write_text("a")
    monkeypatch.chdir(texts)
    monkeypatch.setattr(command, "BATCH_CHARACTERS", 17)
    before = sorted(texts.rglob("*"))
    arguments, complaint = bad_cases()[case]
    try:
        status = run(monkeypatch, "--tokenizer", "vocab.txt", "--out", "out", *arguments)
    except SystemExit as exit:  # argparse's own way
        status = exit.code
    assert status == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(texts.rglob("*")) == before


def test_a_folder_that_is_not_empty_is_not_touched(texts):
    (texts / "out").mkdir()
    prepare([texts / "b.txt"], texts, texts / "out")  # it was empty
    before = (texts / "out" / "meta.json").read_bytes()
    with pytest.raises(InputError, match="out exists already"):
        prepare([texts / "a.tsv.gz"], texts, texts / "out")
    assert (texts / "out" / "meta.json").read_bytes() == before


def command_line(folder, source):
    out = folder / "out"
    paths = [str(path) for path in (source, "--tokenizer", folder / "vocab.txt", "--out", out)]
    return [sys.executable, "-m", "minibert.prepare", *paths]


@pytest.fixture
def long_text(texts):
    """Text enough that its preparation takes a while."""
    (texts / "long.txt").write_text("abstract of a text\n" * 400_000)
    return texts / "long.txt"


def test_a_full_disk_is_one_line_and_leaves_nothing(texts, long_text):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    before = sorted(texts.rglob("*"))
    ended = subprocess.run(
        command_line(texts, long_text), preexec_fn=limit, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr == f"error: {texts / 'out'}: File too large\n"
    assert sorted(texts.rglob("*")) == before


def test_ctrl_c_leaves_nothing(texts, long_text):
    before = sorted(texts.rglob("*"))
    process = subprocess.Popen(command_line(texts, long_text), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (texts / "out.partial" / "tokens.bin").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "interrupted\n"
    assert process.returncode == 130
    assert sorted(texts.rglob("*")) == before


def test_real_reactions(shared_data, tmp_path):
    source = shared_data / "rxnfp" / "uspto50k_eval_test_reactions.txt"
    meta = prepare([source], shared_data / "rxnfp", tmp_path / "corpus")
    figures = [meta[key] for key in ("documents", "tokens", "unk_tokens", "held_out_documents")]
    assert figures == [10_008, 915_949, 0, 521]
    assert (tmp_path / "corpus" / "tokenizer.json").is_file()
