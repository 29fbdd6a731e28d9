"""The ledger's FLOPs are those of the formulas in `closed_form.py`, part by part, exactly; and
those of torch's own counter, where it counts.
"""

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from ledger_toys import EVERY_RECIPE, TOY, followed, ledger_of, run_of, toy_ledger
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import train
from minibert.config import BIOBERT, BertConfig
from minibert.data.batches import GlobalBatch, MicroBatch
from minibert.ledger import closed_form, counts, step
from minibert.ledger.record import BACKWARD, LOSSES, STUDENT, TEACHER, Ledger
from minibert.model import BertForMaskedLM
from minibert.student import new_student
from minibert.training.optimizer import build_optimizer


def expected(run, config: BertConfig) -> Counter:
    """The FLOPs of a recorded step by formula."""
    student, teacher, run = followed(run, config)
    batch = step.random_batch(student, run)
    return closed_form.step_flops(student, teacher, run, batch.micro_batches)


@pytest.mark.parametrize("ops", ["fused", "plain"])
@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_the_step_of_a_recipe(recipe, ops):
    found = closed_form.flops_by_part(toy_ledger(recipe, ops).operations)
    assert found == expected(run_of(recipe, ops=ops), TOY)


@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_in_bfloat16_the_same(recipe):
    halved = closed_form.flops_by_part(toy_ledger(recipe, dtype="bfloat16").operations)
    assert halved == closed_form.flops_by_part(toy_ledger(recipe).operations)


@settings(max_examples=6, deadline=None)
@given(
    recipe=some.sampled_from(EVERY_RECIPE),
    ops=some.sampled_from(["fused", "plain"]),
    dropout=some.sampled_from([0.0, 0.1]),
    heads=some.integers(1, 3),
    sizes=some.tuples(*[some.integers(1, 9)] * 4),
    batch=some.tuples(some.integers(1, 5), some.integers(3, 17), some.integers(1, 40)),
)
def test_at_any_size(recipe, ops, dropout, heads, sizes, batch):
    head_size, intermediate, vocabulary, layers = sizes
    config = BertConfig(
        vocab_size=10 * vocabulary + 1,
        hidden_size=heads * head_size,
        num_hidden_layers=2 * (1 + layers % 2),
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=19,
        attention_probs_dropout_prob=dropout,
    )
    student = {"num_hidden_layers": 1, "hidden_size": heads * (1 + intermediate % 4)}
    given = dict(zip(("batch_size", "max_length", "micro_batch_tokens"), batch, strict=True))
    run = run_of(recipe, student, ops=ops, **given)
    found = closed_form.flops_by_part(ledger_of(run, config).operations)
    assert found == expected(run, config)


def padded(lengths: list[list[int]], masked: int) -> GlobalBatch:
    """Micro-batches of sequences of these lengths, padded to the longest; some masked positions of
    each. Here and there padding stands at the beginning.
    """
    micro_batches = []
    for length in lengths:
        shape = (len(length), max(length))
        attention_mask = torch.tensor([[1] * n + [0] * (shape[1] - n) for n in length])
        attention_mask[0] = attention_mask[0].flip(0)
        positions = attention_mask.flatten().nonzero().squeeze(1)[:masked]
        input_ids = torch.randint(TOY.vocab_size, shape)
        micro_batches.append(MicroBatch(input_ids, attention_mask, positions, positions))
    tokens = sum(map(sum, lengths))
    return GlobalBatch(micro_batches, [], num_tokens=tokens, num_masked=masked * len(lengths))


