"""Each loss term, plain and fused, equals its definition, written out with loops in float64."""

import math

import pytest
import torch
from torch import nn

from minibert.ops import fused, plain

B, S, N, D, H, V, M = 3, 11, 2, 5, 7, 31, 13
LENGTHS = [11, 4, 8]


@pytest.fixture(params=[plain, fused], ids=["plain", "fused"])
def ops(request):
    return request.param


@pytest.fixture
def mask() -> torch.Tensor:
    """attention_mask (B, S) of unequal lengths."""
    return (torch.arange(S) < torch.tensor(LENGTHS)[:, None]).long()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def heads() -> tuple[torch.Tensor, ...]:
    """Head outputs, decoders and biases of student and teacher; the teacher is wider."""
    student = normal(M, H, seed=0), normal(V, H, seed=1), normal(V, seed=2)
    teacher = normal(M, H + 2, seed=3), normal(V, H + 2, seed=4), normal(V, seed=5)
    return *student, *teacher


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(0, V, (M,), generator=torch.Generator().manual_seed(6))


@pytest.fixture
def maps() -> tuple[torch.Tensor, ...]:
    """Queries and keys of student and teacher; the teacher's heads are larger."""
    student = [normal(B, N, S, D, seed=seed) for seed in (7, 8)]
    return *student, *(normal(B, N, S, D + 3, seed=seed) for seed in (9, 10))


def softmax(scores: list[float]) -> list[float]:
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def kl(teacher: list[float], student: list[float]) -> float:
    return sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True))


def attention_row(query: torch.Tensor, keys: torch.Tensor) -> list[float]:
    """The map of one query (D,) over its real keys (length, D)."""
    return softmax([float(query @ key) / math.sqrt(len(query)) for key in keys])


def test_attention_map_loss(ops, maps, mask):
    student_query, student_key, teacher_query, teacher_key = maps
    expected = 0.0
    for b, length in enumerate(LENGTHS):
        for n in range(N):
            for i in range(length):
                student = attention_row(student_query[b, n, i], student_key[b, n, :length])
                teacher = attention_row(teacher_query[b, n, i], teacher_key[b, n, :length])
                expected += kl(teacher, student)
    assert ops.attention_map_loss(*maps, mask).item() == pytest.approx(expected, rel=1e-12)


def test_hidden_state_loss(ops, mask):
    student, teacher = normal(B, S, H, seed=11), normal(B, S, H, seed=12)
    expected = 0.0
    for b, length in enumerate(LENGTHS):
        for i in range(length):
            dot = float(student[b, i] @ teacher[b, i])
            expected += 1 - dot / float(student[b, i].norm() * teacher[b, i].norm())
    loss = ops.hidden_state_loss(student, teacher, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_attention_map_mse(ops, maps, mask):
    student_query, student_key, teacher_query, teacher_key = maps
    expected = 0.0
    for b, length in enumerate(LENGTHS):
        for n in range(N):
            for i in range(length):
                student = attention_row(student_query[b, n, i], student_key[b, n, :length])
                teacher = attention_row(teacher_query[b, n, i], teacher_key[b, n, :length])
                expected += sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True))
    assert ops.attention_map_mse(*maps, mask).item() == pytest.approx(expected, rel=1e-12)


