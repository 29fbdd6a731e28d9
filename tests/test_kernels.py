"""The Triton kernels that go over rows give the values and the gradients of the plain formulas.

Those of attention: test_attention_kernels.py.
"""

import math

import pytest
import torch
from kernel_toys import (
    DEVICE,
    INTERPRETED,
    ON_GPU,
    RUNS_HERE,
    assert_drawn_independently,
    assert_no_worse,
    distance,
    normal,
    run_in_the_interpreter,
)

from minibert.ops import attention, fused, hidden_states, plain, vocabulary

if RUNS_HERE:
    from correctness import check_all

    from minibert.ops import kernels
    from minibert.ops.kernels import loss_rows, norm_rows

B = 2
EPS = 0.3  # of a norm: so large that it counts
IGNORED = plain.IGNORED_LABEL


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this very process")
@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.mark.skipif(not RUNS_HERE, reason="the kernels run in a process of their own")
def test_everything_that_a_gpu_is_asked():
    """benchmarks/correctness.py, at its small sizes: values and gradients of every kernel."""
    rows = list(check_all(torch.device(DEVICE), small=True))
    assert len(rows) == 121
    assert [row for row in rows if not row["right"]] == []


def rows_of(m: int, V: int, dtype: torch.dtype, size: float = 3.0) -> list[torch.Tensor]:
    """Logits of student and teacher (m, V), their biases (V,) in float32, labels (m,)."""
    student, teacher = (size * normal(m, V, seed=seed).to(dtype) for seed in (10, 11))
    student_bias, teacher_bias = (normal(V, seed=seed).float() for seed in (12, 13))
    labels = torch.randint(0, V, (m,), generator=torch.Generator().manual_seed(14))
    labels[1::3] = IGNORED
    return [student, teacher, student_bias, teacher_bias, labels]


def plain_rows(rows, temperature, *weights):
    """Both losses of each row, by plain.vocabulary_loss, and the gradient by the logits.

    With the identity for a decoder, a head's outputs (M, H = V) are the logits without their bias.
    """
    student, teacher, student_bias, teacher_bias, labels = rows
    student = student.detach().requires_grad_()
    decoder = torch.eye(len(student_bias), dtype=student.dtype)
    both = (student, decoder, student_bias, teacher, decoder, teacher_bias)
    plain.vocabulary_loss(*both, labels, temperature, *weights)[0].backward()
    losses = []
    for m in range(len(labels)):
        row = slice(m, m + 1)
        teacher_row = None if teacher is None else teacher[row]
        both = (student[row], decoder, student_bias, teacher_row, decoder, teacher_bias)
        losses.append(plain.vocabulary_loss(*both, labels[row], temperature)[1:])
    mlm, output = (torch.stack(sums) for sums in zip(*losses, strict=True))
    return mlm, output, student.grad


def kernel_rows(rows, *settings):
    """By the kernel, which puts the gradient in the place of the logits."""
    rows = [None if part is None else part.to(DEVICE, copy=True) for part in rows]
    mlm, output = kernels.vocabulary_rows(*rows, rows[0], *settings)
    return mlm, output, rows[0]


def doubles(rows):
    """The same numbers in float64; labels, and a missing teacher, as they are."""
    *numbers, labels = rows
    return [None if part is None else part.double() for part in numbers] + [labels]


class TestHiddenStates:
    __test__ = RUNS_HERE

    def test_a_vector_of_nothing_has_a_finite_gradient(self):
        student = torch.zeros(1, 2, 24, device=DEVICE, requires_grad=True)
        teacher = normal(1, 2, 24, seed=42).float().to(DEVICE)
        loss = kernels.hidden_state_loss(student, teacher, torch.ones(1, 2, device=DEVICE).long())
        loss.backward()
        assert loss.item() == 2
        assert student.grad.isfinite().all()

    def test_no_row(self):
        student = torch.empty(0, 9, 24, device=DEVICE, requires_grad=True)
        mask = torch.empty(0, 9, device=DEVICE).long()
        loss = kernels.hidden_state_loss(student, student.detach(), mask)
        loss.backward()
        assert loss.item() == 0 and student.grad.shape == (0, 9, 24)


