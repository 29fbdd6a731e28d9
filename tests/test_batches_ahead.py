"""Batches built ahead by a process of its own are those of `at`, and that process leaves quietly.

Shapes: B sequences of a micro-batch, S its longest sequence, M its masked positions.
"""

import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from batch_toys import same
from commands import Command
from conftest import ROOT

from minibert.data.batches import Batches, GlobalBatch, MicroBatch
from minibert.data.corpus import Corpus
from minibert.data.merge import write_corpus
from minibert.data.tokenizer import load_tokenizer
from minibert.errors import InputError


def batches_of(folder: Path, packed: bool = False) -> Batches:
    sizes = {"max_length": 19, "micro_batch_tokens": 60, "batch_size": 7}
    return Batches(Corpus.open(folder), **sizes, seed=3, packed=packed)


def assert_same(ours: GlobalBatch, theirs: GlobalBatch) -> None:
    assert type(ours) is type(theirs) is GlobalBatch
    assert ours[1:] == theirs[1:]  # documents, num_tokens, num_masked
    for one, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
        assert type(one) is type(other) is MicroBatch
        assert same(one, other)
        for part, counterpart in zip(one, other, strict=True):
            assert part is None or part.dtype == counterpart.dtype == torch.int64


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("steps", [range(11), range(7, 16), range(5, 5)], ids=str)
def test_every_step_is_the_one_that_at_gives(toy_world, steps, packed):
    """Two epochs and more, from the beginning, from the middle, and none."""
    batches = batches_of(toy_world / "corpus", packed)
    with batches.ahead(steps, pinned=False) as arriving:
        ahead = list(arriving)
    assert len(ahead) == len(steps)
    for step, batch in zip(steps, ahead, strict=True):
        assert_same(batch, batches.at(step))


def test_a_process_that_begins_anew_builds_the_same(toy_world):
    """Where processes are not forked (macOS, Windows), the worker is sent the batches' pickle."""
    batches = batches_of(toy_world / "corpus")
    sent = pickle.loads(pickle.dumps(batches))
    for step in (0, 9):
        assert_same(sent.at(step), batches.at(step))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_worker_that_is_not_forked_builds_the_same(toy_world, packed):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        batches = batches_of(toy_world / "corpus", packed)
        with batches.ahead(range(3), pinned=False) as ahead:
            for step, batch in zip(range(3), ahead, strict=True):
                assert_same(batch, batches.at(step))
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_a_corpus_is_sent_without_its_tokens(toy_world, tmp_path):
    documents = [(f"{document}", np.arange(5, 99).repeat(20).tolist()) for document in range(50)]
    write_corpus(tmp_path / "corpus", load_tokenizer(toy_world), documents, held_out=0.3)
    corpus = Corpus.open(tmp_path / "corpus")
    pickled = pickle.dumps(corpus)
    assert (tmp_path / "corpus" / "tokens.bin").stat().st_size == 50 * 94 * 20 * 2
    assert len(pickled) < 300 + len(str(tmp_path))
    opened = pickle.loads(pickled)
    assert (opened.folder, opened.meta) == (corpus.folder, corpus.meta)
    assert (opened.num_training, opened.num_held_out) == (corpus.num_training, corpus.num_held_out)
    assert opened.tokenizer.vocabulary_sha256 == corpus.tokenizer.vocabulary_sha256
    for document in range(50):
        assert np.array_equal(opened.tokens(document), corpus.tokens(document))


@pytest.fixture
def damaged(toy_world, tmp_path) -> Path:
    """The toy corpus with an id beyond the vocabulary in a training document."""
    folder = tmp_path / "damaged"
    shutil.copytree(toy_world / "corpus", folder)
    place = Corpus.open(folder).offsets[4] * 2  # bytes: ids are uint16
    tokens = bytearray((folder / "tokens.bin").read_bytes())
    tokens[place : place + 2] = (60_000).to_bytes(2, "little")
    (folder / "tokens.bin").write_bytes(tokens)
    return folder


def test_an_error_of_the_worker_is_the_error_of_at(damaged):
    """After the good steps before it, as the same one line."""
    batches = batches_of(damaged)
    good = 0
    with pytest.raises(InputError) as found, batches.ahead(range(20), pinned=False) as ahead:
        for _ in ahead:
            good += 1
    with pytest.raises(InputError) as expected:
        batches.at(good)
    assert type(found.value) is InputError
    assert str(found.value) == str(expected.value)
    assert str(found.value) == f"{damaged / 'tokens.bin'}: damaged; document 4 holds 60000"
    for step in range(good):
        batches.at(step)  # has no error


def test_leaving_early_ends_the_worker(toy_world):
    before = set(multiprocessing.active_children())
    with batches_of(toy_world / "corpus").ahead(range(10_000), pinned=False) as ahead:
        next(ahead)
        (worker,) = set(multiprocessing.active_children()) - before
    assert not worker.is_alive()
    assert set(multiprocessing.active_children()) <= before


# Through the command line.


def started(world: Path, data: Path, out: Path, **flags: str) -> Command:
    """`python train.py` on the toy world, in a process group of its own."""
    flags = {"teacher": str(world / "teacher"), "data": str(data), "out": str(out)} | flags
    flags |= {"max-length": "19", "batch-size": "7", "device": "cpu"}
    words = (f"--{name}={value}" for name, value in flags.items())
    return Command(ROOT / "train.py", *words, start_new_session=True)


def test_a_damaged_corpus_ends_a_run_in_one_line(toy_world, damaged, tmp_path):
    run = started(toy_world, damaged, tmp_path / "run", steps="100")
    out, err = run.communicate(timeout=60)
    run.wait_for_group()
    assert run.returncode == 2, err
    assert out == ""
    assert err == f"error: {damaged / 'tokens.bin'}: damaged; document 4 holds 60000\n"


def test_many_micro_batches_do_not_need_many_file_descriptors(toy_run):
    """1,024 are allowed on most machines; a batch cut into 128 has 512 tensors."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        batches = Batches(Corpus.open(toy_run.data), 19, 3, 128, seed=0)
        with batches.ahead(range(4), pinned=False) as ahead:
            assert [len(batch.micro_batches) for batch in ahead] == [128] * 4
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
