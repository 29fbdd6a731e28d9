"""The batch of a step is a pure function of (seed, step), and says what it should."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minibert.data.batches import Batches, window
from minibert.data.corpus import Corpus, CorpusWriter
from minibert.data.tokenizer import load_tokenizer

MAX_LENGTH = 19


@pytest.fixture(scope="module")
def corpus(toy_world) -> Corpus:
    return Corpus.open(toy_world / "corpus")


def batches(corpus, micro_batch_tokens=60, seed=0, batch_size=7) -> Batches:
    return Batches(corpus, MAX_LENGTH, micro_batch_tokens, batch_size, seed)


def rows(batch):
    """Every sequence of a global batch, without padding: (ids, {place: label})."""
    for micro_batch in batch.micro_batches:
        S = micro_batch.input_ids.shape[1]
        labels = dict(
            zip(micro_batch.masked_positions.tolist(), micro_batch.labels.tolist(), strict=True)
        )
        for number, (ids, mask) in enumerate(
            zip(micro_batch.input_ids, micro_batch.attention_mask, strict=True)
        ):
            length = int(mask.sum())
            assert mask[:length].all(), "real tokens come first"
            places = {p - number * S: label for p, label in labels.items() if p // S == number}
            yield ids[:length].tolist(), places


def original(corpus, ids, places):
    """The sequence before masking, [CLS] and [SEP] taken off."""
    ids = [places.get(place, token) for place, token in enumerate(ids)]
    assert ids[0] == corpus.tokenizer.cls_id
    assert ids[-1] == corpus.tokenizer.sep_id
    return ids[1:-1]


def test_a_step_can_be_built_alone(corpus):
    walked = batches(corpus)
    for step in range(9):
        last = walked.at(step)
    alone = batches(corpus).at(8)
    assert last.documents == alone.documents
    for ours, theirs in zip(last.micro_batches, alone.micro_batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_document_has_one_turn_an_epoch(corpus):
    seen = [
        document
        for step in range(corpus.num_training)
        for document in batches(corpus).at(step).documents
    ]
    epochs = [seen[i : i + corpus.num_training] for i in range(0, len(seen), corpus.num_training)]
    assert len(epochs) == 7
    assert all(sorted(epoch) == list(range(corpus.num_training)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_seed_gives_another_order_and_other_masks(corpus):
    one, other = batches(corpus, seed=0), batches(corpus, seed=1)
    assert one.at(0).documents != other.at(0).documents
    masks = []
    for maker in (one, other):
        everything = Batches(corpus, MAX_LENGTH, 10_000, corpus.num_training, maker.seed).at(0)
        texts = {tuple(original(corpus, *row)): set(row[1]) for row in rows(everything)}
        masks.append([texts[text] for text in sorted(texts)])
    assert masks[0] != masks[1]


def test_what_a_step_learns_from_does_not_depend_on_how_it_is_cut(corpus):
    for step in range(12):
        whole = batches(corpus, micro_batch_tokens=10_000).at(step)
        cut = batches(corpus, micro_batch_tokens=25).at(step)
        assert len(whole.micro_batches) == 1 < len(cut.micro_batches)
        assert list(rows(whole)) == list(rows(cut))
        assert (whole.num_tokens, whole.num_masked) == (cut.num_tokens, cut.num_masked)


def test_the_counts_are_those_of_the_batch(corpus):
    batch = batches(corpus).at(3)
    assert batch.num_tokens == sum(int(m.attention_mask.sum()) for m in batch.micro_batches)
    assert batch.num_masked == sum(len(m.labels) for m in batch.micro_batches)
    assert sum(len(m.input_ids) for m in batch.micro_batches) == 7 == len(batch.documents)


def test_micro_batches_keep_to_the_budget_and_waste_little(corpus):
    batch = batches(corpus, micro_batch_tokens=40).at(1)
    assert all(m.input_ids.numel() <= 40 for m in batch.micro_batches)
    lengths = [int(n) for m in batch.micro_batches for n in m.attention_mask.sum(1)]
    assert lengths == sorted(lengths, reverse=True)
    assert all(
        int(m.attention_mask.sum(1).max()) == m.input_ids.shape[1] for m in batch.micro_batches
    )


def test_unmasked_text_is_the_documents(corpus):
    batch = batches(corpus).at(0)
    texts = {tuple(original(corpus, ids, places)) for ids, places in rows(batch)}
    expected = set()
    for document in batch.documents:
        tokens = corpus.tokens(document).tolist()
        start, end = window(len(tokens), MAX_LENGTH - 2, turn=document)
        expected.add(tuple(tokens[start:end]))
    assert texts == expected


def test_padding_is_padding(corpus):
    for micro_batch in batches(corpus).at(2).micro_batches:
        assert (
            micro_batch.input_ids[micro_batch.attention_mask == 0] == corpus.tokenizer.pad_id
        ).all()


@pytest.fixture(scope="module")
def long_corpus(toy_world, tmp_path_factory) -> Corpus:
    """150 documents of 1,000 tokens, every tenth [UNK]: enough to count masks in."""
    folder = tmp_path_factory.mktemp("long") / "corpus"
    tokenizer = load_tokenizer(toy_world / "vocab.txt")
    generator = np.random.default_rng(5)
    with CorpusWriter(folder, tokenizer, held_out=0.0) as writer:
        for document in range(150):
            ids = generator.integers(5, 99, 1000)
            ids[::10] = tokenizer.unk_id
            writer.add([f"long {document}"], [ids.tolist()])
        writer.finish()
    return Corpus.open(folder)


def test_masking_is_15_percent_80_10_10_and_never_special(long_corpus):
    batch = Batches(long_corpus, 1002, 200_000, batch_size=150, seed=11).at(0)
    outcome = {"mask": 0, "random": 0, "kept": 0}
    ordinary = 0
    for ids, places in rows(batch):
        for place, label in places.items():
            assert label >= 5, "a special token was masked"
            now = ids[place]
            outcome[
                "mask"
                if now == long_corpus.tokenizer.mask_id
                else "kept"
                if now == label
                else "random"
            ] += 1
            assert now == long_corpus.tokenizer.mask_id or now >= 5, "replaced by a special token"
        ordinary += sum(token >= 5 for token in original(long_corpus, ids, places))
    masked = sum(outcome.values())
    # Five standard deviations of the binomial counts; a random id is the old one once in 94.
    assert ordinary == 135_000
    assert abs(masked - 0.15 * ordinary) < 5 * (ordinary * 0.15 * 0.85) ** 0.5
    for kind, share in {"mask": 0.8, "random": 0.1 * 93 / 94, "kept": 0.1 * 95 / 94}.items():
        assert abs(outcome[kind] - share * masked) < 5 * (masked * share * (1 - share)) ** 0.5


def test_masks_change_from_epoch_to_epoch(long_corpus):
    maker = Batches(long_corpus, 1002, 200_000, batch_size=150, seed=11)
    one, two = maker.at(0), maker.at(1)
    assert sorted(one.documents) == sorted(two.documents)
    positions = [set(b.micro_batches[0].masked_positions.tolist()) for b in (one, two)]
    overlap = len(positions[0] & positions[1]) / len(positions[0])
    assert overlap == pytest.approx(0.15 * 0.9, abs=0.02)


def test_held_out_documents_are_others_and_their_masks_always_the_same(corpus):
    count = corpus.num_held_out
    assert 0 < count < corpus.num_training
    one, other = (batches(corpus, seed=seed).held_out(1000) for seed in (1, 2))
    assert sum(len(m.input_ids) for m in one) == count
    for ours, theirs in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_part_of_the_held_out_documents_is_spread_over_all_of_them(corpus):
    first, count = corpus.num_training, corpus.num_held_out
    (micro_batch,) = batches(corpus, micro_batch_tokens=10_000).held_out(2)
    kept = {tuple(ids[mask.bool()].tolist()) for ids, mask in zip(*micro_batch[:2], strict=True)}
    (all_of_them,) = batches(corpus, micro_batch_tokens=10_000).held_out(count)
    lengths = [min(len(corpus.tokens(first + n)), MAX_LENGTH - 2) + 2 for n in (0, count // 2)]
    assert sorted(map(len, kept)) == sorted(lengths)
    assert len(all_of_them.input_ids) == count


@given(
    num_tokens=st.integers(0, 2000), longest=st.integers(1, 300), first_turn=st.integers(0, 1 << 40)
)
def test_windows_cover_a_document_in_turns(num_tokens, longest, first_turn):
    num_windows = max(1, -(-num_tokens // longest))
    covered = set()
    for turn in range(first_turn, first_turn + num_windows):
        start, end = window(num_tokens, longest, turn)
        assert 0 <= start <= end <= num_tokens
        assert end - start == min(num_tokens, longest)
        covered.update(range(start, end))
    assert covered == set(range(num_tokens))
