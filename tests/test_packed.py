"""A packed micro-batch, several sequences in one row, says what the padded one says."""

import dataclasses

import pytest
import torch
from batch_toys import corpus_of, same, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st
from loop_toys import in_float64

import train
from minibert.data.batches import (
    MASKED_STEP,
    TOKEN_STEP,
    Batches,
    GlobalBatch,
    MicroBatch,
)
from minibert.ops import fused, plain
from minibert.recipes import RECIPES

LENGTHS = [23, 17, 16, 9, 3]
# Sequences that stand anywhere in two rows: behind padding, around it, among another's tokens.
NUMBERS = torch.tensor([[0, 2, 1, 1, 0, 2, 1, 0, 0, 2, 2, 1], [3, 3, 0, 3, 1, 1, 1, 1, 1, 3, 0, 0]])
PLACES = [(0, 1), (0, 2), (1, 1), (1, 3)]  # row and number of each


def padded_batch(lengths: list[int], num_masked: int, vocab_size: int = 99) -> MicroBatch:
    """Random sequences, of which so many real tokens are masked."""
    generator = torch.Generator().manual_seed(sum(lengths))
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(5, vocab_size, attention_mask.shape, generator=generator)
    real = attention_mask.flatten().nonzero().squeeze(1)
    masked = real[torch.randperm(len(real), generator=generator)[:num_masked]].sort().values
    labels = torch.randint(5, vocab_size, masked.shape, generator=generator)
    return MicroBatch(input_ids * attention_mask, attention_mask, masked, labels)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7), share=st.floats(0, 1))
def test_the_same_sequences_stand_in_it(lengths, share):
    num_masked = int(share * sum(lengths))
    padded = padded_batch(lengths, num_masked)
    packed = padded.packed()
    (ids,), (numbers,) = packed.input_ids, packed.attention_mask
    (position_ids,) = packed.position_ids
    assert len(ids) == len(numbers) == len(position_ids)
    assert len(ids) % TOKEN_STEP == 0 and len(ids) - sum(lengths) < TOKEN_STEP
    assert numbers[sum(lengths) :].eq(0).all()
    for number, length in enumerate(lengths, start=1):
        assert torch.equal(ids[numbers == number], padded.input_ids[number - 1, :length])
        assert torch.equal(position_ids[numbers == number], torch.arange(length))
    # The masked tokens are the same, in the same order, and what is behind them does not count.
    assert len(packed.labels) % MASKED_STEP == 0 and len(packed.labels) - num_masked < MASKED_STEP
    assert torch.equal(packed.labels[:num_masked], padded.labels)
    assert packed.labels[num_masked:].eq(plain.IGNORED_LABEL).all()
    places = packed.masked_positions[:num_masked]
    assert torch.equal(ids[places], padded.input_ids.flatten()[padded.masked_positions])
    S = padded.input_ids.shape[1]
    assert torch.equal(numbers[places] - 1, padded.masked_positions // S)
    assert torch.equal(position_ids[places], padded.masked_positions % S)


def test_batches_of_steps_are_packed_and_held_out_ones_are_not(tmp_path):
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(5, 60, (n,), generator=generator).tolist() for n in (9, 30, 4, 21, 13)]
    corpus = corpus_of(tokenizer_of(tmp_path, 55), texts, held_out=1)
    settings = {"max_length": 25, "micro_batch_tokens": 50, "batch_size": 4}
    packed, padded = (Batches(corpus, **settings, packed=each) for each in (True, False))
    for step in range(3):
        ours, theirs = packed.at(step), padded.at(step)
        assert ours[1:] == theirs[1:]  # documents and counts
        assert len(ours.micro_batches) == len(theirs.micro_batches) > 1
        for each, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert same(each, other.packed()) and not same(each, other)
    (each,), (other,) = packed.held_out(1), padded.held_out(1)
    assert same(each, other)


@pytest.fixture
def world(toy_run):
    """Student, teacher and settings, in float64, dropout off."""
    return in_float64(toy_run)


@pytest.mark.parametrize(("device", "ops"), [("cpu", "fused"), ("cpu", "plain"), ("cuda", "fused")])
def test_a_run_on_a_cpu_is_packed_where_padding_is_not_computed(toy_run, device, ops):
    packed = train.is_packed(dataclasses.replace(toy_run, ops=ops), torch.device(device))
    assert packed == ((device, ops) == ("cpu", "fused"))


@pytest.mark.parametrize("ops", ["fused", "plain"])
def test_the_loop_goes_by_it(toy_run, monkeypatch, ops):
    seen, loss_terms = [], train.loss_terms

    def watched(student, teacher, batch, *rest):
        seen.append(batch.position_ids is not None and len(batch.input_ids) == 1)
        return loss_terms(student, teacher, batch, *rest)

    monkeypatch.setattr(train, "loss_terms", watched)
    train.train(dataclasses.replace(toy_run, ops=ops, steps=2))
    assert len(seen) > 2 and set(seen) == {ops == "fused"}