@pytest.mark.parametrize("ops", ["fused", "plain"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_fused_leaves_padding_out(ops, packed):
    run = run_of("compactbiobert", ops=ops)
    config, _, run = followed(run, TOY)
    teacher = BertForMaskedLM(TOY).requires_grad_(False).eval()
    student = new_student(teacher, run)
    batch = padded([[27, 4, 19], [20, 2]], masked=3)
    if packed:
        batch = batch._replace(micro_batches=[each.packed() for each in batch.micro_batches])
    optimizer = build_optimizer(student, run.weight_decay)
    with Ledger({"student": student, "teacher": teacher}).recorded() as ledger:
        train.update(student, teacher, optimizer, batch, 1, run)
    found = closed_form.flops_by_part(ledger.operations)
    assert found == closed_form.step_flops(config, TOY, run, batch.micro_batches)
    pairs = 2 * 64**2 if packed else 3 * 27**2 + 2 * 20**2  # 50 and 22 tokens, filled up to 64
    if ops == "fused":  # of each length, rounded up to a multiple of 16
        pairs = (32**2 + 16**2 + 32**2) + (32**2 + 16**2)
    product = 2 * pairs * TOY.hidden_size
    differ = found[STUDENT, "layers.0"] - found[TEACHER, "layers.0"]
    if ops == "fused":  # the teacher's scores, within the student's layers
        assert differ == product and (LOSSES, "attention_map_loss") not in found
    else:  # both models' scores, of two layers
        assert differ == 0 and found[LOSSES, "attention_map_loss"] == 2 * 2 * product


@pytest.mark.parametrize(
    ("recipe", "ops"),
    [("compactbiobert", "fused"), ("tinybiobert", "plain"), ("mlm", "fused")],
)
def test_torch_counts_the_same(recipe, ops, monkeypatch):
    ledger = toy_ledger(recipe, ops)
    update = train.update
    totals = []

    def counted(*arguments):
        with FlopCounterMode(display=False) as counter:
            figures = update(*arguments)
        totals.append(counter.get_total_flops())
        return figures

    monkeypatch.setattr(train, "update", counted)
    ledger_of(run_of(recipe, ops=ops))
    assert sum(o.flops for o in ledger.operations) == totals[1] > 0


def test_no_product_goes_uncounted():
    """Every operation of a step that torch's counter knows is one that ours knows."""
    known = {
        name for packet in flop_registry for name in [getattr(packet, "_qualified_op_name", "")]
    }
    ours = {packet._qualified_op_name for packet in counts.FLOPS}
    seen = {
        operation.name.replace(".", "::", 1).rpartition(".")[0]
        for recipe in EVERY_RECIPE
        for ops in ("fused", "plain")
        for operation in toy_ledger(recipe, ops).operations
    }
    assert "aten::addmm" in seen & known
    assert seen & known <= ours
    products = [name for name in seen if any(word in name for word in ("mm", "matmul", "linear"))]
    assert set(products) <= ours | {"aten::linalg_vector_norm"}


def test_the_parameters_of_models_of_published_size():
    biobert = BIOBERT
    student = dataclasses.replace(biobert, num_hidden_layers=6)
    tiny = dataclasses.replace(
        biobert, num_hidden_layers=4, hidden_size=312, intermediate_size=1_200
    )
    parts = closed_form.parameters(student)
    assert parts["embeddings"] == 22_665_216
    assert {parts[f"layers.{i}"] for i in range(6)} == {7_087_872}
    assert parts["head"] == 621_124
    assert sum(parts.values()) == 65_813_572
    assert sum(closed_form.parameters(biobert).values()) == 108_340_804
    assert sum(closed_form.parameters(tiny).values()) == 13_903_756


@pytest.mark.parametrize("config", [TOY, BIOBERT])
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = BertForMaskedLM(config)
    found: Counter = Counter()
    for name, parameter in model.named_parameters():
        first, second, *_ = name.split(".")
        found[f"layers.{second}" if first == "layers" else first] += parameter.numel()
    assert found == closed_form.parameters(config)


def test_the_step_of_compactbiobert_at_its_published_size():
    """192 sequences of 256 tokens; what the README says."""
    run = run_of("compactbiobert", batch_size=192, max_length=256, micro_batch_tokens=4096)
    flops = expected(run, BIOBERT)
    phases: Counter = Counter()
    for (phase, _), count in flops.items():
        phases[phase] += count
    assert phases == {
        TEACHER: 8_821_970_436_096,
        STUDENT: 4_531_298_107_392,
        LOSSES: 1_313_510_449_152,
        BACKWARD: 8_830_667_980_800,
    }
    assert flops[TEACHER, "layers.11"] == 734_439_407_616
    assert flops[STUDENT, "layers.0"] == 753_766_760_448
    assert flops[STUDENT, "head"] == 8_697_544_704


@pytest.mark.parametrize(
    ("recipe", "ops"),
    [
        ("compactbiobert", "fused"),
        pytest.param("compactbiobert", "plain", marks=pytest.mark.slow),
        pytest.param("distilbiobert", "fused", marks=pytest.mark.slow),
        pytest.param("mlm", "fused", marks=pytest.mark.slow),
    ],
)
def test_biobert_by_shapes_alone(recipe, ops):
    """BioBERT's sizes; in the quick run of two layers."""
    layers = 2 if (recipe, ops) == ("compactbiobert", "fused") else 12
    config = dataclasses.replace(BIOBERT, num_hidden_layers=layers)
    run = run_of(recipe, ops=ops, batch_size=2, max_length=11)
    found = closed_form.flops_by_part(ledger_of(run, config, shapes_only=True).operations)
    assert found == expected(run, config)
