"""Linear maps, the feed-forward network, "add & norm", and attention with the loss of its maps.

Plain and fused: against torch's own modules, and hand-written derivatives against autograd's.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY_CONFIG
from torch import Tensor, nn

from minibert.model import BertModel
from minibert.ops import fused, plain
from minibert.ops.projections import joint_projections

B, S, N, D, H, I = 3, 13, 2, 5, 10, 17
WIDTHS = (7, 4, 9)  # of three linear maps
HALVES = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def linears() -> list[tuple[Tensor, Tensor]]:
    """Weight (out, H) and bias (out,) of each."""
    return [(normal(w, H, seed=w), normal(w, seed=100 + w)) for w in WIDTHS]


def outcome(function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The function's values and, with fixed upstreams of a dtype, the gradients of its inputs."""
    leaves = [part.detach().clone().requires_grad_() for part in inputs]
    values = function(*leaves)
    values = values if isinstance(values, tuple) else (values,)
    upstreams = [
        normal(*value.shape, seed=50 + i, dtype=dtype).to(value) for i, value in enumerate(values)
    ]
    torch.autograd.backward(values, upstreams)
    return [*(value.detach() for value in values), *(leaf.grad for leaf in leaves)]


def joint(values: Tensor, *weights_and_biases: Tensor) -> tuple[Tensor, ...]:
    """As fused.projections has it on a GPU."""
    pairs = list(zip(weights_and_biases[::2], weights_and_biases[1::2], strict=True))
    return joint_projections(values, *pairs)


def one_by_one(values: Tensor, *weights_and_biases: Tensor) -> tuple[Tensor, ...]:
    pairs = zip(weights_and_biases[::2], weights_and_biases[1::2], strict=True)
    return plain.projections(values, *pairs)


@pytest.mark.parametrize("ops", [plain, fused])
def test_projections_are_torchs_linear(ops):
    values = normal(B, S, H, seed=1)
    for (weight, bias), found in zip(linears(), ops.projections(values, *linears()), strict=True):
        torch_s = nn.Linear(H, len(bias), dtype=torch.float64)
        torch_s.load_state_dict({"weight": weight, "bias": bias})
        torch.testing.assert_close(found, torch_s(values))
        torch.testing.assert_close(ops.linear(values, weight, bias), torch_s(values))


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("dtype", HALVES)
def test_one_product_for_all_has_the_gradients_of_each(number, dtype):
    """Those of the float32 weights at least as near to the truth as when they are rounded."""
    parameters = [part.float() for pair in linears()[:number] for part in pair]
    values = normal(B, S, H, seed=1, dtype=dtype)
    rounded = [part.to(dtype).double() for part in (values, *parameters)]
    truths = outcome(one_by_one, rounded, dtype)
    plains, ours = (outcome(f, [values, *parameters], dtype) for f in (one_by_one, joint))
    for truth, by_plain, found in zip(truths, plains, ours, strict=True):
        assert found.dtype == by_plain.dtype and found.shape == by_plain.shape
        errors = [(each.double() - truth).norm() / truth.norm() for each in (by_plain, found)]
        rounding = torch.finfo(found.dtype).eps
        # The gradient of the values is a sum of three products, each rounded.
        assert errors[1] <= errors[0] + rounding
        if found.dtype == torch.float32:
            assert errors[1] < 1e-3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("ops", [plain, fused])