@pytest.mark.parametrize("ops", [plain, fused], ids=["plain", "fused"])
def test_every_token_becomes_what_it_becomes_by_itself(world, ops):
    student, _, _ = world
    padded = padded_batch(LENGTHS, num_masked=11)
    real = padded.attention_mask.bool()
    expected = student(*padded[:2], masked_positions=padded.masked_positions)  # plain, padded
    packed = padded.packed()
    where = {"masked_positions": packed.masked_positions, "position_ids": packed.position_ids}
    output = student(*packed[:2], **where, ops=ops)
    T = sum(LENGTHS)
    torch.testing.assert_close(output.head_output[:11], expected.head_output)
    pairs = zip(output.hidden_states, expected.hidden_states, strict=True)
    for state, by_itself in [(output.embedding_output, expected.embedding_output), *pairs]:
        torch.testing.assert_close(state[0, :T], by_itself[real])


@pytest.mark.parametrize("ops", ["plain", "fused"])
@pytest.mark.parametrize(("hidden", "attention"), [("cosine", "kl"), ("mse", "mse"), (None, None)])
def test_losses_and_gradients_are_the_same(world, ops, hidden, attention):
    """Of masked words alone, too."""
    student, teacher, run = world
    if hidden is None:
        run, teacher = dataclasses.replace(run, recipe=RECIPES["mlm"], teacher=None), None
    else:
        recipe = dataclasses.replace(run.recipe, hidden_loss=hidden, attention_loss=attention)
        run = dataclasses.replace(run, recipe=recipe)
    padded = padded_batch(LENGTHS, num_masked=11)
    counts = (list(range(len(LENGTHS))), sum(LENGTHS), 11)
    gradients, losses = [], []
    for batch, which in ((padded, "plain"), (padded.packed(), ops)):
        run = dataclasses.replace(run, ops=which)
        student.zero_grad()
        terms = train.loss_terms(student, teacher, batch, GlobalBatch([batch], *counts), run)
        (terms.vocabulary_loss + terms.hidden_loss.sum() + terms.attention_loss.sum()).backward()
        losses.append(terms)
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0])
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name, atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize("ops", [plain, fused], ids=["plain", "fused"])
def test_a_sequence_may_stand_anywhere_in_its_row(world, ops):
    student, _, _ = world
    input_ids = torch.arange(5, 29).view(2, 12)
    position_ids = torch.zeros_like(NUMBERS)
    for row, number in PLACES:
        own = NUMBERS[row] == number
        position_ids[row, own] = torch.arange(int(own.sum()))
    together = student(input_ids, NUMBERS, position_ids=position_ids, ops=ops).hidden_states
    for row, number in PLACES:
        own = NUMBERS[row] == number
        ids = input_ids[row, own][None]
        for state, alone in zip(together, student(ids, ids > 0).hidden_states, strict=True):
            torch.testing.assert_close(state[row, own], alone[0])


@pytest.mark.parametrize("ops", [plain, fused], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["attention_map_loss", "attention_map_mse"])
def test_a_loss_of_maps_is_the_sum_of_the_sequences(ops, name):
    generator = torch.Generator().manual_seed(6)
    parts = torch.randn(4, 2, 3, 12, 5, dtype=torch.float64, generator=generator)
    student, teacher = parts[:2].requires_grad_(), parts[2:].detach()
    together = getattr(ops, name)(*student, *teacher, NUMBERS)
    alone = 0.0
    for row, number in PLACES:
        own = (NUMBERS[row] == number).nonzero().squeeze(1)
        maps = [part[row, :, own][None] for part in (*student, *teacher)]
        alone = alone + getattr(plain, name)(*maps, torch.ones(1, len(own)))
    torch.testing.assert_close(together, alone)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (together, alone)]
    torch.testing.assert_close(*gradients)


def test_positions_are_looked_up_where_they_are_given(world):
    """So a packed row may be longer than the model has positions; a place beyond them may not."""
    student, _, _ = world
    longest = student.config.max_position_embeddings
    ids = torch.full((1, longest + 3), 7)
    mask = torch.ones_like(ids)
    positions = torch.arange(longest + 3)[None] % longest
    assert student(ids, mask, position_ids=positions).embedding_output.shape[1] == longest + 3
    with pytest.raises(ValueError, match="positions"):
        student(ids, mask)
    with pytest.raises(IndexError):
        student(ids, mask, position_ids=positions + 3)
