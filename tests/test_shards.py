"""Shards are made once, and merged into what writing document by document would come to."""

import dataclasses
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_toys import content, write_inputs, write_vocabulary

from minibert.data import merge as merging
from minibert.data import shards
from minibert.data.merge import DELETED, KEPT, NO_TEXT, REPLACED, fates_of, merge
from minibert.data.reading import Reading
from minibert.data.shards import Settings, Shard, document_keys, find_shard, make_shard
from minibert.data.tokenizer import Tokenizer, load_tokenizer
from minibert.errors import InputError
from minibert.prepare import prepare


def fates_one_by_one(keys, has_text):
    """What becomes of each record, told plainly."""
    fates, newest = [], {}
    for record, (key, text) in enumerate(zip(keys, has_text, strict=True)):
        fates.append(KEPT if text else NO_TEXT)
        if key in newest:
            fates[newest.pop(key)] = REPLACED if text else DELETED
        if text:
            newest[key] = record
    return fates


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2), st.booleans()), max_size=60))
def test_what_becomes_of_records(records):
    """Keys of several leading and trailing bits, each of them often."""
    keys = [(leading * 2**60 + rest) % 2**64 for leading, rest, _ in records]
    has_text = [text for _, _, text in records]
    found = fates_of(np.array(keys, np.uint64), np.array(has_text, bool))
    assert found.tolist() == fates_one_by_one(keys, has_text)


IDS = st.sampled_from(["1", "2", "3", "four", "fünf", "\U00010400"])
FILES = st.lists(
    st.lists(st.tuples(IDS, st.lists(st.integers(0, 30), max_size=5)), max_size=9),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_vocabulary(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=60, deadline=None)
@given(files=FILES, held_out=st.sampled_from([0, 0.3, 0.7]), block=st.sampled_from([1, 4, 1000]))
def test_merged_as_if_document_by_document(tokenizer, tmp_path_factory, files, held_out, block):
    """A dictionary of the newest records, in their order, training first: the same files."""
    folder = tmp_path_factory.mktemp("files")
    parts, newest = [], {}
    for number, records in enumerate(files):
        part = folder / str(number)
        part.mkdir()
        if records:
            shards.append(part, *zip(*records, strict=True), shards.dtype_for(tokenizer))
        counts = dataclasses.asdict(Reading()) | {"without_tokens": 0}
        parts.append(shards.finish(part, tokenizer, {"name": "", "sha256": ""}, counts))
        for name, tokens in records:
            newest.pop(name, None)
            if tokens:
                newest[name] = tokens
    sides = [
        [name for name in newest if (document_keys([name])[0] < held_out * 2.0**64) == side]
        for side in (False, True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "BLOCK_ITEMS", block)
        if not sides[0]:
            with pytest.raises(InputError, match="no documents to train on"):
                merge(parts, folder / "out", tokenizer, held_out)
            return
        meta = merge(parts, folder / "out", tokenizer, held_out)
    names = sides[0] + sides[1]
    assert (folder / "out" / "ids.txt").read_text() == "".join(f"{name}\n" for name in names)
    tokens = [token for name in names for token in newest[name]]
    assert np.fromfile(folder / "out" / "tokens.bin", "<u2").tolist() == tokens
    offsets = np.cumsum([0, *(len(newest[name]) for name in names)])
    np.save(folder / "offsets.npy", offsets)
    assert (folder / "out" / "offsets.npy").read_bytes() == (folder / "offsets.npy").read_bytes()
    assert (meta["held_out_documents"], meta["tokens"]) == (len(sides[1]), len(tokens))
    assert meta["unk_tokens"] == tokens.count(tokenizer.unk_id)


# A shard is made once.


@pytest.fixture
def made(tmp_path):
    """A function that makes the shard of d.txt; returns whether it was made anew, and its files."""
    inputs, _ = write_inputs(tmp_path)
    write_vocabulary(tmp_path)

    def make(**changes):
        tokenizer = load_tokenizer(tmp_path / "vocab.txt")
        way = Settings(**changes)
        steps = list(make_shard(inputs[3], tmp_path / "shard", tokenizer, way))
        return len(steps) > 0, content(tmp_path / "shard")

    assert make()[0]
    return make


def test_a_finished_shard_is_left_alone(made, tmp_path):
    before = (tmp_path / "shard").stat()
    again, files = made()
    assert not again
    assert (tmp_path / "shard").stat() == before
    assert set(files) == {*shards.COLUMNS, "meta.json"}
    os.utime(tmp_path / "d.txt")  # touched, but the same
    assert not made()[0]


def cut(folder):
    with open(folder / "shard" / "tokens.bin", "r+b") as file:
        file.truncate(10)


def change_meta(folder):
    (folder / "shard" / "meta.json").write_text(json.dumps({"made_from": "another version"}))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "d.txt").write_text((folder / "d.txt").read_text()[::-1]),
        lambda folder: (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text() + "x1"),
        lambda folder: (folder / "shard" / "keys.bin").unlink(),
        cut,
        change_meta,
    ],
)
def test_a_shard_of_something_else_is_made_anew(made, tmp_path, change):
    change(tmp_path)
    assert made()[0]
    files = content(tmp_path / "shard")
    shutil.rmtree(tmp_path / "shard")
    assert made() == (True, files)  # as if there had been none


