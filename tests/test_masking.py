"""Masking: 15 % of ordinary tokens, each by itself, 80/10/10; labels are what stood there.

Statistical bounds are four standard deviations; the draws are fixed, so a test that passes does so
always.
"""

import math

import numpy as np
import pytest
from batch_toys import corpus_of, original, rows, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert.data.batches import Batches
from minibert.data.tokenizer import Tokenizer

NUM_WORDS, FIRST_SPECIAL = 37, 11  # the special ids are 11 to 15, words below and above them
WORDS = [*range(FIRST_SPECIAL), *range(FIRST_SPECIAL + 5, NUM_WORDS + 5)]
DOCUMENTS, LENGTH = 600, 255  # 153,000 ordinary tokens
EVERYTHING = DOCUMENTS * (LENGTH + 2)  # tokens of a micro-batch


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"), NUM_WORDS, FIRST_SPECIAL)


def batches(corpus, max_length=LENGTH + 2, seed=3) -> Batches:
    size = corpus.num_training
    return Batches(corpus, max_length, size * max_length, batch_size=size, seed=seed)


@pytest.fixture(scope="module")
def many(tokenizer) -> Batches:
    """Batches of 600 documents of 255 words each."""
    generator = np.random.default_rng(5)
    return batches(corpus_of(tokenizer, generator.choice(WORDS, (DOCUMENTS, LENGTH))))