class TestAddAndNorm:
    __test__ = RUNS_HERE

    def parts(self, m: int, H: int, dtype=torch.float32) -> list[torch.Tensor]:
        sizes = ((m, H), (m, H), (H,), (H,))
        parts = [normal(*size, seed=seed).to(DEVICE) for seed, size in enumerate(sizes)]
        residual, values, weight, bias = parts
        return [residual.to(dtype), values.to(dtype), weight.float(), bias.float()]

    def outcome(self, function, parts, probability=0.0):
        residual, values, weight, bias = leaves = [p.detach().requires_grad_() for p in parts]
        result = function(residual, values, probability, weight, bias, EPS)
        upstream = normal(*result.shape, seed=9).to(result)
        return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_more_rows_than_programs(self, monkeypatch, dtype):
        monkeypatch.setattr(norm_rows, "PARTS", 3)
        parts = self.parts(11, 37, dtype)
        truths = self.outcome(plain.add_and_norm, [part.double() for part in parts])
        plains = self.outcome(plain.add_and_norm, parts)
        ours = self.outcome(kernels.add_and_norm, parts)
        for value, plains_value, truth in zip(ours, plains, truths, strict=True):
            assert_no_worse(value, plains_value, truth.cpu(), 1e-6)

    def test_the_layout_in_memory_is_free(self):
        residual, values, weight, bias = self.parts(7, 26)
        expected = self.outcome(kernels.add_and_norm, [residual, values, weight, bias])
        columns = [part.T.contiguous().T for part in (residual, values)]
        found = self.outcome(kernels.add_and_norm, [*columns, weight, bias])
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)

    def test_one_number_may_be_every_upstream(self):
        """As torch has it for a sum: repeated, without memory of its own."""
        parts = [part.requires_grad_() for part in self.parts(7, 26)]
        ones = torch.ones(7, 26, device=DEVICE)
        results = []
        for upstream in (ones, ones[:1, :1].clone().expand(7, 26)):
            result = kernels.add_and_norm(*parts[:2], 0.0, *parts[2:], EPS)
            results.append(torch.autograd.grad(result, parts, upstream))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)

    def test_what_is_dropped(self):
        """Dropped values count as 0 and learn nothing, the others are scaled up; so the share of
        those, by the gradient, and the result by the plain formula.
        """
        parts = self.parts(64, 96)
        torch.manual_seed(5)
        result, _, d_values, *_ = self.outcome(kernels.add_and_norm, parts, 0.25)
        kept = d_values != 0
        assert_drawn_independently(~kept.cpu(), 0.25)
        values = (parts[1] * kept / 0.75).double()
        truth = plain.add_and_norm(parts[0].double(), values, 0.0, *parts[2:], EPS)
        assert distance(result, truth.cpu()) < 1e-6

    def test_draws_are_torchs(self):
        parts = self.parts(5, 37)
        results = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            results += [kernels.add_and_norm(*parts[:2], 0.5, *parts[2:], 1e-12) for _ in range(2)]
        first, second, again, _, other, _ = results
        assert torch.equal(first, again)
        assert not torch.equal(first, second) and not torch.equal(first, other)


class TestVocabularyRows:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("weights", [(1, 5), (0, 1), (2, 0)])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    @pytest.mark.parametrize(("m", "V", "tile"), [(7, 97, 4096), (5, 131, 32), (1, 591, 128)])
    def test_losses_and_gradient(self, monkeypatch, m, V, tile, temperature, weights, dtype):
        monkeypatch.setattr(loss_rows, "VOCABULARY_TILE", tile)
        rows = rows_of(m, V, dtype)
        truths = plain_rows(doubles(rows), temperature, *weights)
        plains = plain_rows(rows, temperature, *weights)
        ours = kernel_rows(rows, temperature, *weights)
        for value, plains_value, truth in zip(ours, plains, truths, strict=True):
            assert value.shape == truth.shape
            assert_no_worse(value, plains_value, truth, 1e-6)
        assert ours[0].dtype == ours[1].dtype == torch.float32
        assert ours[2].dtype == dtype
        ignored = rows[-1] == IGNORED
        assert not any(value.cpu()[ignored].any() for value in ours)

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_without_a_teacher_only_the_labels_count(self, monkeypatch, temperature):
        monkeypatch.setattr(loss_rows, "VOCABULARY_TILE", 32)
        student, _, student_bias, _, labels = rows_of(5, 97, torch.float32)
        rows = [student, None, student_bias, None, labels]
        truths = plain_rows(doubles(rows), temperature, 2.0, 3.0)
        ours = kernel_rows(rows, temperature, 2.0, 3.0)
        assert not ours[1].any()
        assert distance(ours[0], truths[0]) < 1e-6
        assert distance(ours[2], truths[2]) < 1e-6

    def test_a_vocabulary_longer_than_a_tile(self):
        rows = rows_of(2, loss_rows.VOCABULARY_TILE + 3, torch.float32)
        rows[0][0, -1] = 30  # the largest logit comes in the last tile
        truths = plain_rows(doubles(rows), 2.0, 1.0, 5.0)
        for value, truth in zip(kernel_rows(rows, 2.0, 1.0, 5.0), truths, strict=True):
            assert distance(value, truth) < 2e-6

    def test_large_logits_do_not_overflow(self, monkeypatch):
        monkeypatch.setattr(loss_rows, "VOCABULARY_TILE", 32)
        rows = rows_of(5, 97, torch.float32, size=1e4)
        truths = plain_rows(doubles(rows), 2.0, 1.0, 5.0)
        for value, truth in zip(kernel_rows(rows, 2.0, 1.0, 5.0), truths, strict=True):
            assert distance(value, truth) < 1e-5

    def test_close_models_keep_their_difference(self, monkeypatch):
        """At a KL of 3e-4 a row."""
        monkeypatch.setattr(loss_rows, "VOCABULARY_TILE", 32)
        rows = rows_of(5, 97, torch.float32)
        rows[1], rows[3] = rows[0] + 1e-2 * rows[1], rows[2]
        truths = plain_rows(doubles(rows), 2.0, 0.0, 1.0)
        ours = kernel_rows(rows, 2.0, 0.0, 1.0)
        assert distance(ours[1], truths[1]) < (1e-2 if ON_GPU else 1e-3)
        assert distance(ours[2], truths[2]) < 1e-4

    def test_no_row(self):
        mlm, output, gradient = kernel_rows(rows_of(0, 97, torch.float32), 1.0, 1.0, 5.0)
        assert mlm.shape == output.shape == (0,)
        assert gradient.shape == (0, 97)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_wider_than_the_vocabulary(self, dtype):
        """As on a GPU, whose products want aligned rows; what stands behind V is never read."""
        rows = rows_of(5, 97, torch.float32)
        expected = kernel_rows(rows, 2.0, 1.0, 5.0)
        wide = [torch.full((5, 128), math.nan, device=DEVICE) for _ in range(2)]
        for part, logits in zip(wide, rows[:2], strict=True):
            part[:, :97] = logits
        gradient = torch.full((5, 128), math.nan, device=DEVICE, dtype=dtype)
        others = [part.to(DEVICE) for part in rows[2:]]
        mlm, output = kernels.vocabulary_rows(*wide, *others, gradient, 2.0, 1.0, 5.0)
        assert torch.equal(mlm, expected[0]) and torch.equal(output, expected[1])
        assert torch.equal(gradient[:, :97], expected[2].to(dtype))
        assert not gradient[:, 97:].any()


