"""Fused operations err no more than plain ones of the same precision, against float64.

Values and gradients, at awkward sizes, with tiles so small that each function goes over several.
The values that the definitions give stand in test_losses.py, for both.
"""

import math
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minibert.ops import attention, fused, plain, tiles, vocabulary

B, S, N, D, H, V, M = 3, 13, 2, 6, 10, 37, 17
PRECISIONS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # relative, half a unit at least
MASKS = {
    "ends": [[1] * 13, [1] * 5 + [0] * 8, [1] * 9 + [0] * 4],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0], [0] * 12 + [1], [1] * 13],
    "nothing": [[0] * 13, [1] + [0] * 12, [1] * 13],
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "IN_CACHE", 40)
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 4 * V)
    monkeypatch.setattr(vocabulary, "DECODER_AT_ONCE", 6 * H)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def outcome(function, inputs: list[Tensor], num_student: int, upstream: float) -> list[Tensor]:
    """The function's value (or its first) and the gradients of the student's inputs, in float64."""
    inputs = [part.detach().clone() for part in inputs]
    student = [part.requires_grad_() for part in inputs[:num_student]]
    values = function(*inputs)
    values = values if isinstance(values, tuple) else (values,)
    (upstream * values[0]).sum().backward()
    assert all(part.grad.dtype == part.dtype for part in student)
    return [part.detach().double() for part in (*values, *(part.grad for part in student))]


def assert_no_worse_than_plain(name, inputs, num_student, dtype, upstream=0.7, slack=1, **settings):
    """Three ways: plain in float64 is the truth that plain and fused in `dtype` are held to.

    slack: so many times the usual tolerance for what is float32.
    """
    rounded = [part.to(dtype) if part.is_floating_point() else part for part in inputs]
    exact = [part.double() if part.is_floating_point() else part for part in rounded]
    outcomes = []
    for ops, arguments in ((plain, exact), (plain, rounded), (fused, rounded)):

        def function(*arguments, ops=ops):
            return getattr(ops, name)(*arguments, **settings)

        outcomes.append(outcome(function, arguments, num_student, upstream))
    for truth, by_plain, by_fused in zip(*outcomes, strict=True):
        size = truth.norm() + 1e-6
        plain_error, fused_error = ((o - truth).norm() / size for o in (by_plain, by_fused))
        precision = torch.float32 if truth.ndim == 0 else dtype  # sums: whatever comes in
        tolerance = PRECISIONS[precision] * (slack if precision == torch.float32 else 1)
        assert fused_error <= plain_error + tolerance


def queries_and_keys() -> list[Tensor]:
    """Of student and teacher, (B, N, S, D) seen through (B, S, N, D); the teacher's are larger."""
    parts = [normal(B, S, N, D + 3 * (seed > 1), seed=seed) for seed in range(4)]
    return [part.transpose(1, 2) for part in parts]


MAP_LOSSES = ["attention_map_loss", "attention_map_mse"]


@pytest.fixture(params=["cpu", "gpu"])
def parts(request, monkeypatch):
    """Maps of one sequence after another, or as on a GPU: of two masked ones at once."""
    if request.param == "gpu":
        monkeypatch.setattr(attention, "_real_parts", partial(attention._masked_parts, num_heads=N))
        monkeypatch.setattr(attention, "ON_GPU", 2 * N * S * S)


