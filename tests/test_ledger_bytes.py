"""Bytes are those of the elements that an operation reads and writes, each tensor once; a view
moves none.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from minibert.ledger.record import Ledger, Operation

FLOAT, LONG, HALF = 4, 8, 2  # bytes of an element


def recorded(call) -> list[Operation]:
    with torch.no_grad(), Ledger({}).recorded() as ledger:
        call()
    return ledger.operations


def moved(call) -> tuple[int, int]:
    """Bytes read and written by the one operation that moves any."""
    counts = [(o.bytes_read, o.bytes_written) for o in recorded(call)]
    (count,) = [count for count in counts if count != (0, 0)] or [(0, 0)]
    return count


A, ROW, COLUMN = torch.rand(5, 7), torch.rand(7), torch.rand(5, 1)
IDS = torch.tensor([[3, 0, 3]])  # (1, 3)
ROWS, FEW = torch.rand(2, 7), torch.rand(1, 3)
PICKED = torch.tensor([1, 4])
TRUE = torch.tensor([True, False, True, True, False])


@pytest.mark.parametrize(
    "call",
    [
        lambda: A.view(7, 5),
        lambda: A.t(),
        lambda: A[2:, 1],
        lambda: A.expand(3, 5, 7),
        lambda: A.unbind(0),
        lambda: A.detach(),
        lambda: torch.ops.aten._unsafe_view(A, [35]),
        lambda: torch.empty(5, 7),
        lambda: torch.empty_like(A),
        lambda: A.new_empty(9, 9),
    ],
)
def test_views_and_allocation_move_nothing(call):
    assert moved(call) == (0, 0)


@pytest.mark.parametrize(
    ("call", "read", "written"),
    [
        (lambda: A + ROW, (35 + 7) * FLOAT, 35 * FLOAT),
        (lambda: A * COLUMN.expand(5, 7), (35 + 5) * FLOAT, 35 * FLOAT),
        (lambda: A * A, 35 * FLOAT, 35 * FLOAT),  # one tensor, read once
        (lambda: A.to(torch.bfloat16), 35 * FLOAT, 35 * HALF),
        (lambda: A.sum(), 35 * FLOAT, FLOAT),
        (lambda: torch.cat([A, A[:2]]), (35 + 14) * FLOAT, 49 * FLOAT),
        # In place, and into a tensor that is there.
        (lambda: A.mul_(1), 35 * FLOAT, 35 * FLOAT),
        (lambda: torch.mul(A, 2, out=A), 35 * FLOAT, 35 * FLOAT),
        (lambda: torch.mul(A, 2, out=torch.empty(5, 7)), 35 * FLOAT, 35 * FLOAT),
        (lambda: A[1:3].copy_(A[3:]), 14 * FLOAT, 14 * FLOAT),  # what is overwritten is not read
        (lambda: A[:, 1:2].copy_(COLUMN), 5 * FLOAT, 5 * FLOAT),
        (lambda: torch.empty(9, dtype=torch.int64).random_(), 0, 9 * LONG),
        (lambda: torch.empty(9).fill_(1), 0, 9 * FLOAT),
        # Shape and dtype are no elements.
        (lambda: torch.zeros_like(A), 0, 35 * FLOAT),
        (lambda: A.new_zeros(3, 3), 0, 9 * FLOAT),
        (lambda: torch.full_like(ROW, 2), 0, 7 * FLOAT),
        # Rows that are looked up, and elements that are added to.
        (lambda: torch.embedding(A, IDS), 3 * 7 * FLOAT + 3 * LONG, 3 * 7 * FLOAT),
        (lambda: A[PICKED], 2 * 7 * FLOAT + 2 * LONG, 2 * 7 * FLOAT),
        (lambda: A[TRUE], 3 * 7 * FLOAT + 5, 3 * 7 * FLOAT),
        (lambda: A.gather(1, IDS), 3 * (FLOAT + LONG), 3 * FLOAT),
        (lambda: A.scatter_add_(1, IDS, FEW), 3 * (2 * FLOAT + LONG), 3 * FLOAT),
        (lambda: A.index_put_((PICKED,), ROWS), 14 * FLOAT + 2 * LONG, 14 * FLOAT),
        (lambda: A.index_put_((PICKED,), ROWS, True), 28 * FLOAT + 2 * LONG, 14 * FLOAT),
        (lambda: torch.mm(A, A.t()), 2 * 35 * FLOAT, 25 * FLOAT),
        (lambda: A.nonzero(), 35 * FLOAT, 2 * 35 * LONG),
        (lambda: ROW[2].item(), FLOAT, 0),
        (lambda: torch._foreach_mul_([A, ROW], 1.0), (35 + 7) * FLOAT, (35 + 7) * FLOAT),
    ],
)
def test_what_is_moved(call, read, written):
    assert moved(call) == (read, written)


def test_a_loss_reads_what_it_picks():
    """Of each row of log-probabilities the label's; its gradient is written whole."""
    logits = torch.rand(3, 11, requires_grad=True)
    labels = torch.tensor([4, 0, 10])
    with Ledger({}).recorded() as ledger:
        torch.nn.functional.nll_loss(logits, labels, reduction="sum").backward()
    forward, backward = (
        next(o for o in ledger.operations if o.name.startswith(f"aten.nll_loss_{way}"))
        for way in ("forward", "backward")
    )
    assert (forward.bytes_read, forward.bytes_written) == (3 * (FLOAT + LONG), 2 * FLOAT)
    assert backward.bytes_read == 3 * LONG + 2 * FLOAT
    assert backward.bytes_written == 33 * FLOAT