class TestColumnSums:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize(("m", "n"), [(0, 5), (1, 3), (301, 133)])
    def test_sums(self, m, n):
        rows = normal(m, n, seed=3).bfloat16().to(DEVICE)
        sums = kernels.column_sums(rows)
        assert sums.dtype == torch.float32
        assert distance(sums, rows.cpu().double().sum(0)) < 1e-6
        assert torch.equal(kernels.column_sums(rows.T.contiguous().T), sums)


@pytest.mark.skipif(not RUNS_HERE, reason="the kernels run in a process of their own")
class TestFusedByKernels:
    """`fused.py` hands its tensors to the kernels, teachers made in inference mode included."""

    @pytest.fixture(autouse=True)
    def in_any_place(self, monkeypatch):
        if INTERPRETED:  # they ask for a GPU
            for module in (attention, fused, hidden_states, vocabulary):
                monkeypatch.setattr(module, "kernels_for", lambda tensor: kernels)

    def test_add_and_norm(self, monkeypatch):
        monkeypatch.setattr(kernels, "add_and_norm", lambda *given: given)
        assert fused.add_and_norm(1, 2, 0.1, 3, 4, 5) == (1, 2, 0.1, 3, 4, 5)

    def test_hidden_state_loss(self, monkeypatch):
        called = []
        ours = kernels.hidden_state_loss
        monkeypatch.setattr(
            kernels, "hidden_state_loss", lambda *given: called.append(1) or ours(*given)
        )
        student, teacher = (normal(B, 9, 26, seed=seed) for seed in (30, 31))
        mask = (torch.arange(9) < torch.tensor([[9], [4]])).long().to(DEVICE)
        results = []
        for ops, dtype in ((plain, torch.float64), (fused, torch.float32)):
            hidden = student.detach().to(DEVICE, dtype).requires_grad_()
            with torch.inference_mode():
                target = teacher.to(DEVICE, dtype) * 1
            loss = ops.hidden_state_loss(hidden, target, mask)
            (0.7 * loss).backward()
            results.append([loss.detach(), hidden.grad])
        assert called
        for truth, ours in zip(*results, strict=True):
            assert distance(ours, truth.cpu()) < 3e-6

    @pytest.mark.parametrize("decoder_rows", [128, 50])  # the last tile has rows of alignment alone
    def test_vocabulary_loss(self, monkeypatch, decoder_rows):
        M, V, H = 8, 97, 10  # V is no multiple of vocabulary.ALIGNED
        monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 3 * V)
        if INTERPRETED:
            monkeypatch.setattr(vocabulary, "at_once", lambda *_: decoder_rows * H)
        inputs = [
            normal(*shape, seed=seed) for seed, shape in enumerate([(M, H), (V, H), (V,)] * 2)
        ]
        labels = torch.arange(M, device=DEVICE) * 11
        labels[2] = IGNORED
        results = []
        for ops, dtype in ((plain, torch.float64), (fused, torch.float32)):
            student = [part.detach().to(DEVICE, dtype).requires_grad_() for part in inputs[:3]]
            teacher = [part.to(DEVICE, dtype) for part in inputs[3:]]
            values = ops.vocabulary_loss(*student, *teacher, labels, 2.0, 0.3, 1.7)
            (0.7 * values[0]).backward()
            results.append([value.detach() for value in values] + [part.grad for part in student])
        for truth, ours in zip(*results, strict=True):
            assert distance(ours, truth.cpu()) < 3e-6