HIDDEN_LOSSES = ["hidden_state_loss", "hidden_state_mse"]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("loss", MAP_LOSSES)
def test_losses_of_attention_maps(loss, mask, dtype, parts):
    inputs = [*queries_and_keys(), torch.tensor(mask)]
    assert_no_worse_than_plain(loss, inputs, 2, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("loss", MAP_LOSSES)
def test_maps_that_are_close(loss, dtype, parts):
    """Where the student is nearly the teacher, the gradient is a small difference."""
    query, key, *_ = queries_and_keys()
    close = [part + normal(*part.shape, seed=9, scale=0.02) for part in (query, key)]
    inputs = [query, key, *close, torch.tensor(MASKS["ends"])]
    # Relative to a difference of 2 %, float32's 6e-8 is 3e-6.
    assert_no_worse_than_plain(loss, inputs, 2, dtype, slack=5)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("loss", HIDDEN_LOSSES)
def test_losses_of_hidden_states(loss, mask, dtype):
    inputs = [normal(B, S, H, seed=11), normal(B, S, H, seed=12), torch.tensor(mask)]
    assert_no_worse_than_plain(loss, inputs, 1, dtype)


@pytest.mark.parametrize("length", [0.0, 1e-6])
@pytest.mark.parametrize("loss", HIDDEN_LOSSES)
def test_hidden_states_that_are_nearly_nothing(loss, length):
    student, teacher = normal(1, S, H, seed=11, scale=length), normal(1, S, H, seed=12)
    inputs = [student, teacher, torch.ones(1, S).long()]
    assert_no_worse_than_plain(loss, inputs, 1, torch.float32)


@pytest.mark.parametrize("loss", HIDDEN_LOSSES)
def test_hidden_states_in_any_layout(loss):
    student, teacher = (normal(S, B, H, seed=seed).transpose(0, 1) for seed in (11, 12))
    inputs = [student, teacher, torch.tensor(MASKS["holes"])]
    assert_no_worse_than_plain(loss, inputs, 1, torch.float32)


def test_values_of_close_maps_are_better_than_plain():
    """Their KL is a small difference of large sums; the rounding of both softmaxes drops out."""
    query, key = (normal(1, 2, 300, 16, seed=seed) for seed in (26, 27))
    close = [part + normal(*part.shape, seed=28, scale=0.003) for part in (query, key)]
    mask = torch.ones(1, 300).long()
    truth = plain.attention_map_loss(query, key, *close, mask)
    single = [part.float() for part in (query, key, *close)]
    errors = [abs(ops.attention_map_loss(*single, mask) - truth) / truth for ops in (plain, fused)]
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("upstream", [1 + 2**-9, 0.3])
@pytest.mark.parametrize("loss", HIDDEN_LOSSES)
def test_bfloat16_gradients_are_scaled_by_upstream_as_it_is(loss, upstream):
    """Not by upstream rounded to bfloat16, which has 8 bits: all would be off the same way."""
    hidden = [normal(B, S, H, seed=seed).bfloat16() for seed in (29, 30)]
    mask = torch.tensor(MASKS["ends"])
    gradients = []
    for factor in (1.0, upstream):
        student = hidden[0].clone().requires_grad_()
        (factor * getattr(fused, loss)(student, hidden[1], mask)).backward()
        gradients.append(student.grad)
    assert torch.equal(gradients[1], (gradients[0].float() * upstream).bfloat16())


def vocabulary_inputs(num_rows: int) -> list[Tensor]:
    """Heads, decoders and biases of student and teacher, of different widths, and labels."""
    inputs = []
    for seed, width in ((13, H), (16, H + 3)):
        inputs += [normal(num_rows, width, seed=seed), normal(V, width, seed=seed + 1)]
        inputs += [normal(V, seed=seed + 2)]
    labels = torch.randint(0, V, (num_rows,), generator=torch.Generator().manual_seed(19))
    return [*inputs, labels]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ignored", [[], [0, 5, 16], range(16), range(17)], ids=len)
def test_vocabulary_loss(ignored, temperature, dtype):
    inputs = vocabulary_inputs(M)
    inputs[-1][list(ignored)] = plain.IGNORED_LABEL
    settings = {"temperature": temperature, "mlm_weight": 0.3, "output_weight": 1.7}
    settings |= {"teacher_entropy": len(ignored) == 3}
    for upstream in (1.0, 0.7):
        assert_no_worse_than_plain("vocabulary_loss", inputs, 3, dtype, upstream, **settings)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_vocabulary_loss_of_models_that_are_close(dtype):
    """Where distillation ends: the gradient is a small difference of two distributions."""
    *student, _, _, _, labels = vocabulary_inputs(M)
    close = [part + normal(*part.shape, seed=31, scale=0.02) for part in student]
    inputs = [*student, *close, labels]
    settings = {"temperature": 1.0, "mlm_weight": 0.0, "output_weight": 5.0, "slack": 5}
    assert_no_worse_than_plain("vocabulary_loss", inputs, 3, dtype, **settings)


def test_the_sums_for_the_log_have_no_gradient():
    *inputs, labels = vocabulary_inputs(M)
    student = [part.requires_grad_() for part in inputs[:3]]
    for ops in (plain, fused):
        loss, *sums = ops.vocabulary_loss(*student, *inputs[3:], labels)
        assert loss.requires_grad and not any(value.requires_grad for value in sums)


@pytest.mark.parametrize("num_rows", [0, 1, 4, 5])
def test_vocabulary_loss_of_few_rows(num_rows):
    assert_no_worse_than_plain("vocabulary_loss", vocabulary_inputs(num_rows), 3, torch.float32)


def test_the_decoder_may_be_more_precise_than_the_heads():
    """As in a bfloat16 run: float32 weights, and a float32 gradient for them."""
    head, decoder, bias, *teacher, labels = vocabulary_inputs(M)
    student = head.bfloat16(), decoder.float().requires_grad_(), bias.float().requires_grad_()
    teacher = [part.bfloat16() for part in teacher]
    loss, *_ = fused.vocabulary_loss(*student, *teacher, labels)
    loss.backward()
    expected, *_ = plain.vocabulary_loss(head, decoder.requires_grad_(), bias, *teacher, labels)
    expected.backward()
    assert student[1].grad.dtype == torch.float32
    error = (student[1].grad.double() - decoder.grad).norm() / decoder.grad.norm()
    assert error < 0.02


def test_logits_of_bfloat16_numbers_are_not_rounded():
    """At sizes where a CPU's matrix units come in: its factors are rounded, its sums are not."""
    head, decoder = (normal(rows, 96, seed=rows).bfloat16() for rows in (70, 130))
    exact = head.double() @ decoder.double().T
    for weights in (decoder, decoder.float()):
        logits = vocabulary._logits(head, weights, [slice(0, 65), slice(65, 130)])
        assert logits.dtype == torch.float32
        assert (logits - exact).norm() < 1e-6 * exact.norm()


def test_products_of_float32_are_again_what_they_were():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), tiles.factors_of(torch.bfloat16):
        assert torch.get_float32_matmul_precision() == "medium"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
    with tiles.factors_of(torch.float32):
        assert torch.get_float32_matmul_precision() == before