def taken_apart(many: Batches, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(documents, LENGTH) each, in the corpus's order: ids before, ids after, is there a label."""
    batch = many.at(step)
    (part,) = batch.micro_batches
    after, labels = part.input_ids.numpy(), part.labels.numpy()
    masked = np.zeros(after.shape, dtype=bool)
    masked.reshape(-1)[part.masked_positions.numpy()] = True
    before = after.copy()
    before[masked] = labels
    by_document = np.argsort(batch.documents)  # all are of one length, so their order was kept
    return tuple(array[by_document][:, 1:-1] for array in (before, after, masked))


@pytest.fixture(scope="module")
def epochs(many) -> list[tuple[np.ndarray, ...]]:
    """The first two epochs, taken apart."""
    return [taken_apart(many, step) for step in (0, 1)]


def assert_share(events: int, trials: int, share: float) -> None:
    """As many as so many independent trials give: a binomial count, within four deviations."""
    assert abs(events - share * trials) < 4 * math.sqrt(trials * share * (1 - share))


def assert_even(counts: np.ndarray) -> None:
    """Pearson's chi-square of counts that chance would make even."""
    expected, freedom = counts.mean(), counts.size - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


# What the 15 % are.


def test_the_shares_are_15_percent_and_80_10_10(many, epochs):
    for before, after, masked in epochs:
        assert before.size > 100_000
        assert_share(masked.sum(), masked.size, 0.15)
        was, now = before[masked], after[masked]
        assert_share((now == many.tokenizer.mask_id).sum(), len(was), 0.8)
        kept_or_drawn = 0.1 + 0.1 / NUM_WORDS  # a random id is the old one now and then
        assert_share((now == was).sum(), len(was), kept_or_drawn)
        assert_share(np.isin(now, WORDS).sum(), len(was), 0.2)


def test_masks_do_not_depend_on_the_position(epochs):
    _, _, masked = epochs[0]
    by_position = masked.sum(axis=0)
    assert_even(by_position * (1 / 0.85))  # the variance of a binomial count, made a Poisson's
    assert_share(masked[:, 0].sum(), DOCUMENTS, 0.15)
    assert_share(masked[:, -1].sum(), DOCUMENTS, 0.15)


@pytest.mark.parametrize("distance", [1, 2, 16, 64])
def test_masks_do_not_depend_on_each_other(epochs, distance):
    _, _, masked = epochs[0]
    both = masked[:, distance:] & masked[:, :-distance]
    assert_share(both.sum(), both.size, 0.15**2)
    side_by_side = masked[distance:] & masked[:-distance]  # documents of neighbouring numbers
    assert_share(side_by_side.sum(), side_by_side.size, 0.15**2)


def test_masks_do_not_depend_on_the_word(epochs):
    before, _, masked = epochs[0]
    for word in WORDS:
        assert_share(masked[before == word].sum(), (before == word).sum(), 0.15)


def test_how_many_a_document_has_is_binomial(epochs):
    """Independent masks, and not 15 % of each document."""
    _, _, masked = epochs[0]
    counts = masked.sum(axis=1)
    expected = LENGTH * 0.15 * 0.85
    assert abs(counts.var() - expected) < 4 * expected * math.sqrt(2 / DOCUMENTS)


def test_random_ids_are_uniform_and_depend_on_nothing(many, epochs):
    """As often each word, whatever stood there, and in either half of a sequence."""
    drawn_at_all = 0
    for before, after, masked in epochs:
        drawn = masked & (after != before) & (after != many.tokenizer.mask_id)
        drawn_at_all += drawn.sum()
        counts = np.bincount(after[drawn], minlength=NUM_WORDS + 5)
        assert counts[FIRST_SPECIAL : FIRST_SPECIAL + 5].sum() == 0
        assert_even(counts[WORDS])
        ranks = np.searchsorted(WORDS, [before[drawn], after[drawn]])
        steps = np.bincount((ranks[1] - ranks[0]) % NUM_WORDS, minlength=NUM_WORDS)
        assert steps[0] == 0  # those count as kept
        assert_even(steps[1:])
        assert_share(drawn[:, : LENGTH // 3].sum(), drawn.sum(), 1 / 3)
    assert drawn_at_all > 4_000


@pytest.mark.parametrize("num_words", [1, 2, 3, 50_000])
def test_random_ids_of_any_vocabulary(tmp_path, num_words):
    """All of them, the first and the last too."""
    tokenizer = tokenizer_of(tmp_path, num_words, first_special=0)
    maker = batches(corpus_of(tokenizer, np.full((DOCUMENTS, LENGTH), 5)))
    before, after, masked = taken_apart(maker, 0)
    drawn = after[masked & (after != before) & (after != tokenizer.mask_id)]
    assert set(drawn) <= set(range(6, num_words + 5))
    if num_words < 9:
        assert set(drawn) == set(range(6, num_words + 5))
    else:
        assert_even(np.bincount((drawn - 5) * 20 // num_words, minlength=20))


# Of what the draws are a function.


def assert_unrelated(one: np.ndarray, other: np.ndarray) -> None:
    assert_share((one & other).sum(), one.size, 0.15**2)


def test_another_epoch_another_seed_and_another_document_mean_other_masks(many, epochs):
    (*_, first), (*_, second) = epochs
    assert_unrelated(first, second)
    assert_unrelated(first[1:], second[:-1])  # documents and epochs are not added up
    assert_unrelated(first[:-1], second[1:])
    *_, of_another_seed = taken_apart(batches(many.corpus, seed=4), 0)
    assert_unrelated(first, of_another_seed)
    assert_unrelated(first[: DOCUMENTS // 2], first[DOCUMENTS // 2 :])


def test_evaluation_has_masks_of_its_own(tokenizer):
    """Not those of a training document of the same number, epoch and seed."""
    documents = np.full((2 * DOCUMENTS, LENGTH), 5)
    held_out = batches(corpus_of(tokenizer, documents, held_out=DOCUMENTS), seed=0)
    (part,) = held_out.held_out(DOCUMENTS)
    both = []
    training = batches(corpus_of(tokenizer, documents), seed=0)
    for positions in (part.masked_positions, training.at(0).micro_batches[0].masked_positions):
        masked = np.zeros(2 * EVERYTHING, dtype=bool)
        masked[positions.numpy()] = True
        both.append(masked.reshape(-1, LENGTH + 2)[:, 1:-1])
    by_document = np.argsort(training.at(0).documents)
    assert_unrelated(both[0][:DOCUMENTS], both[1][by_document][DOCUMENTS:])


def test_a_document_has_the_same_masks_in_any_batch(many):
    """Alone, among others, and on any rank."""
    whole = dict(zip(many.at(0).documents, rows(many.at(0)), strict=True))
    for size, ranks, budget in ((1, 1, 1), (7, 1, 600), (100, 3, 5_000)):
        for rank in range(ranks):
            maker = Batches(
                many.corpus, LENGTH + 2, budget, size, seed=3, rank=rank, world_size=ranks
            )
            batch = maker.at(2)
            own = batch.documents[rank::ranks]  # all are of one length
            assert list(rows(batch)) == [whole[document] for document in own]


# What must hold for every text.


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.integers(0, NUM_WORDS + 4), min_size=1, max_size=30), min_size=1, max_size=9
    ),
    max_length=st.integers(3, 35),
    seed=st.integers(0, 2**70),
    step=st.integers(0, 10**12),
)
def test_labels_are_what_stood_there_and_all_else_is_as_it_was(
    tokenizer, documents, max_length, seed, step
):
    special = set(tokenizer.special_ids)
    corpus = corpus_of(tokenizer, documents)
    batch = batches(corpus, max_length, seed).at(step)
    found = []
    for ids, places in rows(batch):
        found.append(original(corpus, ids, places))
        for place, label in places.items():
            assert label not in special
            assert ids[place] == tokenizer.mask_id or ids[place] not in special
    shown = sorted(
        batch.documents, key=lambda document: -min(len(documents[document]), max_length - 2)
    )
    for ids, document in zip(found, shown, strict=True):
        text, length = documents[document], len(ids)
        assert length == min(len(text), max_length - 2)
        assert any(text[start : start + length] == ids for start in range(len(text)))


def test_text_of_special_tokens_alone_is_never_masked(tokenizer):
    """[PAD] and [UNK] within a text stay; a batch without any label is one."""
    corpus = corpus_of(tokenizer, [list(tokenizer.special_ids) * 50] * 20)
    batch = batches(corpus).at(0)
    assert batch.num_masked == 0
    for ids, places in rows(batch):
        assert ids[1:-1] == list(tokenizer.special_ids) * 50
        assert places == {}
