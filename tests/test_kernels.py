"""The Triton kernels give the values and the gradients of the plain formulas.

They run on the GPU where there is one, elsewhere in Triton's interpreter. Triton reads whether to
interpret when it is imported, and keeps to it: so that happens in a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch

from minibert.ops import fused, plain, vocabulary

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
RUNS_HERE = INTERPRETED or ON_GPU
DEVICE = "cuda" if ON_GPU else "cpu"
if RUNS_HERE:
    from minibert.ops import kernels
if INTERPRETED:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def dot_of_bfloat16(builder, left, right, *rest):
        """As a GPU forms it. The interpreter by itself multiplies the bits, as integers."""
        if left.dtype.scalar == tl.bfloat16:
            left, right = (builder.cast_impl(part, tl.float32) for part in (left, right))
        return dot(builder, left, right, *rest)

    def cast_to_bfloat16(builder, source, dtype):
        """To the nearest, as a GPU does. The interpreter by itself cuts the last bits off."""
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(builder, source, dtype)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot = dot_of_bfloat16
    InterpreterBuilder.cast_impl = cast_to_bfloat16

B, N = 2, 3
IGNORED = plain.IGNORED_LABEL
# What a gradient may lose beyond plain's: in half precision dS is rounded before it is multiplied.
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-3, torch.float16: 2e-4}


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this very process")
@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(value: torch.Tensor, truth: torch.Tensor) -> float:
    """The norm of the error, relative to the truth's (absolute where the truth is 0)."""
    return ((value.cpu().double() - truth).norm() / (truth.norm() or 1)).item()


def assert_no_worse(ours, plains, truth, tolerance):
    """Ours is as near to the truth as the plain formula in the same precision, but for a little."""
    assert distance(ours, truth) <= distance(plains, truth) + tolerance


def mask_of(S: int, *real: list[range]) -> torch.Tensor:
    """attention_mask (B, S): 1 in the ranges of each sequence."""
    mask = torch.zeros(B, S, dtype=torch.long)
    for b, ranges in enumerate(real):
        for positions in ranges:
            mask[b, positions.start : positions.stop] = 1
    return mask