def test_attention_without_backward():
    """What a teacher does: some heads at once. With gradients to come, whole maps."""
    inputs = [*queries_and_keys()[:2], normal(B, S, N, D, seed=21).transpose(1, 2)]
    for dtype, mask in product(PRECISIONS, MASKS.values()):
        rounded = [part.to(dtype) for part in inputs]
        by_any = [rounded, [part.clone().requires_grad_() for part in rounded]]
        mask = torch.tensor(mask)
        lean, whole = (fused.attention(*parts, mask, 0.0) for parts in by_any)
        assert whole.requires_grad and not lean.requires_grad and lean.dtype == dtype
        exact = plain.attention(*(part.double() for part in rounded), mask, 0.0)
        real = mask.bool()[:, None, :, None]
        for context in (lean, whole):
            error = ((context.detach().double() - exact) * real).norm() / (exact * real).norm()
            assert error <= 2 * PRECISIONS[dtype]
            assert (context * ~real).eq(0).all()  # padding is not computed


def test_attention_without_dropout():
    inputs = [*queries_and_keys()[:2], normal(B, S, N, D, seed=21).transpose(1, 2)]
    for dtype in PRECISIONS:
        for mask in MASKS.values():
            outcomes = []
            for ops, kind in ((plain, torch.float64), (plain, dtype), (fused, dtype)):
                real = torch.tensor(mask).bool()[:, None, :, None]

                def function(query, key, value, ops=ops, mask=mask, real=real):
                    context = ops.attention(query, key, value, torch.tensor(mask), 0.0)
                    return context * real  # what padding sees is nobody's concern

                rounded = [part.to(dtype).to(kind) for part in inputs]
                outcomes.append(outcome(function, rounded, 3, 0.7))
            for truth, by_plain, by_fused in zip(*outcomes, strict=True):
                plain_error, fused_error = (
                    (o - truth).norm() / truth.norm() for o in (by_plain, by_fused)
                )
                assert fused_error <= plain_error + PRECISIONS[dtype]


