"""A corpus of all of PubMed is opened, and any batch of it built, at once and in little memory.

Its tokens are a file with nothing in it, which takes no room on the disk; its offsets are real.
"""

import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SPECIAL_TOKENS

from minibert.data import corpus
from minibert.data.batches import Batches
from minibert.data.corpus import Corpus
from minibert.data.tokenizer import load_tokenizer
from minibert.errors import InputError

PUBMED = 36_000_000  # documents
MEAN_LENGTH, DEVIATION = 361, 150  # tokens, as of 61,123 abstracts


def vocabulary(folder: Path, num_words: int) -> dict:
    """Write a vocab.txt, whose id 0 is a word: all text is of it. Returns what meta.json says."""
    words = [f"w{number}" for number in range(num_words)]
    (folder / "vocab.txt").write_text("\n".join(words + SPECIAL_TOKENS) + "\n")
    return {"vocabulary_sha256": load_tokenizer(folder).vocabulary_sha256}


def write_corpus_of(folder: Path, lengths: list[int], num_words: int = 31) -> Path:
    """A corpus folder of documents of these lengths, none held out; without ids.txt."""
    folder.mkdir()
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    return finish(folder, len(lengths), sum(lengths), num_words)


def write_pubmed(folder: Path, num_documents: int) -> Path:
    """As many documents as are asked for, of lengths like PubMed's, a twentieth held out."""
    folder.mkdir()
    shape = (num_documents + 1,)
    offsets = np.lib.format.open_memmap(folder / "offsets.npy", "w+", np.int64, shape)
    generator, total = np.random.default_rng(0), 0
    for first in range(0, num_documents, 1 << 20):
        count = min(1 << 20, num_documents - first)
        lengths = generator.normal(MEAN_LENGTH, DEVIATION, count).clip(5).astype(np.int64)
        offsets[first + 1 : first + count + 1] = total + np.cumsum(lengths)
        total = int(offsets[first + count])
    offsets.flush()
    return finish(folder, num_documents, total, 28_991, held_out=num_documents // 20)


def finish(folder: Path, documents: int, tokens: int, num_words: int, held_out: int = 0) -> Path:
    (folder / "tokens.bin").touch()
    os.truncate(folder / "tokens.bin", 2 * tokens)
    meta = {"format_version": 1, "documents": documents, "held_out_documents": held_out}
    meta |= {"tokens": tokens, "dtype": "uint16", "corpus_sha256": "0"}
    (folder / "meta.json").write_text(json.dumps(meta | vocabulary(folder, num_words)))
    return folder


# Whatever the size.


def test_nothing_is_held_that_grows_with_the_corpus(tmp_path):
    """Two million offsets are 16 MB; the order of an epoch would be as much again."""
    folder = write_pubmed(tmp_path / "corpus", 2_000_000)
    Corpus.open(folder)  # what a first time loads is not counted
    tracemalloc.start()
    try:
        opened = Corpus.open(folder)
        _, opening = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        batch = Batches(opened, 256, micro_batch_tokens=4096, batch_size=192).at(90_000)
        _, building = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(batch.documents) == 192 and batch.num_masked > 5_000
    vocabulary_alone = 8_000_000
    assert opening < vocabulary_alone + 3_000_000
    assert building < vocabulary_alone + 4_000_000


def test_a_document_may_be_longer_than_memory(tmp_path):
    """Of 10 billion tokens a batch reads a window; here the last, at the end of the file."""
    lengths = [10**10, 7]
    folder = write_corpus_of(tmp_path / "corpus", lengths)
    with open(folder / "tokens.bin", "r+b") as file:
        file.seek(2 * (10**10 - 254))
        file.write(np.arange(254 + 7, dtype="<u2").clip(max=30).tobytes())
    opened = Corpus.open(folder)
    maker = Batches(opened, 256, batch_size=2, seed=1)
    num_windows = math.ceil(10**10 / 254)
    batch = maker.at(num_windows - 1)  # an epoch is a step
    (part,) = batch.micro_batches
    long, short = part.input_ids.clone(), part.input_ids[1]
    long.reshape(-1)[part.masked_positions] = part.labels
    assert long[0, 1:-1].tolist() == [min(token, 30) for token in range(254)]
    assert long[1, 1:8].tolist() == [30] * 7
    assert int(short[9]) == opened.tokenizer.pad_id


# Damaged offsets, however they are read.


@pytest.mark.parametrize("at_once", [1, 5, 23, 24, 100])
def test_offsets_that_do_not_rise_are_found_wherever_they_are(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(corpus, "OFFSETS_AT_ONCE", at_once)
    lengths = list(range(1, 24))
    folder = write_corpus_of(tmp_path / "corpus", lengths)
    good = np.load(folder / "offsets.npy")
    assert np.array_equal(Corpus.open(folder).offsets, good)
    for document in range(22):  # the last one's end is compared with meta.json
        for wrong in (good[document], good[document] - 1, -(2**62)):
            spoilt = good.copy()
            spoilt[document + 1] = wrong
            np.save(folder / "offsets.npy", spoilt)
            with pytest.raises(InputError) as caught:
                Corpus.open(folder)
            assert str(caught.value) == (
                f"{folder / 'offsets.npy'}: document {document} ends where it begins, or before"
            )


@pytest.mark.parametrize("wrong", [2**62, 10**6])
def test_offsets_that_leap_ahead_are_found(tmp_path, wrong):
    """The next document would then end before it begins."""
    folder = write_corpus_of(tmp_path / "corpus", [3] * 9)
    spoilt = np.load(folder / "offsets.npy")
    spoilt[4] = wrong
    np.save(folder / "offsets.npy", spoilt)
    with pytest.raises(InputError, match="document 4 ends where it begins, or before"):
        Corpus.open(folder)


# All of PubMed.

MEASURED = """
import json, re, sys, time
from pathlib import Path
from statistics import median
from minibert.data.batches import Batches
from minibert.data.corpus import Corpus

def memory(what):  # kB
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before, own = memory("VmHWM"), memory("RssAnon")
begun = time.perf_counter()
batches = Batches(Corpus.open(Path(sys.argv[1])), 256, micro_batch_tokens=16384, batch_size=192)
opened = time.perf_counter()
first = batches.at(90_000)
built = time.perf_counter()
peak, own_then = memory("VmHWM"), memory("RssAnon")
times = []
for step in range(10_000, 10_100):
    start = time.process_time()
    batch = batches.at(step)
    times.append(time.process_time() - start)
print(json.dumps({
    "to open, s": opened - begun,
    "first batch, s": built - opened,
    "peak memory more than before, MB": (peak - before) / 1024,
    "of its own, MB": (own_then - own) / 1024,
    "of its own after 100 batches more, MB": (memory("RssAnon") - own) / 1024,
    "a batch of 192 x 256 on one core, ms": 1000 * median(times),
    "tokens in it": batch.num_tokens,
    "masked": batch.num_masked,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_of_pubmed(tmp_path, capsys):
    folder = write_pubmed(tmp_path / "corpus", PUBMED)
    with open(folder / "offsets.npy", "rb") as file:  # to be read from the disk, as the first time
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\n{PUBMED:,} documents")
        for name, value in figures.items():
            print(f"  {name:<40} {value:.3f}")
    assert figures["to open, s"] + figures["first batch, s"] < 1
    assert figures["peak memory more than before, MB"] < 100  # the offsets alone are 288
    assert figures["of its own after 100 batches more, MB"] < 50
    assert figures["a batch of 192 x 256 on one core, ms"] < 20  # 1.6 to 6 seen; a GPU's step: 66