def test_feed_forward_learns_as_torchs(ops, dtype):
    """Two linear maps with GELU between; weights of half precisions are float32."""
    of_weights = torch.float32 if dtype in HALVES else dtype
    shapes = [(I, H), (I,), (H, I), (H,)]
    parameters = [normal(*shapes[i], seed=60 + i, dtype=of_weights) for i in range(4)]
    inputs = [normal(B, S, H, seed=1, dtype=dtype), *parameters]

    def ours(values, *parameters):
        return ops.feed_forward(values, parameters[:2], parameters[2:])

    def torchs(values, *parameters):
        inner, outer = (nn.Linear(*sizes, dtype=values.dtype) for sizes in ((H, I), (I, H)))
        names = ["0.weight", "0.bias", "2.weight", "2.bias"]
        both = nn.Sequential(inner, nn.GELU(), outer)
        rounded = [part.to(values.dtype) for part in parameters]
        return torch.func.functional_call(both, dict(zip(names, rounded, strict=True)), values)

    truths = outcome(torchs, [part.to(dtype).double() for part in inputs], dtype)
    theirs, found = (outcome(f, inputs, dtype) for f in (torchs, ours))
    for truth, their, value in zip(truths, theirs, found, strict=True):
        assert value.dtype == their.dtype and value.shape == their.shape
        errors = [(each.double() - truth).norm() / truth.norm() for each in (their, value)]
        assert errors[1] <= errors[0] + torch.finfo(dtype).eps


@pytest.mark.parametrize(("ops", "kept"), [(plain, 2), (fused, 1)])
def test_of_feed_forwards_two_largest_tensors_one_is_kept(ops, kept):
    sizes = []
    pairs = [(normal(I, H, seed=1), normal(I, seed=2)), (normal(H, I, seed=3), normal(H, seed=4))]
    values = normal(B, S, H, seed=5).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
        ops.feed_forward(values, *([part.requires_grad_() for part in pair] for pair in pairs))
    assert sizes.count(B * S * I) == kept


@pytest.mark.parametrize("ops", [plain, fused])
def test_add_and_norm_is_torchs_layer_norm_of_the_sum(ops):
    residual, values = (normal(B, S, H, seed=seed) for seed in (1, 2))
    weight, bias = normal(H, seed=3), normal(H, seed=4)
    norm = nn.LayerNorm(H, eps=1e-3, dtype=torch.float64)
    norm.load_state_dict({"weight": weight, "bias": bias})
    found = ops.add_and_norm(residual, values, 0.0, weight, bias, 1e-3)
    torch.testing.assert_close(found, norm(residual + values))