def test_hidden_state_mse(ops, mask):
    student, teacher = normal(B, S, H, seed=11), normal(B, S, H, seed=12)
    expected = 0.0
    for b, length in enumerate(LENGTHS):
        for i in range(length):
            pairs = zip(student[b, i].tolist(), teacher[b, i].tolist(), strict=True)
            expected += sum((s - t) ** 2 for s, t in pairs) / H
    loss = ops.hidden_state_mse(student, teacher, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_vocabulary_loss(ops, heads, labels, temperature):
    student_head, student_decoder, student_bias, teacher_head, teacher_decoder, teacher_bias = heads
    student_logits = student_head @ student_decoder.T + student_bias
    teacher_logits = teacher_head @ teacher_decoder.T + teacher_bias
    mlm_expected = output_expected = 0.0
    for m in range(M):
        mlm_expected -= math.log(softmax(student_logits[m].tolist())[labels[m]])
        student = softmax((student_logits[m] / temperature).tolist())
        teacher = softmax((teacher_logits[m] / temperature).tolist())
        output_expected += kl(teacher, student) * temperature**2
    weights = (2.0, 3.0)
    loss, mlm_sum, output_sum = ops.vocabulary_loss(*heads, labels, temperature, *weights)
    assert loss.item() == pytest.approx(2 * mlm_expected + 3 * output_expected, rel=1e-12)
    assert mlm_sum.item() == pytest.approx(mlm_expected, rel=1e-12)
    assert output_sum.item() == pytest.approx(output_expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_teachers_entropy_makes_a_cross_entropy_of_the_kl(ops, heads, labels, temperature):
    """sum -p_t log p_s in place of sum p_t (log p_t - log p_s); no gradient of it."""
    student_head, student_decoder, student_bias, teacher_head, teacher_decoder, teacher_bias = heads
    student_logits = student_head @ student_decoder.T + student_bias
    teacher_logits = teacher_head @ teacher_decoder.T + teacher_bias
    counted = [m for m in range(M) if m not in (3, 9)]
    labels[[3, 9]] = plain.IGNORED_LABEL
    expected = 0.0
    for m in counted:
        student = softmax((student_logits[m] / temperature).tolist())
        teacher = softmax((teacher_logits[m] / temperature).tolist())
        expected -= sum(t * math.log(s) for t, s in zip(teacher, student, strict=True))
    expected *= temperature**2
    student_head.requires_grad_()
    gradients, arguments = [], (*heads, labels, temperature, 2.0, 3.0)
    for teacher_entropy in (False, True):
        sums = ops.vocabulary_loss(*arguments, teacher_entropy=teacher_entropy)
        gradients += torch.autograd.grad(sums[0], student_head)
    loss, mlm_sum, output_sum = sums
    assert output_sum.item() == pytest.approx(expected, rel=1e-12)
    assert loss.item() == pytest.approx((2 * mlm_sum + 3 * output_sum).item(), rel=1e-12)
    torch.testing.assert_close(*gradients)


def test_an_ignored_row_counts_for_neither_loss(ops, heads, labels):
    kept = [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12]
    ignored = labels.clone()
    ignored[[3, 9]] = plain.IGNORED_LABEL
    student_head, student_decoder, student_bias, teacher_head, *teacher = heads
    whole = ops.vocabulary_loss(*heads, ignored, 2.0)
    student = (student_head[kept], student_decoder, student_bias)
    part = ops.vocabulary_loss(*student, teacher_head[kept], *teacher, labels[kept], 2.0)
    torch.testing.assert_close(whole, part)


def test_without_a_teacher_only_the_labels_count(ops, heads, labels):
    loss, mlm_sum, output_sum = ops.vocabulary_loss(
        *heads[:3], None, None, None, labels, mlm_weight=3.0, teacher_entropy=True
    )
    assert loss == 3 * mlm_sum
    assert mlm_sum == ops.vocabulary_loss(*heads, labels)[1]
    assert output_sum == 0


def test_no_masked_position_gives_zero(ops, heads, labels):
    student_head, student_decoder, student_bias, teacher_head, *teacher = heads
    student = (student_head[:0].requires_grad_(), student_decoder, student_bias)
    inputs = (*student, teacher_head[:0], *teacher, labels[:0])
    sums = ops.vocabulary_loss(*inputs, teacher_entropy=True)
    assert sum(sums) == 0
    sums[0].backward()


def test_identical_models_differ_by_nothing(ops, maps, heads, labels, mask):
    student_query, student_key, *_ = maps
    same_maps = (student_query, student_key) * 2
    hidden = normal(B, S, H, seed=13)
    assert ops.attention_map_loss(*same_maps, mask).item() == pytest.approx(0, abs=1e-12)
    assert ops.hidden_state_loss(hidden, hidden, mask).item() == pytest.approx(0, abs=1e-12)
    assert ops.attention_map_mse(*same_maps, mask).item() == 0
    assert ops.hidden_state_mse(hidden, hidden, mask).item() == 0
    assert ops.vocabulary_loss(*heads[:3], *heads[:3], labels)[2].item() == 0


@pytest.mark.parametrize(
    ("map_loss", "hidden_loss"),
    [("attention_map_loss", "hidden_state_loss"), ("attention_map_mse", "hidden_state_mse")],
)
def test_padding_changes_nothing(ops, maps, mask, map_loss, hidden_loss):
    """Longer padding, and whatever stands in it: same values, and no gradient there."""
    hidden = normal(B, S, H, seed=14), normal(B, S, H, seed=15)
    wider = torch.cat([mask, torch.zeros(B, 4, dtype=torch.long)], dim=1)
    padded_maps = [
        torch.cat([part, 50 * normal(B, N, 4, part.shape[-1], seed=16)], dim=2).requires_grad_()
        for part in maps
    ]
    padded_hidden = [
        torch.cat([part, 50 * normal(B, 4, H, seed=17)], dim=1).requires_grad_() for part in hidden
    ]
    map_loss = getattr(ops, map_loss)
    hidden_loss = getattr(ops, hidden_loss)
    of_maps, of_hidden = map_loss(*padded_maps, wider), hidden_loss(*padded_hidden, wider)
    torch.testing.assert_close(of_maps, map_loss(*maps, mask))
    torch.testing.assert_close(of_hidden, hidden_loss(*hidden, mask))
    (of_maps + of_hidden).backward()
    padding = wider == 0
    assert not padded_hidden[0].grad[padding].any()
    assert not padded_maps[0].grad.transpose(1, 2)[padding].any()
    assert not padded_maps[1].grad.transpose(1, 2)[padding].any()


def test_the_gradients_are_right(ops, maps, heads, labels, mask):
    hidden = normal(B, S, H, seed=18), normal(B, S, H, seed=19)
    for part in (*maps[:2], *heads[:3], hidden[0]):
        part.requires_grad_()
    teacher = heads[3:]

    def map_loss(query, key):
        return ops.attention_map_loss(query, key, *maps[2:], mask)

    def map_mse(query, key):
        return ops.attention_map_mse(query, key, *maps[2:], mask)

    def vocabulary_losses(*student):
        return ops.vocabulary_loss(*student, *teacher, labels, 2.0, 0.7, 1.3)[0]

    def hidden_loss(student):
        return ops.hidden_state_loss(student, hidden[1], mask)

    def hidden_mse(student):
        return ops.hidden_state_mse(student, hidden[1], mask)

    assert torch.autograd.gradcheck(map_mse, maps[:2])
    assert torch.autograd.gradcheck(hidden_mse, hidden[:1])
    assert torch.autograd.gradcheck(map_loss, maps[:2])
    assert torch.autograd.gradcheck(vocabulary_losses, heads[:3])
    assert torch.autograd.gradcheck(hidden_loss, hidden[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_float32_whatever_comes_in(ops, maps, heads, labels, mask, dtype):
    maps, heads = ([part.to(dtype) for part in parts] for parts in (maps, heads))
    hidden = normal(B, S, H, seed=20).to(dtype)
    sums = [
        ops.attention_map_loss(*maps, mask),
        ops.attention_map_mse(*maps, mask),
        ops.hidden_state_loss(hidden, hidden.flip(0), mask),
        ops.hidden_state_mse(hidden, hidden.flip(0), mask),
        *ops.vocabulary_loss(*heads, labels, teacher_entropy=True),
    ]
    assert all(value.dtype == torch.float32 and value.shape == () for value in sums)


def test_the_published_definitions(ops, maps, heads, labels, mask):
    """The four terms as the authors' script forms them (no dropout, batch padded to S).

    It takes the mean over all elements of the maps of real rows, the mean cosine loss over real
    tokens, batchmean KL and mean cross-entropy over masked positions.
    """
    real = mask.bool()
    probs = [
        plain.attention_scores(query, key, mask).softmax(-1) for query, key in (maps[:2], maps[2:])
    ]
    rows = real[:, None, :, None].expand(B, N, S, S)
    student, teacher = (torch.masked_select(p, rows).view(-1, S) + 1e-12 for p in probs)
    published = nn.functional.kl_div(student.log(), teacher, reduction="none").mean()
    ours = ops.attention_map_loss(*maps, mask) / (mask.sum() * N * S)
    torch.testing.assert_close(ours, published, rtol=1e-8, atol=0)

    hidden = normal(B, S, H, seed=21), normal(B, S, H, seed=22)
    target = torch.ones(int(mask.sum()))
    published = nn.CosineEmbeddingLoss()(hidden[0][real], hidden[1][real], target)
    ours = ops.hidden_state_loss(*hidden, mask) / mask.sum()
    torch.testing.assert_close(ours, published, rtol=1e-8, atol=0)

    logits = [nn.functional.linear(*part) for part in (heads[:3], heads[3:])]
    _, mlm_sum, output_sum = ops.vocabulary_loss(*heads, labels, 2.0)
    torch.testing.assert_close(mlm_sum / M, nn.CrossEntropyLoss()(logits[0], labels))
    published = 4 * nn.KLDivLoss(reduction="batchmean")(
        (logits[0] / 2).log_softmax(-1), (logits[1] / 2).softmax(-1)
    )
    torch.testing.assert_close(output_sum / M, published)
