"""`python -m minibert.prepare` writes a whole corpus that is always the same, or none."""

import gzip
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from prepare_toys import LETTERS, content, run, write_inputs, write_vocabulary

from minibert import prepare as command
from minibert.data import shards
from minibert.data.corpus import Corpus
from minibert.data.shards import in_batches
from minibert.data.tokenizer import Tokenizer, load_tokenizer
from minibert.data.workers import Event, Progress
from minibert.errors import InputError, run_command
from minibert.prepare import prepare


@pytest.fixture
def texts(tmp_path):
    """A folder with vocab.txt, a.tsv.gz (61 documents, 2 titles alone) and b.txt (7 documents)."""
    write_vocabulary(tmp_path)
    rows = [f"{pmid}\ttitle\tabstract {LETTERS[: pmid % 19]} ok" for pmid in range(61)]
    rows += ["70\tonly a title\t", "71\tanother\t"]
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode(), mtime=0))
    (tmp_path / "b.txt").write_text("\n".join(f"{letter} Ü {letter}" for letter in "stuvwxy"))
    return tmp_path


def run_here(monkeypatch, *arguments):
    """The exit status of the command with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    try:
        return run_command(command.main)
    except SystemExit as exit:  # argparse's own way
        return exit.code


def documents_of(folder, part=slice(None)):
    """The (id, tokens) of the documents of a corpus, in order."""
    corpus = Corpus.open(folder)
    numbers = range(corpus.num_training + corpus.num_held_out)[part]
    names = corpus.document_ids(numbers)
    return [(name, corpus.tokens(n).tolist()) for name, n in zip(names, numbers, strict=True)]


# What it holds.


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
    first, second = meta["inputs"]
    assert (first["name"], second["name"]) == ("a.tsv.gz", "b.txt")
    assert (first["documents"], first["titles_only"], first["unk_rate"]) == (61, 2, 0)
    assert (second["documents"], second["titles_only"]) == (7, 0)
    assert second["unk_rate"] == second["unk_tokens"] / second["tokens"] == 1 / 3
    assert second["bytes"] == (texts / "b.txt").stat().st_size
    assert second["sha256"] == hashlib.sha256((texts / "b.txt").read_bytes()).hexdigest()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_last_record_of_an_id_counts(tmp_path, workers):
    """Across formats and files, in their order, and within a file; all counts add up."""
    inputs, expected = write_inputs(tmp_path)
    tokenizer = load_tokenizer(write_vocabulary(tmp_path))
    meta = prepare(inputs, tmp_path, tmp_path / "out", held_out=0, workers=workers)
    found = documents_of(tmp_path / "out")
    assert meta["inputs"][3]["replaced"] > 0  # lines of d.txt are named by what they say
    named = [(name, tokens) for name, tokens in found if len(name) < 16]
    expected = {name: tokenizer.encode_batch([text])[0] for name, text in expected.items()}
    assert named == list(expected.items())
    assert len(found) - len(named) == meta["inputs"][3]["documents"]
    for counts in (*meta["inputs"], meta["totals"]):
        kinds = ("documents", "replaced", "deleted", "titles_only", "empty")
        assert counts["citations"] == sum(counts[kind] for kind in kinds)
    for kind in meta["totals"]:
        assert meta["totals"][kind] == sum(source[kind] for source in meta["inputs"])
    assert meta["totals"]["documents"] == meta["documents"] == len(found)
    assert meta["totals"]["deleted"] > 0 < meta["totals"]["titles_only"]
    assert sum(source["tokens"] for source in meta["inputs"]) == meta["tokens"]
    assert sum(source["unk_tokens"] for source in meta["inputs"]) == meta["unk_tokens"] > 0
    assert meta["inputs"][3]["empty"] == 2
    assert [source["deletions"] for source in meta["inputs"]] == [0, 6, 0, 0]


def test_the_same_byte_for_byte(tmp_path, monkeypatch):
    """For any number of workers, and however records are taken together."""
    inputs, _ = write_inputs(tmp_path)
    write_vocabulary(tmp_path)
    for workers in (1, 2, 4):
        prepare(inputs, tmp_path, tmp_path / f"out{workers}", 0.3, workers=workers)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 17)
    monkeypatch.setattr("minibert.data.merge.BLOCK_ITEMS", 11)
    prepare(inputs, tmp_path, tmp_path / "in_bits", 0.3)
    whole = content(tmp_path / "out1")
    assert len(whole) == 5
    for name in ("out2", "out4", "in_bits"):
        assert content(tmp_path / name) == whole
    assert not list(tmp_path.glob("*.shards"))


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
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 10)
    documents = [(str(n), "x" * n) for n in (3, 4, 5, 30, 1, 2)] + [("deleted", "")] * 3
    batches = list(in_batches(documents))
    kinds = [["3", "4", "5"], ["30"], ["1", "2", "deleted"], ["deleted", "deleted"]]
    assert [ids for ids, _ in batches] == kinds
    assert [pair for ids, texts in batches for pair in zip(ids, texts, strict=True)] == documents


def test_flags_say_what_is_text(tmp_path, monkeypatch):
    write_vocabulary(tmp_path)
    section = '<AbstractText Label="{0}">{1}</AbstractText>'.format
    (tmp_path / "a.xml").write_text(
        "<PubmedArticleSet><PubmedArticle><MedlineCitation><PMID>1</PMID><Article><ArticleTitle>t"
        f"</ArticleTitle><Abstract>{section('AIM', 'a')}{section('END', 'b')}</Abstract></Article>"
        "</MedlineCitation></PubmedArticle><PubmedArticle><MedlineCitation><PMID>2</PMID><Article>"
        "<ArticleTitle>c d</ArticleTitle></Article></MedlineCitation></PubmedArticle>"
        "</PubmedArticleSet>"
    )
    lengths = {}
    for flags in ([], ["--section-labels", "no"], ["--title-only", "yes"]):
        out = tmp_path / "".join(("out", *flags))
        where = ("--tokenizer", tmp_path, "--out", out, "--held-out", "0")
        assert run_here(monkeypatch, tmp_path / "a.xml", *where, *flags) == 0
        lengths[flags[0] if flags else ""] = [len(tokens) for _, tokens in documents_of(out)]
    # t AIM : a END : b, where AIM, END and the colons are [UNK]
    assert lengths == {"": [7], "--section-labels": [3], "--title-only": [7, 2]}


def test_standard_input(texts):
    """Compressed or not, alone or among files, which are read by others."""
    packed = (texts / "a.tsv.gz").read_bytes()
    for number, what in enumerate((packed, gzip.decompress(packed))):
        done = run([Path("-")], texts / f"{number}", "--stdin-format", "tsv", input=what)
        assert (done.returncode, done.stderr) == (0, b"")
        assert documents_of(texts / f"{number}") == documents_of(texts / "0")
    (texts / "c.txt").write_text("c")
    files = [texts / "b.txt", Path("-"), texts / "c.txt"]
    flags = ("--stdin-format", "tsv", "--workers", "2")
    done = run(files, texts / "mixed", *flags, input=packed)
    assert (done.returncode, done.stderr) == (0, b"")
    prepare([texts / "b.txt", texts / "a.tsv.gz", texts / "c.txt"], texts, texts / "named")
    assert documents_of(texts / "mixed") == documents_of(texts / "named")
    meta = Corpus.open(texts / "mixed").meta["inputs"][1]
    assert (meta["name"], meta["bytes"], meta["sha256"]) == ("-", len(packed), None)


def test_neither_it_nor_its_workers_import_torch(texts):
    """Which takes seconds, and memory in every worker."""
    code = (
        "import sys\n"
        "import minibert.prepare, minibert.data.workers\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# What it says.


def test_the_summary_tells_what_was_made(texts, monkeypatch, capsys):
    out = texts / "out"
    arguments = (texts / "a.tsv.gz", "--tokenizer", texts, "--out", out, "--held-out", "0")
    assert run_here(monkeypatch, *arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "documents   61, 0 of them held out\n" in printed.out
    assert "left out    2 titles without an abstract\n" in printed.out
    assert "replaced" not in printed.out
    assert "[UNK]       0.000% of the tokens\n" in printed.out
    assert f"next        python train.py --data {out} " in printed.out
    assert run_here(monkeypatch, texts / "b.txt", "--tokenizer", texts, "--out", texts / "2") == 0
    assert "is this the tokenizer for this text?" in capsys.readouterr().out


@pytest.mark.parametrize(("same", "doubted"), [(3, False), (40, True)])
def test_ids_that_are_no_ids_are_doubted(texts, monkeypatch, capsys, same, doubted):
    rows = [f"{max(0, n - same)}\tt\tabstract {n}\n" for n in range(61)]
    (texts / "c.tsv").write_text("".join(rows))
    where = ("--tokenizer", texts, "--out", texts / "out", "--held-out", "0")
    assert run_here(monkeypatch, texts / "c.tsv", *where) == 0
    printed = capsys.readouterr().out
    assert f"replaced    {same} by later ones of the same id, 0 deleted" in printed
    doubt = "most of c.tsv: are its ids unique among all files?"
    assert (doubt in printed) == doubted


def test_files_that_count_anew_are_doubted(texts, monkeypatch, capsys):
    """Two files numbered from 0: all of the first is replaced by the second."""
    for name in ("c.tsv", "d.tsv"):
        (texts / name).write_text("".join(f"{n}\tt\t{name} {n}\n" for n in range(9)))
    where = ("--tokenizer", texts, "--out", texts / "out", "--held-out", "0")
    assert run_here(monkeypatch, texts / "c.tsv", texts / "d.tsv", *where) == 0
    assert "most of c.tsv: are its ids unique" in capsys.readouterr().out


def test_progress_in_bytes_of_all_files(tmp_path):
    sizes = {"a": 4_000_000, "b": 10_000_000, "c": 2_000_000}
    for name, size in sizes.items():
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    a, b, c = (tmp_path / name for name in sizes)
    progress = Progress([a, b, c])
    for event in (
        Event(a, "done"),  # by an earlier run: not to be counted as speed
        Event(b, "read", 1_000_000, 500),
        Event(c, "read", 500_000, 250),
        Event(b, "read", 4_000_000, 1500),
        Event(c, "bad"),
    ):
        progress.note(event)
    assert progress.text(seconds=30) == (
        " 62%  2/3 files  1,750 documents  58 documents/s  0.15 MB/s  0:00:40 left"
    )
    progress = Progress([a, Path("-")])
    progress.note(Event(Path("-"), "read", 3_000_000, 600))
    assert progress.text(seconds=30) == "0/2 files  600 documents  20 documents/s  0.10 MB/s"


# What it refuses.


def bad_cases():
    """Arguments by name of a bad thing, and what the one line says."""
    return {
        "cut.tsv.gz": (["cut.tsv.gz"], "cut.tsv.gz: unreadable near byte"),
        "bad line": (["bad.jsonl"], "bad.jsonl: line 2"),
        "no documents": (["empty.txt", "titles.tsv"], "empty.txt and 1 more: no documents (1 tit"),
        "no file": (["b.txt", "gone.txt"], "gone.txt: no such file"),
        "no suffix": (["b.txt", "vocab"], "vocab: unknown suffix"),
        "twice": (["b.txt", "a.tsv.gz", "./b.txt"], "b.txt: given twice"),
        "no tokenizer": (["b.txt", "--tokenizer", "gone"], "gone: no such tokenizer file"),
        "share": (["b.txt", "--held-out", "1"], "held-out share 1.0: expected"),
        "no share": (["b.txt", "--held-out", "x"], "argument --held-out: 'x' is not a number"),
        "out is here": (["b.txt", "--out", "."], ".: expected the name of a new folder"),
        "out is a file": (["b.txt", "--out", "one.txt"], "one.txt exists already"),
        "out in a file": (["b.txt", "--out", "one.txt/out"], "one.txt/out"),
        "no format": (["-"], "--stdin-format must say what it is"),
        "format of no -": (["b.txt", "--stdin-format", "xml"], "no - among the files"),
        "unknown format": (["-", "--stdin-format", "pdf"], "invalid choice: 'pdf'"),
        "labels": (["b.txt", "--section-labels", "maybe"], "invalid choice: 'maybe'"),
        "no worker": (["b.txt", "--workers", "0"], "argument --workers: '0' is not a whole number"),
    }


@pytest.mark.parametrize("out", ["out", "new/folders/out"])
@pytest.mark.parametrize("case", bad_cases())
def test_bad_input_is_one_line_and_leaves_nothing(texts, monkeypatch, capsys, case, out):
    whole = (texts / "a.tsv.gz").read_bytes()
    (texts / "cut.tsv.gz").write_bytes(whole[: len(whole) * 3 // 4])
    (texts / "bad.jsonl").write_text('{"text": "fine"}\n{"text"\n')
    (texts / "empty.txt").write_text("\n \n")
    (texts / "titles.tsv").write_text("1\ttitle\t\n")
    (texts / "one.txt").write_text("a")
    monkeypatch.chdir(texts)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 17)
    before = sorted(texts.rglob("*"))
    arguments, complaint = bad_cases()[case]
    flags = ("--tokenizer", "vocab.txt", "--out", out, "--workers", "1")
    assert run_here(monkeypatch, *flags, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(texts.rglob("*")) == before


def test_nothing_to_train_on_keeps_what_was_done(texts, monkeypatch, capsys):
    """Another share may be given."""
    (texts / "one.txt").write_text("a")
    where = (texts / "one.txt", "--tokenizer", texts, "--out", texts / "out")
    assert run_here(monkeypatch, *where, "--held-out", "0.999999") == 2
    complaint = capsys.readouterr().err
    assert "no documents to train on (1 held out); 1 of 1 files are done, the same" in complaint
    monkeypatch.setattr(Tokenizer, "encode_batch", None)  # no need of it
    assert run_here(monkeypatch, *where, "--held-out", "0") == 0


def test_a_folder_that_is_not_empty_is_not_touched(texts):
    (texts / "out").mkdir()
    prepare([texts / "b.txt"], texts, texts / "out")  # it was empty
    before = (texts / "out" / "meta.json").read_bytes()
    with pytest.raises(InputError, match="out exists already"):
        prepare([texts / "a.tsv.gz"], texts, texts / "out")
    assert (texts / "out" / "meta.json").read_bytes() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_files_are_passed_over_when_asked(tmp_path, monkeypatch, capsys, workers):
    """They are listed, nothing of them is in the corpus, and the status is 1."""
    inputs, _ = write_inputs(tmp_path)
    write_vocabulary(tmp_path)
    prepare(inputs, tmp_path, tmp_path / "good")
    capsys.readouterr()
    (tmp_path / "half.txt").write_bytes(b"fine\n" * 99 + b"\xff\n")
    bad = [tmp_path / "half.txt", tmp_path / "gone.txt", tmp_path / "what"]
    mixed = [bad[0], *inputs[:2], bad[1], *inputs[2:], bad[2]]
    flags = ("--tokenizer", tmp_path, "--out", tmp_path / "out", "--workers", workers)
    assert run_here(monkeypatch, *mixed, *flags, "--skip-bad-files") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["skipped", str(path)] for path in bad]
    meta = Corpus.open(tmp_path / "out").meta
    assert [entry["name"] for entry in meta["skipped"]] == ["half.txt", "gone.txt", "what"]
    assert [f"skipped: {entry['reason']}" for entry in meta["skipped"]] == lines
    good, found = content(tmp_path / "good"), content(tmp_path / "out")
    del good["meta.json"], found["meta.json"]
    assert found == good
    assert not (tmp_path / "out.shards").exists()


def test_no_good_file_at_all(texts, monkeypatch, capsys):
    flags = ("--tokenizer", texts, "--out", texts / "out", "--skip-bad-files")
    assert run_here(monkeypatch, texts / "gone.txt", texts / "gone.tsv", *flags) == 2
    complaint = capsys.readouterr().err
    assert complaint == (
        f"error: {texts / 'gone.txt'}: no such file; no other file is whole, either\n"
    )
    assert not (texts / "out.shards").exists()


def test_room_on_the_disk_is_looked_for_first(texts, monkeypatch):
    """By an estimate before anything is written, exactly before the corpus is."""
    size = (texts / "a.tsv.gz").stat().st_size
    free = SimpleNamespace(free=int(2.7 * size))  # of 1.4 for shards and as much for the corpus
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(InputError) as refusal:
        prepare([texts / "a.tsv.gz"], texts, texts / "new" / "out")
    assert "what it is made from needs" in str(refusal.value)
    assert "0.00 MB are free" in str(refusal.value)
    assert not (texts / "new").exists()
    free.free = 3 * size  # too little all the same: so much repetition compresses well
    with pytest.raises(InputError, match=r"out needs 0.00 MB; 0.00 MB are free; 1 of 1 files"):
        prepare([texts / "a.tsv.gz"], texts, texts / "out")
    size = sum(file.stat().st_size for file in (texts / "out.shards").rglob("tokens.bin"))
    free.free = 10 * size
    prepare([texts / "a.tsv.gz"], texts, texts / "out")


def test_real_reactions(shared_data, tmp_path):
    """10,008 of them, 14 twice."""
    source = shared_data / "rxnfp" / "uspto50k_eval_test_reactions.txt"
    meta = prepare([source], shared_data / "rxnfp", tmp_path / "corpus")
    figures = [meta[key] for key in ("documents", "tokens", "unk_tokens", "held_out_documents")]
    assert figures == [9_994, 914_857, 0, 521]
    assert (tmp_path / "corpus" / "tokenizer.json").is_file()


def test_a_folder_that_is_not_ours_stays(texts, monkeypatch, capsys):
    """Others have folders named so, too."""
    theirs = texts / "out.shards"
    theirs.mkdir()
    (theirs / "precious.tar").write_text("months of work")
    where = ("--tokenizer", texts, "--out", texts / "out")
    assert run_here(monkeypatch, texts / "b.txt", *where) == 2
    assert "out.shards: not made here; move it away" in capsys.readouterr().err
    assert (theirs / "precious.tar").read_text() == "months of work"


def test_shards_outlive_what_stands_in_their_way(texts, monkeypatch, capsys):
    """A run that was stopped, and then something else in its place: shards are for later."""
    (texts / "bad.tsv").write_text("one column\n")
    where = ("--tokenizer", texts, "--out", texts / "out", "--workers", "1")
    assert run_here(monkeypatch, texts / "b.txt", texts / "bad.tsv", *where) == 2
    (texts / "out").mkdir()
    (texts / "out" / "thesis.tex").touch()
    capsys.readouterr()
    assert run_here(monkeypatch, texts / "b.txt", *where) == 2
    assert "out exists already; choose another folder" in capsys.readouterr().err
    assert len(list((texts / "out.shards").glob("*/meta.json"))) == 1


def test_shards_made_otherwise_are_not_counted_as_done(texts, monkeypatch, capsys):
    """A run that was stopped, and then other settings: of those nothing is done yet."""
    (texts / "bad.tsv").write_text("one column\n")
    where = ("--tokenizer", texts, "--out", texts / "out", "--workers", "1")
    assert run_here(monkeypatch, texts / "b.txt", texts / "bad.tsv", *where) == 2
    assert "1 of 2 files are done" in capsys.readouterr().err
    assert (
        run_here(monkeypatch, texts / "bad.tsv", texts / "b.txt", *where, "--title-only", "yes")
        == 2
    )
    assert "files are done" not in capsys.readouterr().err