@pytest.mark.parametrize("probability", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("ops", [plain, fused])
def test_add_and_norm_learns_as_torchs(ops, dtype, probability):
    """With what was dropped, by its gradient; weights of half precisions are float32."""
    rows = [normal(B, S, H, seed=seed, dtype=dtype) for seed in (1, 2)]
    of_weights = torch.float32 if dtype in HALVES else dtype
    inputs = [*rows, *(normal(H, seed=seed, dtype=of_weights) for seed in (3, 4))]

    def ours(residual, values, weight, bias):
        return ops.add_and_norm(residual, values, probability, weight, bias, 1e-3)

    torch.manual_seed(0)
    found = outcome(ours, inputs, dtype)
    kept = found[2] != 0
    assert kept.all() if probability == 0 else 0.3 < kept.float().mean() < 0.7

    def torchs(residual, values, weight, bias):
        total = residual + values * kept.to(values.dtype) / (1 - probability)
        return F.layer_norm(total, (H,), weight.to(total.dtype), bias.to(total.dtype), 1e-3)

    truths = outcome(torchs, [part.double() for part in inputs], dtype)
    for truth, theirs, value in zip(truths, outcome(torchs, inputs, dtype), found, strict=True):
        assert value.dtype == theirs.dtype and value.shape == theirs.shape
        errors = [(each.double() - truth).norm() / truth.norm() for each in (theirs, value)]
        assert errors[1] <= errors[0] + torch.finfo(dtype).eps


@pytest.mark.parametrize("ops", [plain, fused])
def test_add_and_norm_drops_values_alone(ops):
    """Where all values are dropped, what is left is the residual's norm."""
    residual, values = normal(B, S, H, seed=1), torch.full((B, S, H), 1e9, dtype=torch.float64)
    ones, zeros = torch.ones(H).double(), torch.zeros(H).double()
    torch.manual_seed(0)
    dropped = ops.add_and_norm(residual, values, 1 - 1e-5, ones, zeros, 0.0)
    expected = plain.add_and_norm(residual, 0 * values, 0.0, ones, zeros, 0.0)
    rows = torch.isclose(dropped, expected).all(-1)
    assert rows.float().mean() > 0.9  # a value that stays is 1e14


REAL = {
    "ends": torch.arange(13) < torch.tensor([13, 4, 9])[:, None],
    "holes": torch.arange(39).view(3, 13) % torch.tensor([2, 5, 7])[:, None] > 0,
    "nothing": torch.arange(13) < torch.tensor([0, 1, 13])[:, None],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("map_loss", ["attention_map_loss", "attention_map_mse"])
@pytest.mark.parametrize("real", REAL.values(), ids=REAL)
@pytest.mark.parametrize("ops", [plain, fused])
def test_attention_and_map_loss_are_both(ops, real, map_loss, dtype):
    """Together they err no more than apart, against plain ones apart in float64."""
    *student, query_t, key_t = (
        normal(B, S, N, D, seed=seed, dtype=dtype).transpose(1, 2) for seed in range(5)
    )
    mask, real = real.long(), real[:, None, :, None]  # what padding sees is nobody's concern
    loss_of_maps = getattr(ops, map_loss)

    def together(query, key, value):
        context, loss = ops.attention_and_map_loss(
            query, key, value, mask, 0.0, query_t, key_t, loss_of_maps
        )
        return context * real, loss

    def apart(query, key, value, ops=ops):
        maps = [part.to(query.dtype) for part in (query, key, query_t, key_t)]
        context = ops.attention(query, key, value, mask, 0.0) * real
        return context, getattr(ops, map_loss)(*maps, mask)

    exact = partial(apart, ops=plain)
    truths = outcome(exact, [part.double() for part in student], dtype)
    results = (outcome(function, student, dtype) for function in (apart, together))
    for truth, theirs, ours in zip(truths, *results, strict=True):
        errors = [(each.double() - truth).norm() / truth.norm() for each in (theirs, ours)]
        assert errors[1] <= errors[0] + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ops", [plain, fused])
def test_attention_drops_and_the_loss_of_its_maps_does_not_see_it(ops, dtype):
    """The teacher's are made in inference mode, as in a run."""
    query, key, value = (
        normal(B, S, N, D, seed=seed, dtype=dtype).transpose(1, 2).requires_grad_()
        for seed in range(3)
    )
    with torch.inference_mode():
        teacher = [normal(B, S, N, D, seed=seed, dtype=dtype).transpose(1, 2) for seed in (3, 4)]
    mask = (torch.arange(S) < torch.tensor([13, 4, 9])[:, None]).long()
    torch.manual_seed(0)
    followed = (query, key, value, mask, 0.5, *teacher)
    context, loss = ops.attention_and_map_loss(*followed, ops.attention_map_loss)
    torch.manual_seed(0)
    torch.testing.assert_close(context, ops.attention(query, key, value, mask, 0.5))
    whole = ops.attention(query, key, value, mask, 0.0)
    assert (context - whole).norm() > 0.3 * whole.norm()
    torch.testing.assert_close(loss, ops.attention_map_loss(query, key, *teacher, mask))
    (context.sum() + loss).backward()
    assert all(part.grad.isfinite().all() for part in (query, key, value))


@pytest.mark.parametrize("ops", [plain, fused])
def test_the_loss_of_maps_is_the_kl_where_nobody_says(ops):
    model = BertModel(TOY_CONFIG).eval()
    ids, mask = torch.tensor([[7, 3, 9]]), torch.ones(1, 3).long()
    teacher = tuple(normal(1, 3, 3, 8, seed=seed, dtype=torch.float32) for seed in (60, 61))
    given = [None, ops.attention_map_loss]
    losses = [
        model(ids, mask, ops=ops, follow={1: teacher}, map_loss=loss).map_losses for loss in given
    ]
    assert losses[0].keys() == {1}
    assert torch.equal(losses[0][1], losses[1][1])