def test_the_update_reads_gradients_and_writes_weights_and_moments():
    weight = torch.nn.Parameter(torch.rand(5, 7))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.rand(5, 7)
    optimizer.step()
    update = next(o for o in recorded(optimizer.step) if "adamw" in o.name)
    assert update.bytes_read == 4 * 35 * FLOAT + FLOAT  # weights, gradients, two moments; the step
    assert update.bytes_written == 3 * 35 * FLOAT


shapes = some.lists(some.integers(0, 5), min_size=0, max_size=4)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, repeated=some.lists(some.booleans(), min_size=4, max_size=4))
def test_any_shapes_added_up(shape, repeated):
    """A dimension in which one of them is repeated is there once."""
    other = [1 if again else size for size, again in zip(shape, repeated, strict=False)]
    left, right = torch.rand(shape), torch.rand(other)
    assert moved(lambda: left + right) == (
        (left.numel() + right.numel()) * FLOAT,
        left.numel() * FLOAT,
    )
    if left.numel() > 0:
        repeatedly = right.expand(shape)
        assert moved(repeatedly.exp)[0] == right.numel() * FLOAT
        assert moved(lambda: left.mul_(repeatedly)) == (
            (left.numel() + right.numel()) * FLOAT,
            left.numel() * FLOAT,
        )


@settings(max_examples=40, deadline=None)
@given(sizes=some.tuples(*[some.integers(1, 6)] * 4))
def test_any_product(sizes):
    B, m, k, n = sizes
    left, right, bias = torch.rand(B, m, k), torch.rand(B, k, n), torch.rand(n)
    (batched,) = [o for o in recorded(lambda: torch.bmm(left, right)) if o.flops]
    assert batched.flops == 2 * B * m * k * n
    assert batched.bytes_read == B * (m * k + k * n) * FLOAT
    assert batched.bytes_written == B * m * n * FLOAT
    (added,) = [o for o in recorded(lambda: torch.addmm(bias, left[0], right[0])) if o.flops]
    assert added.flops == 2 * m * k * n
    assert added.bytes_read == (m * k + k * n + n) * FLOAT
    total = torch.rand(m, n)
    (more,) = [o for o in recorded(lambda: total.addmm_(left[0], right[0])) if o.flops]
    assert more.flops == 2 * m * k * n
    assert more.bytes_read == (m * k + k * n + m * n) * FLOAT
    out = torch.empty(n, m).t()
    (into,) = [o for o in recorded(lambda: torch.mm(left[0], right[0], out=out)) if o.flops]
    assert (into.bytes_read, into.bytes_written) == ((m * k + k * n) * FLOAT, m * n * FLOAT)


@settings(max_examples=20, deadline=None)
@given(sizes=some.tuples(*[some.integers(1, 6)] * 3))
def test_any_look_up(sizes):
    V, H, M = sizes
    table, ids = torch.rand(V, H, requires_grad=True), torch.randint(V, (M,))
    with Ledger({}).recorded() as ledger:
        torch.nn.functional.embedding(ids, table).sum().backward()
    looked_up = ledger.operations[0]
    assert looked_up.bytes_read == M * (H * FLOAT + LONG)
    assert looked_up.bytes_written == M * H * FLOAT
    (gradient,) = [o for o in ledger.operations if "embedding_dense_backward" in o.name]
    assert gradient.bytes_written == V * H * FLOAT  # whole, mostly zeros