def maps_of(S: int, student_D: int, teacher_D: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries and keys of student and teacher as a model makes them: views of (B, S, N, D)."""
    sizes = (student_D, student_D, teacher_D, teacher_D)
    return [
        1.5 * normal(B, S, N, D, seed=seed).to(dtype).transpose(1, 2)  # (B, N, S, D)
        for seed, D in enumerate(sizes)
    ]


def plain_map_loss(maps, mask, upstream):
    """plain.attention_map_loss and its gradients by the student's queries and keys."""
    student = [part.detach().requires_grad_() for part in maps[:2]]
    loss = plain.attention_map_loss(*student, *maps[2:], mask)
    return loss.detach(), *torch.autograd.grad(upstream * loss, student)


def kernel_map_loss(maps, mask, upstream):
    maps, mask = [part.to(DEVICE) for part in maps], mask.to(DEVICE)
    loss, *lse = kernels.attention_map_loss_forward(*maps, mask)
    scale = torch.tensor(upstream, device=DEVICE)
    return loss, *kernels.attention_map_loss_backward(*maps, mask, *lse, scale)


class TestAttentionMaps:
    __test__ = RUNS_HERE

    # One tile holds 32 queries or keys in float32, 64 in half precision.
    @pytest.mark.parametrize(
        ("S", "student_D", "teacher_D", "dtype", "real"),
        [
            (37, 26, 40, torch.float32, [[range(37)], [range(21)]]),
            (37, 64, 26, torch.float32, [[range(37)], []]),
            (101, 26, 26, torch.float32, [[range(35, 98)], [range(20), range(70, 101)]]),
            (64, 40, 64, torch.float32, [[range(64)], [range(1, 2)]]),
            (1, 26, 64, torch.float32, [[range(1)], []]),
            (37, 26, 40, torch.bfloat16, [[range(37)], [range(21)]]),
            (131, 64, 80, torch.bfloat16, [[range(66, 131)], [range(9), range(129, 130)]]),
            (70, 80, 26, torch.float16, [[range(70)], [range(3, 50)]]),
        ],
    )
    def test_value_and_gradients(self, S, student_D, teacher_D, dtype, real):
        mask = mask_of(S, *real)
        padding = mask[:, None, :, None] == 0  # (B, 1, S, 1)
        maps = [part.masked_fill(padding, 0) for part in maps_of(S, student_D, teacher_D, dtype)]
        truths = plain_map_loss([part.double() for part in maps], mask, 0.37)
        plains = plain_map_loss(maps, mask, 0.37)
        unreadable = [part.masked_fill(padding, torch.nan) for part in maps]
        loss, *gradients = kernel_map_loss(unreadable, mask, 0.37)
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert_no_worse(loss, plains[0], truths[0], 1e-6)
        for gradient, plains_gradient, truth in zip(gradients, plains[1:], truths[1:], strict=True):
            assert gradient.dtype == dtype and gradient.shape == truth.shape
            assert_no_worse(gradient, plains_gradient, truth, GRADIENT_TOLERANCE[dtype])
            assert not gradient.cpu().masked_select(padding).any()

    def test_close_maps_keep_their_difference(self):
        """At a KL of 9e-6 a row, between scores that go into the tens."""
        maps = maps_of(37, 26, 26, torch.float32)
        maps[0] = 4 * maps[0]
        maps[2:] = [part + 1e-3 * noise for part, noise in zip(maps[:2], maps[2:], strict=True)]
        mask = mask_of(37, [range(37)], [range(21)])
        truth, *gradients = plain_map_loss([part.double() for part in maps], mask, 1.0)
        loss, *ours = kernel_map_loss(maps, mask, 1.0)
        assert distance(loss, truth) < (1e-2 if ON_GPU else 1e-3)  # a GPU's exp is good to 2^-22
        for gradient, expected in zip(ours, gradients, strict=True):
            assert distance(gradient, expected) < 2e-3

    def test_large_scores_do_not_overflow(self):
        maps = [40 * part for part in maps_of(37, 26, 40, torch.float32)]
        mask = mask_of(37, [range(37)], [range(21)])
        truths = plain_map_loss([part.double() for part in maps], mask, 1.0)
        plains = plain_map_loss(maps, mask, 1.0)
        ours = kernel_map_loss(maps, mask, 1.0)
        for value, plains_value, truth in zip(ours, plains, truths, strict=True):
            assert_no_worse(value, plains_value, truth, 1e-4)

    def test_the_layout_in_memory_is_free(self):
        S, D = 37, 26
        maps = maps_of(S, D, D, torch.float32)
        mask = mask_of(S, [range(37)], [range(4, 21)])
        expected = kernel_map_loss(maps, mask, 1.0)
        layouts = [
            [part.contiguous() for part in maps],
            [part.transpose(2, 3).contiguous().transpose(2, 3) for part in maps],  # D is not last
            [part.contiguous() if place % 2 else part for place, part in enumerate(maps)],
            list(torch.stack(maps, dim=3).unbind(3)),  # (B, N, S, 4, D): one matrix held them all
        ]
        for layout in layouts:
            for ours, same in zip(kernel_map_loss(layout, mask, 1.0), expected, strict=True):
                assert torch.equal(ours, same)


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
    rows = [None if part is None else part.to(DEVICE, copy=True) for part in rows]
    mlm, output = kernels.vocabulary_rows(*rows, *settings)
    return mlm, output, rows[0]


def doubles(rows):
    """The same numbers in float64; labels, and a missing teacher, as they are."""
    *numbers, labels = rows
    return [None if part is None else part.double() for part in numbers] + [labels]


class TestCosineRows:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("m", "H"), [(7, 24), (5, 768), (1, 37)])
    def test_loss_and_gradient(self, m, H, dtype):
        student, teacher = (normal(m, H, seed=seed).to(dtype) for seed in (40, 41))
        real = (torch.arange(m) % 3 != 1).long()
        truths = []
        for kind in (torch.float64, dtype):
            rows = student.detach().to(kind).requires_grad_()
            loss = plain.hidden_state_loss(rows[None], teacher.to(kind)[None], real[None])
            truths.append([loss.detach(), *torch.autograd.grad(loss, rows)])
        student[1:2], teacher[1:2] = float("nan"), float("nan")  # padding, where there is any
        gradient = torch.empty_like(student, device=DEVICE)
        inputs = (part.to(DEVICE) for part in (student, teacher))
        losses = kernels.cosine_rows(*inputs, gradient, real.to(DEVICE))
        assert not losses[1:2].any() and not gradient[1:2].any()
        for ours, plains, truth in zip((losses.sum(), gradient), truths[1], truths[0], strict=True):
            assert_no_worse(ours, plains, truth, 1e-6)

    def test_a_vector_of_nothing_has_a_finite_gradient(self):
        student, teacher = torch.zeros(2, 24), normal(2, 24, seed=42).float()
        gradient = torch.empty(2, 24, device=DEVICE)
        inputs = (part.to(DEVICE) for part in (student, teacher))
        losses = kernels.cosine_rows(*inputs, gradient, torch.ones(2, device=DEVICE).long())
        assert losses.tolist() == [1, 1]
        assert gradient.isfinite().all()

    def test_no_row(self):
        nothing = torch.empty(0, 24, device=DEVICE)
        real = torch.empty(0, device=DEVICE).long()
        assert kernels.cosine_rows(nothing, nothing, nothing, real).shape == (0,)


