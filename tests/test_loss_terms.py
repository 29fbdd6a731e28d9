"""The loop's four terms are the published ones where the published scripts' quirks vanish.

That is: no dropout, and every text as long as `max_length`, so that the batch is padded to it.
"""

import dataclasses

import pytest
import torch
from loop_toys import in_float64
from torch import nn

import train
from minibert.data.batches import GlobalBatch, MicroBatch
from minibert.ops import plain
from minibert.run_config import RunConfig

B, S = 6, 19  # S: max_length of the toy run
LENGTHS = torch.tensor([19, 3, 11, 7, 2, 15])


@pytest.fixture(params=["plain", "fused"])
def world(toy_run, request):
    """Student (4 -> 2 layers, perturbed), teacher and settings, all in float64, dropout off."""
    return in_float64(dataclasses.replace(toy_run, ops=request.param))


@pytest.fixture
def batch() -> GlobalBatch:
    """One micro-batch of six sequences with five masked positions."""
    generator = torch.Generator().manual_seed(9)
    input_ids = torch.randint(5, 99, (B, S), generator=generator)
    attention_mask = (torch.arange(S) < LENGTHS[:, None]).long()
    masked_positions = torch.tensor([1, 18, 20, 40, 100])
    labels = torch.tensor([7, 93, 50, 8, 20])
    micro_batch = MicroBatch(input_ids, attention_mask, masked_positions, labels)
    return GlobalBatch([micro_batch], list(range(B)), int(LENGTHS.sum()), len(labels))


def published_terms(student, teacher, micro_batch: MicroBatch) -> tuple[torch.Tensor, ...]:
    """The authors' CompactBioBERT loss, from whole maps and whole logits."""
    input_ids, attention_mask, masked_positions, labels, _ = micro_batch
    H, N = student.config.hidden_size, student.config.num_attention_heads
    real = attention_mask.bool()
    learnt = student(input_ids, attention_mask, keep=range(2))
    taught = teacher(input_ids, attention_mask, keep=range(4))
    hidden, attention = [], []
    for i in range(2):
        pair = (learnt.hidden_states[i], taught.hidden_states[2 * i + 1])
        rows = [torch.masked_select(h, real[..., None]).view(-1, H) for h in pair]
        hidden.append(nn.CosineEmbeddingLoss()(*rows, torch.ones(len(rows[0]))))
        whole = real[:, None, :, None].expand(B, N, S, S)
        maps = []
        for output, layer in ((learnt, i), (taught, 2 * i + 1)):
            query, key = output.queries[layer], output.keys[layer]
            attention_probs = plain.attention_scores(query, key, attention_mask).softmax(-1)
            maps.append(torch.masked_select(attention_probs, whole).view(-1, S) + 1e-12)
        attention.append(nn.functional.kl_div(maps[0].log(), maps[1], reduction="none").mean())
    student_logits, teacher_logits = (
        model.logits(output.head_output).view(B, S, -1)
        for model, output in ((student, learnt), (teacher, taught))
    )
    all_labels = torch.full((B * S,), -100)
    all_labels[masked_positions] = labels
    mlm = nn.CrossEntropyLoss()(student_logits.flatten(0, 1), all_labels)
    chosen = (all_labels > -1).view(B, S, 1).expand_as(student_logits)
    rows = [
        torch.masked_select(logits, chosen).view(len(labels), -1)
        for logits in (student_logits, teacher_logits)
    ]
    output = nn.KLDivLoss(reduction="batchmean")(rows[0].log_softmax(-1), rows[1].softmax(-1))
    return mlm, torch.stack(hidden), torch.stack(attention), output


def test_terms_and_gradients_are_the_published_ones(world, batch):
    student, teacher, run = world
    ours = train.loss_terms(student, teacher, batch.micro_batches[0], batch, run)
    mlm, hidden, attention, output = theirs = published_terms(
        student, teacher, batch.micro_batches[0]
    )
    gradients = []
    for loss in (
        ours.vocabulary_loss + 3 * ours.hidden_loss.sum() + 3 * ours.attention_loss.sum(),
        1 * mlm + 3 * hidden.sum() + 3 * attention.sum() + 5 * output,
    ):
        student.zero_grad()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters()])
    for our_term, their_term in zip(ours[1:], theirs, strict=True):
        torch.testing.assert_close(our_term, their_term, rtol=1e-8, atol=1e-12)
    for our_gradient, their_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-6, atol=1e-10)


def test_every_parameter_gets_a_gradient(world, batch):
    student, teacher, run = world
    terms = train.loss_terms(student, teacher, batch.micro_batches[0], batch, run)
    (terms.vocabulary_loss + terms.hidden_loss.sum() + terms.attention_loss.sum()).backward()
    for name, parameter in student.named_parameters():
        # Softmax does not see a key's bias, which adds the same to a whole row of scores.
        assert parameter.grad is not None, name
        assert parameter.grad.any() or name.endswith("key.bias"), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_attention_term_does_not_depend_on_the_padding(world, batch):
    """Theirs is a mean over the padded length: a batch of short texts weighs more."""
    student, teacher, run = world
    input_ids, attention_mask, _, labels, _ = batch.micro_batches[0]
    short = [1, 3, 4]  # at most 7 tokens
    cut = []
    for width in (7, 12, S):
        micro_batch = MicroBatch(
            input_ids[short, :width],
            attention_mask[short, :width],
            torch.tensor([1]),
            labels[:1],
        )
        whole = GlobalBatch([micro_batch], short, int(LENGTHS[short].sum()), 1)
        cut.append(train.loss_terms(student, teacher, micro_batch, whole, run))
    for other in cut[1:]:
        for ours, theirs in zip(cut[0], other, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_teacher_with_dropout_on_is_our_own_fault(world, batch):
    student, teacher, run = world
    with pytest.raises(AssertionError, match="dropout"):
        train.loss_terms(student, teacher.train(), batch.micro_batches[0], batch, run)


def test_chosen_layers_supervise_each_other(world, batch):
    """Student layer i follows the i-th of `teacher_layers`."""
    student, teacher, run = world
    run: RunConfig = dataclasses.replace(run, teacher_layers=(0, 2))
    terms = train.loss_terms(student, teacher, batch.micro_batches[0], batch, run)
    input_ids, attention_mask, *_ = batch.micro_batches[0]
    learnt = student(input_ids, attention_mask).hidden_states
    taught = teacher(input_ids, attention_mask).hidden_states
    for i, j in enumerate((0, 2)):
        expected = plain.hidden_state_loss(learnt[i], taught[j], attention_mask) / LENGTHS.sum()
        torch.testing.assert_close(terms.hidden_loss[i], expected)


def test_maps_are_compared_before_dropout(world, batch):
    """Dropout on the maps of layer 0 does not touch the comparison of those maps."""
    student, teacher, run = world
    micro_batch = batch.micro_batches[0]
    still = train.loss_terms(student, teacher, micro_batch, batch, run)
    student.train()
    student.embeddings.hidden_dropout = 0.0
    for layer in student.layers:
        layer.hidden_dropout, layer.attention_dropout = 0.0, 0.5
    dropped = train.loss_terms(student, teacher, micro_batch, batch, run)
    assert dropped.attention_loss[0] == still.attention_loss[0]
    assert dropped.hidden_loss[0] != still.hidden_loss[0]