@pytest.fixture
def same_dropout(monkeypatch):
    """Every map keeps the same probabilities: those the returned function gives for (N, m, m), in
    the draw that it names.
    """

    def kept(shape, probability, dtype):
        generator = torch.Generator().manual_seed(math.prod(shape) + kept.draw)
        return (torch.rand(shape, generator=generator) >= probability).to(dtype), 1 / (
            1 - probability
        )

    kept.draw = 0
    monkeypatch.setattr(attention, "kept_values", kept)
    return kept


@pytest.mark.parametrize("size", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_with_dropout(same_dropout, mask, dtype, size):
    """One sequence after the other by the formula, with the same probabilities dropped.

    At scores of up to 30, which bfloat16 would round by 0.1. Errors are those of eight draws.
    """
    dropout, mask = 0.4, torch.tensor(mask)
    query, key = (size * part for part in queries_and_keys()[:2])
    value = normal(B, S, N, D, seed=22).transpose(1, 2)

    def by_formula(*parts):
        context = torch.zeros_like(parts[2])
        for b in range(B):
            real = mask[b].bool()
            q, k, v = (part[b][:, real] for part in parts)
            scores = plain.attention_scores(q[None], k[None], mask.new_ones(1, k.shape[1]))[0]
            probs = scores.softmax(-1).to(v.dtype)
            n = probs.shape[-1]
            m = attention.rounded_up(n)
            kept, scale = same_dropout((N, m, m), dropout, probs.dtype)
            context[b][:, real] = (probs * kept[:, :n, :n] * scale) @ v
        return context

    def by_fused(*parts):
        return fused.attention(*parts, mask, dropout)

    rounded = [part.to(dtype) for part in (query, key, value)]
    squares = []  # of the relative errors: in each draw by formula and by ours, of each outcome
    for same_dropout.draw in range(8):
        truths = outcome(by_formula, [part.double() for part in rounded], 3, 0.7)
        results = [outcome(function, rounded, 3, 0.7) for function in (by_formula, by_fused)]
        pairs = [list(zip(result, truths, strict=True)) for result in results]
        squares.append([[((o - t).norm() / t.norm()) ** 2 for o, t in each] for each in pairs])
    formula_errors, our_errors = torch.tensor(squares).mean(0).sqrt()  # (outcomes,) each
    assert (our_errors <= formula_errors + PRECISIONS.get(dtype, 1e-12)).all()


@pytest.mark.parametrize("upstream", [1.0, 0.7, 1.003e-4])
def test_a_map_loss_has_its_gradient_scaled_as_it_is(upstream):
    """Not by a number rounded to bfloat16, which would put all of it off by the same."""
    generator = torch.Generator().manual_seed(5)
    query, key, value, *teacher = torch.randn(5, 2, 3, 33, 8, generator=generator).bfloat16()
    mask = torch.ones(2, 33, dtype=torch.long)
    gradients = []
    for weight in (1.0, upstream):
        parts = [part.clone().requires_grad_() for part in (query, key)]
        _, loss = fused.attention_and_map_loss(
            *parts, value, mask, 0.0, *teacher, fused.attention_map_loss
        )
        (weight * loss).backward()
        gradients.append(torch.cat([part.grad.double().flatten() for part in parts]))
    ratio = (gradients[0] @ gradients[1]) / gradients[0].square().sum()
    assert abs(ratio / upstream - 1) < 2**-11


def with_teacher(loss, teacher, mask, *student):
    return loss(*student, *teacher, mask)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(mask, id=name, marks=[] if name == "holes" else pytest.mark.slow)
        for name, mask in MASKS.items()
    ],
)
def test_the_written_derivatives_are_the_true_ones(same_dropout, mask):
    query, key, *teacher = queries_and_keys()
    mask = torch.tensor(mask)
    value = normal(B, S, N, D, seed=23).transpose(1, 2)
    for part in (query, key, value):
        part.requires_grad_()
    hidden, target = normal(B, S, H, seed=24).requires_grad_(), normal(B, S, H, seed=25)
    for loss in (fused.attention_map_loss, fused.attention_map_mse):
        assert torch.autograd.gradcheck(partial(with_teacher, loss, teacher, mask), (query, key))
    for loss in (fused.hidden_state_loss, fused.hidden_state_mse):
        assert torch.autograd.gradcheck(partial(with_teacher, loss, [target], mask), (hidden,))
    assert torch.autograd.gradcheck(
        lambda q, k, v: fused.attention(q, k, v, mask, 0.3), (query, key, value), fast_mode=True
    )
    losses = (fused.attention_map_loss, fused.attention_map_mse)
    used = (slice(0, 1), slice(1, 2), slice(0, 2))  # the context, the loss, both
    for loss, dropout, part in product(losses, (0.0, 0.3), used):

        def results(*heads, loss=loss, dropout=dropout, part=part):
            return fused.attention_and_map_loss(*heads, mask, dropout, *teacher, loss)[part]

        assert torch.autograd.gradcheck(results, (query, key, value), fast_mode=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_derivative_of_the_vocabulary_loss_is_the_true_one(temperature):
    *student, teacher_head, teacher_decoder, teacher_bias, labels = vocabulary_inputs(7)
    labels[3] = plain.IGNORED_LABEL
    for part in student:
        part.requires_grad_()
    teacher = teacher_head, teacher_decoder, teacher_bias
    assert torch.autograd.gradcheck(
        lambda *s: fused.vocabulary_loss(*s, *teacher, labels, temperature, 0.4, 1.9)[0], student
    )


@settings(max_examples=25, deadline=None)
@given(st.floats(0.001, 0.9), st.integers(1, 3), st.integers(0, 2**31))
def test_dropout_drops_its_share_and_keeps_the_mean(probability, odd, seed):
    torch.manual_seed(seed)
    values = torch.ones(101, 200 + odd, requires_grad=True)
    dropped = fused.dropout(values, probability)
    zeros = (dropped == 0).double().mean().item()
    deviation = math.sqrt(probability * (1 - probability) / values.numel())
    assert abs(zeros - probability) < 5 * deviation + 2**-16
    assert len(dropped.unique()) <= 2
    assert abs(dropped.max().item() * (1 - probability) - 1) < 2**-14 / (1 - probability)
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped)  # the same mask, the same factor