class TestVocabularyRows:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("weights", [(1, 5), (0, 1), (2, 0)])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    @pytest.mark.parametrize(("m", "V", "tile"), [(7, 97, 4096), (5, 131, 32), (1, 591, 128)])
    def test_losses_and_gradient(self, monkeypatch, m, V, tile, temperature, weights, dtype):
        monkeypatch.setattr(kernels, "VOCABULARY_TILE", tile)
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
        monkeypatch.setattr(kernels, "VOCABULARY_TILE", 32)
        student, _, student_bias, _, labels = rows_of(5, 97, torch.float32)
        rows = [student, None, student_bias, None, labels]
        truths = plain_rows(doubles(rows), temperature, 2.0, 3.0)
        ours = kernel_rows(rows, temperature, 2.0, 3.0)
        assert not ours[1].any()
        assert distance(ours[0], truths[0]) < 1e-6
        assert distance(ours[2], truths[2]) < 1e-6

    def test_a_vocabulary_longer_than_a_tile(self):
        rows = rows_of(2, kernels.VOCABULARY_TILE + 3, torch.float32)
        rows[0][0, -1] = 30  # the largest logit comes in the last tile
        truths = plain_rows(doubles(rows), 2.0, 1.0, 5.0)
        for value, truth in zip(kernel_rows(rows, 2.0, 1.0, 5.0), truths, strict=True):
            assert distance(value, truth) < 2e-6

    def test_large_logits_do_not_overflow(self, monkeypatch):
        monkeypatch.setattr(kernels, "VOCABULARY_TILE", 32)
        rows = rows_of(5, 97, torch.float32, size=1e4)
        truths = plain_rows(doubles(rows), 2.0, 1.0, 5.0)
        for value, truth in zip(kernel_rows(rows, 2.0, 1.0, 5.0), truths, strict=True):
            assert distance(value, truth) < 1e-5

    def test_close_models_keep_their_difference(self, monkeypatch):
        """At a KL of 3e-4 a row."""
        monkeypatch.setattr(kernels, "VOCABULARY_TILE", 32)
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


@pytest.mark.skipif(not RUNS_HERE, reason="the kernels run in a process of their own")
class TestFusedByKernels:
    """`fused.py` hands its tensors to the kernels, teachers made in inference mode included."""

    @pytest.fixture(autouse=True)
    def in_any_place(self, monkeypatch):
        if INTERPRETED:  # fused.py asks for a GPU
            for module in (fused, vocabulary):
                monkeypatch.setattr(module, "kernels_for", lambda tensor: kernels)
        assert fused.kernels_for(torch.zeros(1, device=DEVICE)) is kernels

    def test_attention_map_loss(self):
        mask = mask_of(21, [range(21)], [range(13)]).to(DEVICE)
        results = []
        for ops, dtype in ((plain, torch.float64), (fused, torch.float32)):
            parts = maps_of(21, 26, 40, torch.float32)
            query, key, *teacher = [part.to(DEVICE, dtype) for part in parts]
            student = [part.detach().requires_grad_() for part in (query, key)]
            with torch.inference_mode():
                teacher = [part * 1 for part in teacher]
            loss = ops.attention_map_loss(*student, *teacher, mask)
            (0.7 * loss).backward()
            results.append([loss.detach(), *(part.grad for part in student)])
        for truth, ours in zip(*results, strict=True):
            assert distance(ours, truth.cpu()) < 3e-6

    def test_hidden_state_loss(self):
        student, teacher = (normal(B, 9, 26, seed=seed) for seed in (30, 31))
        mask = mask_of(9, [range(9)], [range(4)]).to(DEVICE)
        results = []
        for ops, dtype in ((plain, torch.float64), (fused, torch.float32)):
            hidden = student.detach().to(DEVICE, dtype).requires_grad_()
            with torch.inference_mode():
                target = teacher.to(DEVICE, dtype) * 1
            loss = ops.hidden_state_loss(hidden, target, mask)
            (0.7 * loss).backward()
            results.append([loss.detach(), hidden.grad])
        for truth, ours in zip(*results, strict=True):
            assert distance(ours, truth.cpu()) < 3e-6

    def test_vocabulary_loss(self, monkeypatch):
        monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 3 * 97)
        M, V, H = 8, 97, 10
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
