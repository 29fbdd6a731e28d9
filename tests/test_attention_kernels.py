"""The Triton kernels of attention and of the loss of its maps, alone and both at once.

Values and gradients at awkward sizes are compared in test_kernels.py, with all that a GPU is asked.
"""

from functools import partial

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

from minibert.ops import attention, fused, plain

if RUNS_HERE:
    from minibert.ops import kernels
    from minibert.ops.kernels import attention_maps
    from minibert.ops.kernels.draws import dropped_draws

B, N, S, D, TEACHER_D = 2, 3, 37, 26, 40


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this very process")
@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    run_in_the_interpreter(__file__)


def mask_of(*real: list[range]) -> torch.Tensor:
    """attention_mask (B, S): 1 in the ranges of each sequence."""
    mask = torch.zeros(B, S, dtype=torch.long)
    for b, ranges in enumerate(real):
        for positions in ranges:
            mask[b, positions.start : positions.stop] = 1
    return mask.to(DEVICE)


def heads(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Parts of the models as a model makes them: views of (B, S, N, D), for each D."""
    return [
        (1.5 * normal(B, S, N, size, seed=seed)).to(DEVICE, dtype).transpose(1, 2)
        for seed, size in enumerate(sizes)
    ]


def map_loss(function, maps, mask, upstream=1.0):
    """A loss of the maps, and its gradients by the student's query and key."""
    student = [part.detach().requires_grad_() for part in maps[:2]]
    loss = function(*student, *maps[2:], mask)
    return loss.detach(), *torch.autograd.grad(upstream * loss, student)


def doubles(parts):
    return [part.double() for part in parts]


class TestMapLoss:
    __test__ = RUNS_HERE

    def test_close_maps_keep_their_difference(self):
        """At a KL of 9e-6 a row, between scores that go into the tens."""
        maps = heads(D, D, D, D)
        maps[0] = 4 * maps[0]
        maps[2:] = [part + 1e-3 * noise for part, noise in zip(maps[:2], maps[2:], strict=True)]
        mask = mask_of([range(S)], [range(21)])
        truth, *gradients = map_loss(plain.attention_map_loss, doubles(maps), mask)
        loss, *ours = map_loss(kernels.attention_map_loss, maps, mask)
        # A GPU's exp2 is good to 2^-22.
        assert distance(loss, truth.cpu()) < (1e-2 if ON_GPU else 1e-3)
        for gradient, expected in zip(ours, gradients, strict=True):
            assert distance(gradient, expected.cpu()) < 2e-3

    @pytest.mark.parametrize("below_0", [False, True])
    def test_large_scores_do_not_overflow(self, below_0):
        maps = [12 * part for part in heads(D, D, TEACHER_D, TEACHER_D)]  # scores beyond 1,000
        if below_0:  # all of them: padding must not outweigh even these
            maps = [part.abs() if place % 2 else -part.abs() for place, part in enumerate(maps)]
        mask = mask_of([range(S)], [range(3, 21)])
        truths = map_loss(plain.attention_map_loss, doubles(maps), mask)
        plains = map_loss(plain.attention_map_loss, maps, mask)
        ours = map_loss(kernels.attention_map_loss, maps, mask)
        for value, plains_value, truth in zip(ours, plains, truths, strict=True):
            assert value.isfinite().all()
            assert_no_worse(value, plains_value, truth.cpu(), 1e-4)

    def test_the_layout_in_memory_is_free(self):
        maps = heads(D, D, D, D)
        mask = mask_of([range(S)], [range(4, 21)])
        expected = map_loss(kernels.attention_map_loss, maps, mask)
        joint = torch.stack([part.transpose(1, 2) for part in maps], 2)  # (B, S, 4, N, D)
        layouts = [
            [part.contiguous() for part in maps],
            [part.transpose(2, 3).contiguous().transpose(2, 3) for part in maps],  # D is not last
            [part.contiguous() if place % 2 else part for place, part in enumerate(maps)],
            list(torch.stack(maps, dim=3).unbind(3)),  # (B, N, S, 4, D): one matrix held them all
            [part.transpose(1, 2) for part in joint.unbind(2)],  # one product made them all
        ]
        for layout in layouts:
            ours = map_loss(kernels.attention_map_loss, layout, mask)
            for value, same in zip(ours, expected, strict=True):
                assert torch.equal(value, same)

    def test_gradients_in_padding_are_0(self):
        mask = mask_of([range(S)], [range(4, 21)])
        _, *gradients = map_loss(kernels.attention_map_loss, heads(D, D, D, D), mask)
        padding = (mask == 0)[:, None, :, None].expand_as(gradients[0])
        assert not any(gradient[padding].any() for gradient in gradients)

    def test_a_teacher_made_in_inference_mode(self):
        student, mask = heads(D, D), mask_of([range(S)], [range(9)])
        with torch.inference_mode():
            teacher = [2 * part for part in heads(D, D)]
        loss, *_ = map_loss(kernels.attention_map_loss, [*student, *teacher], mask)
        expected = map_loss(kernels.attention_map_loss, [*student, *(2 * p for p in student)], mask)
        assert loss.item() == expected[0].item() > 0


class TestAttention:
    __test__ = RUNS_HERE

    @pytest.fixture
    def all_parts(self):
        """query, key, value, teacher's query and key, and the context's gradient."""
        return heads(D, D, D, TEACHER_D, TEACHER_D, D)

    def test_both_at_once_are_both_alone(self, all_parts):
        *parts, query_t, key_t, d_context = all_parts
        mask = mask_of([range(S)], [range(2, 30)])
        d_context = d_context * mask[:, None, :, None]
        query, key, value = (part.detach().requires_grad_() for part in parts)
        alone = kernels.attention(query, key, value, mask, 0.0)
        loss_alone = kernels.attention_map_loss(query, key, query_t, key_t, mask)
        scalar = (alone * d_context).sum() + 0.37 * loss_alone
        expected = torch.autograd.grad(scalar, (query, key, value))
        context, loss = kernels.attention_and_map_loss(query, key, value, mask, 0.0, query_t, key_t)
        for ours, same in ((context, alone), (loss, loss_alone)):
            assert distance(ours, same.detach().cpu().double()) < 1e-6
        scalar = (context * d_context).sum() + 0.37 * loss
        for ours, sum_of_both in zip(
            torch.autograd.grad(scalar, (query, key, value)), expected, strict=True
        ):
            assert distance(ours, sum_of_both.cpu().double()) < 1e-6

    def test_either_may_have_no_gradient(self, all_parts):
        """A loss that only the log reads; a context that nobody reads."""
        *parts, query_t, key_t, _ = all_parts
        mask = mask_of([range(S)], [range(30)])
        query, key, value = (part.detach().requires_grad_() for part in parts)
        context, loss = kernels.attention_and_map_loss(query, key, value, mask, 0.0, query_t, key_t)
        by_context = torch.autograd.grad(context.sum(), (query, key, value), retain_graph=True)
        alone = kernels.attention(query, key, value, mask, 0.0)
        for ours, expected in zip(
            by_context, torch.autograd.grad(alone.sum(), (query, key, value)), strict=True
        ):
            assert distance(ours, expected.cpu().double()) < 1e-6
        *by_loss, d_value = torch.autograd.grad(loss, (query, key, value))
        _, *expected = map_loss(kernels.attention_map_loss, [*parts[:2], query_t, key_t], mask)
        assert not d_value.any()
        for ours, gradient in zip(by_loss, expected, strict=True):
            assert distance(ours, gradient.cpu().double()) < 1e-6

    def test_behind_the_last_real_token_the_context_is_0(self):
        mask = mask_of([range(3, 30)], [range(1)])
        context = kernels.attention(*heads(D, D, D), mask, 0.0)
        assert context.isfinite().all()
        assert not context[0, :, 30:].any() and not context[1, :, 1:].any()

    def test_a_sequence_of_padding_alone_is_finite(self):
        parts = [part.requires_grad_() for part in heads(D, D, D)]
        context = kernels.attention(*parts, mask_of([range(S)], []), 0.0)
        gradients = torch.autograd.grad(context[0].sum(), parts)
        assert context.isfinite().all() and all(part.isfinite().all() for part in gradients)

    def test_any_number_but_0_is_real(self):
        parts, mask = heads(D, D, D), mask_of([range(3, 30)], [range(1), range(9, 20)])
        expected = kernels.attention(*parts, mask, 0.0)
        twos = mask * (1 + torch.arange(S, device=DEVICE) % 2)
        for same in (mask.bool(), mask.int(), twos, mask.repeat(1, 2)[:, :S]):
            assert torch.equal(kernels.attention(*parts, same, 0.0), expected)

    def test_a_mask_changed_in_place_is_looked_at_again(self):
        parts, mask = heads(D, D, D), mask_of([range(9)], [range(S)])
        kernels.attention(*parts, mask, 0.0)
        mask[0] = 1
        found = kernels.attention(*parts, mask, 0.0)  # before a look at another mask
        assert torch.equal(found, kernels.attention(*parts, mask.clone(), 0.0))

    def test_shapes_that_do_not_fit_are_refused(self):
        query, key, value = heads(D, D, D)
        mask = mask_of([range(S)], [range(S)])
        with pytest.raises(AssertionError):
            kernels.attention(query, key[:, :1], value, mask, 0.0)
        with pytest.raises(AssertionError):
            kernels.attention_map_loss(query, key, query[:, :1], key[:, :1], mask)

    def test_evaluation_keeps_nothing(self, all_parts):
        mask = mask_of([range(S)], [range(30)])
        with torch.inference_mode():
            context = kernels.attention(*all_parts[:3], mask, 0.0)
        truth = plain.attention(*doubles(all_parts[:3]), mask, 0.0)
        real = mask[:, None, :, None]
        assert distance(context * real, (truth * real).cpu()) < 1e-6


class TestDropout:
    __test__ = RUNS_HERE

    def dropped(self, probability: float = 0.25) -> torch.Tensor:
        """Which elements of the maps (B, N, S, S) are dropped.

        All probabilities are 1 / S; values of one 1 each show D columns a call, with one seed.
        """
        state = torch.get_rng_state()
        nothing = torch.zeros(B, N, S, D, device=DEVICE)
        columns = []
        for first in range(0, S, D):
            torch.set_rng_state(state)
            value = torch.eye(S, device=DEVICE)[:, first : first + D]  # (S, at most D)
            value = torch.nn.functional.pad(value, (0, D - value.shape[1])).expand(B, N, S, D)
            mask = mask_of([range(S)], [range(S)])
            context = kernels.attention(nothing, nothing, value.clone(), mask, probability)
            columns.append(context == 0)
        return torch.cat(columns, -1)[..., :S].cpu()

    @pytest.mark.parametrize("probability", [0.1, 0.25, 0.6])
    def test_draws_are_independent(self, probability):
        """Of sequences, heads, rows and columns, those of other tiles included."""
        torch.manual_seed(1)
        assert_drawn_independently(self.dropped(probability), probability)

    def test_both_halves_of_the_seed_count(self, monkeypatch):
        seeds = [(1 << 40) + 1, (1 << 40) + 2, (1 << 41) + 1]
        masks = []
        for seed in seeds:
            monkeypatch.setattr(attention_maps, "draw_seed", lambda seed=seed: seed)
            masks.append(self.dropped())
        assert_drawn_independently(torch.stack(masks), 0.25)

    def test_draws_are_torchs(self):
        draws = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            draws.append(self.dropped())
            torch.rand(1)
            draws.append(self.dropped())
        first, second, again, _, other, _ = draws
        assert torch.equal(first, again)
        assert not torch.equal(first, second) and not torch.equal(first, other)

    def test_the_loss_of_the_maps_does_not_see_it(self):
        query, key, value, query_t, key_t = heads(D, D, D, TEACHER_D, TEACHER_D)
        mask = mask_of([range(S)], [range(21)])
        _, loss = kernels.attention_and_map_loss(query, key, value, mask, 0.5, query_t, key_t)
        assert torch.equal(loss, kernels.attention_map_loss(query, key, query_t, key_t, mask))

    def test_a_probability_of_almost_1(self):
        dropped, factor = dropped_draws(1.0)
        assert dropped == 2**32 - 1 and factor == 2**32
        assert dropped_draws(0.0) == (0, 1.0)


@pytest.mark.skipif(not RUNS_HERE, reason="the kernels run in a process of their own")
class TestFusedByKernels:
    """`fused.py` hands its tensors to the kernels."""

    @pytest.fixture(autouse=True)
    def in_any_place(self, monkeypatch):
        if INTERPRETED:  # attention.py asks for a GPU
            monkeypatch.setattr(attention, "kernels_for", lambda tensor: kernels)

    @pytest.fixture
    def called(self, monkeypatch):
        """Which kernels were called."""
        names = []

        def told(name, original, *given):
            names.append(name)
            return original(*given)

        for name in ("attention", "attention_map_loss", "attention_and_map_loss"):
            monkeypatch.setattr(kernels, name, partial(told, name, getattr(kernels, name)))
        return names

    def test_each_by_its_own(self, called):
        query, key, value, query_t, key_t = heads(D, D, D, D, D, dtype=torch.bfloat16)
        mask = mask_of([range(S)], [range(21)])
        torch.manual_seed(3)
        context = fused.attention(query, key, value, mask, 0.25)
        loss = fused.attention_map_loss(query, key, query_t, key_t, mask)
        torch.manual_seed(3)
        followed = (query, key, value, mask, 0.25, query_t, key_t)
        both = fused.attention_and_map_loss(*followed, fused.attention_map_loss)
        assert torch.equal(both[0], context) and torch.equal(both[1], loss)
        assert called == ["attention", "attention_map_loss", "attention_and_map_loss"]
        assert not torch.equal(context, fused.attention(query, key, value, mask, 0.0))

    def test_another_loss_of_the_maps_comes_after_attention(self, called):
        query, key, value, query_t, key_t = heads(D, D, D, D, D, dtype=torch.bfloat16)
        mask = mask_of([range(S)], [range(21)])
        followed = (query, key, value, mask, 0.0, query_t, key_t)
        _, loss = fused.attention_and_map_loss(*followed, fused.attention_map_mse)
        truth = plain.attention_map_mse(*doubles((query, key, query_t, key_t)), mask)
        assert distance(loss, truth.cpu()) < 1e-5
        assert called == ["attention"]

    def test_in_float32_attention_is_torchs(self, called):
        """Triton multiplies float32 without matrix units."""
        query, key, value, query_t, key_t = heads(D, D, D, TEACHER_D, TEACHER_D)
        mask = mask_of([range(S)], [range(21)])
        followed = (query, key, value, mask, 0.0, query_t, key_t)
        context, loss = fused.attention_and_map_loss(*followed, fused.attention_map_loss)
        truth = plain.attention_and_map_loss(
            *doubles(followed[:3]), mask, 0.0, *followed[5:], plain.attention_map_loss
        )
        assert distance(context[:1], truth[0][:1].cpu()) < 1e-6
        assert distance(loss, truth[1].cpu()) < 1e-5
        assert called == ["attention_map_loss"]