@pytest.mark.parametrize("setting", [field.name for field in dataclasses.fields(Settings)])
def test_a_shard_of_other_settings_is_made_anew(made, setting):
    value = "xml" if setting == "stdin_format" else not getattr(Settings(), setting)
    assert made(**{setting: value})[0]
    assert not made(**{setting: value})[0]
    assert made()[0]


def test_a_file_that_changes_meanwhile_is_refused(made, tmp_path, monkeypatch):
    (tmp_path / "d.txt").write_text("other\n" * 99)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 100)
    before = content(tmp_path / "shard")
    steps = make_shard(tmp_path / "d.txt", tmp_path / "shard", load_tokenizer(tmp_path), Settings())
    next(steps)
    with open(tmp_path / "d.txt", "a") as file:
        file.write("more")
    with pytest.raises(InputError, match=r"d\.txt: changed while it was read"):
        list(steps)
    assert content(tmp_path / "shard") == before


def test_who_stops_in_the_middle_leaves_nothing(made, tmp_path):
    shutil.rmtree(tmp_path / "shard")
    steps = make_shard(tmp_path / "d.txt", tmp_path / "shard", load_tokenizer(tmp_path), Settings())
    next(steps)
    assert (tmp_path / "shard.partial").exists()
    steps.close()
    assert not list(tmp_path.glob("shard*"))
    assert find_shard(tmp_path / "shard") is None


def test_half_a_million_records_in_flat_memory(tokenizer, tmp_path):
    """20 bytes a record to find the last of each, however long the documents are."""
    number = 500_000
    generator = np.random.default_rng(0)
    columns = {
        shards.KEYS: generator.integers(0, 2**64, number, np.uint64).repeat(2)[:number],
        shards.LENGTHS: np.full(number, 3, "<i8"),
        shards.ID_LENGTHS: np.full(number, 2, "<i8"),
    }
    for name, column in columns.items():
        column.tofile(tmp_path / name)
    parts = [
        Shard(tmp_path, {"sizes": {shards.KEYS: 8 * number}, "dtype": "uint16"}) for _ in range(4)
    ]
    del columns
    tracemalloc.start()
    found = merging.what_becomes(parts, held_out=0.3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 4 * number
    assert sum(int((part.fates == KEPT).sum()) for part in found) == number // 2
    for part in found[:3]:
        assert (part.fates == REPLACED).all()


def test_shards_of_one_run_do_not_mix_with_those_of_another(tmp_path):
    """One folder for each input, by its path: two files of one name are two."""
    write_vocabulary(tmp_path)
    inputs = []
    for letter in "ab":
        (tmp_path / letter).mkdir()
        inputs.append(tmp_path / letter / "text.txt")
        inputs[-1].write_text(letter)
    meta = prepare(inputs, tmp_path, tmp_path / "out", held_out=0)
    assert [source["name"] for source in meta["inputs"]] == ["text.txt"] * 2
    assert meta["documents"] == 2