def test_dropped_values_are_independent_of_their_neighbours():
    """Four decisions come from one draw: all pairs of the four are dropped together p^2 often."""
    torch.manual_seed(3)
    dropped = (fused.dropout(torch.ones(40_000, 4), 0.25) == 0).double()
    together = dropped.T @ dropped / len(dropped)  # (4, 4)
    expected = torch.full((4, 4), 0.0625).fill_diagonal_(0.25)
    torch.testing.assert_close(together, expected.double(), atol=0.009, rtol=0)


def test_a_seed_gives_the_same_dropout_again_and_another_does_not():
    values = torch.ones(1_000)
    masks = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        masks.append(fused.dropout(values, 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def one_gradient_of(ops, table: Tensor, ids: Tensor, use: str) -> Tensor:
    """Of a look-up and of the table's other use, or of one of them."""
    rows, again = ops.look_up(table, ids)
    generator = torch.Generator().manual_seed(4)
    of_rows = (rows * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)).sum()
    of_table = (again * torch.randn(again.shape, generator=generator, dtype=rows.dtype)).sum()
    loss = {"rows": of_rows, "table": of_table, "sum": again.sum(), "both": of_rows + of_table}[use]
    (gradient,) = torch.autograd.grad(loss, table)
    return gradient


@pytest.mark.parametrize("use", ["rows", "table", "sum", "both"])
def test_a_table_used_twice_has_one_gradient(use):
    table = torch.randn(31, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(31, (3, 20))  # some of them more than once
    expected = one_gradient_of(plain, table, ids, use)
    torch.testing.assert_close(one_gradient_of(fused, table, ids, use), expected)
