"""The batch of a step is a pure function of (seed, step), and says what it should."""

import numpy as np
import pytest
from batch_toys import corpus_of, original, rows, rows_of, same, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert.data.batches import Batches, window
from minibert.data.corpus import Corpus
from minibert.errors import InputError

MAX_LENGTH = 19


@pytest.fixture(scope="module")
def corpus(toy_world) -> Corpus:
    return Corpus.open(toy_world / "corpus")


def batches(corpus, micro_batch_tokens=60, seed=0, batch_size=7) -> Batches:
    return Batches(corpus, MAX_LENGTH, micro_batch_tokens, batch_size, seed)


def test_a_step_can_be_built_alone(corpus):
    walked = batches(corpus)
    for step in range(9):
        last = walked.at(step)
    alone = batches(corpus).at(8)
    assert last.documents == alone.documents
    for ours, theirs in zip(last.micro_batches, alone.micro_batches, strict=True):
        assert same(ours, theirs)


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


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_share_a_batch(corpus, ranks):
    """Rank r takes sequences r, r + ranks, ... of the batch; the counts are those of all of it."""
    for step in range(6):
        whole = batches(corpus).at(step)
        sequences = list(rows(whole))
        for rank in range(ranks):
            share = Batches(corpus, MAX_LENGTH, 60, 7, rank=rank, world_size=ranks).at(step)
            assert list(rows(share)) == sequences[rank::ranks]
            assert share[1:] == whole[1:]  # documents, num_tokens, num_masked


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


def test_held_out_documents_are_others_and_their_masks_always_the_same(corpus):
    count = corpus.num_held_out
    assert 0 < count < corpus.num_training
    one, other = (batches(corpus, seed=seed).held_out(1000) for seed in (1, 2))
    assert sum(len(m.input_ids) for m in one) == count
    for ours, theirs in zip(one, other, strict=True):
        assert same(ours, theirs)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"), num_words=5_000)


@pytest.mark.parametrize(
    ("asked", "given"),
    [(0, []), (1, [0]), (2, [0, 5]), (3, [0, 3, 7]), (11, range(11)), (99, range(11))],
)
def test_a_part_of_the_held_out_documents_is_spread_over_all_of_them(tokenizer, asked, given):
    """And each has the masks that it has among all."""
    texts = [[5 + document] * 12 for document in range(19)]
    maker = Batches(corpus_of(tokenizer, texts, held_out=11), MAX_LENGTH)
    every, some = ([*rows_of(maker.held_out(count))] for count in (11, asked))
    assert some == [every[number] for number in given]
    shown = [original(maker.corpus, *row) for row in some]
    assert shown == [texts[8 + number] for number in given]


@settings(deadline=None)
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


def test_windows_of_many_documents_are_those_of_each():
    num_tokens, turns = np.arange(1, 400), np.arange(7, 406)
    starts, ends = window(num_tokens, 17, turns)
    each = [window(*pair) for pair in zip(num_tokens, [17] * 399, turns, strict=True)]
    assert list(zip(starts, ends, strict=True)) == each


@pytest.mark.parametrize("max_length", [3, 19, 256])
def test_all_of_a_long_document_is_seen_in_as_many_epochs_as_it_has_windows(tokenizer, max_length):
    """Every token of it is another, so that what is seen can be told."""
    lengths = [1, 700, 256, 17, 18, 1_009, 509]
    corpus = corpus_of(tokenizer, [range(5, 5 + length) for length in lengths])
    maker = Batches(corpus, max_length, batch_size=len(lengths))
    seen = [set() for _ in lengths]
    for epoch in range(-(-max(lengths) // (max_length - 2))):
        batch = maker.at(epoch)
        shown = {document: min(lengths[document], max_length - 2) for document in batch.documents}
        longest_first = sorted(shown, key=lambda document: -shown[document])  # stable
        for document, row in zip(longest_first, rows(batch), strict=True):
            part = original(corpus, *row)
            assert part == list(range(part[0], part[0] + shown[document])), "one piece of text"
            seen[document].update(part)
        for document, length in enumerate(lengths):
            if epoch + 1 == -(-length // (max_length - 2)):  # as many epochs as windows
                assert seen[document] == set(range(5, 5 + length))


# Damage.


def damaged(tokenizer, document: int, place: int) -> Corpus:
    """Eleven documents of 40 tokens, one of them with an id beyond the vocabulary."""
    corpus = corpus_of(tokenizer, [[7] * 40] * 11, held_out=2)
    corpus._tokens[40 * document + place] = 60_000
    return corpus


@pytest.mark.parametrize("document", range(9))
@pytest.mark.parametrize("place", [0, 16, 39])
def test_damage_is_told_of_its_document_alone(tokenizer, document, place):
    """Also the first and the last token, beside which [SEP] and [CLS] of its neighbours stand."""
    corpus = damaged(tokenizer, document, place)
    told = set()
    for step in range(3 * 11):  # the windows of 17 tokens are three
        maker = Batches(corpus, MAX_LENGTH, batch_size=3)
        try:
            maker.at(step)
        except InputError as error:
            assert document in maker.documents(step)
            told.add(str(error))
    assert told == {f"{corpus.folder / 'tokens.bin'}: damaged; document {document} holds 60000"}


def test_damage_of_held_out_documents_is_told(tokenizer):
    maker = Batches(damaged(tokenizer, document=10, place=0), max_length=42)
    maker.held_out(1)
    with pytest.raises(InputError, match="damaged; document 10 holds 60000"):
        maker.held_out(2)


def test_the_first_id_beyond_the_vocabulary_is_one(tokenizer):
    corpus = corpus_of(tokenizer, [[tokenizer.vocab_size - 1] * 9])
    Batches(corpus, MAX_LENGTH).at(0)
    corpus._tokens[8] += 1
    with pytest.raises(InputError, match=f"document 0 holds {tokenizer.vocab_size}"):
        Batches(corpus, MAX_LENGTH).at(0)


def test_a_vocabulary_of_special_tokens_alone_is_refused(tmp_path):
    corpus = corpus_of(tokenizer_of(tmp_path, num_words=0), [[1]])
    with pytest.raises(InputError, match="special tokens alone"):
        Batches(corpus, MAX_LENGTH)
